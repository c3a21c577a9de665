"""The one driver of the inner loop: any inner depth, any length, any offset of every lane.

Nothing here asks the device for a value, so the host never waits for it, and shapes depend on
shapes alone. Lengths, offsets and completed mini-batches are tensors on the device:

* Lanes that stand at different offsets are shifted right by their offset into one *layout* of
  positions, where mini-batch m is `[m C, (m + 1) C)` in every lane. Positions without a frame have
  an inner learning rate of zero. A fresh state, or a single frame, needs no shift.
* A mini-batch changes a lane's weights only if the lane has frames up to its end.
* What a lane's unfinished mini-batch contributes is computed after the scan, from its last
  frames (at most C - 1), at the weights that the lane ends with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_dist.ops import native
from ttt_dist.ops.checks import ScanArguments, check_scan_arguments
from ttt_dist.ops.mini_batch import (
    InnerNorm,
    Weights,
    mini_batch_step,
    minus,
    scores,
    token_gradients,
    weight_changes,
)
from ttt_dist.ops.scan_op import SCAN, without_autocast
from ttt_dist.ops.state import InnerState, compute_dtype


@dataclass(frozen=True)
class Loop:
    """Settings of one scan."""

    mini_batch_size: int
    causal: bool
    group_size: int | None
    compiled: bool

    def group_for(self, mini_batches: int, heads_in_turn: int = 1) -> int:
        """Mini-batches a group: near the square root of all where none is asked for.

        Below it, since a mini-batch of the group at work holds its tokens' hidden values beside a
        state, nearly twice as much as the state that is kept for each group. Longer where heads (of
        all lanes) take turns: one has a group at work, while states are kept for all. By less than
        memory alone asks for, since a longer group leaves the caches (measured: 4 % of the time).
        """
        if self.group_size is None:
            factor = 0.75 if heads_in_turn == 1 else 0.5
            return max(1, round(factor * math.sqrt(mini_batches * heads_in_turn)))
        return self.group_size or mini_batches


@dataclass(frozen=True)
class Tokens:
    """What is read: `q k v` `[B, H, L, d]`, any dtype, and `eta` `[B, H, L]`, compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor

    @property
    def length(self) -> int:
        """`L`"""
        return self.q.shape[2]

    def split(self, lengths: list[int]) -> list[Tokens]:
        """Pieces of these lengths."""
        # Split once: indexing inside a loop would make each step's backward allocate a gradient of
        # the full length, O(L²) bytes in all.
        pieces = (x.split(lengths, dim=2) for x in (self.q, self.k, self.v, self.eta))
        return [Tokens(*piece) for piece in zip(*pieces, strict=True)]


# Computes all mini-batches of a layout: `(loop, tokens, norm, weights, pending, end)` to outputs
# and weights; see `fused_segments`.
Segments = Callable[
    [Loop, Tokens, InnerNorm, Weights, Weights | None, Tensor], tuple[Tensor, Weights]
]


