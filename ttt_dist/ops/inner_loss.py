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

from ttt_dist.ops.pointwise import ready


@dataclass(frozen=True)
class PackedNorm:
    """The per-head LayerNorm of the inner loss, for lanes times heads in one dim.

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
        self.mean, self.factor = like.new_zeros(*rows, 1), like.new_ones(*rows, 1)

    def __call__(self, g: Tensor, x_hat: Tensor) -> Tensor:
        return _project(g, x_hat, self.mean, self.factor)


def _project(g: Tensor, x_hat: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        g, x_hat, g.shape[-1:], mean, factor, None, None, [True, False, False]
    )[0]


def project(g: Tensor, x_hat: Tensor) -> Tensor:
    """`P(g)` once."""
    return Projection(tuple(g.shape[:-1]), g)(g, x_hat)


class InnerLoss:
    """Gradients of the inner losses of one mini-batch after another.

    Args:
        N, C: rows of a mini-batch.
        compiled: one pass over memory each, by `torch.compile`.
    """

    def __init__(self, norm: PackedNorm, N: int, C: int, compiled: bool = False):
        self.norm, self.gamma_square = norm, norm.gamma.square()
        projection = Projection((N, C), norm.gamma)
        self._projection = (projection.mean, projection.factor)
        self._gradient = ready(_gradient, compiled, eps=norm.eps)
        self._backward = ready(_backward, compiled)

    def shift(self, k: Tensor, v: Tensor) -> Tensor:
        """`γ∘(β - t)` for the target `t = v - k`; any leading dims."""
        return torch.sub(k, v).add_(self.norm.beta).mul_(self.norm.gamma)

    def gradient(
        self, z: Tensor, shift: Tensor, eta: Tensor, G: Tensor
    ) -> tuple[TokenLoss, Tensor]:
        """At the inner network's outputs `z`; writes `η r ĝ` into the contiguous `G`.

        Returns:
            The loss's terms, and `η r` `[N, C, 1]`.
        """
        *terms, rate = self._gradient(z, shift, eta, G, self.gamma_square, *self._projection)
        return TokenLoss(*terms), rate

    def backward(self, u: Tensor, loss: TokenLoss) -> tuple[Tensor, Tensor]:
        """Gradients by `z` and by `a`, given `u`, that by `ĝ`."""
        terms = (loss.x_hat, loss.r, loss.a, loss.g_hat)
        dz, da = self._backward(u, *terms, self.gamma_square, *self._projection)
        return dz, da


def _gradient(
    z: Tensor,
    shift: Tensor,
    eta: Tensor,
    G: Tensor,
    gamma_square: Tensor,
    mean: Tensor,
    factor: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x̂, r, a, ĝ` and `η r`."""
    x_hat, _, r = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
    a = torch.addcmul(shift, gamma_square, x_hat)
    g_hat, rate = _project(a, x_hat, mean, factor), r * eta
    torch.mul(g_hat, rate, out=G)
    return x_hat, r, a, g_hat, rate


def _backward(
    u: Tensor,
    x_hat: Tensor,
    r: Tensor,
    a: Tensor,
    g_hat: Tensor,
    gamma_square: Tensor,
    mean: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    part = -1.0 / u.shape[-1]
    along_x, along_g, a_along_x = (
        torch.linalg.vecdot(*both).unsqueeze(-1) for both in ((u, x_hat), (u, g_hat), (a, x_hat))
    )
    da = _project(u, x_hat, mean, factor)
    dx_hat = torch.mul(gamma_square, da)
    dx_hat.addcmul_(u, a_along_x, value=part).addcmul_(a, along_x, value=part)
    through_x = _project(dx_hat, x_hat, mean, factor)
    return through_x.addcmul_(x_hat, along_g, value=part).mul_(r), da


@dataclass(frozen=True)
class TokenLoss:
    """Inner gradients of one mini-batch's tokens: `x̂` `[N, C, d]`, `r` `[N, C, 1]`, `a`, `ĝ`."""

    x_hat: Tensor
    r: Tensor
    a: Tensor
    g_hat: Tensor
