"""The profiler switch: a torch profiler trace of a few steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from launch.configuration.schema import ProfileConfig


def open_profiler(config: ProfileConfig, folder: Path, rank: int) -> AbstractContextManager[Any]:
    """A context whose value's `step()` is called after every step.

    Where profiling is on, each rank writes one trace of steps `start_step` to
    `start_step + num_steps - 1` into `folder`, for TensorBoard or Perfetto.
    """
    if not config.enable:
        return nullcontext(SimpleNamespace(step=lambda: None))
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    before = config.start_step - 1  # the last of them warms the profiler up
    return profile(
        activities=activities,
        schedule=schedule(
            wait=max(before - 1, 0), warmup=min(before, 1), active=config.num_steps, repeat=1
        ),
        on_trace_ready=tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}"),
        record_shapes=True,
        with_flops=True,
    )
