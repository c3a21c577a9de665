"""A group of mini-batches of TTT-Linear, forward and backward, written by hand (no autograd).

As `ttt_dist.ops.mlp_forward` and `mlp_backward` with a single linear map: the inner loss sits right
on it.

    r ĝ = gradient of the inner loss at K W1;  G = η r ĝ;  W1 ← W1 - Kᵀ G;  Y = Q W1 - tril(Q Kᵀ) G
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_dist.ops.group import (
    FrameGradients,
    Frames,
    Settings,
    flat,
    lower_triangle_,
    token_sum,
)
from ttt_dist.ops.inner_loss import InnerLoss, TokenLoss, project


class LinearGroup:
    """Buffers for groups of up to `n` mini-batches, used again from group to group.

    Args:
        n, N, C, d: see `ttt_dist.ops.group`.
        like: gives dtype and device.
    """

    def __init__(self, settings: Settings, n: int, N: int, C: int, d: int, like: Tensor):
        self.settings, self.C, self.d = settings, C, d
        self.loss = InnerLoss(settings.norm, N, C, settings.compiled)
        self._W1 = like.new_empty(n + 1, N, d + 1, d)
        self._y = like.new_empty(n, N, 2 * C, d)  # Z over Y; in backward their gradients
        self._G = like.new_empty(n, N, C, d)

    def forward(self, frames: Frames, weights: list[Tensor]) -> Tensor:
        """Outputs `[n, N, C, d]`; `weights` are replaced, in place, by those after the group."""
        self._learn(frames, weights)
        self._read(frames)
        weights[0].copy_(self._W1[self.n])
        return self.settings.norm.read(self.Y).add_(frames.q)

    def _learn(self, frames: Frames, weights: list[Tensor]) -> None:
        """The chain of states, `W1`, and the token gradients `G`."""
        C, products = self.C, self.settings.products
        self.n = n = frames.v.shape[0]
        self._W1[0].copy_(weights[0])
        self.W1, self.y, self.G = self._W1[:n], self._y[:n], self._G[:n]
        # Masked keys mask what reaches W1 at no cost in the loop.
        self.k_learnt = frames.kq[:, :, :C] * frames.completed
        shifts = self.loss.shift(frames.k, frames.v)
        self.losses: list[TokenLoss] = []
        self.rates: list[Tensor] = []
        steps = zip(
            self.W1.unbind(),
            self._W1[1 : n + 1].unbind(),
            frames.kq.unbind(),
            self.k_learnt.mT.unbind(),
            frames.eta.unbind(),
            shifts.unbind(),
            self.y.unbind(),
            self.y[:, :, :C].unbind(),
            self.G.unbind(),
            strict=True,
        )
        for m, (W1, W1_next, kq, k_T, eta, shift, y, z, G) in enumerate(steps):
            products.mul(kq, W1, out=y, bias=True)
            loss, rate = self.loss.gradient(z, shift, eta, G)
            products.update(W1, k_T, G, alpha=-1.0, out=W1_next)
            if m == 0 and frames.pending is not None:
                W1_next.addcmul_(frames.completed[0], frames.pending[0], value=-1.0)
            self.losses.append(loss)
            self.rates.append(rate)

    def _read(self, frames: Frames) -> None:
        """What queries see: `A` and the inner network's outputs `Y`."""
        C, products = self.C, self.settings.products
        k, q = flat(frames.kq[:, :, :C]), flat(frames.kq[:, :, C:])
        self.A = lower_triangle_(products.mul(q, k.mT), self.settings.causal)
        learnt = products.mul(self.A, flat(self.G)).unflatten(0, (self.n, -1))
        self.Y = self.y[:, :, C:].sub_(learnt)
        if frames.pending is not None:
            self.Y[0].sub_(products.mul(frames.kq[0, :, C:], frames.pending[0], bias=True))

    def backward(
        self, frames: Frames, weights: list[Tensor], d_out: Tensor, d_weights: list[Tensor]
    ) -> FrameGradients:
        """Gradients of the group's tokens; arguments as in `MlpBackward.backward`."""
        C, n, products, norm = self.C, frames.v.shape[0], self.settings.products, self.settings.norm
        self._learn(frames, weights)
        self._read(frames)
        grads = FrameGradients.empty(frames)
        x_hat_y, r_y = norm.normalise(self.Y)
        dY = flat(torch.mul(project(d_out * norm.gamma, x_hat_y), r_y, out=self.Y))
        S = lower_triangle_(products.mul(dY, flat(self.G).mT).neg_(), self.settings.causal)
        dG = products.mul(self.A.mT, dY).neg_().unflatten(0, (n, -1))

        self._learn_backward(frames, dG, d_weights[0], grads)
        dkq = products.mul(flat(self.y), flat(self.W1)[:, : self.d].mT).unflatten(0, (n, -1))
        if frames.pending is not None:
            dkq[0, :, C:].sub_(products.mul(self.y[0, :, C:], frames.pending[0][:, : self.d].mT))
        dq = products.mul(S, flat(frames.k)).unflatten(0, (n, -1)).add_(d_out)
        torch.add(dq, dkq[:, :, C:], out=grads.q)
        through_updates = grads.k.mul_(frames.completed)
        dk = products.mul(S.mT, flat(frames.q)).unflatten(0, (n, -1)).sub_(through_updates)
        x_hat, da = torch.stack([x.x_hat for x in self.losses]), grads.v
        error = torch.addcmul(norm.beta, norm.gamma, x_hat).sub_(frames.v).add_(frames.k)
        de = da * norm.gamma
        torch.add(dk.add_(dkq[:, :, :C]), de, out=grads.k)
        grads.gamma.add_(token_sum(torch.mul(da, error).addcmul_(de, x_hat)))
        grads.gamma.add_(token_sum(d_out * x_hat_y))
        grads.beta.add_(token_sum(de + d_out))
        torch.neg(de, out=grads.v)
        rate_gradient = dG.mul_(torch.stack([x.g_hat for x in self.losses])).sum(-1, keepdim=True)
        torch.mul(rate_gradient, torch.stack([x.r for x in self.losses]), out=grads.eta)
        return grads

    def _learn_backward(
        self, frames: Frames, dG: Tensor, U1: Tensor, grads: FrameGradients
    ) -> None:
        """Back through the chain of states.

        `dG` and `U1` are completed in place; `grads.k` and `grads.v` are given the gradients of
        keys through the updates, without the mask, and of the loss's `a`.
        """
        C, products = self.C, self.settings.products
        U1_T = U1[:, : self.d].mT
        steps = list(
            zip(
                range(self.n),
                self.k_learnt.unbind(),
                frames.kq.mT.unbind(),
                self.G.unbind(),
                self.losses,
                self.rates,
                self.y.unbind(),
                self.y[:, :, :C].unbind(),
                dG.unbind(),
                grads.k.unbind(),
                grads.v.unbind(),
                strict=True,
            )
        )
        for m, k, kq_T, G, loss, rate, y, dZ, dG_m, dk_m, da_m in reversed(steps):
            products.add(dG_m, k, U1, alpha=-1.0, bias=True)
            dz, da = self.loss.backward(dG_m * rate, loss)
            dZ.copy_(dz)
            da_m.copy_(da)
            products.mul(G, U1_T, out=dk_m)
            if m == 0 and grads.pending is not None:
                d_pending = torch.mul(U1, frames.completed[0], out=grads.pending[0]).neg_()
                q_T, dY = frames.kq[0, :, C:].mT, self.y[0, :, C:]
                products.update(d_pending, q_T, dY, alpha=-1.0)
            products.update(U1, kq_T, y)
