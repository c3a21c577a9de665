"""The hybrid model beside stock Moshi: zero gate, names, gradients, checkpointing, streaming."""

import pytest
import torch
from moshi.models.lm import LMGen, LMModel, LMOutput
from moshi.modules.transformer import set_attention_context
from torch import Tensor

from tests.distributed.tiny import LM_CONFIG, TTT_LAYERS, random_codes, stock_model, ttt_placement
from tests.unit.moshi_cases import (
    active_hybrid_model,
    clean_codes,
    hybrid_model,
    set_windows,
    total_loss,
)
from ttt_dist.moshi.block import HybridStreamingTransformerLayer, TTTMoshi
from ttt_dist.moshi.build import (
    build_model,
    depformer_layers,
    freeze_base,
    is_ttt_parameter,
    transformer_layers,
    without_ttt,
)
from ttt_dist.moshi.packed import stock_state_dict


def same_logits(first: LMOutput, second: LMOutput) -> bool:
    """Bitwise, NaN at the same places, masks included."""
    pairs = (
        (first.logits.nan_to_num(nan=7e7), second.logits.nan_to_num(nan=7e7)),
        (first.text_logits.nan_to_num(nan=7e7), second.text_logits.nan_to_num(nan=7e7)),
        (first.mask, second.mask),
        (first.text_mask, second.text_mask),
    )
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_gate_is_stock_moshi_bit_for_bit(inner_model, dtype):
    codes = random_codes(2, 21)
    with torch.no_grad():
        expected = stock_model(dtype)(codes)
        closed = hybrid_model(ttt_placement(inner_model, alpha=0.0), dtype)(codes)
        model = hybrid_model(ttt_placement(inner_model, alpha=0.3), dtype)
        gated = model(codes)
        with without_ttt(model):
            skipped = model(codes)
        again = model(codes)
    assert same_logits(closed, expected)
    assert same_logits(skipped, expected)
    assert same_logits(again, gated)
    difference = (gated.text_logits - expected.text_logits).abs()
    assert torch.all(difference.amax(dim=-1) > 0)


def test_without_ttt_is_undone_after_an_error():
    model = hybrid_model(ttt_placement())
    too_few_codebooks = random_codes(1, 9)[:, :5]
    with pytest.raises(AssertionError), without_ttt(model):
        model(too_few_codebooks)
    assert not any(layer.skip_ttt for layer in transformer_layers(model))


def test_names_and_values_are_stock_moshis_apart_from_ttt():
    model, stock = hybrid_model(ttt_placement()), stock_model()
    base = {k: v for k, v in stock_state_dict(model).items() if ".ttt." not in k}
    assert len(base) < len(model.state_dict())
    assert set(model.state_dict()) == set(stock_state_dict(model))
    fresh = LMModel(device="cpu", **LM_CONFIG)
    fresh.load_state_dict(base, strict=True)
    for name, value in stock.named_parameters():
        assert torch.equal(fresh.get_parameter(name), value), name
    added = [name for name, _ in model.named_parameters() if is_ttt_parameter(name)]
    per_layer = {name.split(".ttt.")[1] for name in added}
    assert set(added) == {
        f"transformer.layers.{index}.ttt.{name}" for index in TTT_LAYERS for name in per_layer
    }
    assert all(isinstance(m, HybridStreamingTransformerLayer) for m in depformer_layers(model))


def test_a_second_ttt_block_is_refused():
    model = hybrid_model(ttt_placement())
    layer = transformer_layers(model)[TTT_LAYERS[0]]
    with pytest.raises(ValueError, match="has a TTT block already"):
        layer.add_ttt(layer.ttt)


def gradients(model: TTTMoshi, codes: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    total_loss(model(codes), codes, model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
def test_gradients_reach_every_parameter(inner_model):
    model = set_windows(active_hybrid_model(inner_model))
    found = gradients(model, random_codes(2, 21))
    for name, _ in model.named_parameters():
        assert name in found, name
        assert torch.isfinite(found[name]).all(), name
        assert found[name].any(), name


def test_frozen_base_trains_ttt_alone():
    model = hybrid_model(ttt_placement())
    freeze_base(model, torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = gradients(model, random_codes(2, 21))
    optimizer.step()
    for name, value in model.named_parameters():
        assert (name in found) is is_ttt_parameter(name), name
        assert torch.equal(value, before[name]) is not is_ttt_parameter(name), name


def test_frozen_base_is_kept_in_its_own_dtype():
    model = build_model(LM_CONFIG, ttt_placement(), device="meta")
    freeze_base(model, torch.bfloat16)
    for name, value in model.named_parameters():
        expected = torch.float32 if is_ttt_parameter(name) else torch.bfloat16
        assert value.dtype == expected, name
        assert value.requires_grad is is_ttt_parameter(name), name


def test_without_ttt_streaming_gives_what_one_forward_gives():
    """1e-5: another order of float32 sums; Moshi's ring cache alone was measured at 3e-6."""
    model = set_windows(hybrid_model(None)).eval()
    codes = clean_codes(2, 17)
    with torch.no_grad():
        whole, _ = model.forward_text(codes)
        with model.streaming(2):
            pieces = [model.forward_text(codes[:, :, t : t + 1])[0] for t in range(17)]
    streamed = torch.cat(pieces, dim=1)
    assert (streamed - whole).norm() / whole.norm() < 1e-5
    assert not model.is_streaming


def test_without_ttt_moshis_own_generator_gives_stock_moshis_tokens():
    """Text and Depformer streaming (weights per step) through our layer class, bit for bit."""
    stock = stock_model().eval()
    set_attention_context(stock.transformer, 7)
    user = clean_codes(1, 12)[:, 9:]

    def generate(model: LMModel) -> list[Tensor]:
        generator = LMGen(model, use_sampling=False, check=True)
        with generator.streaming(1):
            steps = [generator.step(user[:, :, t : t + 1]) for t in range(12)]
        return [step for step in steps if step is not None]

    expected = generate(stock)
    found = generate(set_windows(hybrid_model(None)).eval())
    assert len(found) == len(expected) == 11  # the largest delay is one step
    assert len(torch.stack(expected).unique()) > 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
