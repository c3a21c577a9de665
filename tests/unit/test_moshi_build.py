"""Building: sizes of the 7B on the meta device, layer choice, windows, operations."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.tiny import LM_CONFIG, TTT_LAYERS, ttt_placement
from tests.unit.moshi_cases import clean_codes, hybrid_model
from ttt_dist.config import TTTConfig
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import (
    TTTPlacement,
    build_model,
    freeze_base,
    is_ttt_parameter,
    select_layers,
    transformer_layers,
)
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
    set_attention_contexts,
)
from ttt_dist.moshi.flops import flops_per_frame
from ttt_dist.moshi.lora import LoRASettings

MOSHI_7B = 7_687_729_152
TTT_MLP_LAYER = 71_491_616


def build_7b(layers: str) -> TTTMoshi:
    placement = TTTPlacement(
        layer=TTTConfig(model_dim=4096, num_heads=32),
        layers=select_layers(layers, 32),
        initial_alpha=0.05,
    )
    return build_model(None, placement)


@pytest.fixture(scope="module")
def moshi_7b() -> TTTMoshi:
    return build_7b("29,30,31")


def number_of_elements(model: TTTMoshi) -> int:
    return sum(value.numel() for value in model.parameters())


def test_moshi_7b_has_the_released_size():
    model = build_model(None, None)
    assert number_of_elements(model) == MOSHI_7B
    assert all(value.is_meta for value in model.parameters())
    assert all(layer.ttt is None for layer in transformer_layers(model))


def test_each_ttt_mlp_layer_of_the_default_config_adds_its_size(moshi_7b):
    assert number_of_elements(moshi_7b) - MOSHI_7B == 3 * TTT_MLP_LAYER == 214_474_848
    for index in (29, 30, 31):
        block = transformer_layers(moshi_7b)[index].ttt
        assert sum(value.numel() for value in block.parameters()) == TTT_MLP_LAYER
    assert all(value.is_meta for value in moshi_7b.parameters())


def test_windows_of_the_7b_are_set_and_read_back(moshi_7b):
    before = read_attention_contexts(moshi_7b)
    assert before == [(index >= 29, 3000) for index in range(32)]
    set_attention_contexts(moshi_7b, ttt_context=50, other_context=100)
    contexts = read_attention_contexts(moshi_7b)
    assert contexts == [(False, 100)] * 29 + [(True, 50)] * 3
    assert (
        describe_attention_contexts(contexts)
        == "TTT layers=50 (3 layers), other layers=100 (29 layers)"
    )
    check_attention_contexts(contexts, ttt_layers=(29, 30, 31), ttt_context=50, other_context=100)
    set_attention_contexts(moshi_7b, ttt_context=None, other_context=None)
    assert read_attention_contexts(moshi_7b) == contexts
    assert all(layer.self_attn.context is None for layer in moshi_7b.depformer.layers)


def test_windows_of_one_kind_alone_leave_the_others():
    model = build_model(LM_CONFIG, ttt_placement())
    set_attention_contexts(model, ttt_context=5, other_context=None)
    assert read_attention_contexts(model) == [(False, 3000), (True, 5), (True, 5), (False, 3000)]
    set_attention_contexts(model, ttt_context=None, other_context=7)
    contexts = read_attention_contexts(model)
    assert contexts == [(False, 7), (True, 5), (True, 5), (False, 7)]
    check_attention_contexts(contexts, ttt_layers=TTT_LAYERS, ttt_context=None, other_context=7)


def test_description_tells_windows_that_differ_and_none():
    assert describe_attention_contexts([(False, 9), (True, None), (False, 8), (False, 9)]) == (
        "TTT layers=unlimited (1 layer), other layers=9 (2 layers), other layers=8 (1 layer)"
    )


def test_a_model_that_is_not_the_configured_one_stops_the_run():
    model = build_model(LM_CONFIG, ttt_placement())
    set_attention_contexts(model, ttt_context=5, other_context=7)
    wanted = {"ttt_layers": TTT_LAYERS, "ttt_context": 5, "other_context": 7}
    check_attention_contexts(read_attention_contexts(model), **wanted)

    layers = transformer_layers(model)
    layers[0].self_attn.context = 3000
    layers[2].self_attn.context = None
    with pytest.raises(RuntimeError) as caught:
        check_attention_contexts(read_attention_contexts(model), **wanted)
    assert "layer 0: attention context is 3000, configured 7" in str(caught.value)
    assert "layer 2: attention context is None, configured 5" in str(caught.value)

    set_attention_contexts(model, ttt_context=5, other_context=7)
    layers[1].ttt = None
    with pytest.raises(RuntimeError) as caught:
        check_attention_contexts(read_attention_contexts(model), **wanted)
    assert "TTT was configured for layers (1, 2), the model has it in (2,)" in str(caught.value)
    assert "layer 1: attention context is 5, configured 7" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("none", ()),
        ("all", tuple(range(32))),
        ("middle", tuple(range(8, 24))),
        ("29,30,31", (29, 30, 31)),
        (" 31, 29 ,0", (0, 29, 31)),
        ("Middle ", tuple(range(8, 24))),
        ("5", (5,)),
        ([3, 1], (1, 3)),
    ],
)
def test_layer_choice(spec, layers):
    assert select_layers(spec, 32) == layers


def test_the_middle_half_of_small_models():
    assert select_layers("middle", 4) == (1, 2)
    assert select_layers("middle", 5) == (1, 2, 3)
    assert select_layers("middle", 1) == (0,)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("", "names no layer"),
        (",", "names no layer"),
        ([], "names no layer"),
        ("31,32", r"\[32\] lie outside"),
        ("-1", r"\[-1\] lie outside"),
        ([40, 2, 33], r"\[40, 33\] lie outside"),
        ("3,4,3", r"\[3\] stand there twice"),
        ([7, 7], r"\[7\] stand there twice"),
        ("last", "found 'last'"),
        ("1;2", "found '1;2'"),
        ("1.5", "found '1.5'"),
    ],
)
def test_layer_choice_errors_list_the_valid_range(spec, why):
    with pytest.raises(ValueError, match=why) as caught:
        select_layers(spec, 32)
    assert "'none', 'all', 'middle' or indices from 0 to 31, each once" in str(caught.value)


def test_flops_of_a_frame_are_those_that_torch_counts():
    """Exact for the matrices; attention and inner steps are formulas of their own."""
    frames = 12
    model = hybrid_model(None)
    codes = clean_codes(1, frames)
    with FlopCounterMode(display=False) as counter:
        output = model(codes)
        (output.logits.nan_to_num().sum() + output.text_logits.sum()).backward()
    operations = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in operations.items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = 3 * 4 * LM_CONFIG["dim"] * (frames + 1) / 2 * LM_CONFIG["num_layers"]
    assert flops_per_frame(model, frames) == matrices / frames + attention


# What is trained: layers with TTT, rank of adapters, embeddings; and of each layer's attention the
# multiple of its forward that a step computes: 3 where gradients come to its input or q, k and v.
TRAINED_PARTS = {
    "TTT in the last layers": ((2, 3), 0, False, (1, 1, 1, 3)),
    "TTT in the first layer": ((0,), 0, False, (1, 3, 3, 3)),
    "adapters": ((), 3, False, (3, 3, 3, 3)),
    "adapters and embeddings": ((), 3, True, (3, 3, 3, 3)),
    "adapters and TTT": ((1, 2), 3, False, (3, 3, 3, 3)),
}


@pytest.mark.parametrize("part", TRAINED_PARTS)
def test_flops_of_a_frozen_base_are_those_that_torch_counts(part):
    """Exact, but for what isn't the formula's: see `beside`."""
    frames, D, H, d = 12, 32, 4, 8
    ttt_layers, rank, embeddings, attention = TRAINED_PARTS[part]
    placement = replace(ttt_placement(), layers=ttt_layers)
    lm_config = LM_CONFIG | {"depformer_low_rank_embeddings": 6}  # matrices that embeddings have
    lora = LoRASettings(rank, 2.0) if rank else None
    model = build_model(lm_config, placement, lora, device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.0, 0.1)
    freeze_base(model, torch.float32, train_embeddings=embeddings)
    # As products that the counter knows: it has no formula for the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        text, audio = model.step_losses(model.steps(clean_codes(1, frames)))
        (text.sum() + audio.sum()).backward()
    modules = {
        name: {str(op): n for op, n in operations.items()}
        for name, operations in counter.get_flop_counts().items()
    }
    matrices = ("aten.mm", "aten.addmm", "aten.bmm")
    products = sum(n for op, n in modules["Global"].items() if op in matrices)

    beside = 0.0
    for n in attention:  # the formula takes what a frame sees; computed are all scores
        beside += n * 4 * D * frames * (frames - (frames + 1) / 2)
    beside += 3 * 2 * 4 * 24 * 8 * 8 * frames  # the Depformer's attention, which it leaves out
    for layer in ttt_layers:
        # Of the inner learning rate it counts the bias alone. Inner steps are an operator that
        # isn't among these products, and beside it those of the unfinished mini-batch.
        reached = layer > min(ttt_layers) or rank > 0
        beside += (2 + reached) * 2 * (H * D - H) * frames
        beside += modules[f"StreamingTransformer.layers.{layer}.ttt.layer"]["aten.bmm"]
        beside -= 3 * 2 * 7 * H * d * 4 * d * frames
    assert flops_per_frame(model, frames) * frames == products - beside


def test_flops_of_ttt_layers_and_windows():
    plain, mlp = build_model(LM_CONFIG, None), build_model(LM_CONFIG, ttt_placement("mlp"))
    linear = build_model(LM_CONFIG, ttt_placement("linear"))
    D, d, H = 32, 8, 4
    around = 2 * (4 * D * D)  # wq wk wv wo
    for model, inner in ((mlp, 7 * H * d * 4 * d), (linear, 3 * H * d * d)):
        added = flops_per_frame(model, 12) - flops_per_frame(plain, 12)
        # 1 %: what the gate of the inner learning rate takes is left out or counted roughly.
        assert added == pytest.approx(3 * len(TTT_LAYERS) * (around + 2 * inner), rel=0.01)
    whole = {frames: flops_per_frame(plain, frames) for frames in (7, 12, 1000)}
    set_attention_contexts(plain, ttt_context=None, other_context=7)
    for frames, flops in whole.items():
        unseen = sum(max(t - 7, 0) for t in range(1, frames + 1)) / frames
        found = flops - flops_per_frame(plain, frames)
        assert found == pytest.approx(3 * 4 * 4 * D * unseen, abs=1e-6)


def test_parameters_take_the_asked_dtype_and_device():
    model = build_model(LM_CONFIG, ttt_placement(), device="cpu", dtype=torch.float64)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    assert {is_ttt_parameter(name) for name, _ in model.named_parameters()} == {True, False}
