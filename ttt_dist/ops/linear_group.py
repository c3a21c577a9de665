"""A group of mini-batches of TTT-Linear, forward and backward, written by hand (no autograd).

As `ttt_dist.ops.mlp_group` with a single linear map: the inner loss sits right on it.
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
from ttt_dist.ops.inner_loss import TokenLoss, project


class LinearGroup:
    """Buffers for groups of up to `n` mini-batches, used again from group to group.

    Args:
        n, N, C, d: see `ttt_dist.ops.group`.
        like: gives dtype and device.
    """

    def __init__(self, settings: Settings, n: int, N: int, C: int, d: int, like: Tensor):
        self.settings, self.C, self.d = settings, C, d
        self.gamma_square = settings.norm.gamma.square()
        self._W1 = like.new_empty(n + 1, N, d + 1, d)
        self._y = like.new_empty(n, N, 2 * C, d)  # Z over Y; in backward their gradients
        self._G1 = like.new_empty(n, N, C, d)

    def forward(self, frames: Frames, weights: list[Tensor]) -> Tensor:
        """Outputs `[n, N, C, d]`; `weights` are replaced, in place, by those after the group."""
        self._start(frames, weights)
        self._learn(frames)
        self._read(frames)
        weights[0].copy_(self._W1[self.n])
        norm = self.settings.norm
        x_hat, _ = norm.normalise(self.Y)
        return torch.addcmul(norm.beta, norm.gamma, x_hat).add_(frames.q)

    def _start(self, frames: Frames, weights: list[Tensor]) -> None:
        self.n = n = frames.v.shape[0]
        self._W1[0].copy_(weights[0])
        self.W1, self.y, self.G1 = self._W1[:n], self._y[:n], self._G1[:n]
        # Keys whose contributions reach the weights: the mask costs nothing here.
        self.k_learnt = frames.kq[:, :, : self.C] * frames.completed
        norm = self.settings.norm
        self.gamma_shift = (frames.k - frames.v).add_(norm.beta).mul_(norm.gamma)
        self.losses: list[TokenLoss] = []

    def _learn(self, frames: Frames) -> None:
        """The chain of states, `self.W1`, and the token gradients `G1`."""
        products = self.settings.products
        for m in range(self.n):
            W1 = self._W1[m]
            y = products.mul(frames.kq[m], W1, out=self.y[m])
            loss = TokenLoss.of(
                y[:, : self.C], self.gamma_shift[m], self.gamma_square, self.settings.norm
            )
            G1 = torch.mul(loss.g_hat, loss.r * frames.eta[m], out=self.G1[m])
            products.add(W1, self.k_learnt[m].mT, G1, alpha=-1.0, out=self._W1[m + 1])
            self.losses.append(loss)
            if m == 0 and frames.pending is not None:
                self._W1[1].addcmul_(frames.completed[0], frames.pending[0], value=-1.0)

    def _read(self, frames: Frames) -> None:
        """What queries see: `A1` and the inner network's outputs `Y`."""
        C, products = self.C, self.settings.products
        k, q = flat(frames.kq[:, :, :C]), flat(frames.kq[:, :, C:])
        self.A1 = lower_triangle_(products.mul(q, k.mT), self.settings.causal)
        learnt = products.mul(self.A1, flat(self.G1)).unflatten(0, (self.n, -1))
        self.Y = self.y[:, :, C:].sub_(learnt)
        if frames.pending is not None:
            self.Y[0].sub_(products.mul(frames.kq[0, :, C:], frames.pending[0]))

    def backward(
        self, frames: Frames, weights: list[Tensor], d_out: Tensor, d_weights: list[Tensor]
    ) -> FrameGradients:
        """Gradients of the group's tokens; arguments as in `MlpGroup.backward`."""
        C, n, products, norm = self.C, frames.v.shape[0], self.settings.products, self.settings.norm
        self._start(frames, weights)
        self._learn(frames)
        self._read(frames)
        x_hat_y, r_y = norm.normalise(self.Y)
        d_gamma = token_sum(d_out * x_hat_y)
        dY = flat(torch.mul(project(d_out * norm.gamma, x_hat_y), r_y, out=self.Y))
        S1 = lower_triangle_(products.mul(dY, flat(self.G1).mT).neg_(), self.settings.causal)
        dG1 = products.mul(self.A1.mT, dY).neg_().unflatten(0, (n, -1))

        d_keys, das, d_pending = self._learn_backward(frames, dG1, d_weights[0])
        dkq = products.mul(flat(self.y), flat(self.W1)[:, : self.d].mT).unflatten(0, (n, -1))
        dk, dq = dkq[:, :, :C], dkq[:, :, C:]
        if frames.pending is not None:
            dq[0].sub_(products.mul(self.y[0, :, C:], frames.pending[0][:, : self.d].mT))
        dq = products.mul(S1, flat(frames.k)).unflatten(0, (n, -1)).add_(dq).add_(d_out)
        dk = products.mul(S1.mT, flat(frames.q)).unflatten(0, (n, -1)).add_(dk).sub_(d_keys)
        losses = self.losses
        x_hat, da = torch.stack([x.x_hat for x in losses]), torch.stack(das)
        de = da * norm.gamma
        error = torch.addcmul(norm.beta, norm.gamma, x_hat).sub_(frames.v).add_(frames.k)
        d_gamma = d_gamma + token_sum(da * error + de * x_hat)
        d_eta = (dG1 * torch.stack([x.g_hat for x in losses])).sum(-1, keepdim=True)
        d_eta *= torch.stack([x.r for x in losses])
        d_beta = token_sum(d_out + de)
        return FrameGradients(dq, dk.add_(de), -de, d_eta, d_gamma, d_beta, d_pending)

    def _learn_backward(
        self, frames: Frames, dG1: Tensor, U1: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
        """Back through the chain of states; `dG1` and `U1` are completed in place.

        Returns:
            The gradient of keys through the updates, `[n, N, C, d]`; those of `a`, one tensor a
            mini-batch; those of `pending`.
        """
        C, products = self.C, self.settings.products
        d_keys = torch.empty_like(frames.v)
        d_pending: list[Tensor] | None = None
        das = []
        for m in reversed(range(self.n)):
            loss = self.losses[m]
            dG1_m = products.add(dG1[m], self.k_learnt[m], U1, alpha=-1.0)
            da, dZ = loss.backward(dG1_m * (loss.r * frames.eta[m]), self.gamma_square)
            self.y[m, :, :C].copy_(dZ)
            products.mul(self.G1[m], U1[:, : self.d].mT, out=d_keys[m])
            if m == 0 and frames.pending is not None:
                completed, q, dY = frames.completed[0], frames.kq[0, :, C:], self.y[0, :, C:]
                dP = (U1 * completed).neg_()
                d_pending = [products.add(dP, q.mT, dY, alpha=-1.0)]
            products.add(U1, frames.kq[m].mT, self.y[m])
            das.append(da)
        return d_keys.mul_(frames.completed), das[::-1], d_pending
