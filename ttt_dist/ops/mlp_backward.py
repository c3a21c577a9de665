"""The way back through mini-batches of TTT-MLP, written by hand (no autograd).

A group of mini-batches is computed once more: the chain of states through the keys first, all of
which are kept (`_learn`); then, slab by slab from the end, what the queries see and all gradients.
The equations follow from those in `ttt_dist.ops.mlp_forward`. Shapes: `ttt_dist.ops.group`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_dist.ops.activation import gelu
from ttt_dist.ops.group import (
    FrameGradients,
    Frames,
    Settings,
    flat,
    lower_triangle_,
    slabs,
    token_sum,
    with_ones,
)
from ttt_dist.ops.inner_loss import InnerLoss, TokenLoss, project
from ttt_dist.ops.mlp_forward import HiddenTokens


class MlpBackward:
    """Buffers for groups of up to `n` mini-batches, used again from group to group.

    Args:
        n, slab: mini-batches of a group, and how many of them are taken at once where they don't
            depend on each other.
        N, C, d, h: see `ttt_dist.ops.group`; h is the hidden width.
        like: gives dtype and device.
    """

    def __init__(
        self, settings: Settings, n: int, slab: int, N: int, C: int, d: int, h: int, like: Tensor
    ):
        self.settings, self.slab, self.C, self.d, self.h = settings, min(slab, n), C, d, h
        self.loss = InnerLoss(settings.norm, N, C, settings.compiled)
        self.gelu = gelu(settings.compiled, self.slab, (N, C, h), like)
        self.W1, self.W2 = like.new_empty(n, N, d + 1, h), like.new_empty(n, N, h + 1, d)
        self.tokens = HiddenTokens.buffers(n, N, C, d, h, like)
        # Views that every mini-batch takes, made once.
        W2_T = self.W2[:, :, :h].mT
        self._states = list(zip(self.W1.unbind(), self.W2.unbind(), W2_T.unbind(), strict=True))
        self._each = self.tokens.each()
        # Of one slab at a time.
        s = self.slab
        self.hidden = like.new_empty(s, N, 2 * C, h)
        self.x = with_ones((s, N, 3 * C), h, like)
        self.x[:, :, 2 * C :, h] = 0.0
        self.y = like.new_empty(s, N, 3 * C, d)
        self.G1, self.slope_y, self.Y1 = like.new_empty(3, s, N, C, h).unbind()

    def _learn(self, frames: Frames, weights: list[Tensor]) -> None:
        """The chain of states, `W1` and `W2`, and what led from each to the next."""
        C, products, completed = self.C, self.settings.products, frames.completed
        self.W1[0].copy_(weights[0])
        self.W2[0].copy_(weights[1])
        self.losses: list[TokenLoss] = []
        self.rates: list[Tensor] = []
        steps = zip(
            self._each,
            frames.kq[:, :, :C].unbind(),
            # Masked keys mask what reaches W1 at no cost in the loop.
            (frames.kq[:, :, :C] * completed).mT.unbind(),
            frames.eta.unbind(),
            completed.unbind(),
            self.loss.shift(frames.k, frames.v).unbind(),
            strict=False,
        )
        for m, (tokens, k, k_T, eta, mask, shift) in enumerate(steps):
            W1, W2, W2_T = self._states[m]
            products.mul(k, W1, out=tokens.Z1, bias=True)
            loss, rate = tokens.fill(products, self.gelu, self.loss, W2, W2_T, shift, eta)
            self.losses.append(loss)
            self.rates.append(rate)
            if m + 1 == len(frames.v):
                break  # nothing reads the weights after the group
            W1_next, W2_next, _ = self._states[m + 1]
            G1 = torch.mul(tokens.P, tokens.slope, out=self.G1[0])
            products.update(W1, k_T, G1, alpha=-1.0, out=W1_next)
            products.update(W2, tokens.X2_T, tokens.G2 * mask, alpha=-1.0, out=W2_next)
            if m == 0 and frames.pending is not None:
                W1_next.addcmul_(mask, frames.pending[0], value=-1.0)
                W2_next.addcmul_(mask, frames.pending[1], value=-1.0)

    def backward(
        self, frames: Frames, weights: list[Tensor], d_out: Tensor, d_weights: list[Tensor]
    ) -> FrameGradients:
        """Gradients of the group's tokens.

        Args:
            weights: those before the group.
            d_out: `[n, N, C, d]`, gradient of the outputs, compute dtype.
            d_weights: gradients of the weights after the group; replaced, in place, by those of
                the weights before it.
        """
        self._learn(frames, weights)
        grads = FrameGradients.empty(frames)
        for part in reversed(slabs(frames.v.shape[0], self.slab)):
            _Slab(self, frames, part).walk_back(d_out[part], d_weights, grads)
        return grads


class _Slab:
    """What the queries of a few mini-batches see, and the way back through these mini-batches."""

    def __init__(self, group: MlpBackward, frames: Frames, part: slice):
        self.group, self.part, self.frames = group, part, frames
        products, causal = group.settings.products, group.settings.causal
        C, h = group.C, group.h
        self.kq = frames.kq[part]
        s, N = self.kq.shape[:2]
        self.W1, self.W2 = group.W1[part], group.W2[part]
        self.X2, self.G2 = group.tokens.X2[part], group.tokens.G2[part]
        self.first = part.start == 0 and frames.pending is not None
        k, q = flat(self.kq[:, :, :C]), flat(self.kq[:, :, C:])
        self.G1 = torch.mul(group.tokens.P[part], group.tokens.slope[part], out=group.G1[:s])
        self.A1 = lower_triangle_(products.mul(q, k.mT), causal)
        Y1 = group.Y1[:s]
        products.mul(q, flat(self.W1), out=flat(Y1), bias=True)
        products.add(flat(Y1), self.A1, flat(self.G1), alpha=-1.0)
        pending = frames.pending
        if self.first and pending is not None:
            Y1[0].sub_(products.mul(self.kq[0, :, C:], pending[0], bias=True))
        # X2 over Xb over dP, and beside them dZ2 over dY2 over G2: one product sums dW2 up.
        self.x, self.y = group.x[:s], group.y[:s]
        self.Xb = self.x[:, :, C : 2 * C]
        self.slope_y = group.slope_y[:s]
        group.gelu.value_and_derivative(Y1, self.Xb[..., :h], self.slope_y)
        Xb = flat(self.Xb)
        self.A2 = lower_triangle_(products.mul(Xb, flat(self.X2).mT), causal)
        Y2 = products.mul(Xb, flat(self.W2), bias=True)
        products.add(Y2, self.A2, flat(self.G2), alpha=-1.0)
        self.Y2 = Y2.unflatten(0, (s, N))
        if self.first and pending is not None:
            self.Y2[0].sub_(products.mul(self.Xb[0], pending[1], bias=True))

    def walk_back(self, d_out: Tensor, d_weights: list[Tensor], grads: FrameGradients) -> None:
        """Fill this slab's part of `grads`; replace the weights' gradients by those before it."""
        group, frames, part, C, d = self.group, self.frames, self.part, self.group.C, self.group.d
        products, norm = group.settings.products, group.settings.norm
        s, N = self.kq.shape[:2]
        k, q = frames.k[part], frames.q[part]
        dG1, dG2, dX2, S1 = self._read_backward(d_out, grads)
        self._learn_backward(dG1, dG2, dX2, d_weights, grads)

        dkq = products.mul(flat(self.hidden), flat(self.W1)[:, :d].mT).unflatten(0, (s, N))
        if self.first and frames.pending is not None:
            dkq[0, :, C:].sub_(products.mul(self.hidden[0, :, C:], frames.pending[0][:, :d].mT))
        dq = products.mul(S1, flat(k)).unflatten(0, (s, N)).add_(d_out)
        torch.add(dq, dkq[:, :, C:], out=grads.q[part])
        through_updates = grads.k[part].mul_(frames.completed[part])
        dk = products.mul(S1.mT, flat(q)).unflatten(0, (s, N)).sub_(through_updates)
        losses = group.losses[part]
        x_hat, da = torch.stack([x.x_hat for x in losses]), grads.v[part]
        error = torch.addcmul(norm.beta, norm.gamma, x_hat).sub_(frames.v[part]).add_(k)
        de = da * norm.gamma
        torch.add(dk.add_(dkq[:, :, :C]), de, out=grads.k[part])
        grads.gamma.add_(token_sum(torch.mul(da, error).addcmul_(de, x_hat)))
        grads.beta.add_(token_sum(de + d_out))
        torch.neg(de, out=grads.v[part])
        g = torch.stack([x.g_hat for x in losses])
        rate_gradient = dG2.mul_(g).sum(-1, keepdim=True)
        torch.mul(rate_gradient, torch.stack([x.r for x in losses]), out=grads.eta[part])

    def _read_backward(
        self, d_out: Tensor, grads: FrameGradients
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients, through the outputs, of `G1`, `G2`, `X2` and of `Q Kᵀ`."""
        group, C, h = self.group, self.group.C, self.group.h
        products, norm, causal = group.settings.products, group.settings.norm, group.settings.causal
        s, N = self.kq.shape[:2]
        x_hat, r = norm.normalise(self.Y2)
        grads.gamma.add_(token_sum(d_out * x_hat))
        dY2_n = project(d_out * norm.gamma, x_hat).mul_(r)
        self.y[:, :, C : 2 * C].copy_(dY2_n)
        self.y[:, :, 2 * C :].copy_(self.G2)
        self.x[:, :, :C, :h].copy_(self.X2[..., :h])
        dY2 = flat(dY2_n)
        G1, G2, X2, Xb = (flat(x) for x in (self.G1, self.G2, self.X2, self.Xb))
        S2 = lower_triangle_(products.mul(dY2, G2.mT).neg_(), causal)
        dXb = group.Y1[:s]
        products.mul(dY2, flat(self.W2)[:, :h].mT, out=flat(dXb))
        products.add(flat(dXb), S2, X2[..., :h])
        pending = self.frames.pending
        if self.first and pending is not None:
            dXb[0].sub_(products.mul(dY2_n[0], pending[1][:, :h].mT))
        # dZ1 over dY1, which dW1 and the gradients of keys over queries are products with.
        self.hidden = group.hidden[:s]
        dY1 = flat(torch.mul(dXb, self.slope_y, out=self.hidden[:, :, C:]))
        S1 = lower_triangle_(products.mul(dY1, G1.mT).neg_(), causal)
        # Their buffers are free by now.
        dG1 = products.mul(self.A1.mT, dY1, out=flat(self.slope_y)).neg_()
        dX2 = products.mul(S2.mT, Xb[..., :h], out=flat(dXb))
        dG2 = products.mul(self.A2.mT, dY2).neg_()
        return (*(x.unflatten(0, (s, N)) for x in (dG1, dG2, dX2)), S1)

    def _learn_backward(
        self,
        dG1: Tensor,
        dG2: Tensor,
        dX2: Tensor,
        d_weights: list[Tensor],
        grads: FrameGradients,
    ) -> None:
        """Back through the chain of states.

        `dG2` becomes the gradient of `G2`; `grads.k` and `grads.v` are given the gradients of keys
        through the updates, without the mask, and of the loss's `a`.
        """
        group, C, d, h = self.group, self.group.C, self.group.d, self.group.h
        products, frames, part = group.settings.products, self.frames, self.part
        U1, U2 = d_weights
        U1_T, U2_rows, U2_T = U1[:, :d].mT, U2, U2[:, :h].mT
        curvature = group.tokens.P[part]
        group.gelu.curvature(group.tokens.Z1[part], curvature)
        completed = frames.completed[part]
        k_learnt = self.kq[:, :, :C] * completed
        G2_learnt = self.G2 * completed
        steps = list(
            zip(
                range(part.start, part.stop),
                completed.unbind(),
                k_learnt.unbind(),
                self.kq.mT.unbind(),
                self.X2.unbind(),
                self.W2[:, :, :h].unbind(),
                self.W2[:, :, :h].mT.unbind(),
                self.G1.unbind(),
                G2_learnt.unbind(),
                group.tokens.slope[part].unbind(),
                curvature.unbind(),
                self.hidden.unbind(),
                self.hidden[:, :, :C].unbind(),
                self.x.mT.unbind(),
                self.x[:, :, 2 * C :, :h].unbind(),
                self.y.unbind(),
                self.y[:, :, :C].unbind(),
                dG1.unbind(),
                dG2.unbind(),
                dX2.unbind(),
                grads.k[part].unbind(),
                grads.v[part].unbind(),
                strict=True,
            )
        )
        for (
            m, mask, k_m, kq_T, X2_m, W2_m, W2_T, G1_m, G2_m, slope, curve, hidden, dZ1, x_T, dP,
            y, dZ2_row, dG1_m, dG2_m, dX2_m, dk_m, da_m,
        ) in reversed(steps):  # fmt: skip
            products.add(dG1_m, k_m, U1, alpha=-1.0, bias=True)
            dG2_m.addcmul_(mask, products.mul(X2_m, U2_rows, bias=True), value=-1.0)
            torch.mul(dG1_m, slope, out=dP)
            products.add(dG2_m, dP, W2_m)
            u = dG2_m * group.rates[m]
            dZ2, da = group.loss.backward(u, group.losses[m])
            dZ2_row.copy_(dZ2)
            da_m.copy_(da)
            products.add(dX2_m, G2_m, U2_T, alpha=-1.0)
            products.add(dX2_m, dZ2, W2_T)
            torch.mul(dG1_m, curve, out=dZ1).addcmul_(dX2_m, slope)
            products.mul(G1_m, U1_T, out=dk_m)
            if m == 0 and grads.pending is not None:
                self._pending_gradients(U1, U2, grads.pending)
            products.update(U1, kq_T, hidden)
            products.update(U2, x_T, y)

    def _pending_gradients(self, U1: Tensor, U2: Tensor, d_pending: list[Tensor]) -> None:
        C, products = self.group.C, self.group.settings.products
        q, Xb, completed = self.kq[0, :, C:], self.Xb[0], self.frames.completed[0]
        torch.mul(U1, completed, out=d_pending[0]).neg_()
        torch.mul(U2, completed, out=d_pending[1]).neg_()
        products.update(d_pending[0], q.mT, self.hidden[0, :, C:], alpha=-1.0)
        products.update(d_pending[1], Xb.mT, self.y[0, :, C : 2 * C], alpha=-1.0)