def fused_segments(
    loop: Loop,
    tokens: Tokens,
    norm: InnerNorm,
    weights: Weights,
    pending: Weights | None,
    end: Tensor,
) -> tuple[Tensor, Weights]:
    """All mini-batches of a layout by one operator: outputs, and weights with completed ones.

    Args:
        tokens: position 0 starts a mini-batch in every lane.
        weights, pending: `(W1, b1, …)`.
        end: int64 `[B]`, position after each lane's last frame.
    """
    mini_batches = -(-tokens.length // loop.mini_batch_size)
    # States between groups are there for backward alone.
    group = mini_batches
    if torch.is_grad_enabled():
        # C++ kernels take heads one by one, tensor code all at once.
        q, W1 = tokens.q, weights[0]
        in_turn = native.suits(len(weights) // 2, q.device, q.dtype, W1.dtype)
        group = loop.group_for(mini_batches, W1.shape[0] * W1.shape[1] if in_turn else 1)
    out, after, _ = SCAN(
        tokens.q, tokens.k, tokens.v, tokens.eta, norm.weight.squeeze(-2), norm.bias.squeeze(-2),
        list(weights), list(pending or ()), end,
        loop.mini_batch_size, loop.causal, norm.eps, group, loop.compiled,
    )  # fmt: skip
    return out, tuple(after)


def scan(
    op: str,
    depth: int,
    given: ScanArguments,
    *,
    compiled: bool = False,
    segments: Segments = fused_segments,
) -> tuple[Tensor, InnerState]:
    """Run the inner loop of `depth` linear maps; `ttt_mlp` documents arguments and errors."""
    check_scan_arguments(op, depth, given)
    if compiled and segments is not fused_segments:
        raise ValueError(
            f"{op}: compiled is True, which a network of {depth} layers has no code for"
        )
    loop = Loop(given.mini_batch_size, given.causal, given.checkpoint_group_size, compiled)
    with without_autocast(given.q.device.type):
        dtype = compute_dtype(given.q.dtype)
        gamma, beta = (t.to(dtype).unsqueeze(-2) for t in (given.ln_weight, given.ln_bias))
        norm = InnerNorm(gamma, beta, given.inner_eps)
        tokens = Tokens(given.q, given.k, given.v, given.eta.to(dtype))
        return _scan(loop, tokens, norm, given.state, segments)


def real_lengths(eta: Tensor) -> Tensor:
    """Number of frames before the trailing padding, int64 `[B]`.

    Padding is the frames at the end of a lane whose `eta` `[B, H, L]` is exactly 0 in all heads.
    """
    counted = torch.arange(1, eta.shape[-1] + 1, device=eta.device)
    return torch.where((eta != 0).any(dim=1), counted, 0).amax(dim=-1)


def _take_frames(x: Tensor, index: Tensor) -> Tensor:
    """Frames `index` `[B, N]` of `x` `[B, H, L, d]` or `[B, H, L]`; must lie in `[0, L)`."""
    index = index[:, None] if x.ndim == 3 else index[:, None, :, None]
    shape = list(x.shape)
    shape[2] = index.shape[2]
    return x.gather(2, index.expand(shape))


def _scan(
    loop: Loop, tokens: Tokens, norm: InnerNorm, state: InnerState, segments: Segments
) -> tuple[Tensor, InnerState]:
    L, C = tokens.length, loop.mini_batch_size
    end = state.offset + real_lengths(tokens.eta)  # position after each lane's last frame
    pending = None if state.fresh else state.pending
    shifted = not state.fresh and L > 1
    if L == 1 or (state.fresh and L < C):
        out, weights, pending_after = _one_segment(loop, tokens, norm, state.weights, pending, end)
    else:
        layout = _lay_out(tokens, state.offset, loop) if shifted else tokens
        out, weights = segments(loop, layout, norm, state.weights, pending, end)
        if shifted:
            frame = torch.arange(L, device=out.device)
            out = _take_frames(out, state.offset[:, None] + frame)
        pending_after = _unfinished(loop, tokens, norm, weights, state, end)
    return out, InnerState(weights, pending_after, end % C, C)


def _lay_out(tokens: Tokens, offset: Tensor, loop: Loop) -> Tokens:
    """Shift every lane right by its offset; `L + C - 1` positions, enough for any offset."""
    L = tokens.length
    position = torch.arange(L + loop.mini_batch_size - 1, device=offset.device)
    frame = position - offset[:, None]  # [B, L + C - 1]
    present = ((frame >= 0) & (frame < L))[:, None]  # [B, 1, L + C - 1]
    frame = frame.clamp(0, L - 1)
    # Positions without a frame repeat a neighbour, so that nothing there can overflow.
    q, k, v = (_take_frames(x, frame) for x in (tokens.q, tokens.k, tokens.v))
    return Tokens(q, k, v, torch.where(present, _take_frames(tokens.eta, frame), 0.0))


def _one_segment(
    loop: Loop,
    tokens: Tokens,
    norm: InnerNorm,
    weights: Weights,
    pending: Weights | None,
    end: Tensor,
) -> tuple[Tensor, Weights, Weights]:
    """Frames of a single mini-batch, perhaps its last ones: outputs, weights and pending."""
    q, k, v, eta = tokens.q, tokens.k, tokens.v, tokens.eta
    scores1 = scores(q, k, q.dtype, eta.dtype, loop.causal)
    out, weights, gradients = mini_batch_step(
        weights, pending, q, k, v, eta[..., None], scores1, None, norm, loop.causal
    )
    changes = weight_changes(gradients, k.dtype)
    if pending is not None:
        changes = tuple(p + c for p, c in zip(pending, changes, strict=True))
    complete = (end >= loop.mini_batch_size)[:, None, None, None]
    after = tuple(
        torch.where(complete, new, old)
        for new, old in zip(minus(weights, changes), weights, strict=True)
    )
    return out, after, tuple(torch.where(complete, 0.0, c) for c in changes)


def _unfinished(
    loop: Loop, tokens: Tokens, norm: InnerNorm, weights: Weights, state: InnerState, end: Tensor
) -> Weights:
    """What every lane's mini-batch in progress contributes, at the weights it ends with."""
    C, L = loop.mini_batch_size, tokens.length
    start = end - end % C  # position of the first token of the mini-batch in progress
    # A window of each lane's last frames, long enough for what can be unfinished. Tokens of the
    # mini-batch in progress that came with earlier calls are in `state.pending`.
    window = min(max(C - 1, 1), L)
    frame = (end - state.offset)[:, None] + torch.arange(-window, 0, device=end.device)
    present = (frame >= 0) & (frame + state.offset[:, None] >= start[:, None])
    frame = frame.clamp(0, L - 1)
    k, v, eta = (_take_frames(x, frame) for x in (tokens.k, tokens.v, tokens.eta))
    eta = torch.where(present[:, None], eta, 0.0)
    changes = weight_changes(token_gradients(weights, k, v, eta[..., None], norm), k.dtype)
    if state.fresh:
        return changes
    same = (start == 0)[:, None, None, None]
    return tuple(torch.where(same, p + c, c) for p, c in zip(state.pending, changes, strict=True))
