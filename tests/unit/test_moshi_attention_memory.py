"""What windowed attention allocates, and what recomputation and compilation make of it."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.activation import checkpoint_layers
from parallel.compilation import compile_layers
from tests.distributed.tiny import random_codes
from tests.unit.attention_cases import D, attentions, empty, error
from tests.unit.moshi_cases import active_hybrid_model, set_windows, total_loss
from ttt_dist.moshi.attention import AttentionWindow, attend
from ttt_dist.moshi.build import transformer_layers


class Allocations(TorchDispatchMode):
    """Bytes of all that operators make, the largest of it, and which attention kernels run."""

    def __init__(self):
        super().__init__()
        self.total, self.largest, self.kernels = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():
            self.kernels[func.name().removeprefix("aten::_scaled_dot_product_")] += 1
        if not func.is_view and not func._schema.is_mutable:
            made = out if isinstance(out, (list, tuple)) else [out]
            sizes = [t.numel() * t.element_size() for t in made if torch.is_tensor(t)]
            self.total += sum(sizes)
            self.largest = max([self.largest, *sizes])
        return out


def allocations(forward, frames):
    x = torch.randn(1, frames, D, requires_grad=True)
    with Allocations() as seen:
        forward(x).sum().backward()
    return seen


@pytest.mark.parametrize("context", [1, 50, 100])
@pytest.mark.parametrize("carried", [False, True])
def test_all_that_is_allocated_grows_as_the_frames(context, carried):
    """Forward and backward; Moshi's own forward, as a check of the check, grows as their square."""
    stock, packed = attentions(context)

    def ours(x):
        return attend(packed, x, empty(packed, batch_size=1) if carried else None)[0]

    counts = [allocations(ours, frames) for frames in (1000, 2000, 4000)]
    for small, large in pairwise(counts):
        assert large.total < 2.1 * small.total
        assert large.largest < 2.1 * small.largest
        assert large.kernels == small.kernels
    # No scores are kept either: the kernel that keeps none takes masks, forward and backward.
    kernels = {"flash_attention_for_cpu", "flash_attention_for_cpu_backward"}
    assert set(counts[0].kernels) == kernels
    dense = [allocations(lambda x: stock(x, x, x), frames) for frames in (1000, 2000)]
    assert dense[1].largest > 3.9 * dense[0].largest


def test_selective_recomputation_keeps_every_attention():
    """Each kernel runs as often as without recomputation; under `layer` once more."""
    codes = random_codes(2, 140)  # three blocks of 64, so each kind of block
    runs = {}
    for recompute in ("none", "selective", "layer"):
        model = set_windows(active_hybrid_model())
        checkpoint_layers(model, recompute)
        with Allocations() as seen:
            total_loss(model(codes), codes, model).backward()
        runs[recompute] = seen.kernels["flash_attention_for_cpu"]
    assert runs["selective"] == runs["none"] < runs["layer"] == 2 * runs["none"]


@pytest.mark.integration  # compiles
def test_a_compiled_and_recomputed_layer_carries_windows():
    """1e-5: compiled float32 sums in another order."""
    x = torch.randn(2, 170, 32, requires_grad=True)
    results = []
    for wrapped in (False, True):
        model = set_windows(active_hybrid_model())
        if wrapped:
            torch._dynamo.reset()
            compile_layers(model)
            checkpoint_layers(model, "layer")
        layer = transformer_layers(model)[0]
        window = AttentionWindow.empty(layer.self_attn, 2, device="cpu", dtype=x.dtype)
        outputs = []
        for piece in x.split(85, dim=1):
            y, window = layer._whole(piece, None, window)
            outputs.append(y)
        y = torch.cat(outputs, dim=1)
        weights = [p for n, p in layer.named_parameters() if "self_attn" in n]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *weights])])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-5
