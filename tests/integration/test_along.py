"""Training along recordings, in lengths that grow, by the real command; resumed on other ranks."""

import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.reporting.ttt_health import NAMES
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
        *("ttt.log_inner_loop_losses=true", "ttt.inner_loop_log_interval=2"),
        "ttt.save_inner_loop_plots=true",
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


def test_health_of_ttt_is_logged_at_its_own_interval(along):
    rows = [row for row in along.rows if "ttt_state_change_layer_1" in row]
    assert [row["step"] for row in rows] == [2, 4, STEPS]
    assert rows[0].keys() == {"step", "time", *(f"{n}_layer_{i}" for n in NAMES for i in (1, 2))}
    for row in rows:
        assert row["ttt_inner_loss_after_layer_1"] < row["ttt_inner_loss_before_layer_1"]
    events = EventAccumulator(str(along.folder / "tensorboard")).Reload()
    shown = [event.step for event in events.Scalars("train/ttt_gate_max_layer_2")]
    assert shown == [2, 4, STEPS]


def test_inner_losses_of_an_evaluation_are_those_of_any_layout(along, resumed):
    folder = along.folder / "inner_loop"
    names = {path.name for path in folder.iterdir()}
    steps = ("000000", f"{STEPS:06d}")
    assert names == {f"step-{step}.{kind}" for step in steps for kind in ("json", "png")}
    found, expected = (
        json.loads((run.folder / "inner_loop" / f"step-{steps[-1]}.json").read_text())
        for run in (resumed, along)
    )
    assert sum(expected["frames"]) > 100
    assert found["frames"] == expected["frames"]
    for layer, curves in expected["layers"].items():
        assert curves["w0"][0] == curves["before"][0]
        for name, values in curves.items():
            assert found["layers"][layer][name] == pytest.approx(values, rel=1e-6), (layer, name)


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
