"""What runs a scan: the one place where device, dtype and depth choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_dist.ops import grouped_scan, native
from ttt_dist.ops.scan_inputs import ScanInputs
from ttt_dist.ops.state import DEEP_MLP_LAYERS, compute_dtype


@dataclass(frozen=True)
class Implementation:
    """A whole scan and its backward; `ttt_dist.ops.grouped_scan` documents arguments and results.

    Between the two only borders pass, whose shape is everybody's and whose layout each's own.
    """

    name: str
    forward: Callable[[ScanInputs], tuple[Tensor, list[Tensor], list[Tensor]]]
    backward: Callable[[ScanInputs, list[Tensor], Tensor, list[Tensor]], list[Tensor]]


TENSOR_CODE = Implementation("tensor code", grouped_scan.scan_forward, grouped_scan.scan_backward)
NATIVE = Implementation("C++ kernels", native.scan_forward, native.scan_backward)


def implementation(
    depth: int, device: torch.device, operand: torch.dtype, compute: torch.dtype
) -> Implementation:
    """For a network of `depth` layers, q, k, v of dtype `operand`, weights of `compute`.

    C++ kernels for TTT-MLP on a CPU, where they could be built; tensor code, which runs anywhere,
    for everything else. Fused kernels for a GPU belong here.
    """
    fits = native.suits(depth, device, operand, compute) and native.library().functions is not None
    return NATIVE if fits else TENSOR_CODE


def describe_scan(depth: int, device: torch.device, operand: torch.dtype) -> str:
    """What runs scans of q, k, v in `operand`, in words for a log."""
    if depth in DEEP_MLP_LAYERS:
        return "autograd through the dual form"
    found = implementation(depth, device, operand, compute_dtype(operand)).name
    if found == TENSOR_CODE.name and native.suits(depth, device, operand, compute_dtype(operand)):
        return f"{found} ({native.library().told})"
    return found
