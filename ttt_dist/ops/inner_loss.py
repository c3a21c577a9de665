"""The inner loss `½‖LN(z) - t‖²` of every token: its gradient by `z`, and backward through that.

With `x̂ = (z - mean(z)) r`, `r = (var(z) + eps)^-½`, `P(g) = g - mean(g) - x̂ mean(g∘x̂)`:

    a = γ∘(γ∘x̂ + β - t);  ĝ = P(a);  gradient by z: r ĝ

`P` is linear, symmetric and `P` of a LayerNorm's output gradient over γ is its input gradient but
for the factor `r`, so backward needs nothing but `P` and means over a token. Plain tensor code
without autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InnerNorm:
    """The per-head LayerNorm of the inner loss.

    Attributes:
        gamma, beta: `[N, 1, d]` for N lanes times heads, compute dtype.
        eps: added to the variance.
    """

    gamma: Tensor
    beta: Tensor
    eps: float

    def normalise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`x̂` of z's shape `[..., d]`, and `r` `[..., 1]`."""
        x_hat, _, r = torch.native_layer_norm(z, z.shape[-1:], None, None, self.eps)
        return x_hat, r


def project(g: Tensor, x_hat: Tensor) -> Tensor:
    """`P(g)`: `g` without its mean and without its part along `x̂`, over the last dim."""
    # LayerNorm's backward at an input that is normalised already: mean 0, factor 1.
    statistics = g.new_zeros(2, *g.shape[:-1], 1)
    statistics[1].fill_(1.0)
    return torch.ops.aten.native_layer_norm_backward(
        g, x_hat, g.shape[-1:], statistics[0], statistics[1], None, None, [True, False, False]
    )[0]


@dataclass
class TokenLoss:
    """Inner gradients of one mini-batch's tokens, `[N, C, d]` each, and what backward needs."""

    x_hat: Tensor
    r: Tensor  # [N, C, 1]
    a: Tensor
    g_hat: Tensor

    @classmethod
    def of(cls, z: Tensor, gamma_shift: Tensor, gamma_square: Tensor, norm: InnerNorm) -> TokenLoss:
        """At the inner network's outputs `z`; `gamma_shift` is `γ∘(β - t)`."""
        x_hat, r = norm.normalise(z)
        a = torch.addcmul(gamma_shift, gamma_square, x_hat)
        return cls(x_hat, r, a, project(a, x_hat))

    def backward(self, u: Tensor, gamma_square: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by `a` and by `z`, given `u`, that by `ĝ`."""
        along_x = (u * self.x_hat).mean(-1, keepdim=True)
        along_g = (u * self.g_hat).mean(-1, keepdim=True)
        m = (self.a * self.x_hat).mean(-1, keepdim=True)
        da = project(u, self.x_hat)
        dx_hat = torch.mul(gamma_square, da)
        dx_hat.addcmul_(u, m, value=-1.0).addcmul_(self.a, along_x, value=-1.0)
        dz = project(dx_hat, self.x_hat)
        return da, dz.addcmul_(self.x_hat, along_g, value=-1.0).mul_(self.r)
