"""What a run tells: lines, metrics.jsonl, TensorBoard, W&B, the loss curve."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.config import REPO_ROOT, load_config
from launch.configuration.schema import ProfileConfig
from launch.metrics import MetricsLogger, peak_flops, peak_memory_gib, read_metrics
from launch.reporting.plots import plot_losses
from launch.reporting.profiling import open_profiler
from launch.reporting.wandb_log import INIT_TIMEOUT_SECONDS, start_wandb
from launch.run_folder import RunFolder

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def log_run(folder: RunFolder, steps: range, **options: object) -> str:
    out = io.StringIO()
    settings: dict[str, object] = {"max_steps": 20, "world_size": 2, "out": out}
    logger = MetricsLogger(folder, **{**settings, **options})  # type: ignore[arg-type]
    for step in steps:
        logger.after_step(frames=100)
        logger.log_step(
            step,
            loss=9.0 / step,
            text_loss=4.0 / step,
            audio_loss=5.0 / step,
            grad_norm=1.5,
            lr=2e-6,
            peak_memory_gib=0.5,
        )
    logger.log_eval(steps[-1], {"loss": 3.0, "text_loss": 1.0, "audio_loss": 2.0})
    logger.close()
    return out.getvalue()


def test_one_line_and_one_row_a_step(tmp_path: Path) -> None:
    text = log_run(RunFolder(tmp_path), range(1, 4))
    lines = text.splitlines()
    assert len(lines) == 4
    for part in ("step 2/20", "loss 4.5000", "text 2.0000", "audio 2.5000", "grad norm 1.5"):
        assert part in lines[1]
    for part in ("lr 2.00e-06", "frames/s", "/GPU", "MFU - ", "0.50 GiB"):
        assert part in lines[1]
    assert lines[3] == ("eval after step 3/20 | loss 3.0000 | text loss 1.0000 | audio loss 2.0000")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert set(rows[0]) >= {
        "step",
        "loss",
        "text_loss",
        "audio_loss",
        "grad_norm",
        "lr",
        "frames_per_sec",
        "frames_per_sec_per_gpu",
        "mfu",
        "peak_memory_gib",
    }
    assert rows[0]["mfu"] is None
    assert rows[3]["eval_text_loss"] == 1.0


def test_throughput_counts_frames_over_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    logger = MetricsLogger(
        RunFolder(tmp_path),
        max_steps=20,
        world_size=4,
        peak_flops=1e12,
        tensorboard=False,
        out=io.StringIO(),
    )
    for _ in range(2):
        logger.after_step(frames=1000, flops_per_frame=3e9)
        clock[0] += 1.0
    with logger.pause():
        clock[0] += 50.0
    row = logger.log_step(
        2, loss=1.0, text_loss=0.5, audio_loss=0.5, grad_norm=1.0, lr=1.0, peak_memory_gib=1.0
    )
    logger.close()
    assert row["frames_per_sec"] == 1000.0
    assert row["frames_per_sec_per_gpu"] == 250.0
    # 3e9 FLOP a frame * 1000 frames/s over 4 devices of 1e12 FLOP/s.
    assert row["mfu"] == 75.0


def test_resume_appends_and_mends_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log_run(folder, range(1, 4))
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    before = folder.metrics.read_text()
    log_run(folder, range(3, 6), first_step=2)
    assert folder.metrics.read_text().startswith(before + "\n")
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3, 3, 3, 4, 5, 5]


def test_not_a_number_is_null(tmp_path: Path) -> None:
    logger = MetricsLogger(RunFolder(tmp_path), max_steps=1, world_size=1, out=io.StringIO())
    logger.log_eval(1, {"loss": float("nan"), "text_loss": float("inf")})
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert row["eval_loss"] is None


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log_run(folder, range(1, 4))
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 9.0), (2, 4.5), (3, 3.0)]
    assert events.Scalars("eval/eval_loss")[0].value == 3.0


def test_loss_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.touch()
    assert plot_losses(folder.metrics, folder.loss_curve) is None
    assert not folder.loss_curve.exists()
    assert capsys.readouterr().err == ""
    log_run(folder, range(1, 4), tensorboard=False)
    assert plot_losses(folder.metrics, folder.loss_curve) == folder.loss_curve
    assert folder.loss_curve.read_bytes().startswith(PNG_SIGNATURE)


def test_a_loss_curve_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    log_run(folder, range(1, 4), tensorboard=False)
    folder.loss_curve.mkdir()
    assert plot_losses(folder.metrics, folder.loss_curve) is None
    assert "warning: no loss curve: IsADirectoryError: " in capsys.readouterr().err


def profiled_steps(folder: Path, first_step: int) -> list[int]:
    """Which of a run's steps 1 to 9, started after `first_step`, are in its trace."""
    profile = ProfileConfig(enable=True, start_step=5, num_steps=3)
    with open_profiler(profile, folder, 0, first_step) as profiler:
        for step in range(first_step + 1, 10):
            with torch.profiler.record_function(f"step of the run {step}"):
                torch.ones(2).sum()
            profiler.step()
    events = [
        event["name"]
        for path in folder.glob("*.pt.trace.json")
        for event in json.loads(path.read_text())["traceEvents"]
        if event["name"].startswith("step of the run ")
    ]
    return sorted(int(name.rpartition(" ")[2]) for name in events)


