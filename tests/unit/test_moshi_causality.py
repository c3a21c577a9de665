"""Causality of the whole model in steps, delays considered; what attention windows let through.

Code (k', t') enters at step s' = t' + delay[k']: the Depformer reads it at that step, once it has
predicted codebook k' itself; the main transformer at the next one.
"""

import pytest
import torch

from tests.distributed.tiny import LM_CONFIG, ttt_placement
from tests.unit.moshi_cases import (
    DELAYS,
    DEP_Q,
    active_hybrid_model,
    clean_codes,
    hybrid_model,
    largest_change,
    set_windows,
)
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model, without_ttt

FRAMES = 23  # no multiple of the mini-batch (8) and longer than every window
# Text; both undelayed codebooks; delayed ones, the last predicted one among them; other speaker's.
STREAMS = (0, 1, 2, 5, 8, 9, 10, 16)
TIMES = (0, 6, 7, 15, FRAMES - 2, FRAMES - 1)


def changes_of(model: TTTMoshi, where: list[tuple[int, int]], frames: int) -> torch.Tensor:
    """`[len(where), 1 + dep_q, S]`: how far logits move when one code (k', t') changes.

    One code a lane, and the unchanged codes in the same lanes, so that every kernel sees the same
    shapes: equal numbers in give equal numbers out, bit for bit.
    """
    codes = clean_codes(1, frames).repeat(len(where), 1, 1)
    changed = codes.clone()
    for lane, (k, t) in enumerate(where):
        card = LM_CONFIG["text_card"] if k == 0 else LM_CONFIG["card"]
        changed[lane, k, t] = (changed[lane, k, t] + 7) % card
    with torch.no_grad():
        return largest_change(model(changed), model(codes))


def may_move(k: int, t: int) -> torch.Tensor:
    """`[1 + dep_q, S]` bool: logits that code (k, t) may reach. NaN logits aren't excluded."""
    steps = torch.arange(FRAMES)
    entry = t + DELAYS[k]
    allowed = (steps > entry).repeat(1 + DEP_Q, 1)
    later_codebooks = torch.arange(1 + DEP_Q)[:, None] > k
    return allowed | ((steps == entry) & later_codebooks)


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
def test_codes_move_exactly_the_logits_that_follow_them(inner_model):
    """Exact zeros before; every logit after, near or far, moves: TTT carries what windows cut."""
    model = set_windows(active_hybrid_model(inner_model))
    where = [(k, t) for k in STREAMS for t in TIMES]
    for (k, t), change in zip(where, changes_of(model, where, FRAMES)):
        predicted = ~change.isnan()
        # Delayed codebooks have no logits at step 0, everything else has.
        assert predicted.sum() == (1 + DEP_Q) * FRAMES - sum(DELAYS[1 : 1 + DEP_Q])
        allowed = may_move(k, t)
        too_early = predicted & ~allowed & (change != 0)
        assert not too_early.any(), f"code {k, t} moved (k, s) {too_early.nonzero().tolist()}"
        unmoved = predicted & allowed & (change == 0)
        assert not unmoved.any(), f"code {k, t} didn't move (k, s) {unmoved.nonzero().tolist()}"


def test_a_codebook_moves_delayed_ones_of_the_frame_before():
    """Why causality is a matter of steps: by frame, this looks like a leak and isn't one."""
    model = set_windows(active_hybrid_model())
    codes = clean_codes(1, FRAMES)
    changed = codes.clone()
    changed[0, 1, 9] = (changed[0, 1, 9] + 7) % LM_CONFIG["card"]
    with torch.no_grad():
        moved = (model(changed).logits - model(codes).logits).abs().amax(dim=-1)[0]
    assert torch.all(moved[1:, 8] > 0)  # codebooks 2 to 8, one frame before
    assert moved[0, 8] == 0
    assert torch.all(moved[:, :8] == 0)


def test_a_ttt_layer_that_looks_ahead_is_caught():
    """The same comparison finds TTT-Video's form, which sees the rest of its mini-batch."""
    placement = ttt_placement()
    noncausal = type(placement.layer)(**(vars(placement.layer) | {"causal": False}))
    model = build_model(LM_CONFIG, type(placement)(noncausal, placement.layers, 0.3), device="cpu")
    model.load_state_dict(active_hybrid_model().state_dict())
    # Step 14 is read as input 15, the last of the second mini-batch.
    change = changes_of(set_windows(model), [(1, 14)], FRAMES)[0]
    assert torch.all(change[0, 8:15] > 0)
    assert torch.all(change[0, :8] == 0)


def test_windows_limit_attention_and_ttt_carries_the_rest():
    """Without TTT a code reaches as far as the windows add up to, and not one step farther."""
    ttt_context, other_context, frames = 3, 4, 21
    # float64: the outermost step hangs on one weight of every layer's attention.
    model = set_windows(active_hybrid_model(dtype=torch.float64), ttt_context, other_context)
    plain = set_windows(hybrid_model(None, torch.float64), other_context=other_context)
    where = [(0, 2), (1, 2), (9, 2), (10, 1), (16, 1)]  # all enter at step 2
    first = 3  # the step whose input they are
    two_ttt_layers, two_others = 2 * (ttt_context - 1), 2 * (other_context - 1)
    last = first + two_ttt_layers + two_others
    assert last < frames - 5
    with without_ttt(model):
        skipped = changes_of(model, where, frames)
    carried = changes_of(model, where, frames)
    stock = changes_of(plain, where, frames)
    assert torch.all(skipped[:, :, first : last + 1] > 0)
    assert torch.all(skipped[:, :, last + 1 :] == 0)
    # All four windows of 4 reach two steps farther: it was the TTT layers' window that counted.
    assert torch.all(stock[:, :, first : last + 3] > 0)
    assert torch.all(stock[:, :, last + 3 :] == 0)
    assert torch.all(carried[:, :, first:] > 0)
