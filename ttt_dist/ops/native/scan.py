"""A whole scan of TTT-MLP by the C++ kernels: heads of lanes one by one, or by threads.

Same arguments and results as `ttt_dist.ops.grouped_scan`. A head's weights and what they are
multiplied with stay in a core's caches from one mini-batch to the next, and of the mini-batches
that backward computes once more only those of one head's group are kept for each thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_dist.ops.native.build import library
from ttt_dist.ops.scan_inputs import ScanInputs, empty_borders

_TYPES = {torch.float32: "float", torch.float64: "double"}
_SIZES = ("B", "H", "L", "C", "d", "h", "group", "causal", "threads")


class _Frames(ctypes.Structure):
    """`ttt::Frames` of scan.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3))


class _Layers(ctypes.Structure):
    """`ttt::Layers` of scan.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("W1", "b1", "W2", "b2"))


class _Scan(ctypes.Structure):
    """`ttt::Scan` of scan.cpp."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in _SIZES),
        ("eps", ctypes.c_double),
        *((n, _Frames) for n in ("q", "k", "v", "eta")),
        *((n, ctypes.c_void_p) for n in ("gamma", "beta", "end")),
        *((n, _Layers) for n in ("weights", "pending")),
        *((n, ctypes.c_void_p) for n in ("borders1", "borders2", "out")),
        ("after", _Layers),
        ("d_out", _Frames),
        ("d_after", _Layers),
        *((n, ctypes.c_void_p) for n in ("d_q", "d_k", "d_v", "d_eta", "d_gamma", "d_beta")),
        *((n, _Layers) for n in ("d_weights", "d_pending")),
        ("workspace", ctypes.c_void_p),
    )


def suits(depth: int, device: torch.device, operand: torch.dtype, compute: torch.dtype) -> bool:
    """Whether these kernels are written for it: TTT-MLP on a CPU, all tensors of one dtype."""
    return depth == 2 and device.type == "cpu" and operand == compute and compute in _TYPES


def scan_forward(inputs: ScanInputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As `grouped_scan.scan_forward`; in the borders, W1 lies transposed."""
    call = _Call(inputs)
    out = torch.empty_like(inputs.q, memory_format=torch.contiguous_format)
    after = [_like(w) for w in inputs.weights]
    borders = empty_borders(inputs)
    call.scan.borders1, call.scan.borders2 = (call.contiguous(x) for x in borders)
    call.scan.out = call.contiguous(out)
    call.scan.after = call.layers(after)
    call.run("ttt_scan")
    return out, after, borders


def scan_backward(
    inputs: ScanInputs, borders: list[Tensor], d_out: Tensor, d_weights: list[Tensor]
) -> list[Tensor]:
    """As `grouped_scan.scan_backward`, with borders of `scan_forward` above."""
    call = _Call(inputs)
    B, H, _, d = inputs.q.shape
    dtype = inputs.weights[0].dtype
    frames = [_like(x) for x in (inputs.q, inputs.k, inputs.v, inputs.eta)]
    norms = [d_out.new_zeros(B, H, d, dtype=dtype) for _ in "gb"]
    weights, pending = ([_like(w) for w in given] for given in (inputs.weights, inputs.pending))
    scan = call.scan
    scan.borders1, scan.borders2 = (call.contiguous(x) for x in borders)
    scan.d_out = call.frames(d_out.to(dtype))
    scan.d_after = call.layers(d_weights)
    scan.d_q, scan.d_k, scan.d_v, scan.d_eta = (call.contiguous(x) for x in frames)
    scan.d_gamma, scan.d_beta = (call.contiguous(x) for x in norms)
    scan.d_weights = call.layers(weights)
    scan.d_pending = call.layers(pending)
    call.run("ttt_scan_backward")
    return [*frames, *(x.sum(0) for x in norms), *weights, *pending]


class _Call:
    """The arguments of one call, and the tensors that they point into, for as long as it takes."""

    def __init__(self, inputs: ScanInputs):
        B, H, L, d = inputs.q.shape
        self._alive: list[Tensor] = []
        self._dtype = inputs.weights[0].dtype
        self._device = inputs.q.device
        threads = min(torch.get_num_threads(), B * H)
        self.scan = _Scan(
            B, H, L, inputs.mini_batch_size, d, inputs.weights[0].shape[-1], inputs.group_size,
            inputs.causal, threads, inputs.eps,
            *(self.frames(x) for x in (inputs.q, inputs.k, inputs.v, inputs.eta)),
            *(self.contiguous(x) for x in (inputs.gamma, inputs.beta)),
            self._pointer(inputs.end.contiguous()),
            *(self.layers(x) for x in (inputs.weights, inputs.pending)),
        )  # fmt: skip

    def _pointer(self, x: Tensor) -> int:
        self._alive.append(x)
        return x.data_ptr()

    def contiguous(self, x: Tensor) -> int:
        """The address of `x`, or of a contiguous copy; results must be contiguous."""
        assert x.dtype == self._dtype
        return self._pointer(x.contiguous())

    def frames(self, x: Tensor) -> _Frames:
        """`[B, H, L]` or `[B, H, L, d]` with any strides but the last dim's."""
        assert x.dtype == self._dtype
        if x.ndim == 4 and x.stride(3) != 1:
            x = x.contiguous()
        return _Frames(self._pointer(x), (ctypes.c_int64 * 3)(*x.stride()[:3]))

    def layers(self, tensors: Sequence[Tensor]) -> _Layers:
        """W1, b1, W2, b2, or null where there are none."""
        return _Layers(*(self.contiguous(x) for x in tensors))

    def run(self, name: str) -> None:
        """Call the kernel for the dtype at hand, with workspace for every thread."""
        functions, suffix = library().functions, _TYPES[self._dtype]
        count = getattr(functions, f"{name}_bytes_{suffix}")
        count.restype = ctypes.c_int64
        scan = ctypes.byref(self.scan)
        workspace = torch.empty(self.scan.threads * count(scan), dtype=torch.uint8)
        self.scan.workspace = workspace.data_ptr()
        getattr(functions, f"{name}_{suffix}")(scan)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
