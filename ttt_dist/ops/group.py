"""What a scan's kernels are given and give back: groups of consecutive mini-batches, packed.

A group holds `n` mini-batches of `C` tokens for `N` lanes times heads, mini-batches first, so that
one mini-batch, and all of them together, are contiguous. Biases ride along in the products: keys,
queries and hidden values have a column of ones, weights a last row that is the bias:
`W1 [N, d + 1, h]`, `W2 [N, h + 1, d]`. That column is also the `+ 1` of the dual form's scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_dist.ops.inner_loss import PackedNorm
from ttt_dist.ops.products import Products

# Columns that a row of an augmented matrix takes beyond its width: the ones, and what keeps rows
# aligned to 64 bytes.
PADDING = 16


@dataclass(frozen=True)
class Settings:
    """What stays the same over a scan; `compiled`: see `ttt_dist.ops.pointwise`."""

    causal: bool
    norm: PackedNorm
    products: Products
    compiled: bool


@dataclass(frozen=True)
class Frames:
    """The tokens of one group.

    Attributes:
        kq: `[n, N, 2C, d + 1]`, keys over queries, with the column of ones; rows may be padded.
        v: `[n, N, C, d]`.
        eta: `[n, N, C, 1]`, zero at positions without a frame.
        completed: `[n, N, 1, 1]`, one where a lane completes the mini-batch, so that its weights
            change, else zero.
        pending: `(P1, P2)` like the weights: what earlier tokens of the first mini-batch
            contribute; None where there are none.
    """

    kq: Tensor
    v: Tensor
    eta: Tensor
    completed: Tensor
    pending: list[Tensor] | None

    @property
    def C(self) -> int:  # noqa: N802
        return self.v.shape[2]

    @property
    def k(self) -> Tensor:
        """`[n, N, C, d]`"""
        return self.kq[:, :, : self.C, :-1]

    @property
    def q(self) -> Tensor:
        """`[n, N, C, d]`"""
        return self.kq[:, :, self.C :, :-1]


@dataclass(frozen=True)
class FrameGradients:
    """Gradients of a group's `q`, `k`, `v` `[n, N, C, d]` and `eta` `[n, N, C, 1]`, of the norm's
    `gamma`, `beta` `[N, 1, d]`, and of `pending`."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    gamma: Tensor
    beta: Tensor
    pending: list[Tensor] | None

    @classmethod
    def empty(cls, frames: Frames) -> FrameGradients:
        """Buffers for all of them; gamma's and beta's are sums that start at zero."""
        N, d = frames.v.shape[1], frames.v.shape[3]
        pending = None if frames.pending is None else [torch.empty_like(p) for p in frames.pending]
        return cls(
            torch.empty_like(frames.v),
            torch.empty_like(frames.v),
            torch.empty_like(frames.v),
            torch.empty_like(frames.eta),
            frames.v.new_zeros(N, 1, d),
            frames.v.new_zeros(N, 1, d),
            pending,
        )


def with_ones(rows: tuple[int, ...], width: int, like: Tensor) -> Tensor:
    """`[*rows, width + 1]` uninitialised but for the last column, ones; rows are padded."""
    x = like.new_empty(*rows, width + PADDING)[..., : width + 1]
    x[..., -1] = 1.0
    return x


def lower_triangle_(scores: Tensor, causal: bool) -> Tensor:
    """In place, `[..., C, C]`: nothing reads from later tokens where causal."""
    return scores.tril_() if causal else scores


def token_sum(x: Tensor) -> Tensor:
    """`[n, N, C, d]` to `[N, 1, d]`."""
    return x.sum((0, 2)).unsqueeze(1)


def flat(x: Tensor) -> Tensor:
    """`[n, N, ...]` to `[n N, ...]`: all mini-batches of a group in one batch of products."""
    return x.flatten(0, 1)


def slabs(n: int, size: int) -> list[slice]:
    """`n` mini-batches cut into slices of up to `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
