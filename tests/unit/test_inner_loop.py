"""Inner losses by position over recordings, TTT's health, and what they leave alone."""

import json
from unittest.mock import patch

import pytest
import torch

from launch.feeding.lanes import Lanes
from launch.reporting.inner_loop import InnerLossCurves
from launch.reporting.ttt_health import NAMES, ttt_health
from launch.step import SeparatePieces, accumulate_gradients, evaluate
from parallel.activation import checkpoint_layers
from parallel.carry import empty_carry
from tests.distributed.tiny import TTT_LAYERS, random_codes
from tests.distributed.training import OneRank, loss_config
from tests.unit.moshi_cases import active_hybrid_model, hybrid_model, set_windows
from ttt_dist.data.steps import piece_of_steps
from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.probe import probing
from ttt_dist.reading import Reading

PIECE, SIZE, LONGEST = 16, 8, 48
RECORDINGS = (44, 30)  # a lane each: three pieces, and two
CPU = torch.device("cpu")


@pytest.fixture
def model():
    return set_windows(active_hybrid_model(dtype=torch.float64)).double()


def new_lanes(model, lanes=2):
    return Lanes(
        empty_carry(model, lanes, OneRank(), dtype=torch.float64, device=CPU), batch_size=lanes
    )


def batches(model):
    """The pieces of two recordings, each in its lane; the shorter one's lane ends with nothing."""
    steps = [model.steps(random_codes(2, n, seed=n)[:1])[0] for n in RECORDINGS]
    lanes = new_lanes(model)
    for piece in range(3):
        parts = torch.stack([piece_of_steps(each, piece, PIECE) for each in steps])
        begins = torch.tensor([piece == 0, piece == 0])
        yield lanes.pieces(
            [[parts]], [[begins]], [[piece * PIECE, piece * PIECE if piece < 2 else 0]]
        )


def curves_of(model, bins=500):
    curves = InnerLossCurves(model, LONGEST, OneRank(), CPU, bins)
    evaluate(model, batches(model), loss_config(model), OneRank(), CPU, curves)
    return curves.figures()


def set_rate(model, factor):
    """Multiply the inner learning rate of all layers."""
    for layer in model.transformer.layers:
        if layer.ttt is not None:
            config = layer.ttt.layer.config
            object.__setattr__(config, "base_lr", config.base_lr * factor)


def check_curves(model):
    """The first TTT layer's W0 under other rates; later layers read what it gives."""
    first = TTT_LAYERS[0]
    found = curves_of(model).curves[first]
    assert found["w0"][0] == found["before"][0]
    assert all(w0 != b for w0, b in zip(found["w0"][1:], found["before"][1:], strict=True))
    assert sum(found["after"]) < sum(found["before"])
    set_rate(model, 2.0)
    assert curves_of(model).curves[first]["w0"] == found["w0"]
    set_rate(model, 0.0)
    frozen = curves_of(model).curves[first]
    assert frozen["w0"] == frozen["before"] == frozen["after"] == found["w0"]


def test_w0_is_that_of_the_parameters_over_whole_recordings(model):
    check_curves(model)


def test_running_weights_in_place_of_the_parameters_are_noticed(model):
    """The bug of the prototypes, here with the state that a piece starts from."""
    real = Reading.__init__

    def planted(self, config, *rest):
        real(self, config, *rest)
        object.__setattr__(self, "initial", self.before.weights)

    with patch.object(Reading, "__init__", planted), pytest.raises(AssertionError):
        check_curves(model)


def test_figures_are_means_over_what_was_read(model):
    """Against each layer's losses, recording by recording in one piece."""
    expected = {i: torch.zeros(3, LONGEST, dtype=torch.float64) for i in TTT_LAYERS}
    count = torch.zeros(LONGEST)
    for frames in RECORDINGS:
        steps = model.steps(random_codes(2, frames, seed=frames)[:1])

        def add(layer, given, frames=frames):
            every = torch.ones(1, frames, dtype=torch.bool)
            expected[layer][:, :frames] += given.learned(every)[0].mean(dim=(1, 2))

        with torch.no_grad(), probing(model, add):
            model.step_losses(steps)
        count[:frames] += 1
    found = curves_of(model)
    assert found.edges == list(range(0, LONGEST + 1, SIZE))
    assert found.frames == count.view(-1, SIZE).sum(1).tolist()
    for layer, curves in found.curves.items():
        sums = expected[layer].view(3, -1, SIZE).sum(2) / count.view(-1, SIZE).sum(1)
        for row, name in enumerate(("w0", "before", "after")):
            # 1e-6: whole models in float64; Moshi's norms compute in float32.
            assert curves[name] == pytest.approx(sums[row].tolist(), rel=1e-6), (layer, name)
    wide = curves_of(model, bins=2)
    assert wide.edges == [0, 24, 48]
    assert wide.frames == [48, 26]


