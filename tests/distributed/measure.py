"""How far tensors are apart, whatever they lie on."""

from __future__ import annotations

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


def worst(errors: dict[str, float]) -> tuple[float, str]:
    name = max(errors, key=errors.__getitem__)
    return errors[name], name
