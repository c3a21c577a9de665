"""Adapters: moshi's own names, shapes, outputs and gradients; what trains, and what is merged."""

import pytest
import torch
from moshi.models.lm import LMGen
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora, replace_lora_with_linear
from safetensors.torch import load_file, save_file
from torch import nn

from tests.distributed.tiny import (
    LM_CONFIG,
    random_codes,
    save_release_weights,
    stock_model,
    ttt_placement,
)
from tests.unit.moshi_cases import clean_codes, total_loss
from ttt_dist.moshi.build import build_model, freeze_base, is_ttt_parameter
from ttt_dist.moshi.lora import (
    LoRASettings,
    add_adapters,
    is_adapter_parameter,
    merge_adapters,
    released_name,
)
from ttt_dist.moshi.packed import PackedLinear, packed_parameters, stock_state_dict
from ttt_dist.moshi.weights import init_adapters, init_ttt_weights, load_base_weights

RANK = 5
LORA = LoRASettings(RANK, scaling=2.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "model.safetensors"
    save_release_weights(path)
    return path


def adapted(weights, ttt=None, dtype=torch.float32, lora=LORA):
    model = build_model(LM_CONFIG, ttt, lora, device="cpu", dtype=dtype)
    load_base_weights(model, weights)
    init_ttt_weights(model, seed=0)
    init_adapters(model, seed=0)
    return model


@torch.no_grad()
def move_adapters(model):
    """Away from the start, where `lora_B` is 0 and `lora_A` has no gradient."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_parameters():
        if is_adapter_parameter(name):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def stock_with_adapters_of(model, dtype=torch.float32):
    """moshi's model of moshi's LoRA layers, with all values of `model`."""
    stock = stock_model(dtype)
    replace_all_linear_with_lora(stock, RANK, 2.0)
    stock.load_state_dict(stock_state_dict(model), strict=True)
    return stock


def gradients(model, codes):
    model.zero_grad(set_to_none=True)
    total_loss(model(codes), codes, model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_names_and_stock_shapes_are_moshis(weights):
    model = adapted(weights, ttt_placement())
    stock = stock_model()
    replace_all_linear_with_lora(stock, RANK, 2.0)
    found = {n: v.shape for n, v in stock_state_dict(model).items() if not is_ttt_parameter(n)}
    assert found == {name: value.shape for name, value in stock.state_dict().items()}
    adapters = {name for name in found if is_adapter_parameter(name)}
    assert len(adapters) == 2 * sum(isinstance(m, LoRALinear) for m in stock.modules()) > 190
    bare = {name for name, _ in stock_model().named_parameters()}
    assert {released_name(name) for name in found if name not in adapters} == bare
    # TTT's own projections get none.
    assert not any(".ttt." in name for name in adapters)


def test_the_released_weights_are_the_frozen_ones(weights):
    model, stock = adapted(weights), stock_model()
    state = stock_state_dict(model)
    for name in state:
        if not is_adapter_parameter(name):
            assert torch.equal(state[name], stock.get_parameter(released_name(name))), name


def test_missing_weights_are_told_by_their_released_names(weights, tmp_path):
    tensors = load_file(weights)
    del tensors["text_linear.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: text_linear\.weight"):
        adapted(tmp_path / "model.safetensors")


def test_initial_values_are_moshi_finetunes(weights):
    """Kaiming's rule with a = sqrt(5): uniform within 1 / sqrt(inputs), whatever the rank."""
    model = adapted(weights, lora=LoRASettings(40, 2.0))
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            assert not value.any(), name
        elif ".lora_A." in name:
            bound = value.shape[1] ** -0.5
            assert 0.95 * bound < value.abs().max() <= bound, name
            # Of n uniform values the variance is bound² / 3, give or take a few of its own spread.
            assert value.var().item() == pytest.approx(bound**2 / 3, rel=4 / value.numel() ** 0.5)
    other = adapted(weights, ttt_placement(), lora=LoRASettings(40, 2.0))
    for name, value in model.named_parameters():
        assert torch.equal(other.get_parameter(name), value), name  # by seed and name alone
    assert init_adapters(model, seed=1) == sum(
        value.numel() for name, value in model.named_parameters() if is_adapter_parameter(name)
    )
    name = "text_linear.lora_A.weight"
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))


