"""The proof that it learns: the demo as `make train` runs it, on two ranks."""

import math
import statistics

import pytest

from launch.config import load_config
from tests.integration.runs import DEMO, TRAIN, Run, check_trained, initial_model
from tests.ranks import run_ranks
from ttt_dist.moshi.build import is_ttt_parameter, select_layers

pytestmark = pytest.mark.integration
CODEBOOKS = 8
FRAMES_PER_SECOND = 12.5


@pytest.fixture(scope="module")
def demo_run(demo_base, tmp_path_factory) -> Run:
    """configs/demo.yaml as it stands; only where things lie is another place."""
    folder = tmp_path_factory.mktemp("demo")
    places = {
        "run_dir": folder / "run",
        "data.cache_dir": folder / "codes",
        "moshi_paths.hf_repo_id": demo_base,
    }
    overrides = [f"{key}={path}" for key, path in places.items()]
    # Under 90 s on 2 idle cores; the rest is for machines that do other work too.
    job = run_ranks(2, TRAIN, [str(DEMO), *overrides], timeout=280)
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder / "run", job)


def test_the_demo_needs_ttt_to_carry_something(demo_run):
    config = load_config(demo_run.folder / "config.yaml")
    layers = len(initial_model(demo_run).transformer.layers)
    with_ttt = len(select_layers(config.ttt.layers, layers))
    assert with_ttt >= 2
    assert layers - with_ttt >= 2
    frames = math.ceil(config.duration_sec * FRAMES_PER_SECOND)
    windows = (config.ttt.ttt_layer_context, config.ttt.non_ttt_layer_context)
    assert all(4 * window < frames for window in windows)
    assert frames >= 4 * config.ttt.mini_batch_size
    assert frames % config.ttt.mini_batch_size != 0
    line = f"attention context: TTT layers={windows[0]} ({with_ttt} layers), other layers="
    assert line in demo_run.job.stdout


def test_training_loss_falls_by_a_quarter(demo_run):
    losses = [row["loss"] for row in demo_run.steps]
    assert len(losses) == load_config(DEMO).max_steps
    assert len(losses) >= 20
    first, last = statistics.fmean(losses[:10]), statistics.fmean(losses[-10:])
    assert last <= 0.75 * first, (first, last)


def test_held_out_losses_fall(demo_run):
    before, after = demo_run.evaluations[0], demo_run.evaluations[-1]
    assert (before["step"], after["step"]) == (0, load_config(DEMO).max_steps)
    keys = ["eval_text_loss_without_padding"]
    keys += [f"eval_audio_loss_{codebook}" for codebook in range(1, CODEBOOKS + 1)]
    assert {key: after[key] for key in keys if not after[key] < before[key]} == {}


def test_ttt_layers_help_on_held_out_speech(demo_run):
    last = demo_run.evaluations[-1]
    assert last["eval_loss_without_ttt"] > last["eval_loss"]


def test_every_ttt_parameter_has_moved(demo_run):
    names = {name for name, _ in initial_model(demo_run).named_parameters()}
    ttt = {name for name in names if is_ttt_parameter(name)}
    # Two layers of alpha, W1, b1, W2, b2, wq, wk, wv, wo, the inner rate and the norms at least.
    assert len(ttt) >= 2 * 12
    check_trained(demo_run, load_config(DEMO).max_steps, ttt)
