"""Moshi 7B of the shipped configurations, laid out for 8 and for 64 GPUs: a rank's memory and work.

Nothing is allocated or computed: see moshi_7b_worker.py. Each job is a process of its own, for the
process group it pretends to have is global to a process.
"""

import json
import sys

import pytest

from tests.distributed.moshi_7b_worker import KINDS, LAYOUTS
from tests.ranks import run_command

pytestmark = pytest.mark.distributed

MOSHI = 7_687_729_152  # parameters of the released model
TTT = 71_491_616  # of one TTT block: 4096 features, 32 heads, TTT-MLP with expansion 4
TTT_LAYERS = {"moshi_7b_ttt": 3, "moshi_7b_full": 16}
# GB (10^9 bytes) on the rank that holds most. Master weights and AdamW's moments are float32, the
# frozen base of moshi_7b_ttt is bfloat16.
GIGABYTES = {
    # configuration, layout: parameters, gradients, optimizer
    ("moshi_7b_ttt", "dp 8"): (2.029, 0.107, 0.214),
    ("moshi_7b_ttt", "dp 4 x tp 2"): (2.029, 0.107, 0.214),
    ("moshi_7b_ttt", "dp 8 x tp 8"): (0.254, 0.013, 0.027),
    ("moshi_7b_full", "dp 8"): (4.416, 4.416, 8.832),
    ("moshi_7b_full", "dp 4 x tp 2"): (4.416, 4.416, 8.832),
    ("moshi_7b_full", "dp 8 x tp 8"): (0.552, 0.552, 1.104),
}


# Of gradients that wait for a step's last microbatch, unless parallel.reduce_every_microbatch.
WAITING_GIGABYTES = {
    ("moshi_7b_ttt", "dp 8"): 0.858,
    ("moshi_7b_ttt", "dp 4 x tp 2"): 0.429,
    ("moshi_7b_ttt", "dp 8 x tp 8"): 0.107,
    ("moshi_7b_full", "dp 8"): 35.326,
    ("moshi_7b_full", "dp 4 x tp 2"): 19.886,
    ("moshi_7b_full", "dp 8 x tp 8"): 8.305,
}


def run_worker(what, folder):
    results = folder / f"{what}.json"
    command = [sys.executable, "-m", "tests.distributed.moshi_7b_worker", what, str(results)]
    job = run_command(command, timeout=400, NO_TORCH_COMPILE="1")
    assert job.returncode == 0, job.stdout + job.stderr
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return run_worker("memory", tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return run_worker("work", tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize(("config", "layout"), GIGABYTES)
def test_every_element_has_one_place(memory, config, layout):
    found = memory[f"{config} {layout}"]
    assert found["elements"] == MOSHI + TTT_LAYERS[config] * TTT
    assert found["unique elements"] == found["elements"]
    assert found["not tiled"] == []


@pytest.mark.parametrize(("config", "layout"), GIGABYTES)
def test_a_rank_holds_its_share(memory, config, layout):
    """The bound of every rank: 5 % over an even share, and what all ranks of a tp group repeat."""
    found = memory[f"{config} {layout}"]
    world_size, tp = LAYOUTS[layout]
    # FSDP2 cuts over dp_shard what is whole on tp.
    repeated = sum(found["whole on tp"].values()) * tp / world_size
    allowed = 1.05 * sum(found["total"].values()) / world_size + repeated
    assert repeated < 1e-3 * allowed  # norms and gates: what is allowed for them hides nothing
    for held in [*found["by rule"], *found["measured"].values()]:
        assert sum(held.values()) <= allowed
    for kind, gigabytes in zip(KINDS, GIGABYTES[config, layout]):
        most = max(held[kind] for held in found["by rule"])
        assert most / 1e9 == pytest.approx(gigabytes, abs=0.0005), kind  # its last digit


@pytest.mark.parametrize(("config", "layout"), WAITING_GIGABYTES)
def test_gradients_that_wait_are_cut_by_tp_alone(memory, config, layout):
    found = memory[f"{config} {layout}"]
    assert found["whole gradients"] == found["whole gradients by rule"]
    gigabytes = WAITING_GIGABYTES[config, layout]
    assert found["whole gradients"] / 1e9 == pytest.approx(gigabytes, abs=0.0005)


@pytest.mark.parametrize(("config", "layout"), GIGABYTES)
def test_laid_out_ranks_hold_what_the_placements_say(memory, config, layout):
    """What is told of all ranks is true of those that were really laid out, byte for byte."""
    found = memory[f"{config} {layout}"]
    assert found["differ from the rule"] == []
    assert len(found["by rule"]) == LAYOUTS[layout][0]
    assert len(found["measured"]) == 3
    for rank, held in found["measured"].items():
        rule = found["by rule"][int(rank)]
        # FSDP2 pads every rank's part of a parameter to the largest.
        assert held["parameters"] == max(ranks["parameters"] for ranks in found["by rule"])
        assert held["gradients"] == rule["gradients"]
        # AdamW counts its steps in a float32 for each tensor, beside the two moments.
        assert held["optimizer"] == rule["optimizer"] + 4 * found["trained tensors"]


@pytest.mark.parametrize("part", ["backbone", "with Depformer"])
def test_tp_2_halves_the_work(work, part):
    """The text head alone, 2 % of the backbone's products, is computed by both ranks."""
    assert work["tp 2"][part] / work["tp 1"][part] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("part", ["self_attn", "gating", "ttt.layer"])
def test_tp_2_halves_each_part_of_a_layer(work, part):
    """A part of few products could be computed whole by both ranks and hide in the sum."""
    assert work["tp 2"][part] == 0.5 * work["tp 1"][part]


def test_counted_work_is_the_models(work):
    """Half of what isn't counted proves nothing: the count is that of the model's arithmetic."""
    whole = work["tp 1"]
    # The estimate takes attention for the window it sees; computed are all 100 x 100 scores, and of
    # the inner steps what it leaves out (C x C scores, the unfinished mini-batch, whatever the scan
    # recomputes): 0.4 to 0.6 % in all.
    assert whole["with Depformer"] == pytest.approx(whole["estimate"], rel=0.01)
    # The inner steps are a sixth of a TTT layer: a scan that the counter can't see would miss here.
    assert whole["ttt.layer"] >= whole["ttt projections"] + whole["ttt inner steps"]
