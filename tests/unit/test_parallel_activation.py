"""Activation checkpointing and compilation change what is kept and run, not what comes out."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.activation import checkpoint_layers
from parallel.compilation import compile_layers
from tests.distributed.tiny import LM_CONFIG, TTT_LAYERS, random_codes, ttt_placement
from tests.unit.moshi_cases import active_hybrid_model, set_windows, total_loss
from ttt_dist.moshi.build import (
    build_model,
    depformer_layers,
    freeze_base,
    transformer_layers,
)
from ttt_dist.ops import scan_op
from ttt_dist.ops.implementations import Implementation

FRAMES = 21


def gradients(model, codes):
    model.zero_grad(set_to_none=True)
    total_loss(model(codes), codes, model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def scans(monkeypatch):
    """How often the scan's operator runs, forward and backward.

    Its backward computes every mini-batch forward once more (tests of the operator count them), so
    with one run of each a step computes the scan forward twice.
    """
    counted = Counter()
    choose = scan_op.implementation

    def counting(*args):
        chosen = choose(*args)

        def forward(*args):
            counted["forward"] += 1
            return chosen.forward(*args)

        def backward(*args):
            counted["backward"] += 1
            return chosen.backward(*args)

        return Implementation(chosen.name, forward, backward)

    monkeypatch.setattr(scan_op, "implementation", counting)
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
def test_recomputation_changes_no_bit_and_runs_the_scan_twice(inner_model, recompute, scans):
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
    once = {"forward": len(TTT_LAYERS), "backward": len(TTT_LAYERS)}
    assert scans == once
    scans.clear()

    wrapped = checkpoint_layers(model, recompute)
    assert wrapped == (0 if recompute == "none" else len(layers))
    recomputed = gradients(model, codes)
    assert set(passes.values()) == {2 if recompute == "none" else 3}
    assert scans == once
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


@pytest.mark.integration  # a minute of compilation
def test_compiled_layers_give_the_same_gradients(scans):
    """1e-5: compiled float32 sums in another order. The scan's operator is the same, and its
    outputs are kept through compiled code too."""
    model = set_windows(active_hybrid_model("mlp"))
    codes = random_codes(2, FRAMES)
    expected = gradients(model, codes)
    once = dict(scans)
    scans.clear()
    assert compile_layers(model) == len(transformer_layers(model) + depformer_layers(model))
    checkpoint_layers(model, "layer")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(model, codes)
    stats = torch._dynamo.utils.counters["stats"]
    # A plain layer, the three parts of one with TTT, a layer of the Depformer: each is traced once.
    assert stats["unique_graphs"] == 5, stats
    assert scans == once
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.integration  # half a minute of compilation
def test_compiled_code_leaves_alone_what_checkpointing_keeps(monkeypatch):
    """With one head, as where tp has as many ranks as there are heads, the scan's output and what
    the output norm makes of it lie alike in memory: the one could replace the other."""
    monkeypatch.setenv("TTT_DIST_NATIVE", "0")
    small = {"num_layers": 1, "depformer_num_layers": 1, "num_heads": 1}
    settings = LM_CONFIG | small
    placement = replace(ttt_placement(lm_config=settings), layers=(0,))
    torch.manual_seed(0)
    model = build_model(settings, placement, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.2)
    codes = random_codes(2, FRAMES)
    expected = gradients(model, codes)
    compile_layers(model)
    checkpoint_layers(model, "layer")
    torch._dynamo.reset()
    found = gradients(model, codes)
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.integration  # a quarter of a minute of tracing
def test_lengths_may_change_many_times_under_compilation(monkeypatch):
    """Every length, with gradients and without, of parameters or of inputs, is compiled anew: here
    by a compiler that only traces. Unsaid, torch allows 8 in all, which three lengths exceed."""
    settings = {"backend": "eager", "fullgraph": True, "dynamic": False}
    tracing = partial(torch.compile, **settings)
    monkeypatch.setattr(torch, "compile", lambda part, **_: tracing(part))
    model = set_windows(active_hybrid_model("mlp"))
    freeze_base(model, torch.float32)
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_layers(model)
        checkpoint_layers(model, "layer")
        torch._dynamo.reset()
        for frames in (24, 40, 56):
            codes = random_codes(2, frames)
            with torch.no_grad():
                model(codes)
            assert gradients(model, codes)
