"""Attention over a window: Moshi's own, in O(T · context), and carried from piece to piece.

Tolerances: the attention itself in float64 to 1e-12 (sums in another order). The module in float32
to 1e-5, as sums in another order, and carried windows are roped at other positions of the same
distance, in float32. Where one block holds all frames the very same kernel computes the very same
numbers: bit for bit.
"""

import math

import pytest
import torch

from tests.unit.attention_cases import D, H, attentions, empty, error
from ttt_dist.moshi.attention import attend, windowed_attention
from ttt_dist.moshi.block import HybridStreamingTransformerLayer


def dense_attention(q, k, v, context, past=0, length=None):
    """The definition, by all scores of all queries."""
    frames = q.shape[2]
    query = past + torch.arange(frames)[:, None]
    key = torch.arange(past + frames)
    seen = key <= query
    if context is not None:
        seen = seen & (key > query - context)
    seen = seen.expand(q.shape[0], frames, past + frames)
    if length is not None:
        seen = seen & (key >= past - length[:, None, None])
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return scores.softmax(dim=-1) @ v


B, HEAD = 3, 8
CONTEXTS = (1, 2, 5, 63, 64, 65, 100, 1000, None)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("frames", [1, 2, 63, 64, 65, 128, 201])
@pytest.mark.parametrize("past", [0, 1, 99, 130])
@pytest.mark.parametrize("lengths", [None, (0, 1, 99)])
def test_attention_and_gradients_are_the_definitions(context, frames, past, lengths):
    if past == 0 and lengths is not None:
        lengths = (0, 0, 0)
    length = None if lengths is None else torch.tensor(lengths)
    torch.manual_seed(0)
    shapes = (frames, past + frames, past + frames)
    tensors = [torch.randn(B, H, n, HEAD, dtype=torch.float64, requires_grad=True) for n in shapes]
    cotangent = torch.randn(B, H, frames, HEAD, dtype=torch.float64)
    results = []
    for function in (windowed_attention, dense_attention):
        y = function(*tensors, context, past, length)
        results.append([y, *torch.autograd.grad(y, tensors, cotangent)])
    for name, found, expected in zip(("y", "q", "k", "v"), *results, strict=True):
        assert found.shape == expected.shape
        assert error(found, expected) < 1e-12, name


@pytest.mark.parametrize("context", [0, -1])
def test_a_window_of_no_frame_is_refused(context):
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"context: found {context}, allowed"):
        windowed_attention(x, x, x, context)


def test_keys_of_another_length_are_refused():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="found 3 keys and 3 values; 2 frames before 3 queries"):
        windowed_attention(x, x, x, 5, past=2)


def gradients(module, x, y, cotangent):
    parameters = list(module.parameters())
    found = torch.autograd.grad(y, [x, *parameters], cotangent)
    return [g.flatten() for g in found]


@pytest.mark.parametrize("rope", ["interleaved", "halves", None])
@pytest.mark.parametrize("context", [1, 2, 7, 64, 90, 200, 1000, None])
@pytest.mark.parametrize("frames", [1, 33, 64, 150, 200])
def test_the_module_is_moshis_own(context, frames, rope):
    stock, packed = attentions(context, rope)
    x = torch.randn(2, frames, D, requires_grad=True)
    cotangent = torch.randn(2, frames, D)
    expected = stock(x, x, x)
    found, window = attend(packed, x, None)
    assert window is None
    pairs = list(
        zip(
            [found, *gradients(packed, x, found, cotangent)],
            [expected, *gradients(stock, x, expected, cotangent)],
            strict=True,
        )
    )
    if frames <= 64 or context is None or context >= frames:
        assert all(torch.equal(a, b) for a, b in pairs)
    for a, b in pairs:
        assert error(a, b) < 1e-5


# Pieces of one recording: alone, many short ones, shorter and longer than the window, a remainder.
SPLITS = [(150,), (75, 75), (1,) * 20 + (130,), (3, 140, 7), (64, 64, 22), (16,) * 9 + (6,)]


def in_pieces(attention, x, split, window):
    outputs = []
    for piece in x.split(split, dim=1):
        versions = [value._version for value in window]
        y, after = attend(attention, piece, window)
        assert [value._version for value in window] == versions  # nothing is written
        outputs.append(y)
        window = after
    return torch.cat(outputs, dim=1), window


@pytest.mark.parametrize("rope", ["interleaved", None])
@pytest.mark.parametrize("context", [1, 2, 7, 64, 65, 200])
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_with_the_window_carried_is_one_call(context, split, rope):
    """Gradients of early frames through later pieces included."""
    _, attention = attentions(context, rope)
    x = torch.randn(2, 150, D, requires_grad=True)
    cotangent = torch.randn(2, 150, D)
    expected, _ = attend(attention, x, None)
    found, window = in_pieces(attention, x, split, empty(attention))
    assert window.length.tolist() == [min(150, context - 1)] * 2
    pairs = zip(
        [found, *gradients(attention, x, found, cotangent)],
        [expected, *gradients(attention, x, expected, cotangent)],
        strict=True,
    )
    for a, b in pairs:
        assert error(a, b) < 1e-5


