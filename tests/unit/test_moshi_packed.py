"""Packed projections: bitwise Moshi's own, cut by head and feature, or refused."""

import pytest
import torch
from moshi.modules.transformer import StreamingTransformerLayer

from tests.distributed.tiny import LM_CONFIG, ttt_placement
from ttt_dist.moshi.block import HybridStreamingTransformerLayer
from ttt_dist.moshi.build import build_model, depformer_layers, transformer_layers
from ttt_dist.moshi.packed import packed_parameters, stock_state_dict


def layers(**changes):
    settings = {
        "d_model": 32,
        "num_heads": 4,
        "dim_feedforward": 132,
        "causal": True,
        "context": 5,
        "norm": "rms_norm_f32",
        "gating": "silu",
    } | changes
    torch.manual_seed(0)
    stock = StreamingTransformerLayer(**settings)
    hybrid = HybridStreamingTransformerLayer(**settings)
    packed = packed_parameters(hybrid)
    shapes = {name: value.shape for name, value in hybrid.state_dict().items()}
    hybrid.load_state_dict(
        {n: v.view(shapes[n]) if n in packed else v for n, v in stock.state_dict().items()}
    )
    return stock, hybrid


def test_layer_and_all_gradients_are_bitwise_the_stock_layers():
    stock, hybrid = layers()
    x = torch.randn(2, 11, 32)
    x_stock, x_hybrid = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_stock, y_hybrid = stock(x_stock), hybrid(x_hybrid)
    assert torch.equal(y_hybrid, y_stock)
    cotangent = torch.randn_like(y_stock)
    y_stock.backward(cotangent)
    y_hybrid.backward(cotangent)
    assert torch.equal(x_hybrid.grad, x_stock.grad)
    for name, value in hybrid.named_parameters():
        expected = stock.get_parameter(name).grad
        assert torch.equal(value.grad.view(expected.shape), expected), name


def test_streaming_is_bitwise_the_stock_layers():
    stock, hybrid = layers()
    x = torch.randn(2, 9, 32)
    with torch.no_grad(), stock.streaming(2), hybrid.streaming(2):
        for frame in x.split(1, dim=1):
            assert torch.equal(hybrid(frame), stock(frame))


def test_packed_names_and_stock_shapes():
    model = build_model(LM_CONFIG, ttt_placement(), device="cpu")
    names = packed_parameters(model)
    assert len(names) == 2 * LM_CONFIG["num_layers"]
    state, stock = model.state_dict(), stock_state_dict(model)
    for name in names:
        parts = 3 if "self_attn" in name else 2
        assert state[name].shape[0] == parts
        assert stock[name].shape == (state[name].shape[1] * parts, state[name].shape[2])
        # A cut by rows of each part: the second quarter of q, k and v, not a quarter of the stack.
        quarter = state[name].shape[1] // 4
        cut = state[name][:, quarter : 2 * quarter]
        rows = stock[name].unflatten(0, (parts, -1))
        assert torch.equal(cut, rows[:, quarter : 2 * quarter])


@pytest.mark.parametrize(
    ("changes", "splittable"),
    [
        ({}, True),
        ({"kv_repeat": 2}, False),
        ({"gating": "none"}, False),
        ({"cross_attention": True}, False),
    ],
)
def test_only_what_can_be_cut_right_is_splittable(changes, splittable):
    hybrid = layers(**changes)[1]
    assert hybrid.splittable is splittable
    if "cross_attention" not in changes:
        stock, hybrid = layers(**changes)
        x = torch.randn(1, 7, 32)
        assert torch.equal(hybrid(x), stock(x))


def test_the_depformers_weights_per_step_stay_as_they_are():
    model = build_model(LM_CONFIG, None, device="meta")
    assert all(layer.splittable for layer in transformer_layers(model))
    assert not any(layer.splittable for layer in depformer_layers(model))
