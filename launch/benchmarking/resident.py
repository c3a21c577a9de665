"""Peak resident bytes of one scan, forward and backward, in a process of its own.

Beside tensors this sees what autograd keeps: nodes, saved variables and Python objects, about
130 KB a mini-batch in the slow twin. Each measurement starts a fresh Python (Linux alone), in which
malloc gives freed blocks from 64 KiB up back at once: otherwise what it keeps for later, which
differs from run to run, is counted too.

    python -m launch.benchmarking.resident SIDE OP B H d h C L DTYPE GROUP_SIZE THREADS

prints the number (`launch.benchmark --resident` runs this).
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from launch.benchmarking.cases import FAST, Case, Drawn, Inner, scan_workload
from launch.benchmarking.measure import step
from ttt_dist.ops.dual_form import dual_form

ROOT = Path(__file__).resolve().parents[2]
RESET = Path("/proc/self/clear_refs")  # writing 5 resets the peak of the resident size
STATUS = Path("/proc/self/status")
_RETURN_FROM = "65536"  # bytes
_WARM_UP_MINI_BATCHES = 3
_SEED = 0


class ResidentError(Exception):
    """The process that measures ended without a result."""


def resident_bytes(side: str, case: Case, group_size: int | None, threads: int) -> int:
    """Most bytes in memory during a step of `side` ("fast" or "twin"), beyond those before it.

    Raises:
        ResidentError: the process failed; its last words.
    """
    sizes = (case.B, case.H, case.d, case.h, case.C, case.L)
    dtype = str(case.dtype).removeprefix("torch.")
    arguments = [side, case.inner, *sizes, dtype, "" if group_size is None else group_size, threads]
    result = subprocess.run(
        [sys.executable, "-m", "launch.benchmarking.resident", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": _RETURN_FROM, "MALLOC_TRIM_THRESHOLD_": _RETURN_FROM},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        words = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise ResidentError(f"the process that measures resident bytes failed: {words[0]}")
    return int(result.stdout.split()[-1])


def resident_supported() -> bool:
    """Whether this system tells a process its peak resident size."""
    return RESET.exists() and STATUS.exists()


def _size(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _measure(words: Sequence[str]) -> int:
    side, name, *sizes, dtype, group_size, threads = words
    inner: Inner = "linear" if name == "linear" else "mlp"
    torch.set_num_threads(int(threads))
    B, H, d, h, C, L = map(int, sizes)
    grouped = {"checkpoint_group_size": int(group_size)} if group_size else {}

    def draw(length: int) -> Drawn:
        case = Case(inner, B, H, d, h, C, length, getattr(torch, dtype), torch.device("cpu"))
        op = FAST[inner] if side == "fast" else dual_form
        return scan_workload(case, op, **grouped)(_SEED)

    # Code and libraries are in memory before, by a step too short to leave anything to use again.
    step(draw(min(L, _WARM_UP_MINI_BATCHES * C)))
    drawn = draw(L)
    gc.collect()
    RESET.write_text("5")
    before = _size("VmRSS")
    step(drawn)
    return _size("VmHWM") - before


if __name__ == "__main__":
    print(_measure(sys.argv[1:]))