def test_at_the_start_the_model_is_the_base_bit_for_bit(weights):
    codes = random_codes(2, 21)
    base = build_model(LM_CONFIG, None, device="cpu")
    load_base_weights(base, weights)
    with torch.no_grad():
        expected, found = base(codes), adapted(weights)(codes)
    for a, b in zip(
        (found.logits, found.text_logits), (expected.logits, expected.text_logits), strict=True
    ):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_outputs_and_gradients_are_moshis_own_lora_layers(weights):
    """Bit for bit: on one device the packed shapes are views of what moshi computes with."""
    codes = random_codes(2, 21)
    model = move_adapters(adapted(weights))
    stock = stock_with_adapters_of(model)
    with torch.no_grad():
        a, b = model(codes), stock(codes)
    assert torch.equal(a.logits.nan_to_num(), b.logits.nan_to_num())
    assert torch.equal(a.text_logits.nan_to_num(), b.text_logits.nan_to_num())
    found, expected = gradients(model, codes), gradients(stock, codes)
    assert list(found) == list(dict(model.named_parameters()))
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert torch.equal(gradient.reshape(expected[name].shape), expected[name]), name


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_adapters_train_and_the_base_is_frozen(weights, train_embeddings):
    model = build_model(LM_CONFIG, ttt_placement(), LORA, device="cpu")
    freeze_base(model, torch.float32, train_embeddings=train_embeddings)
    load_base_weights(model, weights)
    init_ttt_weights(model, seed=0)
    init_adapters(model, seed=0)
    move_adapters(model)
    found = gradients(model, random_codes(2, 21))
    for name, value in model.named_parameters():
        embedding = name.split(".")[0] in ("emb", "text_emb", "depformer_emb", "depformer_text_emb")
        trained = is_ttt_parameter(name) or is_adapter_parameter(name)
        trained = trained or (embedding and train_embeddings)
        assert value.requires_grad is trained, name
        assert (name in found) is trained, name
        assert not trained or found[name].any(), name


def test_only_what_trains_is_kept_wide():
    model = build_model(LM_CONFIG, ttt_placement(), LORA)
    freeze_base(model, torch.bfloat16, train_embeddings=True)
    for name, value in model.named_parameters():
        assert (value.dtype == torch.float32) is value.requires_grad, name
        assert value.dtype == torch.float32 or ".lora_" not in name


def test_merged_is_what_moshi_merges(weights):
    codes = clean_codes(2, 13)
    model = move_adapters(adapted(weights))
    with torch.no_grad():
        apart = model(codes)
    stock = stock_with_adapters_of(model)
    replace_lora_with_linear(stock)
    merge_adapters(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    merged = stock_state_dict(model)
    assert set(merged) == set(stock.state_dict())
    for name, value in stock.state_dict().items():
        # The same sum of products, in one order or another.
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert packed_parameters(model) == packed_parameters(build_model(LM_CONFIG, None))
    with torch.no_grad():
        together = model(codes)
    # float32, other sums; logits are of the order of 1.
    torch.testing.assert_close(together.logits, apart.logits, rtol=0, atol=1e-4, equal_nan=True)


def test_merged_weights_of_a_frozen_bf16_base_are_rounded_once():
    base = nn.Linear(16, 12, bias=False, dtype=torch.bfloat16)
    module = nn.ModuleDict({"packed": PackedLinear(base, 2)})
    before = base.weight.detach().clone()
    add_adapters(module, LORA, torch.float32)
    layer = module["packed"]
    exact = before.double() + 2 * (layer.lora_B.weight.flatten(0, 1) @ layer.lora_A.weight).double()
    merge_adapters(module)
    assert module["packed"].weight.dtype == torch.bfloat16
    assert torch.equal(module["packed"].weight.flatten(0, 1), exact.float().bfloat16())


def test_streaming_gives_moshis_tokens(weights):
    model = move_adapters(adapted(weights)).eval()
    stock = stock_with_adapters_of(model).eval()
    user = clean_codes(1, 8)[:, 9:]

    def generate(lm):
        generator = LMGen(lm, use_sampling=False, check=True)
        with generator.streaming(1):
            steps = [generator.step(user[:, :, t : t + 1]) for t in range(8)]
        return torch.stack([step for step in steps if step is not None])

    expected = generate(stock)
    assert len(expected.unique()) > 4
    assert torch.equal(generate(model), expected)


def test_a_rank_above_the_layers_own_works_and_none_is_refused(weights):
    model = adapted(weights, lora=LoRASettings(70, 2.0))  # above every dim of this model's layers
    assert model.transformer.layers[0].self_attn.in_projs[0].lora_B.weight.shape == (3, 32, 70)
    assert gradients(model, random_codes(1, 9))
    with pytest.raises(ValueError, match="rank: found 0"):
        LoRASettings(0, 2.0)
