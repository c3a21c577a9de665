"""Streaming the hybrid model: step by step it computes what the training forward computes."""

import copy
import dataclasses

import pytest
import torch
from moshi.models.lm import LMGen, LMOutput
from torch import Tensor

from tests.distributed.tiny import LM_CONFIG, TTT_LAYERS, save_release_weights, ttt_placement
from tests.unit.moshi_cases import clean_codes, hybrid_model, set_windows
from tests.unit.streaming_cases import (
    copies,
    in_steps,
    joined,
    largest_difference,
    ready,
    states,
    step,
)
from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.block import TTTBlock
from ttt_dist.moshi.build import build_model, transformer_layers, without_ttt
from ttt_dist.moshi.lora import LoRASettings, is_adapter_parameter
from ttt_dist.moshi.streaming import TTTLayerState
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

# Mini-batches of 8, windows of 5 and 7 frames: 8 mini-batch borders and a remainder, and 9 to 13
# windows.
FRAMES = 67
# The project's bound for float32 logits of order 1. Streamed and whole differ by the order of
# float32 sums in attention and in the scan's closed form, and by what the inner loop makes of that.
TOLERANCE = 1e-4


@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
@torch.no_grad()
def test_stepwise_equals_the_training_forward(inner):
    model, codes = ready(inner), clean_codes(2, FRAMES)
    expected = model(codes)
    with without_ttt(model):
        assert largest_difference(model(codes), expected) > 0.1  # TTT matters
    sequence = in_steps(model, codes)
    with model.streaming(2):
        steps = [
            step(model, sequence[:, :, t : t + 1], sequence[:, :, t + 1 : t + 2])
            for t in range(FRAMES)
        ]
        offsets = [state.inner.offset.tolist() for state in states(model)]
    assert offsets == [[FRAMES % 8] * 2] * len(TTT_LAYERS)
    assert largest_difference(joined(model, steps, expected), expected) < TOLERANCE
    assert not model.is_streaming
    assert largest_difference(model(codes), expected) == 0


@torch.no_grad()
def test_adapters_stream_too(tmp_path):
    path = tmp_path / "model.safetensors"
    save_release_weights(path)
    model = build_model(LM_CONFIG, ttt_placement(), LoRASettings(5, 2.0), device="cpu").eval()
    load_base_weights(model, path)
    init_ttt_weights(model, seed=0)
    for name, value in model.named_parameters():
        if is_adapter_parameter(name):
            value.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    set_windows(model)
    codes = clean_codes(2, 20)
    expected, sequence = model(codes), in_steps(model, codes)
    with model.streaming(2):
        steps = [
            step(model, sequence[:, :, t : t + 1], sequence[:, :, t + 1 : t + 2]) for t in range(20)
        ]
    assert largest_difference(joined(model, steps, expected), expected) < TOLERANCE


@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
@torch.no_grad()
def test_streams_out_of_step(inner):
    """Four lanes that stand still at random, two that begin anew: each is what it is alone."""
    model, B = ready(inner), 4
    generator = torch.Generator().manual_seed(3)
    # Lane 1 is reset before 30 steps, in the middle of a mini-batch, lane 3 twice.
    resets = {19: [3], 30: [1], 41: [3]}
    talks = [[0], [1, 4], [2], [3, 5, 6]]  # conversations of each lane
    codes = clean_codes(7, 130)
    expected = [model(codes[i : i + 1]) for i in range(7)]
    sequence = in_steps(model, codes)
    current, at = [0] * B, [0] * B
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(7)]
    with model.streaming(B):
        for number in range(120):
            if number in resets:
                mask = torch.tensor([lane in resets[number] for lane in range(B)])
                model.reset_streaming(mask)
                for lane in resets[number]:
                    current[lane], at[lane] = current[lane] + 1, 0
            active = torch.rand(B, generator=generator) < torch.tensor([1.0, 0.8, 0.5, 0.7])
            model.set_exec_mask(active)
            tokens = torch.randint(0, 24, (B, 17, 2), generator=generator)  # for idle lanes
            for lane in range(B):
                if active[lane]:
                    talk = talks[lane][current[lane]]
                    tokens[lane] = sequence[talk, :, at[lane] : at[lane] + 2]
            text, audio = step(model, tokens[:, :, :1], tokens[:, :, 1:])
            for lane in range(B):
                if active[lane]:
                    one = slice(lane, lane + 1)
                    found[talks[lane][current[lane]]].append((text[one], audio[one]))
                    at[lane] += 1
        offsets = [state.inner.offset.tolist() for state in states(model)]
    lengths = [len(steps) for steps in found]
    assert lengths[0] == 120
    assert all(10 < length <= 120 for length in lengths)
    assert len({at[lane] % 8 for lane in range(B)}) > 2
    assert offsets == [[position % 8 for position in at]] * len(TTT_LAYERS)
    for talk, steps in enumerate(found):
        cut = len(steps)
        whole = expected[talk]
        part = LMOutput(
            whole.logits[:, :, :cut].clone(), whole.mask, whole.text_logits[:, :, :cut], whole.mask
        )
        # The last frame's delayed codebooks are predicted one step later.
        delayed = [k - 1 for k in range(1, 1 + model.dep_q) if model.delays[k]]
        part.logits[:, delayed, -1] = torch.nan
        assert largest_difference(joined(model, steps, part), part) < TOLERANCE, talk


