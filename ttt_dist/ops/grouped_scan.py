"""A whole scan in tensor code, forward and backward, group by group, on any device.

Only the weights between groups are kept for backward, which computes each group's mini-batches once
more. Here groups are packed; `mlp_forward`, `mlp_backward` and `linear_group` compute them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ttt_dist.ops.group import FrameGradients, Frames, Settings, with_ones
from ttt_dist.ops.inner_loss import PackedNorm
from ttt_dist.ops.linear_group import LinearGroup
from ttt_dist.ops.mlp_backward import MlpBackward
from ttt_dist.ops.mlp_forward import MlpForward
from ttt_dist.ops.products import Products
from ttt_dist.ops.scan_inputs import ScanInputs, empty_borders

_SLAB_VALUES = 2**16
_FORWARD_PIECE = 32  # mini-batches packed at once in forward, however long a group is


class ForwardGroups(Protocol):
    """Runs one group at a time; `MlpForward` documents arguments."""

    def forward(self, frames: Frames, weights: list[Tensor]) -> Tensor: ...


class BackwardGroups(Protocol):
    """Walks back through one group at a time; `MlpBackward` documents arguments."""

    def backward(
        self, frames: Frames, weights: list[Tensor], d_out: Tensor, d_weights: list[Tensor]
    ) -> FrameGradients: ...


def _forward_groups(inputs: ScanInputs) -> ForwardGroups:
    B, H, _, d = inputs.q.shape
    C, like = inputs.mini_batch_size, inputs.weights[0]
    if len(inputs.weights) == 2:
        n = min(_group(inputs), _FORWARD_PIECE)
        return LinearGroup(_settings(inputs), n, B * H, C, d, like)
    return MlpForward(_settings(inputs), B * H, C, d, like.shape[-1], like)


def _backward_groups(inputs: ScanInputs) -> BackwardGroups:
    B, H, _, d = inputs.q.shape
    C, like, n = inputs.mini_batch_size, inputs.weights[0], _group(inputs)
    if len(inputs.weights) == 2:
        return LinearGroup(_settings(inputs), n, B * H, C, d, like)
    h = like.shape[-1]
    # At once on a CPU: as many as fill a buffer of hidden values that still lies in a core's
    # second-level cache. On a GPU: all.
    slab = n if like.is_cuda else max(1, _SLAB_VALUES // (B * H * C * h))
    return MlpBackward(_settings(inputs), n, slab, B * H, C, d, h, like)


def _group(inputs: ScanInputs) -> int:
    """Mini-batches of the longest group."""
    return min(inputs.group_size, inputs.mini_batches)


def _settings(inputs: ScanInputs) -> Settings:
    B, H, _, d = inputs.q.shape
    gamma, beta = (
        x.expand(B, H, d).reshape(B * H, 1, d).contiguous() for x in (inputs.gamma, inputs.beta)
    )
    return Settings(
        inputs.causal,
        PackedNorm(gamma, beta, inputs.eps),
        Products(operand=inputs.q.dtype, compute=inputs.weights[0].dtype),
        inputs.compiled,
    )


def scan_forward(inputs: ScanInputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs `[B, H, L, d]`, weights after the scan, and those before every group, packed."""
    B, C = inputs.q.shape[0], inputs.mini_batch_size
    groups = _forward_groups(inputs)
    weights = _pack_weights(inputs.weights)
    out = torch.empty_like(inputs.q, memory_format=torch.contiguous_format)
    borders = empty_borders(inputs)
    for i, start in enumerate(inputs.group_starts):
        for border, w in zip(borders, weights, strict=True):
            border[i].copy_(w)
        stop = min(start + inputs.group_size, inputs.mini_batches)
        for first in range(start, stop, _FORWARD_PIECE):
            last = min(first + _FORWARD_PIECE, stop)
            y = groups.forward(_pack_frames(inputs, first, last), weights)
            _unpack(y, out[:, :, first * C : last * C])
    return out, _unpack_weights(weights, B), borders


