"""The inner loss `½‖LN(z) - t‖²` of every token: its gradient by `z`, and backward through that.

With `x̂ = (z - mean(z)) r`, `r = (var(z) + eps)^-½`, `P(g) = g - mean(g) - x̂ mean(g∘x̂)`:

    a = γ∘(γ∘x̂ + β - t);  ĝ = P(a);  gradient by z: r ĝ

`P` is linear and symmetric, so backward needs nothing but `P` and means over a token. Plain tensor
code without autograd; `[N, C, d]` for the C tokens of a mini-batch, N lanes times heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InnerNorm:
    """The per-head LayerNorm of the inner loss.

    Attributes:
        gamma, beta: `[N, 1, d]`, compute dtype.
        eps: added to the variance.
    """

    gamma: Tensor
    beta: Tensor
    eps: float

    def normalise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`x̂` of z's shape `[..., d]`, and `r` `[..., 1]`."""
        x_hat, _, r = torch.native_layer_norm(z, z.shape[-1:], None, None, self.eps)
        return x_hat, r

    def read(self, z: Tensor) -> Tensor:
        """`γ∘x̂ + β`"""
        return torch.addcmul(self.beta, self.gamma, self.normalise(z)[0])


class Projection:
    """`P` for tensors with the tokens `rows`: LayerNorm's backward where mean is 0, factor 1."""

    def __init__(self, rows: tuple[int, ...], like: Tensor):
        self._mean, self._factor = like.new_zeros(*rows, 1), like.new_ones(*rows, 1)

    def __call__(self, g: Tensor, x_hat: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            g, x_hat, g.shape[-1:], self._mean, self._factor, None, None, [True, False, False]
        )[0]


def project(g: Tensor, x_hat: Tensor) -> Tensor:
    """`P(g)` once."""
    return Projection(tuple(g.shape[:-1]), g)(g, x_hat)


class InnerLoss:
    """Gradients of the inner losses of one mini-batch after another.

    Args:
        N, C: rows of a mini-batch.
    """

    def __init__(self, norm: InnerNorm, N: int, C: int):
        self.norm, self.gamma_square = norm, norm.gamma.square()
        self._project = Projection((N, C), norm.gamma)

    def shift(self, k: Tensor, v: Tensor) -> Tensor:
        """`γ∘(β - t)` for the target `t = v - k`; any leading dims."""
        return torch.sub(k, v).add_(self.norm.beta).mul_(self.norm.gamma)

    def gradient(self, z: Tensor, shift: Tensor) -> TokenLoss:
        """At the inner network's outputs `z`."""
        x_hat, r = self.norm.normalise(z)
        a = torch.addcmul(shift, self.gamma_square, x_hat)
        return TokenLoss(x_hat, r, a, self._project(a, x_hat))

    def backward(self, u: Tensor, loss: TokenLoss, dz: Tensor) -> Tensor:
        """Writes the gradient by `z` into `dz`, given `u`, that by `ĝ`.

        Returns:
            The gradient by `a`.
        """
        mean = -1.0 / u.shape[-1]
        along_x, along_g, a_along_x = (
            torch.linalg.vecdot(*both).unsqueeze(-1)
            for both in ((u, loss.x_hat), (u, loss.g_hat), (loss.a, loss.x_hat))
        )
        da = self._project(u, loss.x_hat)
        dx_hat = torch.mul(self.gamma_square, da)
        dx_hat.addcmul_(u, a_along_x, value=mean).addcmul_(loss.a, along_x, value=mean)
        through_x = self._project(dx_hat, loss.x_hat)
        torch.mul(through_x.addcmul_(loss.x_hat, along_g, value=mean), loss.r, out=dz)
        return da


@dataclass(frozen=True)
class TokenLoss:
    """Inner gradients of one mini-batch's tokens: `x̂`, `a`, `ĝ` `[N, C, d]`, `r` `[N, C, 1]`."""

    x_hat: Tensor
    r: Tensor
    a: Tensor
    g_hat: Tensor
