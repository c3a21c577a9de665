"""What rank 0 tells of a run: progress bar, lines, metrics.jsonl, TensorBoard, W&B."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launch.guards.step_guard import BadStep
from launch.reporting.wandb_log import WandbLog
from launch.run_folder import RunFolder

GIB = 1024**3

# Dense bfloat16 peak in FLOP/s, from the vendors' data sheets (half of a figure "with sparsity").
# The first name found in the device's name counts, so longer names stand before their prefixes.
PEAK_FLOPS = (
    ("A100", 312e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H20", 148e12),
    ("GB200", 2.5e15),
    ("GB300", 2.5e15),
    ("B200", 2.25e15),
    ("B300", 2.25e15),
    ("L40S", 362e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of `device` in FLOP/s; None where it isn't known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_FLOPS if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Highest use so far: allocated GPU memory, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # ru_maxrss begins, on Linux, with what the process that started this one had at its peak.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _json_value(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


class JsonLines:
    """Appends one JSON object a line, each flushed."""

    def __init__(self, path: Path) -> None:
        # A run that was killed while it wrote may have left half a line; the next needs its own.
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, row: Mapping[str, Any]) -> None:
        plain = {key: _json_value(value) for key, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`; a line that a kill cut short is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class MetricsLogger:
    """Rank 0's log of a run; other ranks don't build one.

    Args:
        folder: where `metrics.jsonl` and TensorBoard events go; existing rows are kept.
        max_steps: steps of the whole run.
        first_step: steps done already (a resumed run).
        world_size: ranks; throughput a GPU is over all of them.
        peak_flops: of one device (`peak_flops(device)`); None: no MFU.
        tensorboard: whether to write TensorBoard events.
        wandb: a started W&B run, or None.
        out: where the lines go.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        max_steps: int,
        world_size: int,
        first_step: int = 0,
        peak_flops: float | None = None,
        tensorboard: bool = True,
        wandb: WandbLog | None = None,
        out: TextIO | None = None,
    ) -> None:
        self._max_steps = max_steps
        self._world_size = world_size
        self._peak_flops = peak_flops
        self._wandb = wandb
        self._out = sys.stdout if out is None else out
        self._rows = JsonLines(folder.metrics)
        self._bad_steps = folder.bad_steps
        self._tensorboard = SummaryWriter(str(folder.tensorboard)) if tensorboard else None
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._frames, self._flops = 0, 0.0
        self._paused = 0.0
        self._since = time.perf_counter()

    def after_step(self, frames: int, flops_per_frame: float = 0.0) -> None:
        """Count one optimizer step in which all ranks together trained on `frames` frames.

        Args:
            flops_per_frame: forward and backward of one frame, of the whole model; 0: no MFU.
        """
        self._frames += frames
        self._flops += frames * flops_per_frame
        self._bar.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (evaluation, checkpoints) doesn't count as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        text_loss: float,
        audio_loss: float,
        grad_norm: float,
        lr: float,
        peak_memory_gib: float,
        extra: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Log optimizer step `step` (counted from 1); throughput is since the last logged one.

        Returns the row as written. Keys: those of the arguments, `frames_per_sec`,
        `frames_per_sec_per_gpu`, `mfu` (percent or null), `seconds` and `time` (Unix seconds).
        """
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused, 1e-9)
        frames_per_sec = self._frames / seconds
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "text_loss": text_loss,
            "audio_loss": audio_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "frames_per_sec": frames_per_sec,
            "frames_per_sec_per_gpu": frames_per_sec / self._world_size,
            "mfu": self._mfu(seconds),
            "peak_memory_gib": peak_memory_gib,
            "seconds": seconds,
            "time": time.time(),
            **(extra or {}),
        }
        self._frames, self._flops, self._paused, self._since = 0, 0.0, 0.0, now
        self._record(row, "train")
        self._say(
            f"step {step}/{self._max_steps} | loss {loss:.4f} | text {text_loss:.4f} | "
            f"audio {audio_loss:.4f} | grad norm {grad_norm:.3g} | lr {lr:.2e} | "
            f"{frames_per_sec:.1f} frames/s ({row['frames_per_sec_per_gpu']:.1f}/GPU) | "
            f"MFU {_percent(row['mfu'])} | memory {peak_memory_gib:.2f} GiB"
        )
        return row

    def log_eval(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Log an evaluation after `step`; each key of `values` gets the prefix `eval_`."""
        row: dict[str, Any] = {"step": step}
        row |= {f"eval_{key.removeprefix('eval_')}": value for key, value in values.items()}
        row["time"] = time.time()
        self._record(row, "eval")
        shown = " | ".join(
            f"{key.removeprefix('eval_').replace('_', ' ')} {value:.4f}"
            for key, value in row.items()
            if key not in ("step", "time") and isinstance(value, float)
        )
        self._say(f"eval after step {step}/{self._max_steps} | {shown}")
        return row

    def log_ttt(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Log `ttt_health` before the update of `step`, in a row of its own."""
        row: dict[str, Any] = {"step": step, **values, "time": time.time()}
        self._record(row, "train")
        return row

    def log_bad_step(self, bad: BadStep) -> None:
        """Log a step that was left out, in `bad_steps.jsonl`."""
        rows = JsonLines(self._bad_steps)
        rows.write(asdict(bad) | {"time": time.time()})
        rows.close()
        self._say(f"warning: {bad}")

    def say(self, line: str) -> None:
        """Print a line of your own without breaking the progress bar."""
        self._say(line)

    def close(self) -> None:
        """Flush and close every sink."""
        self._bar.close()
        self._rows.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def _mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation in percent, after PaLM (arXiv 2204.02311), appendix B."""
        if self._flops == 0.0 or self._peak_flops is None:
            return None
        return 100 * self._flops / seconds / (self._peak_flops * self._world_size)

    def _record(self, row: Mapping[str, Any], tag: str) -> None:
        self._rows.write(row)
        numbers = {
            key: float(value)
            for key, value in row.items()
            if key not in ("step", "time") and value is not None
        }
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(f"{tag}/{key}", value, row["step"])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({f"{tag}/{key}": value for key, value in numbers.items()}, row["step"])

    def _say(self, line: str) -> None:
        with self._bar.external_write_mode(file=self._out):
            print(line, file=self._out, flush=True)
