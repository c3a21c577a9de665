"""Activation checkpointing and compilation change what is kept and run, not what comes out."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.activation import checkpoint_layers
from parallel.compilation import compile_layers
from tests.distributed.tiny import TTT_LAYERS, random_codes
from tests.unit.moshi_cases import active_hybrid_model, set_windows, total_loss
from ttt_dist.moshi.build import depformer_layers, transformer_layers
from ttt_dist.ops.linear_group import LinearGroup
from ttt_dist.ops.mlp_group import MlpGroup

FRAMES = 21


def gradients(model, codes):
    model.zero_grad(set_to_none=True)
    total_loss(model(codes), codes, model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def mini_batches(monkeypatch):
    """Every mini-batch whose inner step is computed forward, counted."""
    counted = Counter()
    for cls in (MlpGroup, LinearGroup):
        original = cls._learn

        def learn(self, frames, original=original):
            counted["forward"] += self.n
            original(self, frames)

        monkeypatch.setattr(cls, "_learn", learn)
    return counted


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_recomputation_changes_no_bit_and_runs_the_scan_twice(inner_model, recompute, mini_batches):
    model = set_windows(active_hybrid_model(inner_model))
    layers = transformer_layers(model) + depformer_layers(model)
    passes = dict.fromkeys(range(len(layers)), 0)
    for index, layer in enumerate(layers):

        def count(*_: object, index: int = index) -> None:
            passes[index] += 1

        layer.norm2.register_forward_hook(count)
    codes = random_codes(2, FRAMES)
    kept = gradients(model, codes)
    assert set(passes.values()) == {1}
    scans = mini_batches["forward"]
    C = transformer_layers(model)[TTT_LAYERS[0]].ttt.layer.config.mini_batch_size
    assert scans == 2 * len(TTT_LAYERS) * -(-FRAMES // C)  # once forward, once in the backward

    wrapped = checkpoint_layers(model, recompute)
    assert wrapped == (0 if recompute == "none" else len(layers))
    recomputed = gradients(model, codes)
    assert set(passes.values()) == {2 if recompute == "none" else 3}
    assert mini_batches["forward"] == 2 * scans  # no more than before
    assert kept.keys() == recomputed.keys()
    for name, value in kept.items():
        assert torch.equal(value, recomputed[name]), name
    with torch.no_grad():
        model(codes)
    assert set(passes.values()) == {3 if recompute == "none" else 4}


def test_selective_recomputation_multiplies_about_half_as_much():
    products = {}
    for recompute in ("none", "selective", "layer"):
        model = set_windows(active_hybrid_model("mlp"))
        checkpoint_layers(model, recompute)
        with Products() as counted:
            gradients(model, random_codes(2, FRAMES))
        products[recompute] = counted.count
    layer, selective = (products[mode] - products["none"] for mode in ("layer", "selective"))
    assert 0.4 * layer < selective < 0.6 * layer, products


def test_compiled_layers_give_the_same_gradients(mini_batches):
    """1e-5: compiled float32 sums in another order. The scan's operator is the same, and its
    outputs are kept through compiled code too."""
    model = set_windows(active_hybrid_model("mlp"))
    codes = random_codes(2, FRAMES)
    expected = gradients(model, codes)
    scans = mini_batches["forward"]
    assert compile_layers(model) == len(transformer_layers(model) + depformer_layers(model))
    checkpoint_layers(model, "layer")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(model, codes)
    stats = torch._dynamo.utils.counters["stats"]
    # A plain layer, the three parts of one with TTT, a layer of the Depformer: each is traced once.
    assert stats["unique_graphs"] == 5, stats
    assert mini_batches["forward"] == 2 * scans
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 1e-5, (name, error)
