"""Moshi's float32 LayerNorm, for weights of any dtype."""

from __future__ import annotations

from moshi.modules.transformer import LayerNormF32
from torch import Tensor, nn
from torch.nn import functional as F


class Float32LayerNorm(nn.LayerNorm):
    """moshi's `LayerNormF32`, which casts its input alone: torch then wants float32 weights, while
    FSDP2 gathers them in the dtype of computation."""

    def __init__(self, stock: LayerNormF32) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = stock.normalized_shape, stock.eps
        self.elementwise_affine = stock.elementwise_affine
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same, in x's dtype; computed in float32."""
        weight, bias = self.weight.float(), self.bias.float()
        y = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype)


def replace_float32_norms(module: nn.Module) -> None:
    """Put `Float32LayerNorm` in place of moshi's, wherever it is inside `module`."""
    for name, child in module.named_children():
        if isinstance(child, LayerNormF32):
            setattr(module, name, Float32LayerNorm(child))
        else:
            replace_float32_norms(child)
