"""The device of this process, and torchtitan on machines without an accelerator.

Import this module before any other part of torchtitan: torchtitan decides at import which device it
runs on, falls back to CUDA where there is none, and then fails in its first call.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torchtitan.tools.utils as titan_utils


def device_type() -> str:
    """`"cuda"` where a GPU can be used, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_device() -> torch.device:
    """This process's device: the GPU of its local rank, or the CPU."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def hide_gpus() -> None:
    """For work on a CPU: where this process sees GPUs, it starts over with the same command line.

    Libraries choose their device when they are imported, so hiding them now is too late.
    """
    if device_type() != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _use_cpu_in_torchtitan() -> None:
    """Give torchtitan the CPU as its device, with the calls of an accelerator that it makes."""
    # `ParallelDims` gives axes of size 1 the fake backend, which registers itself on import.
    import torch.testing._internal.distributed.fake_pg

    class CPUModule:
        """`torch.cpu` with those functions of `torch.cuda` that torchtitan calls."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cpu, name)

        current_device = staticmethod(lambda: 0)
        get_device_name = staticmethod(lambda *_: "cpu")
        get_device_properties = staticmethod(lambda *_: SimpleNamespace(total_memory=1))
        memory_stats = staticmethod(lambda *_: {})
        reset_peak_memory_stats = staticmethod(lambda *_: None)
        empty_cache = staticmethod(lambda: None)

    titan_utils.device_type = "cpu"
    titan_utils.device_module = CPUModule()


if device_type() == "cpu":
    # moshi compiles its norm at the first step on a CPU (17 s) unless told otherwise at import.
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
    _use_cpu_in_torchtitan()