def scan_backward(
    inputs: ScanInputs, borders: list[Tensor], d_out: Tensor, d_weights: list[Tensor]
) -> list[Tensor]:
    """Gradients of `q k v eta gamma beta`, of all weights and of all of `pending`, in this order.

    Args:
        borders: of `scan_forward`.
        d_out: `[B, H, L, d]`, any dtype.
        d_weights: gradients of the returned weights.
    """
    B, H, _, d = inputs.q.shape
    C = inputs.mini_batch_size
    groups = _backward_groups(inputs)
    dtype = inputs.weights[0].dtype
    dq, dk, dv, d_eta = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (inputs.q, inputs.k, inputs.v, inputs.eta)
    )
    U = _pack_weights(d_weights)
    d_gamma, d_beta = (torch.zeros(B * H, 1, d, dtype=dtype, device=d_out.device) for _ in "gb")
    d_pending: list[Tensor] = []
    for i, start in reversed(list(enumerate(inputs.group_starts))):
        frames = _pack_frames(inputs, start, start + inputs.group_size)
        piece = slice(start * C, (start + inputs.group_size) * C)
        grads = groups.backward(
            frames,
            [border[i] for border in borders],
            _pack(d_out[:, :, piece], C, dtype),
            U,
        )
        for y, x in ((grads.q, dq), (grads.k, dk), (grads.v, dv), (grads.eta, d_eta[..., None])):
            _unpack(y, x[:, :, piece])
        d_gamma += grads.gamma
        d_beta += grads.beta
        if grads.pending is not None:
            d_pending = _unpack_weights(grads.pending, B)
    by_head = (x.view(B, H, d).sum(0) for x in (d_gamma, d_beta))
    return [dq, dk, dv, d_eta, *by_head, *_unpack_weights(U, B), *d_pending]


def _pack(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, l, d]` to contiguous `[n, B H, C, d]`; a last shorter mini-batch ends in zeros."""
    B, H, length, d = x.shape
    n = -(-length // C)
    packed = torch.empty(n, B * H, C, d, dtype=dtype, device=x.device)
    _pack_into(packed, x)
    return packed


def _pack_into(packed: Tensor, x: Tensor) -> None:
    """`[B, H, l, d]` into `[n, B H, C, d]`, which may be strided."""
    B, H, length, _ = x.shape
    n, C = packed.shape[0], packed.shape[2]
    full, rest = divmod(length, C)
    lanes = packed.unflatten(1, (B, H))
    lanes[:full].copy_(x[:, :, : full * C].unflatten(2, (full, C)).movedim(2, 0))
    if full < n:
        lanes[full, :, :, :rest].copy_(x[:, :, full * C :])
        lanes[full, :, :, rest:].zero_()


def _unpack(packed: Tensor, x: Tensor) -> None:
    """Inverse of `_pack_into`; what stands at positions past the end is dropped."""
    B, H, length, _ = x.shape
    n, C = packed.shape[0], packed.shape[2]
    full, rest = divmod(length, C)
    lanes = packed.unflatten(1, (B, H))
    x[:, :, : full * C].unflatten(2, (full, C)).copy_(lanes[:full].movedim(0, 2))
    if full < n:
        x[:, :, full * C :].copy_(lanes[full, :, :, :rest])


def _pack_frames(inputs: ScanInputs, start: int, stop: int) -> Frames:
    """Mini-batches `[start, stop)`, or up to the last one."""
    C, dtype = inputs.mini_batch_size, inputs.weights[0].dtype
    piece = slice(start * C, stop * C)
    q, k, v, eta = (x[:, :, piece] for x in (inputs.q, inputs.k, inputs.v, inputs.eta))
    B, H, length, d = q.shape
    n = -(-length // C)
    kq = with_ones((n, B * H, 2 * C), d, inputs.weights[0])
    _pack_into(kq[:, :, :C, :d], k)
    _pack_into(kq[:, :, C:, :d], q)
    borders = torch.arange(start + 1, start + n + 1, device=q.device) * C
    completed = (inputs.end >= borders[:, None]).to(dtype)  # [n, B]
    completed = completed.repeat_interleave(H, dim=1)[..., None, None]
    pending = _pack_weights(inputs.pending) if start == 0 and inputs.pending else None
    return Frames(kq, _pack(v, C, dtype), _pack(eta[..., None], C, dtype), completed, pending)


def _pack_weights(weights: list[Tensor]) -> list[Tensor]:
    """`(W1, b1, …)` `[B, H, …]` to one `[B H, rows + 1, columns]` a layer, the bias last."""
    return [
        torch.cat((W, b), dim=2).flatten(0, 1)
        for W, b in zip(weights[::2], weights[1::2], strict=True)
    ]


def _unpack_weights(packed: list[Tensor], B: int) -> list[Tensor]:
    weights = []
    for w in packed:
        w = w.unflatten(0, (B, -1))
        weights += [w[:, :, :-1].clone(memory_format=torch.contiguous_format)]
        weights += [w[:, :, -1:].clone(memory_format=torch.contiguous_format)]
    return weights
