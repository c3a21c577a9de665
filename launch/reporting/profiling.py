"""The profiler switch: a torch profiler trace of a few steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from launch.configuration.schema import ProfileConfig


def open_profiler(
    config: ProfileConfig, folder: Path, rank: int, first_step: int
) -> AbstractContextManager[Any]:
    """A context whose value's `step()` is called after every step.

    Where profiling is on, each rank writes one trace of the run's steps `start_step` to
    `start_step + num_steps - 1` into `folder`, for TensorBoard or Perfetto. Of a resumed run, which
    has done `first_step` steps, it holds what is left of them; where none is, rank 0 says so.
    """
    off = nullcontext(SimpleNamespace(step=lambda: None))
    if not config.enable:
        return off
    last = config.start_step + config.num_steps - 1
    left = last - max(first_step, config.start_step - 1)
    if left <= 0:
        if rank == 0:
            print(
                f"warning: profile: nothing is traced, since steps {config.start_step} to {last} "
                f"are done; to trace what comes, set profile.start_step above {first_step}",
                flush=True,
            )
        return off
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    before = last - left - first_step  # the last of them warms the profiler up
    return profile(
        activities=activities,
        schedule=schedule(wait=max(before - 1, 0), warmup=min(before, 1), active=left, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}"),
        record_shapes=True,
        with_flops=True,
    )
