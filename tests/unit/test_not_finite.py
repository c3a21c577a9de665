"""The first tensor that isn't finite is found: in the forward, or among the gradients."""

import pytest
import torch

from launch.feeding.lanes import Lanes
from launch.guards.not_finite import first_gradient_not_finite, first_not_finite
from launch.step import SeparatePieces, accumulate_gradients
from parallel.activation import checkpoint_layers
from parallel.carry import empty_carry
from parallel.reduce import clip_gradients
from tests.distributed.tiny import random_codes
from tests.distributed.training import OneRank, loss_config
from tests.unit.moshi_cases import active_hybrid_model, set_windows

NAN = float("nan")


@pytest.fixture
def model():
    model = set_windows(active_hybrid_model())
    checkpoint_layers(model, "layer")  # wraps the layers' parts
    return model


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("text_emb.weight", "text_emb"),
        ("transformer.layers.0.self_attn.out_projs.0.weight", "layer 0 attention"),
        ("transformer.layers.1.self_attn.out_projs.0.weight", "layer 1 attention"),
        ("transformer.layers.1.ttt.layer.wk.bias", "layer 1 TTT: k"),
        ("transformer.layers.1.ttt.layer.learnable_ttt_lr_bias", "layer 1 TTT: eta"),
        ("transformer.layers.2.ttt.layer.W2", "layer 2 TTT: state before, W2"),
        ("transformer.layers.2.ttt.layer.wo.bias", "layer 2 TTT: output"),
        ("transformer.layers.2.ttt.alpha", "layer 2 TTT: gate"),
        ("transformer.layers.2.gating.linear_in.weight", "layer 2 feed-forward"),
        ("out_norm.alpha", "out_norm"),
        ("text_linear.weight", "text_linear"),
        ("depformer.layers.1.norm2.alpha", "Depformer layer 1 feed-forward"),
        ("linears.3.weight", "linears.3"),
    ],
)
def test_a_parameter_that_is_not_finite_is_met_where_it_acts(model, parameter, place):
    with torch.no_grad():
        dict(model.named_parameters())[parameter].view(-1)[0] = NAN
        # Every token meets the first row of an embedding.
        codes = torch.zeros_like(random_codes(1, 20))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    found = first_not_finite(model, SeparatePieces(model, [random_codes(2, 9), codes]), 1)
    assert found is not None
    assert found[1] == place
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def test_a_state_that_overflows_is_named_by_what_it_became(model):
    layer = model.transformer.layers[1].ttt.layer
    object.__setattr__(layer.config, "base_lr", 1e38)
    found = first_not_finite(model, SeparatePieces(model, [random_codes(1, 20)]), 0)
    assert found is not None
    assert found[1].startswith("layer 1 TTT: state after, W")


def test_lanes_are_computed_again_from_where_they_started(model):
    """A carried state that isn't finite is in the forward again, and is left as it is."""
    config, mesh = loss_config(model), OneRank()
    carry = empty_carry(model, 2, mesh, dtype=torch.float32, device="cpu")
    lanes = Lanes(carry, batch_size=2)
    steps = model.steps(random_codes(2, 48))
    pieces = [steps[:, :, n * 16 : n * 16 + 17] for n in range(3)]
    accumulate_gradients(
        model, lanes.pieces([[pieces[0]]], [[torch.ones(2, dtype=torch.bool)]]), config, mesh
    )
    carry = lanes.carry
    carry.layers[2].inner[0][1, 0, 0, 0] = NAN
    lanes.put(carry)
    go_on = [torch.zeros(2, dtype=torch.bool)] * 2
    step = lanes.pieces([pieces[1:]], [go_on])
    loss = accumulate_gradients(model, step, config, mesh)
    assert not loss.total.isfinite()
    left = {name: value.clone() for name, value in lanes.carry.tensors().items()}
    lanes.forget_broken(None)  # as a run does after a bad step; what is computed again knows it
    found = first_not_finite(model, step, 1)
    assert found is not None
    assert found[1] == "layer 2 TTT: state before, W1"
    assert not left["2.W1"].isfinite().all()
    # The step's first piece is behind the last backward: its lanes begin anew.
    assert first_not_finite(model, step, 0) is None


def test_gradients_that_are_not_finite_are_told_in_the_backwards_order(model):
    loss = accumulate_gradients(
        model, SeparatePieces(model, [random_codes(1, 20)]), loss_config(model), OneRank()
    )
    assert loss.total.isfinite()
    assert first_gradient_not_finite(model) is None
    broken = ("ttt.layer.wk.weight", "self_attn.in_projs.0.weight", "ttt.layer.W1", "norm1.alpha")
    for name in ("text_emb.weight", *(f"transformer.layers.1.{each}" for each in broken)):
        dict(model.named_parameters())[name].grad.view(-1)[0] = NAN
    # Clipping by a norm that isn't finite leaves all others what they are.
    assert clip_gradients(model.parameters(), 1.0).isnan()
    assert first_gradient_not_finite(model)[1] == "transformer.layers.1.ttt.layer.W1"
    assert model.transformer.layers[3].self_attn.out_projs[0].weight.grad.isfinite().all()
