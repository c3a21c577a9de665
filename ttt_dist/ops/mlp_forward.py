"""Mini-batches of TTT-MLP, forward, written by hand (no autograd).

Formulas: arXiv 2407.04620, section 2.5, for the dual form. Shapes: `ttt_dist.ops.group`. The inner
learning rate enters in one place alone, `G2 = η r ĝ`; everything behind is linear in it:

    Z1 = K W1;  X2 = gelu(Z1);  r ĝ = gradient of the inner loss at X2 W2
    P = G2 W2ᵀ;  G1 = P∘gelu'(Z1);  W1 ← W1 - Kᵀ G1;  W2 ← W2 - X2ᵀ G2
    Y1 = Q W1 - A1 G1;  Xb = gelu(Y1);  Y2 = Xb W2 - A2 G2;  A1 = tril(Q Kᵀ);  A2 = tril(Xb X2ᵀ)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ttt_dist.ops.activation import Gelu, gelu
from ttt_dist.ops.group import Frames, Settings, flat, lower_triangle_, with_ones
from ttt_dist.ops.inner_loss import InnerLoss, TokenLoss
from ttt_dist.ops.products import Products


@dataclass(frozen=True)
class HiddenTokens:
    """Buffers for what keys leave in the hidden layer: of one mini-batch, or of n, `[n, ...]`.

    Attributes:
        Z1, slope, P: `[N, C, h]`; slope is `gelu'(Z1)`.
        X2: `[N, C, h + 1]`, with the column of ones; `x2` without it, `X2_T` transposed (views).
        G2: `[N, C, d]`
    """

    Z1: Tensor
    slope: Tensor
    P: Tensor
    X2: Tensor
    x2: Tensor
    X2_T: Tensor
    G2: Tensor

    @classmethod
    def buffers(cls, n: int, N: int, C: int, d: int, h: int, like: Tensor) -> HiddenTokens:
        """For `n` mini-batches, which lie in memory one after the other."""
        X2 = with_ones((n, N, C), h, like)
        Z1, slope, P = like.new_empty(3, n, N, C, h).unbind()
        return cls(Z1, slope, P, X2, X2[..., :h], X2.mT, like.new_empty(n, N, C, d))

    def each(self) -> list[HiddenTokens]:
        """One for every mini-batch."""
        views = (getattr(self, field.name).unbind() for field in fields(self))
        return [HiddenTokens(*tensors) for tensors in zip(*views, strict=True)]

    def fill(
        self,
        products: Products,
        gelu: Gelu,
        losses: InnerLoss,
        W2: Tensor,
        W2_T: Tensor,
        shift: Tensor,
        eta: Tensor,
    ) -> tuple[TokenLoss, Tensor]:
        """All of them from `Z1`; `W2_T` is W2 without its bias, transposed.

        Returns:
            The inner losses' gradients, and `η r` `[N, C, 1]`.
        """
        gelu.value_and_derivative(self.Z1, self.x2, self.slope)
        loss, rate = losses.gradient(products.mul(self.X2, W2, bias=True), shift, eta, self.G2)
        products.mul(self.G2, W2_T, out=self.P)
        return loss, rate


class MlpForward:
    """Runs groups of any number of mini-batches; one mini-batch's buffers serve all."""

    def __init__(self, settings: Settings, N: int, C: int, d: int, h: int, like: Tensor):
        self.settings, self.h = settings, h
        self.losses = InnerLoss(settings.norm, N, C, settings.compiled)
        self.gelu = gelu(settings.compiled, 1, (N, C, h), like)
        (self._tokens,) = HiddenTokens.buffers(1, N, C, d, h, like).each()
        self._Y1 = like.new_empty(N, C, h)
        self._Xb = with_ones((N, C), h, like)

    def forward(self, frames: Frames, weights: list[Tensor]) -> Tensor:
        """Outputs `[n, N, C, d]`; `weights` are replaced, in place, by those after the group."""
        products, causal, C, h = self.settings.products, self.settings.causal, frames.C, self.h
        W1, W2 = weights
        W2_T, tokens, Xb = W2[:, :h].mT, self._tokens, self._Xb
        Xb_rows, Y1 = Xb[..., :h], self._Y1
        k, q = frames.kq[:, :, :C], frames.kq[:, :, C:]
        n, N = frames.v.shape[:2]
        A1 = lower_triangle_(products.mul(flat(q), flat(k).mT), causal).unflatten(0, (n, N))
        Y2 = torch.empty_like(frames.v)
        steps = zip(
            k.unbind(),
            q.unbind(),
            (k * frames.completed).mT.unbind(),
            frames.eta.unbind(),
            frames.completed.unbind(),
            self.losses.shift(frames.k, frames.v).unbind(),
            A1.unbind(),
            Y2.unbind(),
            strict=True,
        )
        for m, (k_m, q_m, k_T, eta, completed, shift, A1_m, Y2_m) in enumerate(steps):
            # Not one product with the queries: backward repeats this one, to the last bit.
            products.mul(k_m, W1, out=tokens.Z1, bias=True)
            tokens.fill(products, self.gelu, self.losses, W2, W2_T, shift, eta)
            G1 = tokens.P.mul_(tokens.slope)
            products.mul(q_m, W1, out=Y1, bias=True)
            products.add(Y1, A1_m, G1, alpha=-1.0)
            pending = frames.pending if m == 0 else None
            if pending is not None:
                Y1.sub_(products.mul(q_m, pending[0], bias=True))
            self.gelu.value(Y1, Xb_rows)
            A2 = lower_triangle_(products.mul(Xb, tokens.X2_T), causal)
            products.mul(Xb, W2, out=Y2_m, bias=True)
            products.add(Y2_m, A2, tokens.G2, alpha=-1.0)
            if pending is not None:
                Y2_m.sub_(products.mul(Xb, pending[1], bias=True))
            products.update(W1, k_T, G1, alpha=-1.0)
            products.update(W2, tokens.X2_T, tokens.G2.mul_(completed), alpha=-1.0)
            if pending is not None:
                W1.addcmul_(completed, pending[0], value=-1.0)
                W2.addcmul_(completed, pending[1], value=-1.0)
        return self.settings.norm.read(Y2).add_(frames.q)
