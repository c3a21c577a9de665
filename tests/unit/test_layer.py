"""TTTLayer: the public code's goldens, causality by frame, streaming, padding, placement words."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ttt_dist.config import TTTConfig
from ttt_dist.layer import TTTLayer
from ttt_dist.ops import InnerState
from ttt_dist.placement import PARTIAL, place_into, to_local

GOLDENS = Path(__file__).parents[1] / "assets" / "goldens"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def make_layer(**changes: object) -> TTTLayer:
    torch.manual_seed(0)
    settings = {"model_dim": 24, "num_heads": 3, "mini_batch_size": 8, "base_lr": 3.0} | changes
    layer = TTTLayer(TTTConfig(**settings)).double()
    with torch.no_grad():  # values away from the initial ones, so that no term vanishes
        for value in layer.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return layer


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
def test_golden_outputs_and_all_gradients(inner_model):
    """1e-7: the public code truncates GELU's constants (goldens/README.md)."""
    path = GOLDENS / f"layer_{inner_model}_noncausal.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    golden = load_file(path)
    layer = TTTLayer(
        TTTConfig(
            model_dim=24,
            num_heads=int(metadata["num_heads"]),
            inner_model=inner_model,
            mini_batch_size=int(metadata["mini_batch_size"]),
            base_lr=float(metadata["base_lr"]),
            inner_eps=float(metadata["inner_eps"]),
            causal=False,
        )
    ).double()
    parameters = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}
    layer.load_state_dict(parameters, strict=True)
    x = golden["x"].requires_grad_()
    y, _ = layer(x)
    y.backward(golden["grad_y"])
    assert relative_error(y, golden["y"]) < 1e-7
    assert relative_error(x.grad, golden["grad.x"]) < 1e-7
    for name, value in layer.named_parameters():
        assert relative_error(value.grad, golden[f"grad.{name}"]) < 1e-7, name


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
def test_causal_by_frame(inner_model):
    """A changed frame changes no earlier output at all, and does change its own."""
    layer = make_layer(inner_model=inner_model)
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer(x)
        for frame in (0, 5, 7, 8, 20):
            changed = x.clone()
            changed[:, frame] += 1.0
            moved = (layer(changed)[0] - y).abs().amax(dim=(0, 2))
            assert torch.all(moved[:frame] == 0)
            assert moved[frame] > 1e-3


def test_noncausal_looks_ahead():
    layer = make_layer(causal=False)
    x = torch.randn(1, 8, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1.0
    assert (layer(changed)[0] - layer(x)[0])[:, 0].abs().max() > 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_any_split_equals_one_call(seed):
    """1e-10 in float64: the same sums in another order."""
    layer = make_layer()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    whole, final = layer(x)
    cuts = torch.randperm(36, generator=generator)[:5].sort().values + 1
    state: InnerState | None = None
    parts = []
    for piece in x.tensor_split(cuts, dim=1):
        y, state = layer(piece, state)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-10
    for name, tensor in final.tensors().items():
        if tensor.is_floating_point():
            scale = final.tensors()["W1"].norm()
            assert (state.tensors()[name] - tensor).norm() < 1e-10 * scale, name
        else:
            assert torch.equal(state.tensors()[name], tensor)


def test_padded_frames_leave_the_stream_as_it_was():
    """A lane that ends early goes on, after padding, as if there had been none."""
    layer = make_layer()
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 13:] = False
    after = torch.randn(2, 9, 24, dtype=torch.float64)
    _, state = layer(x, frame_mask=mask)
    y, _ = layer(after, state)
    _, unpadded = layer(x[1:, :13])
    expected, _ = layer(after[1:], unpadded)
    assert relative_error(y[1:], expected) < 1e-10


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
def test_a_frame_without_any_token_spoils_no_gradient(inner_model):
    """Fresh biases are zero, so a frame of zeros has queries, keys and values of length zero.
    Gradients of what has no direction are those of an ordinary frame, not 10^11 times as large."""
    torch.manual_seed(0)
    layer = TTTLayer(
        TTTConfig(model_dim=16, num_heads=2, mini_batch_size=4, inner_model=inner_model)
    )
    x, weights = torch.randn(2, 1, 11, 16)
    found = []
    for frame in (None, 6):
        x = x.detach().clone()
        if frame is not None:
            x[:, frame] = 0.0
        layer.zero_grad()
        (layer(x.requires_grad_())[0] * weights).sum().backward()
        found.append({n: p.grad for n, p in layer.named_parameters()} | {"x": x.grad})
    ordinary, with_zeros = found
    for name, grad in with_zeros.items():
        assert grad.isfinite().all(), name
        assert grad.norm() < 100 * ordinary[name].norm() + 1e-6, name


def test_bfloat16_keeps_a_float32_state():
    layer = make_layer().bfloat16()
    y, state = layer(torch.randn(1, 11, 24, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.W1.dtype == torch.float32


def test_placement_words_are_the_identity_on_plain_tensors():
    """place_into returned its second argument in a prototype; values exploded 6000-fold."""
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    assert place_into(first, second) is first
    assert to_local(first, grad_placements=PARTIAL) is first


def test_config_names_every_problem():
    with pytest.raises(ValueError, match=r"(?s)mini_batch_size.*inner_model.*base_lr"):
        TTTConfig(model_dim=8, num_heads=2, mini_batch_size=0, inner_model="rnn", base_lr=-1)
    with pytest.raises(ValueError, match="divisors of model_dim=10"):
        TTTConfig(model_dim=10, num_heads=4)
