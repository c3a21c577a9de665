"""Rotary position embedding on interleaved pairs (arXiv 2104.09864), positions within a mini-batch.

As in TTT-Video, a frame's position is its index in the stream modulo the mini-batch size: the table
has `mini_batch_size` rows for a stream of any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_dist.ops.state import compute_dtype


def rope_table(
    head_dim: int,
    mini_batch_size: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position · base^(-2i / head_dim)`, each `[mini_batch_size, d/2]`.

    A few KB: float64 by default, so that float64 inputs are rotated exactly; `apply_rope` takes the
    table to the dtype that it computes in.

    Raises:
        ValueError: `head_dim` isn't even and positive, or `mini_batch_size` is below 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected an even number above 0")
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size is {mini_batch_size}, expected at least 1")
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    position = torch.arange(mini_batch_size, dtype=torch.float64, device=device)
    angle = torch.outer(position, base ** (-pair / head_dim))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def stream_positions(offset: Tensor, length: int) -> Tensor:
    """Positions `[B, length]` of the next frames of lanes that stand at `offset` (int64 `[B]`)."""
    return offset[:, None] + torch.arange(length, device=offset.device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs `(x[2i], x[2i+1])` by the angle of their frame's position.

    Args:
        x: `[B, H, L, d]`; computed in float32 (float64 where x is) and returned in its dtype.
        cos, sin: of `rope_table`, `[C, d/2]`.
        positions: int64 `[L]` or `[B, L]`, at least 0, taken modulo C.

    Raises:
        ValueError: the shapes don't fit.
    """
    B, _, L, d = x.shape
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] * 2 != d:
        raise ValueError(
            f"cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}, "
            f"expected [C, {d // 2}] for a head_dim of {d}"
        )
    if list(positions.shape) not in ([L], [B, L]):
        raise ValueError(
            f"positions has shape {list(positions.shape)}, expected [{L}] or [{B}, {L}]"
        )
    dtype = compute_dtype(x.dtype)
    row = positions % cos.shape[0]
    c, s = (t.to(dtype)[row].unsqueeze(-3) for t in (cos, sin))  # [(B,) 1, L, d/2]
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
