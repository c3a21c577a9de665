"""How `launch.benchmark` measures: time, peak bytes, kernel launches, the machine's own peaks."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch._C._profiler import RecordScope
from torch.autograd import (
    DeviceType,
    ProfilerActivity,
    _disable_profiler,
    _enable_profiler,
    _prepare_profiler,
)
from torch.autograd.profiler import profile

from launch.benchmarking.cases import Drawn, Workload, gradients, outputs_and_gradients

# Relative differences ‖a − b‖ / ‖b‖ allowed between a fast path and its slow twin. float64 and
# float32: the same sums in another order; in float32 the twin itself was found off from float64 by
# up to 8e-7 over 4,096 frames, 6e-6 over 16,384. bfloat16: operands of every product are rounded,
# by up to 2^-9, at places that differ between two forms of the same mathematics; each was found off
# from float32 by 4e-3 to 6e-3.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_PEAK_REPEATS = 5
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # ...ExC and the like too


class DisagreementError(Exception):
    """A fast path and its slow twin gave different results."""


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ by name (‖a‖ where b is zero); infinite where shapes or integers differ."""
    if found.keys() != expected.keys():
        return dict.fromkeys(found.keys() ^ expected.keys(), float("inf"))
    errors = {}
    for name, b in expected.items():
        a = found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            errors[name] = float("inf")
        elif not b.is_floating_point():
            errors[name] = 0.0 if torch.equal(a, b) else float("inf")
        else:
            a, b = a.double(), b.double()
            scale = b.norm().item()
            errors[name] = (a - b).norm().item() / (scale or 1.0)
    return errors


def check_agreement(fast: Workload, twin: Workload, seed: int, dtype: torch.dtype) -> float:
    """Compare outputs, returned states and all gradients on the same inputs.

    Returns:
        The worst relative difference.

    Raises:
        DisagreementError: some are beyond the tolerance of `dtype`, or not finite; names them.
    """
    expected = outputs_and_gradients(twin(seed), seed)
    errors = compare(outputs_and_gradients(fast(seed), seed), expected)
    allowed = TOLERANCE[dtype]
    bad = {name: error for name, error in errors.items() if not error <= allowed}  # NaN is bad
    if bad:
        told = ", ".join(f"{name} {error:.1e}" for name, error in bad.items())
        raise DisagreementError(
            f"{len(bad)} of {len(errors)} results differ from the slow twin's by more than "
            f"{allowed:.0e} of their norm: {told}"
        )
    return max(errors.values())


@dataclass(frozen=True)
class Seconds:
    """Wall time of one repetition, and the CPU time of all threads over both."""

    forward: float
    backward: float
    cpu: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def medians(steps: Sequence[Seconds]) -> dict[str, float]:
    """Of wall time, forward and backward, and of CPU time, as columns of a row."""
    return {
        "seconds": median(step.total for step in steps),
        "forward_seconds": median(step.forward for step in steps),
        "backward_seconds": median(step.backward for step in steps),
        "cpu_seconds": median(step.cpu for step in steps),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, as columns of a row."""
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor as far as Python knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What earlier steps left is collected before, so that it neither takes time nor is counted."""
    gc.collect(1)  # the young generations: imported modules take long to go through
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed_step(workload: Workload, seed: int, device: torch.device) -> Seconds:
    """One forward and backward of the output (not of the state) on fresh inputs."""
    drawn = workload(seed)
    with _no_garbage_collection():
        synchronize(device)
        cpu, start = time.process_time(), time.perf_counter()
        out, _ = drawn.forward()
        synchronize(device)
        between = time.perf_counter()
        gradients(drawn, [out], [drawn.grad])
        synchronize(device)
        end = time.perf_counter()
        return Seconds(between - start, end - between, time.process_time() - cpu)


def interleaved(
    first: Workload, second: Workload, pairs: int, seed: int, device: torch.device
) -> list[tuple[Seconds, Seconds]]:
    """`pairs` times first and second in turn, both on the same inputs, new ones for each pair."""
    return [
        (timed_step(first, seed + i, device), timed_step(second, seed + i, device))
        for i in range(pairs)
    ]


def peak_bytes(workload: Workload, seed: int, device: torch.device) -> int:
    """Most bytes alive at once in a forward and backward, beyond the inputs: the output, what is
    kept for the backward, gradients and scratch.

    On a GPU from the caching allocator. On a CPU from every allocation and release of torch's
    allocator, as its profiler reports them: exact, the same in each run, and it sees inside custom
    ops, which a dispatch mode does not. What isn't a tensor's (autograd's nodes, BLAS's own small
    buffers) is left out: see `launch.benchmarking.resident`.
    """
    drawn = workload(seed)
    with _no_garbage_collection():
        return _peak_on_gpu(drawn, device) if device.type == "cuda" else _peak_on_cpu(drawn)


def _peak_on_gpu(drawn: Drawn, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(drawn)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(drawn: Drawn) -> int:
    # Through the low-level switch, since only there can all but the allocations be left out: the
    # operators' events of a long scan take gigabytes.
    config = profile(use_cpu=True, profile_memory=True).config()
    activities = {ProfilerActivity.CPU}
    _prepare_profiler(config, activities)
    _enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
    try:
        step(drawn)
    finally:
        events = _disable_profiler().events()
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, alive)
    return peak


def step(drawn: Drawn) -> None:
    """Forward, and the backward of the output."""
    out, _ = drawn.forward()
    gradients(drawn, [out], [drawn.grad])


@dataclass(frozen=True)
class Launches:
    """What the host started in one forward and backward, and what the GPU ran.

    Attributes:
        launches: calls of the driver that start kernels; a CUDA graph is one.
        kernels: kernels run, those inside graphs included; copies and fills are not counted.
    """

    launches: int
    kernels: int


def count_launches(workload: Workload, seed: int, device: torch.device) -> Launches:
    """By torch's profiler; on CUDA devices alone."""
    drawn = workload(seed)
    torch.cuda.synchronize(device)
    with profile(use_cpu=True, use_device="cuda") as profiler:
        step(drawn)
        torch.cuda.synchronize(device)
    launches = kernels = 0
    assert profiler.kineto_results is not None
    for event in profiler.kineto_results.events():
        name = event.name()
        if name.startswith(_LAUNCHES):
            launches += 1
        elif event.device_type() == DeviceType.CUDA and not name.startswith(("Memcpy", "Memset")):
            kernels += 1
    return Launches(launches, kernels)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of a few large square matrix products in `dtype`."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written ones together, of the fastest of a few large copies."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call.

    On a GPU of many in a row, beside which a wait is short. On one CPU thread by CPU time, so that
    others at work can't make the machine look slow and its share large.
    """
    calls = 20 if device.type == "cuda" else 1
    own = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own else time.perf_counter
    run()
    best = float("inf")
    for _ in range(_PEAK_REPEATS):
        synchronize(device)
        start = clock()
        for _ in range(calls):
            run()
        synchronize(device)
        best = min(best, (clock() - start) / calls)
    return best
