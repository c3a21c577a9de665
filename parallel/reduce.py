"""Sums over ranks, and the gradient norm of a model whose parameters live on several meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh


def sum_over_data_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `values` over ranks that hold different samples.

    Args:
        values: any shape, float; not changed.
        group: `Mesh.dp_group`; None where one rank holds all samples.
    """
    total = values.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def sum_over_tp_ranks(values: Tensor, mesh: Mesh) -> Tensor:
    """The sum of `values` over ranks that hold different heads of the same samples."""
    return sum_over_data_ranks(values, None if mesh.tp is None else mesh.tp.get_group())


def highest_over_ranks(values: list[int]) -> list[int]:
    """Each number's largest value over all ranks: how ranks agree on what one of them has seen."""
    highest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest.tolist()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`.

    torch's own function refuses gradients of several meshes; here the norm is taken mesh by mesh
    (each counts every element once, whatever is sharded or replicated) and then combined.

    Args:
        parameters: parameters with plain or DTensor gradients, or none.
        max_norm: bound of the 2-norm over all of them.

    Returns:
        The norm before clipping, a plain float32 scalar, the same on all ranks. Where it isn't
        finite, the gradients stay as they were.
    """
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups[mesh].append(parameter)
    if not groups:
        raise ValueError("clip_gradients: no parameter has a gradient; nothing was trained")
    norms = []
    for members in groups.values():
        norm = nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    # A norm that isn't finite would make every gradient so; left alone, they tell which was first.
    scale_by = torch.where(total.isfinite(), total, 0.0).to(norms[0].dtype)
    for members in groups.values():
        nn.utils.clip_grads_with_norm_(members, max_norm, scale_by)
    return total.float()
