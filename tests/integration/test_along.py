"""Training along recordings, in lengths that grow, by the real command; resumed on other ranks."""

import shutil

import pytest

from tests.integration.runs import TIMEOUT, TRAIN, Run, single
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
SAVED, STEPS = 3, 5  # saved in the middle of the second length


@pytest.fixture(scope="module")
def along(short, tmp_path_factory) -> Run:
    """Two ranks, a lane each; two pieces of each lane a step, and gradients through both."""
    folder = tmp_path_factory.mktemp("along") / "run"
    settings = [
        *short,
        *(f"run_dir={folder}", f"max_steps={STEPS}", f"ckpt_freq={SAVED}", "num_ckpt_keep=null"),
        *("ttt.persistent_states=true", "ttt.tbptt_pieces=2", "num_microbatches=2"),
        *("duration_sec={0: 1.3, 2: 2.6}", "global_batch_size=4"),
    ]
    job = run_ranks(2, TRAIN, settings, timeout=TIMEOUT)
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)


@pytest.fixture(scope="module")
def resumed(along, tmp_path_factory) -> Run:
    """One rank goes on with both lanes from the checkpoint in the middle, in a copy of the run."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(along.folder, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")
    settings = [f"run_dir={folder}", "resume=true", "batch_size=2"]
    job = single([str(along.folder / "config.yaml"), *settings])
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)


def test_what_a_step_takes_is_told(along):
    out = along.job.stdout
    assert "a step: 2 pieces of each of 2 lanes, of 1.28 s, 2.56 s from step 3 on" in out
    assert "train data: 7 recordings" in out
    assert [row["step"] for row in along.steps] == list(range(1, STEPS + 1))


def test_states_of_the_lanes_are_in_the_checkpoint(along):
    saved = along.checkpoint(SAVED)
    carried = {name: value for name, value in saved.items() if name.startswith("carry.")}
    assert {value.shape[0] for value in carried.values()} == {2}
    inner = carried["carry.1.W1"]
    assert inner.shape[1:] == saved["model.transformer.layers.1.ttt.layer.W1"].shape
    # Lanes learn from recordings of their own; the parameters are other values still.
    assert not inner[0].equal(inner[1])
    assert "carry.0.W1" not in carried  # a layer without TTT
    assert carried["carry.0.length"].tolist() == [23, 23]  # of a window of 24


def test_another_layout_goes_on_in_the_middle(along, resumed):
    """1e-6: float64, but for Moshi's float32 norms, in sums of another order."""
    assert f"resumed after step {SAVED}" in resumed.job.stdout
    found = [row for row in resumed.rows if "loss" in row][-(STEPS - SAVED) :]
    expected = along.steps[SAVED:]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for key in ("loss", "text_loss", "audio_loss", "grad_norm"):
        wanted = [row[key] for row in expected]
        assert [row[key] for row in found] == pytest.approx(wanted, rel=1e-6), key
    # Recordings are met whole by both, and shared out otherwise.
    for key in ("eval_loss", "eval_loss_without_ttt"):
        wanted = along.evaluations[-1][key]
        assert resumed.evaluations[-1][key] == pytest.approx(wanted, rel=1e-6), key