def test_a_window_cut_at_the_border_is_seen():
    """The comparison above catches the mistake it is there for, forward and backward."""
    _, attention = attentions(7)
    x = torch.randn(2, 150, D, requires_grad=True)
    expected, _ = attend(attention, x, None)
    whole = gradients(attention, x, expected, torch.ones_like(expected))

    cut = torch.cat([attend(attention, p, empty(attention))[0] for p in x.split(75, 1)], dim=1)
    assert error(cut, expected) > 0.01
    assert torch.allclose(cut[:, :75], expected[:, :75], atol=1e-5)
    changed = (cut - expected).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == list(range(75, 75 + 6))

    first, window = attend(attention, x[:, :75], empty(attention))
    second, _ = attend(attention, x[:, 75:], window.detach())
    carried = torch.cat([first, second], dim=1)
    assert error(carried, expected) < 1e-5
    detached = gradients(attention, x, carried, torch.ones_like(expected))
    assert error(detached[0], whole[0]) > 0.01


@pytest.mark.parametrize("context", [2, 7, 90])
def test_lanes_begin_recordings_at_different_pieces(context):
    """Lane 0 begins anew at the third piece, lane 1 at the second, lane 2 never."""
    _, attention = attentions(context)
    pieces = (30, 5, 70, 3, 80)
    begins = {2: torch.tensor([True, False, False]), 1: torch.tensor([False, True, False])}
    x = torch.randn(3, sum(pieces), D)
    window = empty(attention, batch_size=3)
    found = []
    for index, piece in enumerate(x.split(pieces, dim=1)):
        if index in begins:
            # Whatever a lane's old recording left there must not come through.
            spoiled = torch.where(begins[index].view(-1, 1, 1, 1), math.nan, window.keys)
            window = window._replace(keys=spoiled).reset(begins[index])
        y, window = attend(attention, piece, window)
        found.append(y)
    found = torch.cat(found, dim=1)
    for lane, start in enumerate((35, 30, 0)):
        for part in (x[lane : lane + 1, :start], x[lane : lane + 1, start:]):
            if part.shape[1]:
                expected, _ = attend(attention, part, None)
                got = found[lane, :start] if part.shape[1] == start else found[lane, start:]
                assert error(got, expected[0]) < 1e-5, lane


def test_a_lane_that_forgets_to_begin_anew_is_seen():
    _, attention = attentions(7)
    x = torch.randn(2, 40, D)
    _, window = attend(attention, x[:, :20], empty(attention))
    kept, _ = attend(attention, x[:, 20:], window)
    expected, _ = attend(attention, x[:, 20:], None)
    reset, _ = attend(attention, x[:, 20:], window.reset(torch.tensor([True, False])))
    assert error(kept[0], expected[0]) > 0.01
    assert error(reset[0], expected[0]) < 1e-5
    assert torch.equal(reset[1], kept[1])


def test_pieces_give_what_moshis_streaming_gives():
    """Its ring cache, frame by frame, was measured at 3e-6 from one forward."""
    stock, packed = attentions(7)
    x = torch.randn(2, 40, D)
    with torch.no_grad(), stock.streaming(2):
        streamed = torch.cat([stock(frame, frame, frame) for frame in x.split(1, dim=1)], dim=1)
    found, _ = in_pieces(packed, x, (13, 13, 14), empty(packed))
    assert error(found, streamed) < 1e-5


def test_far_into_a_recording_positions_stay_small():
    """After an hour in pieces the last frames are as exact as the first ones of a new recording."""
    _, attention = attentions(7)
    x = torch.randn(1, 20, D)
    window = empty(attention, batch_size=1)
    with torch.no_grad():
        for _ in range(450):
            _, window = attend(attention, torch.randn(1, 100, D), window)
        last, _ = attend(attention, x, window)
        start, _ = attend(attention, x, None)
    assert error(last[:, 6:], start[:, 6:]) < 1e-5


def test_a_window_holds_nothing_but_itself_and_its_graph_can_be_cut():
    _, attention = attentions(7)
    x = torch.randn(2, 40, D, requires_grad=True)
    _, window = attend(attention, x, empty(attention))
    assert window.keys.requires_grad
    cut = window.detach()
    assert not cut.keys.requires_grad
    assert not cut.values.requires_grad
    for value in cut[:2]:
        assert value.untyped_storage().nbytes() == value.nbytes


def test_a_window_takes_the_dtype_of_computation():
    _, attention = attentions(7, dtype=torch.bfloat16)
    x = torch.randn(2, 40, D, dtype=torch.bfloat16)
    y, window = attend(attention, x, empty(attention, dtype=torch.float32))
    assert y.dtype == window.keys.dtype == window.values.dtype == torch.bfloat16
    assert window.length.dtype == torch.int64


def test_a_window_that_does_not_fit_is_refused():
    _, attention = attentions(7)
    x = torch.randn(2, 10, D)
    with pytest.raises(ValueError, match=r"attention window: found .* needed for this module"):
        attend(attention, x, empty(attention, batch_size=3))
    window = empty(attention)
    attention.context = 8
    with pytest.raises(ValueError, match=r"attention window: found .* needed for this module"):
        attend(attention, x, window)
    attention.context = None
    for carried in (window, None):
        with pytest.raises(ValueError, match="found none \\(unlimited\\)"):
            attend(attention, x, carried) if carried else empty(attention)


def test_layers_with_shared_keys_take_no_window():
    settings = {"d_model": D, "num_heads": H, "causal": True, "context": 5, "gating": "silu"}
    layer = HybridStreamingTransformerLayer(**settings, kv_repeat=2)
    assert not layer.windowed
    plain = HybridStreamingTransformerLayer(**settings)
    assert plain.windowed
    x = torch.randn(2, 4, D)
    plain._attend(x, None, empty(plain.self_attn))
    with pytest.raises(ValueError, match="can't take an attention window"):
        layer._attend(x, None, empty(plain.self_attn))
