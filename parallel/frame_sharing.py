"""Frames of the Depformer shared among tp ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ttt_dist.placement import PARTIAL, REPLICATED


class SharedFrames:
    """A contiguous share of the frames for each rank of the tp axis (`frames.FrameSharing`).

    Every parameter of the Depformer is sharded by FSDP2 over `dp_shard x tp`, which *averages* the
    ranks' gradients, while here each rank has those of its own frames: their sum is wanted. So the
    gradient is multiplied by the number of ranks where it enters the own frames (`all`), and
    divided again where it leaves them for what all ranks compute alike (`own`).

    Args:
        axis: one mesh axis, tp.
    """

    def __init__(self, axis: DeviceMesh) -> None:
        self._axis = axis
        self._ranks = axis.size()

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's frames; padded with zeros where the ranks do not divide them.

        Backward: one all-reduce of x's gradient, in float32 at least. Integers pass without.
        """
        if x.is_floating_point():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            placed = DTensor.from_local(wide, self._axis, REPLICATED, run_check=False)
            wide = placed.to_local(grad_placements=PARTIAL)
            x = _scale_gradient(wide, 1 / self._ranks).to(x.dtype)
        share = -(-x.shape[dim] // self._ranks)
        missing = share * self._ranks - x.shape[dim]
        after = [0, 0] * (x.ndim - dim - 1) + [0, missing]
        return F.pad(x, after).narrow(dim, self._axis.get_local_rank() * share, share)

    def all(self, own: Tensor, dim: int, frames: int) -> Tensor:
        """All ranks' frames; one all-gather, none in the backward: its gradient is the same on all
        ranks, and each keeps its own frames of it."""
        placed = DTensor.from_local(own, self._axis, (Shard(dim),), run_check=False)
        whole = placed.redistribute(placements=REPLICATED).to_local(grad_placements=REPLICATED)
        return _scale_gradient(whole, self._ranks).narrow(dim, 0, frames)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return _ScaledGradient.apply(x, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None