@pytest.mark.parametrize(
    ("first_step", "steps"), [(0, [5, 6, 7]), (3, [5, 6, 7]), (4, [5, 6, 7]), (5, [6, 7])]
)
def test_profiled_steps_are_the_runs(tmp_path: Path, first_step: int, steps: list[int]) -> None:
    assert profiled_steps(tmp_path, first_step) == steps


def test_a_run_resumed_after_the_profiled_steps_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled_steps(tmp_path, 7) == []
    assert capsys.readouterr().out.startswith("warning: profile: nothing is traced, since steps 5")


def test_device_facts_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    assert 0.01 < peak_memory_gib(cpu) < 64


def test_memory_is_of_this_process_and_not_of_what_started_it() -> None:
    held = bytearray(b"1") * (2 << 30)
    code = "import launch.metrics as m, torch; print(m.peak_memory_gib(torch.device('cpu')))"
    command = [sys.executable, "-c", code]
    job = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(job.stdout) < len(held) / 2**30 - 0.5


WANDB = """
import sys
import time
from pathlib import Path
import wandb
from launch.reporting import wandb_log
from launch.config import load_config
wandb_log.INIT_TIMEOUT_SECONDS = 2
config = load_config(None, ["run_dir=" + sys.argv[1], "full_finetuning=true", *sys.argv[2:]])
began = time.monotonic()
run = wandb_log.start_wandb(config, Path(sys.argv[1]))
seconds = time.monotonic() - began
if run is not None:
    run.log({"train/loss": 1.5}, 1)
    run.close()
print("started" if run is not None else "went on", seconds)
"""


def run_wandb(folder: Path, *overrides: str, key: str | None = None) -> tuple[str, str, float]:
    """W&B in a process of its own, without this machine's login: outcome, stderr, seconds."""
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environment |= {
        "HOME": str(folder),
        "NETRC": str(folder / "netrc"),
        # Nothing listens on port 9: connections are refused at once.
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    if key is not None:
        environment["WANDB_API_KEY"] = key
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(folder), *overrides],
        cwd=REPO_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    outcome, _, seconds = done.stdout.strip().rpartition(" ")
    return outcome, done.stderr, float(seconds)


def test_wandb_is_off_without_a_project(tmp_path: Path) -> None:
    config = load_config(None, [f"run_dir={tmp_path}", "full_finetuning=true"])
    assert start_wandb(config, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_writes_files(tmp_path: Path) -> None:
    out, err, _ = run_wandb(tmp_path, "wandb.project=p", "wandb.offline=true")
    assert out == "started"
    assert "warning: no W&B" not in err
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_without_login_warns_and_goes_on(tmp_path: Path) -> None:
    out, err, _ = run_wandb(tmp_path, "wandb.project=p")
    assert out == "went on"
    assert err.count("warning: no W&B: not logged in") == 1


def test_wandb_unreachable_warns_and_goes_on(tmp_path: Path) -> None:
    key = "0123456789" * 4
    out, err, seconds = run_wandb(tmp_path, "wandb.project=p", key=key)
    # The timeout is 2 s here; of the 20 s promised, a run's timeout leaves this much for the rest.
    assert seconds < 2 + (20 - INIT_TIMEOUT_SECONDS)
    assert out == "went on"
    assert err.count("warning: no W&B") == 1
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes()