@torch.no_grad()
def test_a_lane_without_exec_mask_is_left_bitwise_even_by_nan():
    model, codes = ready(), clean_codes(3, 12)
    with model.streaming(3):
        for t in range(11):
            model.forward_text(codes[:, :, t : t + 1])
        before = [copies(state) for state in states(model)]
        model.set_exec_mask(torch.tensor([True, False, True]))
        for layer in transformer_layers(model):
            if layer.ttt is not None:
                x = torch.randn(3, 1, 32)
                x[1] = torch.nan
                layer(x)
        for old, state in zip(before, states(model), strict=True):
            for name, now in state.inner.tensors().items():
                assert torch.equal(now[1], old[name][1]), name
                assert now.isfinite().all(), name
                if name.startswith("pending"):
                    assert not torch.equal(now[0], old[name][0]), name


@torch.no_grad()
def test_reset_gives_a_lane_its_first_state_and_leaves_the_others():
    model, codes = ready(), clean_codes(3, 12)
    with model.streaming(3):
        first = [copies(state) for state in states(model)]
        for t in range(11):
            model.forward_text(codes[:, :, t : t + 1])
        before = [copies(state) for state in states(model)]
        model.set_exec_mask(torch.tensor([True, False, True]))
        model.reset_streaming(torch.tensor([False, True, False]))
        for start, old, state in zip(first, before, states(model), strict=True):
            assert state.exec_mask.tolist() == [True, True, True]
            for name, now in state.inner.tensors().items():
                assert torch.equal(now[1], start[name][1]), name
                assert torch.equal(now[[0, 2]], old[name][[0, 2]]), name
                assert not torch.equal(now[1], old[name][1]), name
        model.reset_streaming()
        for start, state in zip(first, states(model), strict=True):
            for name, now in state.inner.tensors().items():
                assert torch.equal(now, start[name]), name


def test_a_step_writes_into_the_same_tensors_and_keeps_no_graph():
    """Parameters want gradients, and a stream may be started and stepped with autograd on."""
    model, codes = ready(), clean_codes(2, 20)
    with model.streaming(2):
        tensors = [t for state in states(model) for t in state.inner.tensors().values()]
        addresses = [t.data_ptr() for t in tensors]
        for t in range(20):
            model.forward_text(codes[:, :, t : t + 1])
        after = [t for state in states(model) for t in state.inner.tensors().values()]
        assert all(a is b for a, b in zip(tensors, after, strict=True))
        assert [t.data_ptr() for t in after] == addresses
        assert not any(t.requires_grad for t in after)
        assert {t.dtype for t in after} == {torch.float32, torch.int64}


@torch.no_grad()
def test_bfloat16_models_keep_a_float32_state():
    model = ready().to(torch.bfloat16)
    codes = clean_codes(1, 10)
    with model.streaming(1):
        for t in range(10):
            model.forward_text(codes[:, :, t : t + 1])
        for state in states(model):
            assert {t.dtype for t in state.inner.weights + state.inner.pending} == {torch.float32}


@torch.no_grad()
def test_two_conversations_take_turns_by_get_and_set_streaming_state():
    model, codes = ready(), clean_codes(2, 30)
    alone = []
    for i in range(2):
        with model.streaming(1):
            alone.append([model.forward_text(codes[i : i + 1, :, t : t + 1])[1] for t in range(30)])
    kept = []
    for _ in range(2):
        with model.streaming(1):
            kept.append(model.get_streaming_state())
    assert set(kept[0]) > {f"transformer.layers.{index}" for index in TTT_LAYERS}
    with model.streaming(1):
        for t in range(30):
            for i in range(2):
                model.set_streaming_state(kept[i])
                logits = model.forward_text(codes[i : i + 1, :, t : t + 1])[1]
                assert torch.equal(logits, alone[i][t]), (t, i)


