"""A group of mini-batches of TTT-MLP, forward and backward, written by hand (no autograd).

Only the chain through the keys is serial (`_learn`); queries read from all states of the group at
once (`_read`). Backward runs `_learn` and `_read` again and walks back. Formulas: arXiv 2407.04620,
section 2.5, for the dual form; backward is derived from it by hand. Shapes: `ttt_dist.ops.group`.

The inner learning rate enters in one place alone, `G2 = η r ĝ`; everything behind is linear in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_dist.ops.activation import gelu_, gelu_second_derivative
from ttt_dist.ops.group import (
    FrameGradients,
    Frames,
    Settings,
    flat,
    lower_triangle_,
    token_sum,
    with_ones,
)
from ttt_dist.ops.inner_loss import TokenLoss, project


class MlpGroup:
    """Buffers for groups of up to `n` mini-batches, used again from group to group.

    Args:
        n, N, C, d, h: see `ttt_dist.ops.group`; h is the hidden width.
        like: gives dtype and device.
    """

    def __init__(self, settings: Settings, n: int, N: int, C: int, d: int, h: int, like: Tensor):
        self.settings, self.C, self.d, self.h = settings, C, d, h
        self.gamma_square = settings.norm.gamma.square()

        def buffer(*shape: int) -> Tensor:
            return like.new_empty(shape)

        self._W1, self._W2 = buffer(n + 1, N, d + 1, h), buffer(n + 1, N, h + 1, d)
        self._hidden = buffer(n, N, 2 * C, h)  # Z1 over Y1; in backward their gradients
        # X2 over Xb over dP, and beside them dZ2 over dY2 over G2: one product sums dW2 up.
        self._x = with_ones((n, N, 3 * C), h, like)
        self._x[:, :, 2 * C :, h] = 0.0
        self._y = buffer(n, N, 3 * C, d)
        self._slope = buffer(n, N, C, h)  # gelu'(Z1)
        self._P, self._G1 = buffer(n, N, C, h), buffer(n, N, C, h)

    def forward(self, frames: Frames, weights: list[Tensor]) -> Tensor:
        """Outputs `[n, N, C, d]`; `weights` are replaced, in place, by those after the group."""
        self._start(frames, weights)
        self._learn(frames)
        self._read(frames)
        for w, stack in zip(weights, (self._W1, self._W2), strict=True):
            w.copy_(stack[self.n])
        x_hat, _ = self.settings.norm.normalise(self.Y2)
        norm = self.settings.norm
        return torch.addcmul(norm.beta, norm.gamma, x_hat).add_(frames.q)

    def _start(self, frames: Frames, weights: list[Tensor]) -> None:
        n, C = frames.v.shape[0], self.C
        self.n = n
        self._W1[0].copy_(weights[0])
        self._W2[0].copy_(weights[1])
        self.W1, self.W2 = self._W1[:n], self._W2[:n]
        self.hidden, self.x, self.y = self._hidden[:n], self._x[:n], self._y[:n]
        self.slope, self.P, self.G1 = self._slope[:n], self._P[:n], self._G1[:n]
        self.X2, self.Xb, self.dP = self.x[:, :, :C], self.x[:, :, C : 2 * C], self.x[:, :, 2 * C :]
        self.G2 = self.y[:, :, 2 * C :]
        # Keys whose contributions reach the weights: the mask costs nothing here.
        self.k_learnt = frames.kq[:, :, :C] * frames.completed
        norm = self.settings.norm
        self.gamma_shift = (frames.k - frames.v).add_(norm.beta).mul_(norm.gamma)
        self.losses: list[TokenLoss] = []

    def _learn(self, frames: Frames) -> None:
        """The chain of states, `self.W1`, `self.W2`, and the token gradients `G1`, `G2`."""
        C, h, products = self.C, self.h, self.settings.products
        for m in range(self.n):
            W1, W2 = self._W1[m], self._W2[m]
            hidden = products.mul(frames.kq[m], W1, out=self.hidden[m])
            gelu_(hidden[:, :C], value=self.X2[m, :, :, :h], derivative=self.slope[m])
            Z2 = products.mul(self.X2[m], W2)
            loss = TokenLoss.of(Z2, self.gamma_shift[m], self.gamma_square, self.settings.norm)
            G2 = torch.mul(loss.g_hat, loss.r * frames.eta[m], out=self.G2[m])
            P = products.mul(G2, W2[:, :h].mT, out=self.P[m])
            G1 = torch.mul(P, self.slope[m], out=self.G1[m])
            products.add(W1, self.k_learnt[m].mT, G1, alpha=-1.0, out=self._W1[m + 1])
            learnt = G2 * frames.completed[m]
            products.add(W2, self.X2[m].mT, learnt, alpha=-1.0, out=self._W2[m + 1])
            self.losses.append(loss)
            if m == 0 and frames.pending is not None:
                for stack, p in zip((self._W1, self._W2), frames.pending, strict=True):
                    stack[1].addcmul_(frames.completed[0], p, value=-1.0)

    def _read(self, frames: Frames) -> None:
        """What queries see: `A1`, `A2`, the inner network's outputs `Y2`."""
        C, h, products, causal = self.C, self.h, self.settings.products, self.settings.causal
        k, q = flat(frames.kq[:, :, :C]), flat(frames.kq[:, :, C:])
        self.A1 = lower_triangle_(products.mul(q, k.mT), causal)
        learnt = products.mul(self.A1, flat(self.G1)).unflatten(0, (self.n, -1))
        Y1 = self.hidden[:, :, C:].sub_(learnt)
        if frames.pending is not None:
            Y1[0].sub_(products.mul(frames.kq[0, :, C:], frames.pending[0]))
        self.slope_y = torch.empty_like(learnt)
        gelu_(Y1, value=self.Xb[..., :h], derivative=self.slope_y)
        X2, Xb = flat(self.X2), flat(self.Xb)
        self.A2 = lower_triangle_(products.mul(Xb, X2.mT), causal)
        Y2 = products.mul(Xb, flat(self.W2))
        products.add(Y2, self.A2, flat(self.G2), alpha=-1.0)
        self.Y2 = Y2.unflatten(0, (self.n, -1))
        if frames.pending is not None:
            self.Y2[0].sub_(products.mul(self.Xb[0], frames.pending[1]))

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
        self._start(frames, weights)
        self._learn(frames)
        self._read(frames)
        # What G1 changes by with Z1; from here on `hidden` holds gradients.
        self.P.mul_(gelu_second_derivative(self.hidden[:, :, : self.C]))
        dG1, dG2, dX2, d_scores, d_gamma = self._read_backward(frames, d_out)
        d_keys, u, da, d_pending = self._learn_backward(frames, dG1, dG2, dX2, d_weights)
        return self._frame_gradients(frames, d_out, d_scores, d_gamma, d_keys, u, da, d_pending)

    def _read_backward(
        self, frames: Frames, d_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients, through the outputs, of `G1`, `G2`, `X2`, of `q kᵀ`, and of gamma."""
        C, h, products, causal = self.C, self.h, self.settings.products, self.settings.causal
        norm, n = self.settings.norm, self.n
        x_hat, r = norm.normalise(self.Y2)
        d_gamma = token_sum(d_out * x_hat)
        dY2 = torch.mul(project(d_out * norm.gamma, x_hat), r, out=self.y[:, :, C : 2 * C])
        dY2, G2, X2, Xb = flat(dY2), flat(self.G2), flat(self.X2), flat(self.Xb)
        S2 = lower_triangle_(products.mul(dY2, G2.mT).neg_(), causal)
        dXb = products.mul(dY2, flat(self.W2)[:, :h].mT)
        products.add(dXb, S2, X2[..., :h])
        dXb = dXb.unflatten(0, (n, -1))
        if frames.pending is not None:
            dXb[0].sub_(products.mul(self.y[0, :, C : 2 * C], frames.pending[1][:, :h].mT))
        dY1 = flat(torch.mul(dXb, self.slope_y, out=self.hidden[:, :, C:]))
        G1 = flat(self.G1)
        S1 = lower_triangle_(products.mul(dY1, G1.mT).neg_(), causal)
        dG1 = products.mul(self.A1.mT, dY1).neg_()
        dG2 = products.mul(self.A2.mT, dY2).neg_()
        dX2 = products.mul(S2.mT, Xb[..., :h])
        dG1, dG2, dX2, S1 = (x.unflatten(0, (n, -1)) for x in (dG1, dG2, dX2, S1))
        return dG1, dG2, dX2, S1, d_gamma

    def _learn_backward(
        self, frames: Frames, dG1: Tensor, dG2: Tensor, dX2: Tensor, d_weights: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor] | None]:
        """Back through the chain of states.

        Returns:
            The gradient of keys through the updates of W1, `[n, N, C, d]`; gradients of `G2 / η`
            and of `a`, one tensor a mini-batch; those of `pending`.
        """
        C, d, h, products = self.C, self.d, self.h, self.settings.products
        U1, U2 = d_weights
        d_keys = torch.empty_like(frames.v)
        d_pending: list[Tensor] | None = None
        d_G2s, das = [], []
        for m in reversed(range(self.n)):
            completed, loss, W2 = frames.completed[m], self.losses[m], self._W2[m]
            dG1_m = products.add(dG1[m], self.k_learnt[m], U1, alpha=-1.0)
            dG2_m = dG2[m].addcmul_(completed, products.mul(self.X2[m], U2), value=-1.0)
            dP = torch.mul(dG1_m, self.slope[m], out=self.dP[m, :, :, :h])
            products.add(dG2_m, dP, W2[:, :h])
            da, dZ2 = loss.backward(dG2_m * (loss.r * frames.eta[m]), self.gamma_square)
            self.y[m, :, :C].copy_(dZ2)
            dX2_m = products.add(dX2[m], self.G2[m] * completed, U2[:, :h].mT, alpha=-1.0)
            products.add(dX2_m, dZ2, W2[:, :h].mT)
            dZ1 = torch.mul(dG1_m, self.P[m], out=self.hidden[m, :, :C])
            dZ1.addcmul_(dX2_m, self.slope[m])
            products.mul(self.G1[m], U1[:, :d].mT, out=d_keys[m])
            if m == 0 and frames.pending is not None:
                d_pending = self._pending_gradients(frames, U1, U2)
            products.add(U1, frames.kq[m].mT, self.hidden[m])
            products.add(U2, self.x[m].mT, self.y[m])
            d_G2s.append(dG2_m)
            das.append(da)
        return d_keys.mul_(frames.completed), d_G2s[::-1], das[::-1], d_pending

    def _pending_gradients(self, frames: Frames, U1: Tensor, U2: Tensor) -> list[Tensor]:
        C, products, completed = self.C, self.settings.products, frames.completed[0]
        d_pending = [(U * completed).neg_() for U in (U1, U2)]
        q, Xb = frames.kq[0, :, C:], self.Xb[0]
        products.add(d_pending[0], q.mT, self.hidden[0, :, C:], alpha=-1.0)
        products.add(d_pending[1], Xb.mT, self.y[0, :, C : 2 * C], alpha=-1.0)
        return d_pending

    def _frame_gradients(
        self,
        frames: Frames,
        d_out: Tensor,
        d_scores: Tensor,
        d_gamma: Tensor,
        d_keys: Tensor,
        d_G2s: list[Tensor],
        das: list[Tensor],
        d_pending: list[Tensor] | None,
    ) -> FrameGradients:
        C, d, products, norm = self.C, self.d, self.settings.products, self.settings.norm
        losses, S1 = self.losses, flat(d_scores)
        dkq = products.mul(flat(self.hidden), flat(self.W1)[:, :d].mT).unflatten(0, (self.n, -1))
        dk, dq = dkq[:, :, :C], dkq[:, :, C:]
        if frames.pending is not None:
            dq[0].sub_(products.mul(self.hidden[0, :, C:], frames.pending[0][:, :d].mT))
        dq = products.mul(S1, flat(frames.k)).unflatten(0, (self.n, -1)).add_(dq).add_(d_out)
        dk = products.mul(S1.mT, flat(frames.q)).unflatten(0, (self.n, -1)).add_(dk).sub_(d_keys)
        x_hat, da = torch.stack([x.x_hat for x in losses]), torch.stack(das)
        de = da * norm.gamma
        error = torch.addcmul(norm.beta, norm.gamma, x_hat).sub_(frames.v).add_(frames.k)
        d_gamma = d_gamma + token_sum(da * error + de * x_hat)
        d_beta = token_sum(d_out + de)
        d_eta = (torch.stack(d_G2s) * torch.stack([x.g_hat for x in losses])).sum(-1, keepdim=True)
        d_eta *= torch.stack([x.r for x in losses])
        return FrameGradients(dq, dk.add_(de), -de, d_eta, d_gamma, d_beta, d_pending)
