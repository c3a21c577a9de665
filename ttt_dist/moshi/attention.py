"""Causal attention over a window, in time and memory O(T · context), and the window as a value.

Moshi's own forward builds a `[T, T]` mask in every layer: at an hour (45,000 frames) two gigabytes
of booleans, and as many scores to compute. Here each block of queries meets its own keys and the
`context - 1` before it. Frames that came earlier enter as an `AttentionWindow` and leave as
another one: nothing is written in a forward, which activation checkpointing runs twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor
from torch.nn import functional as F

# Shorter blocks don't pay: a kernel's tile is about as long.
_SHORTEST_BLOCK = 64


class AttentionWindow(NamedTuple):
    """What attention still sees of the frames before a call: `W = context - 1` a lane.

    Keys are kept as they are before rope. Only distances count there, so a call ropes them anew by
    their place in the window: positions stay small however long a recording is, where float32
    angles of large ones are inexact.

    Attributes:
        keys: `[B, H, W, d]`, newest last; `H` this rank's own heads.
        values: `[B, H, W, d]`.
        length: int64 `[B]`, how many of the newest are frames of the lane's recording; 0 where it
            begins. The others are hidden, whatever they hold.
    """

    keys: Tensor
    values: Tensor
    length: Tensor

    @classmethod
    def empty(
        cls,
        attention: StreamingMultiheadAttention,
        batch_size: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> AttentionWindow:
        """The window at a recording's start, in all lanes.

        Args:
            dtype: that of computation; a call casts the window to its own keys' dtype.

        Raises:
            ValueError: the attention's context is unlimited.
        """
        head_dim = attention.embed_dim // attention.num_heads
        shape = (batch_size, attention.num_heads, window_frames(attention), head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, torch.zeros(batch_size, device=device, dtype=torch.int64))

    def reset(self, lanes: Tensor) -> AttentionWindow:
        """A window that is empty in the lanes of `lanes` (bool `[B]`), and as it was in others."""
        mask = lanes.view(-1, 1, 1, 1)
        # Hidden frames have a weight of zero, which would still make NaN of an infinite value.
        return AttentionWindow(
            self.keys.masked_fill(mask, 0.0),
            self.values.masked_fill(mask, 0.0),
            self.length.masked_fill(lanes, 0),
        )

    def detach(self) -> AttentionWindow:
        """The same values, cut from the graph."""
        return AttentionWindow(self.keys.detach(), self.values.detach(), self.length)


def window_frames(attention: StreamingMultiheadAttention) -> int:
    """Frames of an `AttentionWindow`: `context - 1`.

    Raises:
        ValueError: the context is unlimited.
    """
    if attention.context is None:
        raise ValueError(
            "attention context: found none (unlimited), allowed are whole numbers from 1 on: what "
            "it sees of earlier pieces would grow with the recording"
        )
    return attention.context - 1


def attend(
    attention: StreamingMultiheadAttention, x: Tensor, window: AttentionWindow | None
) -> tuple[Tensor, AttentionWindow | None]:
    """Causal self-attention of a module that isn't streaming, with projections and rope.

    What the module's own forward computes, where `window` is None; otherwise what it would compute
    for these frames with the window's in front. Gradients flow through the window too.

    Args:
        attention: with packed projections (`packed.pack_attention`), split over heads or not.
        x: `[B, T, D]`.
        window: of the frames before; None: there are none, and none are kept.

    Returns:
        `[B, T, D]`, and the window after the last frame (None where none was given), in storage of
        its own.

    Raises:
        ValueError: the window isn't one of this module with this batch size.
    """
    projected: Tensor = attention.in_projs[0](x)
    heads = projected.unflatten(2, (3, attention.num_heads, -1))  # [B, T, 3, H, d]
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    if window is None:
        q, k = _rope(attention, q, k, 0)
        y = windowed_attention(q, k, v, attention.context)
        after = None
    else:
        _check_window(attention, window, k)
        before = AttentionWindow(window.keys.to(k), window.values.to(v), window.length)
        after = _append(before, k, v)
        past = before.keys.shape[2]
        _, earlier = _rope(attention, before.keys, before.keys, 0)  # as many queries as keys
        q, k = _rope(attention, q, k, past)
        k = torch.cat([earlier, k], dim=2)
        v = torch.cat([before.values, v], dim=2)
        y = windowed_attention(q, k, v, attention.context, past, before.length)
    return attention.out_projs[0](y.transpose(1, 2).flatten(2)), after


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: int | None,
    past: int = 0,
    length: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each query to its own and the `context - 1` frames before.

    Args:
        q: `[B, H, T, d]`.
        k: `[B, H, past + T, d]`; its last frame belongs to the last query.
        v: as `k`.
        context: frames that a query sees, its own included; None: all.
        past: how many keys come before the first query's.
        length: int `[B]`, how many of those, the newest, a lane may see; None: all.

    Returns:
        `[B, H, T, d]`.

    Raises:
        ValueError: `context` below 1, or not `past + T` keys and values.
    """
    frames = q.shape[2]
    if context is not None and context < 1:
        raise ValueError(f"context: found {context}, allowed are whole numbers from 1 on")
    if not k.shape[2] == v.shape[2] == past + frames:
        raise ValueError(
            f"found {k.shape[2]} keys and {v.shape[2]} values; {past} frames before {frames} "
            f"queries take {past + frames}"
        )
    reach = past + frames if context is None else min(context, past + frames)
    if past > reach - 1:
        k, v = k[:, :, past - reach + 1 :], v[:, :, past - reach + 1 :]
        past = reach - 1
    # The first block sees the past; no later one does, since a block is as long as the reach.
    block = max(reach, _SHORTEST_BLOCK)
    first = min(block, frames)
    parts = [_first_block(q, k, v, first, reach, past, length)]
    count, rest = divmod(frames - first, block)
    start = first
    for blocks, rows in ((count, block), (1, rest)):
        if blocks and rows:
            parts.append(_later_blocks(q, k, v, start, blocks, rows, reach, past))
        start += blocks * rows
    if len(parts) == 1:
        return parts[0]
    # Kernels lay their output out as [B, T, H, d], and so does the projection that reads it.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _first_block(
    q: Tensor, k: Tensor, v: Tensor, rows: int, reach: int, past: int, length: Tensor | None
) -> Tensor:
    """Attention of the first `rows` queries: `[B, H, rows, d]`."""
    q, k, v = q[:, :, :rows], k[:, :, : past + rows], v[:, :, : past + rows]
    if past == 0 and reach >= rows:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = _visible(rows, past, reach, q.device)[None, None]
    if past > 0 and length is not None:
        place = torch.arange(past + rows, device=q.device)
        mask = mask & (place >= past - length[:, None]).view(-1, 1, 1, past + rows)
    return F.scaled_dot_product_attention(q, k, v, mask)


