"""The DTensor words that the model speaks: `to_local` and `place_into`, and sums over shards.

The model is written on local tensors and runs unchanged on one device: on a plain tensor each of
these is the identity. `parallel/tensor_parallel.py` decides which tensors are DTensors.

An exit from DTensor always names the placement of the gradient that comes back through it. A
replicated tensor that each rank uses for its own heads gets a *partial* gradient; torch's default
takes it for replicated and gives ranks different, unreduced gradients without an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# What a tensor of a head-sharded layer is on the tensor-parallel axis (one axis: one placement).
BY_HEAD: tuple[Placement, ...] = (Shard(0),)  # parameters whose dim 0 runs over heads
BY_INPUT: tuple[Placement, ...] = (Shard(1),)  # row-parallel weights, split along their input dim
BY_BLOCK_ROW: tuple[Placement, ...] = (Shard(1),)  # packed [parts, rows, inputs], by rows
PARTIAL: tuple[Placement, ...] = (Partial(),)
REPLICATED: tuple[Placement, ...] = (Replicate(),)


def to_local(tensor: Tensor, *, grad_placements: Sequence[Placement]) -> Tensor:
    """This rank's part of `tensor`; a plain tensor is returned as it is.

    Args:
        tensor: a plain tensor or a DTensor of any shape and dtype.
        grad_placements: what the local gradients are on the DTensor's mesh, one per axis.

    Returns:
        A plain tensor: the local shard (for a replicated DTensor, the whole).

    Raises:
        ValueError: the number of placements is not the number of mesh axes.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if len(grad_placements) != tensor.device_mesh.ndim:
        raise ValueError(
            f"to_local: found {len(grad_placements)} grad_placements for a mesh of "
            f"{tensor.device_mesh.ndim} axes; name one for each axis"
        )
    return tensor.to_local(grad_placements=tuple(grad_placements))


def place_into(
    local: Tensor, like: Tensor, placements: Sequence[Placement] | None = None
) -> Tensor:
    """`local` as this rank's part of a DTensor shaped and placed like `like`.

    Args:
        local: plain tensor, this rank's part.
        like: the template. Where it is a plain tensor, `local` is returned: the *first* argument.
        placements: placements instead of the template's (its mesh and global shape stay).

    Returns:
        A DTensor of `like`'s global shape around `local` (gradients pass through unchanged), or
        `local` itself.

    Raises:
        ValueError: `local`'s shape is not what this rank holds of a tensor like `like`.
    """
    if not isinstance(like, DTensor):
        return local
    chosen = tuple(like.placements if placements is None else placements)
    expected, _ = compute_local_shape_and_global_offset(like.shape, like.device_mesh, chosen)
    if tuple(local.shape) != tuple(expected):
        raise ValueError(
            f"place_into: found a local tensor of shape {tuple(local.shape)}; a tensor of global "
            f"shape {tuple(like.shape)} placed {chosen} holds {tuple(expected)} on this rank"
        )
    return DTensor.from_local(
        local, like.device_mesh, chosen, run_check=False, shape=like.shape, stride=like.stride()
    )


def enter_shards(x: Tensor, like: Tensor) -> Tensor:
    """`x`, the same on all ranks, for use with each rank's shard of `like`.

    Each rank's use gives a part of `x`'s gradient; the backward sums them by one all-reduce, in
    float32 at least: sums over ranks in bfloat16 lose what training needs.

    Args:
        x: plain tensor, equal on all ranks of `like`'s mesh.
        like: tells the mesh; where it is a plain tensor, `x` is returned.
    """
    if not isinstance(like, DTensor):
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    replicated = DTensor.from_local(wide, like.device_mesh, REPLICATED, run_check=False)
    return replicated.to_local(grad_placements=PARTIAL).to(x.dtype)


def sum_shards(local: Tensor, like: Tensor) -> Tensor:
    """The sum over ranks of contributions made with each rank's shard of `like`; one all-reduce.

    Summed in float32 at least. The result is the same on every rank and feeds computations that
    every rank repeats, so its gradient is the same everywhere and the backward needs no
    communication.

    Args:
        local: this rank's contribution, plain, of the result's shape and dtype.
        like: tells the mesh; where it is a plain tensor, `local` is returned.
    """
    if not isinstance(like, DTensor):
        return local
    wide = local.to(torch.promote_types(local.dtype, torch.float32))
    partial = DTensor.from_local(wide, like.device_mesh, PARTIAL, run_check=False)
    total = partial.redistribute(placements=REPLICATED)
    return total.to_local(grad_placements=REPLICATED).to(local.dtype)


def gather_shards(local: Tensor, like: Tensor, dim: int) -> Tensor:
    """Every rank's `local` concatenated along `dim`; one all-gather, reduce-scatter backward.

    The result feeds computations on each rank's own heads, so its gradient is partial.

    Args:
        local: plain tensor of the same shape on all ranks.
        like: tells the mesh; where it is a plain tensor, `local` is returned.
        dim: non-negative dim of the concatenation.
    """
    if not isinstance(like, DTensor):
        return local
    placed = DTensor.from_local(local, like.device_mesh, (Shard(dim),), run_check=False)
    return placed.redistribute(placements=REPLICATED).to_local(grad_placements=PARTIAL)


def shard_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of `tensor` lies in the whole: one slice a dim.

    For a plain tensor that is all of it; a DTensor may be sharded along any dims, evenly or not.
    """
    shape: Sequence[int] = tensor.shape
    offset: Sequence[int] = [0] * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
