"""Attention over a window: Moshi's own, in O(T · context), and carried from piece to piece.

Tolerances: the attention itself in float64 to 1e-12 (sums in another order). The module in float32
to 1e-5, as sums in another order, and carried windows are roped at other positions of the same
distance, in float32. Where one block holds all frames the very same kernel computes the very same
numbers: bit for bit.
"""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingMultiheadAttention
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.activation import checkpoint_layers
from parallel.compilation import compile_layers
from tests.distributed.tiny import random_codes
from tests.unit.moshi_cases import active_hybrid_model, set_windows, total_loss
from ttt_dist.moshi.attention import AttentionWindow, attend, windowed_attention
from ttt_dist.moshi.block import HybridStreamingTransformerLayer
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.packed import pack_attention

B, H, D = 3, 2, 16
HEAD = D // H


def error(found, expected):
    scale = expected.norm()
    return ((found - expected).norm() / (scale if scale > 0 else 1.0)).item()


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
        # With one visible key its weight is 1 whatever q and k are; the definition says so exactly.
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


def attentions(context, rope="interleaved", dtype=torch.float32):
    """Moshi's own module, and one of the same weights with packed projections."""
    torch.manual_seed(0)
    embedding = None if rope is None else RotaryEmbedding(interleave=rope == "interleaved")
    stock, packed = (
        StreamingMultiheadAttention(D, H, causal=True, context=context, rope=embedding, dtype=dtype)
        for _ in range(2)
    )
    packed.load_state_dict(stock.state_dict())
    assert pack_attention(packed)
    return stock, packed


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


def empty(attention, dtype=torch.float32, batch_size=2):
    return AttentionWindow.empty(attention, batch_size, device="cpu", dtype=dtype)


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


class Allocations(TorchDispatchMode):
    """Bytes of all that operators make, the largest of it, and which attention kernels run."""

    def __init__(self):
        super().__init__()
        self.total, self.largest, self.kernels = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():
            self.kernels[func.name().removeprefix("aten::_scaled_dot_product_")] += 1
        if not func.is_view and not func._schema.is_mutable:
            made = out if isinstance(out, (list, tuple)) else [out]
            sizes = [t.numel() * t.element_size() for t in made if torch.is_tensor(t)]
            self.total += sum(sizes)
            self.largest = max([self.largest, *sizes])
        return out


def allocations(forward, frames):
    x = torch.randn(1, frames, D, requires_grad=True)
    with Allocations() as seen:
        forward(x).sum().backward()
    return seen


@pytest.mark.parametrize("context", [1, 50, 100])
@pytest.mark.parametrize("carried", [False, True])
def test_all_that_is_allocated_grows_as_the_frames(context, carried):
    """Forward and backward; Moshi's own forward, as a check of the check, grows as their square."""
    stock, packed = attentions(context)

    def ours(x):
        return attend(packed, x, empty(packed, batch_size=1) if carried else None)[0]

    counts = [allocations(ours, frames) for frames in (1000, 2000, 4000)]
    for small, large in pairwise(counts):
        assert large.total < 2.1 * small.total
        assert large.largest < 2.1 * small.largest
        assert large.kernels == small.kernels
    # No scores are kept either: the kernel that keeps none takes masks, forward and backward.
    kernels = {"flash_attention_for_cpu", "flash_attention_for_cpu_backward"}
    assert set(counts[0].kernels) == kernels
    dense = [allocations(lambda x: stock(x, x, x), frames) for frames in (1000, 2000)]
    assert dense[1].largest > 3.9 * dense[0].largest


def test_selective_recomputation_keeps_every_attention():
    """Each kernel runs as often as without recomputation; under `layer` once more."""
    codes = random_codes(2, 140)  # three blocks of 64, so each kind of block
    runs = {}
    for recompute in ("none", "selective", "layer"):
        model = set_windows(active_hybrid_model())
        checkpoint_layers(model, recompute)
        with Allocations() as seen:
            total_loss(model(codes), codes, model).backward()
        runs[recompute] = seen.kernels["flash_attention_for_cpu"]
    assert runs["selective"] == runs["none"] < runs["layer"] == 2 * runs["none"]


@pytest.mark.integration  # compiles
def test_a_compiled_and_recomputed_layer_carries_windows():
    """1e-5: compiled float32 sums in another order."""
    x = torch.randn(2, 170, 32, requires_grad=True)
    results = []
    for wrapped in (False, True):
        model = set_windows(active_hybrid_model())
        if wrapped:
            torch._dynamo.reset()
            compile_layers(model)
            checkpoint_layers(model, "layer")
        layer = transformer_layers(model)[0]
        window = AttentionWindow.empty(layer.self_attn, 2, device="cpu", dtype=x.dtype)
        outputs = []
        for piece in x.split(85, dim=1):
            y, window = layer._whole(piece, None, window)
            outputs.append(y)
        y = torch.cat(outputs, dim=1)
        weights = [p for n, p in layer.named_parameters() if "self_attn" in n]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *weights])])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-5