def _later_blocks(
    q: Tensor, k: Tensor, v: Tensor, start: int, blocks: int, rows: int, reach: int, past: int
) -> Tensor:
    """Attention of `blocks` times `rows` queries from `start` on, all blocks as one batch."""
    before = reach - 1
    y = F.scaled_dot_product_attention(
        _in_blocks(q, start, blocks, rows, 0),
        _in_blocks(k, past + start, blocks, rows, before),
        _in_blocks(v, past + start, blocks, rows, before),
        _visible(rows, before, reach, q.device)[None, None],
    )
    y = y.transpose(1, 2).unflatten(0, (-1, blocks)).flatten(1, 2)  # [B, T of these, H, d]
    return y.transpose(1, 2)


def _in_blocks(x: Tensor, start: int, blocks: int, rows: int, before: int) -> Tensor:
    """Frames of `[B, H, ·, d]` from `start` on as `[B * blocks, H, before + rows, d]`."""
    own = x[:, :, start : start + blocks * rows].unflatten(2, (blocks, rows)).transpose(1, 2)
    if before > 0:
        ends = x[:, :, start - before : start + (blocks - 1) * rows]
        ends = ends.unfold(2, before, rows).permute(0, 2, 1, 4, 3)  # [B, blocks, H, before, d]
        own = torch.cat([ends, own], dim=3)
    return own.flatten(0, 1)


def _visible(rows: int, before: int, reach: int, device: torch.device) -> Tensor:
    """Bool `[rows, before + rows]`: keys that each query sees, the first at place `before`."""
    query = torch.arange(before, before + rows, device=device)
    age = query[:, None] - torch.arange(before + rows, device=device)
    return (age >= 0) & (age < reach)


def _append(window: AttentionWindow, k: Tensor, v: Tensor) -> AttentionWindow:
    """The window after frames with keys and values `[B, H, T, d]`."""
    size, frames = window.keys.shape[2], k.shape[2]

    def newest(old: Tensor, new: Tensor) -> Tensor:
        old = old[:, :, min(frames, size) :]
        # A copy even of new frames alone: a view would keep all of the piece's projections alive.
        return torch.cat([old, new[:, :, max(frames - size, 0) :]], dim=2)

    length = (window.length + frames).clamp(max=size)
    return AttentionWindow(newest(window.keys, k), newest(window.values, v), length)


def _check_window(
    attention: StreamingMultiheadAttention, window: AttentionWindow, k: Tensor
) -> None:
    B, H, _, d = k.shape
    expected = (B, H, window_frames(attention), d)
    found = [tuple(value.shape) for value in window]
    if found != [expected, expected, (B,)]:
        raise ValueError(
            f"attention window: found keys, values and lengths of shapes {found}, needed for this "
            f"module and batch are {[expected, expected, (B,)]}"
        )


def _rope(
    attention: StreamingMultiheadAttention, q: Tensor, k: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys `[B, H, T, d]` turned by their positions, `first` and on."""
    if attention.rope is None or q.shape[2] == 0:
        return q, k
    offset = torch.full((q.shape[0],), first, device=q.device, dtype=torch.int64)
    return attention.rope(q, k, offset)
