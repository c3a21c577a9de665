"""How far tensors are apart, whatever they lie on."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_errors(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ by name; names whose expected value is zero are compared absolutely."""
    errors = {}
    for name, (found, expected) in pairs.items():
        scale = expected.norm().item()
        errors[name] = (whole(found) - expected).norm().item() / (scale if scale > 1e-12 else 1.0)
    return errors


def largest_of_ranks(errors: dict[str, float]) -> dict[str, float]:
    """By name the largest error that any rank sees: copies that should be equal may not be."""
    own = torch.tensor(list(errors.values()), dtype=torch.float64)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    largest = torch.stack(ranks).amax(dim=0)  # NaN wins
    return dict(zip(errors, largest.tolist(), strict=True))


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """The largest error and its name; NaN is larger than any number."""
    name = max(errors, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
    return errors[name], name