@torch.no_grad()
def test_a_copied_state_takes_a_conversation_up_again():
    model, codes = ready(), clean_codes(1, 30)
    with model.streaming(1):
        for t in range(13):
            model.forward_text(codes[:, :, t : t + 1])
        kept = copy.deepcopy(model.get_streaming_state())
        first = [model.forward_text(codes[:, :, t : t + 1])[1] for t in range(13, 30)]
    with model.streaming(1):
        model.set_streaming_state(kept)
        again = [model.forward_text(codes[:, :, t : t + 1])[1] for t in range(13, 30)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_stream_begun_without_ttt_stays_so():
    model, codes = ready(), clean_codes(1, 12)
    with torch.no_grad(), without_ttt(model):
        stream = model.streaming(1)
        inside = [model.forward_text(codes[:, :, t : t + 1])[1] for t in range(12)]
    with torch.no_grad(), stream:
        model.reset_streaming()
        outside = [model.forward_text(codes[:, :, t : t + 1])[1] for t in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@torch.no_grad()
def test_chunks_are_refused_before_anything_is_written():
    """Moshi's ring cache is wrong for them; the stream can go on as if nothing had happened."""
    model, codes = ready(), clean_codes(1, 12)
    with model.streaming(1):
        expected = [model.forward_text(codes[:, :, t : t + 1])[1] for t in range(12)]
    with model.streaming(1):
        for t in range(12):
            with pytest.raises(ValueError, match="found 3 frames in one streaming step"):
                model.forward_text(codes[:, :, :3])
            logits = model.forward_text(codes[:, :, t : t + 1])[1]
            assert torch.equal(logits, expected[t])
        with pytest.raises(ValueError, match="found 12 frames in one streaming step"):
            model(codes)
    # The transformer alone can stream too.
    with (
        model.transformer.streaming(1),
        pytest.raises(ValueError, match="found 2 frames in one streaming step"),
    ):
        model.transformer(torch.randn(1, 2, 32))


@torch.no_grad()
def test_a_model_that_looks_ahead_is_refused_and_stays_usable():
    placement = ttt_placement()
    layer = dataclasses.replace(placement.layer, causal=False)
    model = hybrid_model(dataclasses.replace(placement, layer=layer)).eval()
    codes = clean_codes(1, 9)
    expected = model(codes)
    for stream in (model, LMGen(model)):
        with pytest.raises(RuntimeError, match=r"look ahead .*causal=False"):
            stream.streaming(1)
    assert not any(getattr(module, "is_streaming", False) for module in model.modules())
    assert torch.equal(model(codes).text_logits, expected.text_logits)


@torch.no_grad()
def test_ttt_is_not_switched_or_added_while_a_stream_lasts():
    model, plain = ready(), hybrid_model(None).eval()
    set_windows(plain)
    block = TTTBlock(ttt_placement().layer, 0.3)
    with model.streaming(1), plain.streaming(1):
        with pytest.raises(RuntimeError, match="before the stream begins"), without_ttt(model):
            pass
        with pytest.raises(RuntimeError, match="is streaming; add TTT before or after"):
            transformer_layers(plain)[0].add_ttt(block)
        model.set_streaming_state(plain.get_streaming_state())
        with pytest.raises(RuntimeError, match="a streaming state without"):
            model.forward_text(clean_codes(1, 1))


@torch.no_grad()
def test_ttt_can_be_added_after_a_stream():
    """Moshi remembers its streaming modules from the first stream on."""
    model = set_windows(hybrid_model(None)).eval()
    codes = clean_codes(1, 10)
    with model.streaming(1):
        model.forward_text(codes[:, :, :1])
    donor = ready()
    for index in TTT_LAYERS:
        transformer_layers(model)[index].add_ttt(transformer_layers(donor)[index].ttt)
    set_windows(model)
    with model.streaming(1), donor.streaming(1):
        for t in range(10):
            frame = codes[:, :, t : t + 1]
            assert torch.equal(model.forward_text(frame)[1], donor.forward_text(frame)[1])


@torch.no_grad()
def test_layer_alone_frame_by_frame_in_float64():
    """The layer's part of it, without Moshi's float32 norms: 1e-10, as for all of TTT."""
    layer = TTTLayer(ttt_placement().layer, dtype=torch.float64)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(2, FRAMES, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, after = layer(x)
    state = TTTLayerState.start(layer, 2, torch.device("cpu"))
    streamed = torch.cat([state.read(layer, x[:, t : t + 1]) for t in range(FRAMES)], dim=1)
    assert (streamed - whole).norm() / whole.norm() < 1e-10
    for name, expected in after.tensors().items():
        found = state.inner.tensors()[name]
        assert found.dtype == expected.dtype
        assert (found - expected).double().norm() <= 1e-10 * expected.double().norm(), name
