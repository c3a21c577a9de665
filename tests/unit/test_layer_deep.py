"""TTT layers whose inner MLP has 3 to 5 layers: parameters, streaming, models, recomputation."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel.activation import checkpoint_layers
from parallel.compilation import compile_layers
from tests.distributed.tiny import LM_CONFIG, TTT_LAYERS, random_codes
from tests.unit.moshi_cases import active_hybrid_model, set_windows, total_loss
from tests.unit.test_layer import make_layer, relative_error
from ttt_dist.config import TTTConfig
from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.build import TTTPlacement, build_model, transformer_layers
from ttt_dist.moshi.flops import flops_per_frame
from ttt_dist.moshi.weights import init_ttt_weights
from ttt_dist.ops import dual_form, reference_scan

INNER = [name for number in range(1, 6) for name in (f"W{number}", f"b{number}")]


def inner_shapes(layer):
    return {n: list(p.shape) for n, p in layer.named_parameters() if n in INNER}


def test_parameters_are_named_and_shaped_by_depth():
    settings = {"model_dim": 24, "num_heads": 3, "expansion": 2}
    four = TTTLayer(TTTConfig(**settings, mlp_layers=4))
    expected = {"W1": [3, 8, 16], "W2": [3, 16, 16], "W3": [3, 16, 16], "W4": [3, 16, 8]}
    expected |= {f"b{n}": [3, 1, 16] for n in (1, 2, 3)} | {"b4": [3, 1, 8]}
    assert inner_shapes(four) == expected
    assert [list(p.shape) for p in four.inner_parameters()] == list(inner_shapes(four).values())
    two = TTTLayer(TTTConfig(**settings))
    assert list(inner_shapes(two)) == INNER[:4]
    linear = TTTLayer(TTTConfig(**settings, inner_model="linear", mlp_layers=4))
    assert inner_shapes(linear) == {"W1": [3, 8, 8], "b1": [3, 1, 8]}
    for layers in (1, 6):
        with pytest.raises(ValueError, match=f"mlp_layers: found {layers}, allowed are 2 to 5"):
            TTTConfig(**settings, mlp_layers=layers)


def test_initial_values_are_those_of_two_layers():
    config = TTTConfig(model_dim=256, num_heads=4, mlp_layers=5)
    model = build_model(LM_CONFIG | {"dim": 256}, TTTPlacement(config, (3,), 0.05), device="cpu")
    layer = transformer_layers(model)[3].ttt.layer
    with torch.no_grad():
        for value in layer.parameters():
            value.fill_(5.0)
    init_ttt_weights(model, 0)
    weights, biases = layer.inner_parameters()[::2], layer.inner_parameters()[1::2]
    assert len(weights) == len(biases) == 5
    for W in weights:
        # Six standard errors of a standard deviation of n normal numbers.
        bound = 6 * 0.02 / math.sqrt(2 * W.numel())
        assert W.std().item() == pytest.approx(0.02, abs=bound)
    assert all(torch.all(b == 0) for b in biases)


@pytest.mark.parametrize("mlp_layers", [3, 5])
def test_any_split_equals_one_call_of_the_definition(mlp_layers, monkeypatch):
    """Outputs, parameters' gradients and state; 1e-10 in float64: sums in another order."""
    layer = make_layer(mlp_layers=mlp_layers)
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    state, parts = None, []
    for piece in x.split([6, 1, 9, 5], dim=1):
        y, state = layer(piece, state)
        parts.append(y)
    found = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), list(layer.parameters()))

    def definition(*tensors, checkpoint_group_size, compiled, **settings):
        return reference_scan(*tensors, **settings)

    monkeypatch.setattr("ttt_dist.layer.ttt_mlp", definition)
    y, final = layer(x)
    expected = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    assert relative_error(torch.cat(parts, dim=1), y) < 1e-10
    for name, a, b in zip(dict(layer.named_parameters()), found, expected, strict=True):
        assert relative_error(a, b) < 1e-10, name
    for a, b in zip(state.weights + state.pending, final.weights + final.pending, strict=True):
        assert relative_error(a, b) < 1e-10


def test_padded_frames_leave_the_stream_as_it_was():
    layer = make_layer(mlp_layers=3)
    x, after = torch.randn(2, 30, 24).double(), torch.randn(2, 9, 24).double()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 13:] = False
    _, state = layer(x, frame_mask=mask)
    _, unpadded = layer(x[1:, :13])
    y, expected = layer(after, state)[0][1:], layer(after[1:], unpadded)[0]
    assert relative_error(y, expected) < 1e-10


def test_flops_are_those_that_torch_counts():
    """Of one mini-batch more, so that what a scan does once doesn't count. The formula leaves the
    `C x C` products out, and the inner learning rate's, which are less than 1 %."""
    C, D, H, layers = 16, 256, 4, (1,)
    lm_config = LM_CONFIG | {"dim": D}
    plain = flops_per_frame(build_model(lm_config, None), C)
    for mlp_layers in (2, 3, 5):
        config = TTTConfig(model_dim=D, num_heads=H, mlp_layers=mlp_layers, mini_batch_size=C)
        counted = []
        for L in (2 * C, 3 * C):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                TTTLayer(config)(torch.randn(1, L, D))
            counted.append(counter.get_total_flops())
        among_tokens = sum(2 * 2 * H * C * C * width for width in config.inner_widths[:-1])
        among_tokens += sum(2 * 2 * H * C * C * width for width in config.inner_widths[1:])
        model = build_model(lm_config, TTTPlacement(config, layers, 0.05))
        forward = C * (flops_per_frame(model, C) - plain) / 3
        assert forward == pytest.approx(counted[1] - counted[0] - among_tokens // 2, rel=0.01)


def gradients(model, codes):
    model.zero_grad(set_to_none=True)
    total_loss(model(codes), codes, model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def deep_model():
    return set_windows(active_hybrid_model("mlp", mlp_layers=3))


def test_every_parameter_of_a_model_gets_a_gradient():
    for name, grad in gradients(deep_model(), random_codes(2, 21)).items():
        assert grad is not None, name
        assert grad.norm() > 0 or "depformer" in name, name


@pytest.mark.parametrize("recompute", ["layer", "selective"])
def test_recomputation_changes_no_bit_and_runs_a_third_forward(recompute, monkeypatch):
    groups = []
    original = dual_form._group

    def counted(*arguments):
        groups.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(dual_form, "_group", counted)
    model, codes = deep_model(), random_codes(2, 21)
    kept = gradients(model, codes)
    # Two full mini-batches of 8 and one shorter one: groups of two, and one.
    assert len(groups) == 2 * 2 * len(TTT_LAYERS)
    checkpoint_layers(model, recompute)
    groups.clear()
    recomputed = gradients(model, codes)
    assert len(groups) == 3 * 2 * len(TTT_LAYERS)
    for name, value in kept.items():
        assert torch.equal(value, recomputed[name]), name


def test_compiled_models_keep_their_deep_layers_eager(monkeypatch):
    """Traced, and run as traced: what is compiled here is code that other tests compile."""
    model, codes = deep_model(), random_codes(2, 21)
    expected = gradients(model, codes)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compile_layers(model)
    checkpoint_layers(model, "layer")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(model, codes)
    # A plain layer, the two other parts of one with TTT, a layer of the Depformer.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for name, value in expected.items():
        # The same kernels, in float32; the compiler may fold constants.
        assert relative_error(found[name], value) < 1e-6, name
