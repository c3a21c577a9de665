"""The real command on every layout of two ranks: the same losses, and what a run leaves.

Layouts are compared in float64: Moshi's norms and RoPE compute in float32 whatever the model's
dtype, so whole models agree to 1e-6 (DESIGN.md, Numbers). In float32 only the first step could be
compared, since Adam amplifies rounding noise over near-zero gradients.
"""

import json
import struct
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.config import load_config
from tests.integration.conftest import SECRET
from tests.integration.runs import DEMO, TIMEOUT, TRAIN, Run, single, snapshot
from tests.ranks import run_ranks

# Fixtures start up to five jobs, each with its own limit; a busy machine may need all of it.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
TOLERANCE = 1e-6
STEPS = 4
STEP_KEYS = {
    *("step", "loss", "text_loss", "audio_loss", "grad_norm", "lr", "frames_per_sec"),
    *("frames_per_sec_per_gpu", "mfu", "peak_memory_gib", "seconds", "time"),
    *("skipped_steps", "skipped_samples"),
}
EVAL_KEYS = {
    *("step", "time", "eval_loss", "eval_text_loss", "eval_audio_loss"),
    "eval_text_loss_without_padding",
    *(f"eval_audio_loss_{codebook}" for codebook in range(1, 9)),
}


@pytest.fixture(scope="module")
def single_run(short, tmp_path_factory) -> Run:
    """One process, no torchrun."""
    folder = tmp_path_factory.mktemp("single") / "run"
    job = single([str(DEMO), *short, f"run_dir={folder}"])
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)


@pytest.fixture(scope="module")
def fsdp_run(short, tmp_path_factory) -> Run:
    """Two data-parallel ranks, started in another folder, by a relative path, without CONFIG."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    arguments = [*short, "run_dir=runs/fsdp", "num_ckpt_keep=1"]
    job = run_ranks(2, TRAIN, arguments, timeout=TIMEOUT, cwd=cwd)
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(cwd / "runs" / "fsdp", job)


@pytest.fixture(params=["fsdp_run", "tp_run"])
def ranks_run(request) -> Run:
    return request.getfixturevalue(request.param)


def test_two_ranks_train_as_one_process(ranks_run, single_run):
    assert [row["step"] for row in ranks_run.steps] == list(range(1, STEPS + 1))
    keys = ("loss", "text_loss", "audio_loss", "grad_norm", "lr")
    for found, expected in zip(ranks_run.steps, single_run.steps, strict=True):
        for key in keys:
            assert found[key] == pytest.approx(expected[key], rel=TOLERANCE), (key, found["step"])
    for found, expected in zip(ranks_run.evaluations, single_run.evaluations, strict=True):
        for key in expected.keys() - {"time"}:
            assert found[key] == pytest.approx(expected[key], rel=TOLERANCE), (key, found["step"])


def test_two_ranks_end_at_the_parameters_of_one_process(ranks_run, single_run):
    found, expected = ranks_run.checkpoint(STEPS), single_run.checkpoint(STEPS)
    names = {name for name in expected if name.startswith("model.")}
    assert {name for name in found if name.startswith("model.")} == names
    errors = {
        name: (torch.dist(found[name], expected[name]) / expected[name].norm()).item()
        for name in names
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < TOLERANCE, (worst, errors[worst])


def test_losses_move(single_run):
    losses = [row["loss"] for row in single_run.steps]
    assert len(set(losses)) == STEPS
    assert losses[-1] < 0.9 * losses[0]


def test_prepare_encodes_ahead_and_runs_encode_nothing(prepared, single_run, ranks_run):
    assert prepared.job.returncode == 0, prepared.job.stderr
    assert "encoded now: 8 (" in prepared.job.stdout
    now = snapshot(prepared.folder)
    assert {name: now.get(name) for name in prepared.files} == prepared.files
    assert sum(name.endswith(".safetensors") for name in prepared.files) == 8
    # What else is there belongs to runs along whole recordings, which lie beside the pieces.
    others = {name for name in now.keys() - prepared.files.keys() if name.endswith(".safetensors")}
    assert len(others) in (0, 8)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("single_run", "dp_replicate 1 x dp_shard 1 x tp 1"),
        ("fsdp_run", "dp_replicate 1 x dp_shard 2 x tp 1"),
        ("tp_run", "dp_replicate 1 x dp_shard 1 x tp 2"),
    ],
)
def test_printed_lines(request, name, mesh):
    run = request.getfixturevalue(name)
    lines = run.job.stdout.splitlines()
    assert lines.count(f"mesh: {mesh}") == 1
    ttt = load_config(DEMO).ttt
    windows = (ttt.ttt_layer_context, ttt.non_ttt_layer_context)
    expected = "attention context: TTT layers={} (2 layers), other layers={} (2 layers)"
    assert lines.count(expected.format(*windows)) == 1
    # One rank holds whole gradients anyway; 2 data ranks have a single microbatch; with tp, the
    # Depformer, embeddings and heads are cut over both ranks, and wait whole for the second.
    kept_whole = [line for line in lines if "last microbatch gradients are kept whole: " in line]
    assert len(kept_whole) == (name == "tp_run")
    for step in range(1, STEPS + 1):
        (line,) = [line for line in lines if line.startswith(f"step {step}/{STEPS} | loss ")]
        for part in ("text", "audio", "grad norm", "lr", "frames/s", "/GPU", "MFU", "memory"):
            assert part in line
    assert sum(line.startswith("eval after step ") for line in lines) == 2
    assert lines[-3:-1] == [f"run folder: {run.folder}", f"loss curve: {run.folder / 'loss.png'}"]
    assert lines[-1].startswith("next: ")
    assert "Traceback" not in run.job.stderr


def test_what_a_run_leaves(fsdp_run):
    run = fsdp_run
    config = load_config(run.folder / "config.yaml")
    assert (config.run_dir, config.global_batch_size) == (str(run.folder), 2)
    assert (config.max_steps, config.param_dtype) == (STEPS, "float64")
    demo = load_config(DEMO)
    assert (config.ttt, config.optim, config.duration_sec) == (
        demo.ttt,
        demo.optim,
        demo.duration_sec,
    )
    assert run.status["state"] == "finished"
    assert run.status["step"] == STEPS
    assert run.checkpoints == [f"step-{STEPS:06d}"]  # num_ckpt_keep=1, and no drafts
    assert all(row.keys() == STEP_KEYS for row in run.steps)
    first, last = run.evaluations
    assert (first["step"], last["step"]) == (0, STEPS)
    assert first.keys() == EVAL_KEYS
    assert last.keys() == EVAL_KEYS | {"eval_loss_without_ttt"}

    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    # TensorBoard keeps float32.
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in run.steps]
    assert shown == expected

    png = (run.folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack(">II", png[16:24])) >= 300


def test_manifest_tells_versions_and_hosts_and_no_secrets(tp_run):
    manifest = json.loads((tp_run.folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [rank["rank"] for rank in manifest["ranks"]] == [0, 1]
    assert all(rank["host"] and rank["device"].startswith("cpu") for rank in manifest["ranks"])
    assert manifest["world_size"] == 2
    git = manifest["git"]
    assert git is None or len(git["revision"]) == 40  # None: the sources of an archive
    assert "parallel.tp=2" in manifest["command"]
    # The run's environment held a key and a note; neither may lie in any file.
    for path in tp_run.folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in tp_run.job.stdout + tp_run.job.stderr