def test_looking_on_changes_nothing(model):
    checkpoint_layers(model, "layer")  # wraps the layers' parts

    def losses_and_carry(look):
        lanes = new_lanes(model)
        steps = model.steps(random_codes(2, 2 * PIECE))
        pieces = [[steps[:, :, n * PIECE : (n + 1) * PIECE + 1] for n in range(2)]]
        microbatches = lanes.pieces(pieces, [[torch.tensor([n == 0] * 2) for n in range(2)]])
        health = ttt_health(model, microbatches, OneRank()) if look else None
        loss = accumulate_gradients(model, microbatches, loss_config(model), OneRank())
        gradient = model.transformer.layers[1].ttt.layer.W1.grad.clone()
        model.zero_grad()
        return loss.total, gradient, lanes.carry.tensors(), health

    plain, looked = losses_and_carry(False), losses_and_carry(True)
    assert torch.equal(plain[0], looked[0])
    assert torch.equal(plain[1], looked[1])
    assert all(torch.equal(value, looked[2][name]) for name, value in plain[2].items())
    assert looked[3].keys() == {f"{name}_layer_{i}" for name in NAMES for i in TTT_LAYERS}


def test_health_says_what_the_layers_do(model):
    codes = random_codes(2, 29)[:1]  # all of its frames are read
    found = ttt_health(model, SeparatePieces(model, [codes]), OneRank())
    layer = model.transformer.layers[1]
    gate = layer.ttt.alpha.tanh().abs()
    assert found["ttt_gate_mean_layer_1"] == pytest.approx(gate.mean().item())
    assert found["ttt_gate_max_layer_1"] == pytest.approx(gate.max().item())
    seen = []
    hook = layer.ttt.layer.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    with torch.no_grad():
        model(codes)
    hook.remove()
    (state,) = seen
    now = [w - p for w, p in zip(state.weights, state.pending, strict=True)]
    w0 = layer.ttt.layer.inner_parameters()
    changed = sum((w - p).square().flatten(1).sum(1) for w, p in zip(now, w0, strict=True))
    expected = (changed / sum(p.square().sum() for p in w0)).sqrt().mean().item()
    assert found["ttt_state_change_layer_1"] == pytest.approx(expected, rel=1e-6)
    set_rate(model, 0.0)
    still = ttt_health(model, SeparatePieces(model, [codes]), OneRank())
    assert still["ttt_state_change_layer_1"] == still["ttt_inner_lr_layer_1"] == 0.0
    assert still["ttt_inner_loss_after_layer_1"] == still["ttt_inner_loss_w0_layer_1"]


def test_probing_is_refused_with_gradients_and_twice(model):
    with pytest.raises(RuntimeError, match="without gradients"), probing(model, print):
        pass
    with (
        torch.no_grad(),
        probing(model, print),
        pytest.raises(RuntimeError, match="probed already"),
        probing(model, print),
    ):
        pass


def test_layers_without_a_probe_make_no_reading(model):
    def none(*_):
        raise AssertionError("a reading was made")

    with patch.object(Reading, "__init__", none), torch.no_grad():
        model(random_codes(1, 9))
        assert all(m.probe is None for m in model.modules() if isinstance(m, TTTLayer))


def test_json_and_png(model, tmp_path):
    figures = curves_of(model)
    figures.write(tmp_path / "new" / "step-000004", "after step 4")
    found = json.loads((tmp_path / "new" / "step-000004.json").read_text())
    assert found["bin_edges"] == figures.edges
    assert found["layers"]["2"]["before"] == figures.curves[2]["before"]
    mean = [sum(each) / 2 for each in zip(*(c["w0"] for c in figures.curves.values()), strict=True)]
    assert found["mean"]["w0"] == pytest.approx(mean)
    assert "W0" in found["caption"]
    png = (tmp_path / "new" / "step-000004.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no TTT layer"):
        InnerLossCurves(hybrid_model(None), LONGEST, OneRank(), CPU)
