"""Inner MLPs of three to five layers: `ttt_mlp` by autograd, against the definition in primal form.

float64 to 1e-10, for the reasons of test_ops_oracle.py: sums in another order leave 1e-15 a step.
"""

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.unit.ops_cases import DEEP, DEPTHS, gradients, make_case, objective, relative
from tests.unit.ops_cases import state_errors as errors_of_states
from tests.unit.test_ops_oracle import compare
from ttt_dist.ops import InnerState, deep_mlp_state, mlp_state, ttt_linear

TOLERANCE = 1e-10
deep = pytest.mark.parametrize("inner", DEEP)


def ragged(inner, lengths, **settings):
    """A batch whose lanes end in padded frames."""
    case = make_case(inner, len(lengths), 2, max(lengths), **settings)
    with torch.no_grad():
        for lane, n in enumerate(lengths):
            case.x["eta"][lane, :, n:] = 0
    return case


@deep
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 11, 4), (1, 2, 12, 4), (2, 1, 3, 7), (1, 2, 1, 4)])
def test_outputs_state_and_all_gradients(inner, shape, causal):
    B, H, L, C = shape
    after = compare(make_case(inner, B, H, L, C=C, causal=causal))
    assert after.depth == DEPTHS[inner]
    assert after.offset.tolist() == [L % C] * B


@deep
@pytest.mark.parametrize("length", [1, 6, 13])
def test_lanes_out_of_step_and_padded(inner, length):
    """Four lanes, four offsets; one lane of the second call ends early, one has no frame at all."""
    first = ragged(inner, [7, 4, 1, 2], seed=5)
    _, state = first.run(first.fresh())
    assert state.offset.tolist() == [3, 0, 1, 2]
    lengths = [length, length // 2, 0, length]
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    after = compare(ragged(inner, lengths), state, real)
    assert after.offset.tolist() == [(3 + length) % 4, length // 2 % 4, 1, (2 + length) % 4]


@deep
@pytest.mark.parametrize("pieces", [[1] * 19, [3, 1, 9, 6], [8, 11], [2, 17]])
def test_any_split_equals_one_call(inner, pieces):
    """Outputs, returned state, and the gradients of everything through all calls."""
    case = make_case(inner, 2, 2, 19)
    whole, parts = case.run(case.fresh()), case.run_pieces(pieces)
    grads, grads_parts = (gradients(objective(*r), case.x) for r in (whole, parts))
    errors = {"out": relative(parts[0], whole[0])} | errors_of_states(parts[1], whole[1])
    errors |= {n: relative(grads_parts[n], grads[n]) for n in grads}
    assert max(errors.values()) < TOLERANCE, errors


@deep
@pytest.mark.parametrize("fed", [0, 4, 6])
def test_all_padding_returns_the_state_unchanged(inner, fed):
    """Bitwise, on a fresh state, at a border and within a mini-batch."""
    case = make_case(inner, 2, 2, max(fed, 1))
    state = case.run(case.fresh())[1] if fed else case.fresh()
    padding = make_case(inner, 2, 2, 9, seed=3)
    with torch.no_grad():
        padding.x["eta"].zero_()
    _, after = padding.run(state)
    assert all(torch.equal(t, state.tensors()[n]) for n, t in after.tensors().items())


@deep
@pytest.mark.parametrize("name", ["q", "k", "v", "eta"])
def test_causality_is_exact(inner, name):
    case = make_case(inner, 1, 2, 11)
    before, _ = case.run(case.fresh())
    with torch.no_grad():
        case.x[name][:, :, 6] *= 1.5
    moved = (case.run(case.fresh())[0] != before).any(dim=-1).any(dim=1)[0]
    assert not moved[:6].any()
    assert moved[6]


def test_groups_and_an_outer_checkpoint_change_no_bit():
    """Recomputation repeats the same kernels; the norm's gradients are summed up group by group:
    1e-14 for another order."""
    case = make_case("mlp 3", 2, 2, 23)

    def value(*_, group_size=None):
        return objective(*case.run(case.fresh(), checkpoint_group_size=group_size))

    first = gradients(value(), case.x)
    others = [gradients(value(group_size=n), case.x) for n in (0, 1, 2, 16)]
    outer = checkpoint(value, *case.x.values(), use_reentrant=False)
    for other in (*others, gradients(outer, case.x)):
        for name, found in other.items():
            if name.startswith("ln_"):
                assert relative(found, first[name]) < 1e-14
            else:
                assert torch.equal(found, first[name]), name


@deep
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_stays_float32(inner, dtype):
    """The error is what rounded inputs cause by themselves, in float64, and as much again for the
    rounding of what lies between (measured: up to 2.3 times that). A deep network that learns fast
    amplifies it: 1e-6 of five layers' outputs in float32, 1e-7 of two layers'."""
    case, exact, near = (make_case(inner, 2, 2, 23, d=16) for _ in range(3))
    case.x = {n: t.detach().to(dtype if n in "qkv" else torch.float32) for n, t in case.x.items()}
    exact.x = {n: t.double() for n, t in case.x.items()}
    g = torch.Generator().manual_seed(0)
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-24
    for n, t in exact.x.items():
        near.x[n] = t * (1 + unit * (2 * torch.rand(t.shape, generator=g, dtype=t.dtype) - 1))
    (out, after), (expected, right), (moved, other) = (
        c.run(c.fresh()) for c in (case, exact, near)
    )
    assert out.dtype == dtype
    assert all(t.dtype == torch.float32 for t in (*after.weights, *after.pending))
    assert relative(out.double(), expected) < 4 * relative(moved, expected)
    for found, t, change in zip(after.weights, right.weights, other.weights, strict=True):
        assert relative(found.double(), t) < 4 * relative(change, t)


def test_state_of_many_layers_is_a_bag_of_named_tensors():
    case = make_case("mlp 4", 2, 2, 6)
    _, state = case.run(case.fresh())
    assert {"W1", "b4", "pending_W4"} < set(state.tensors())
    assert state.W2.shape == (2, 2, 18, 18)
    assert state.tensors()["W4"].shape == (2, 2, 18, 6)
    again = InnerState.from_tensors(state.tensors(), state.mini_batch_size)
    assert all(map(torch.equal, again.tensors().values(), state.tensors().values()))


def test_mistakes_are_named():
    def layers(*widths, H=2):
        pairs = list(pairwise(widths))
        return [torch.zeros(H, i, o) for i, o in pairs], [torch.zeros(H, 1, o) for _, o in pairs]

    for widths in ((6, 8, 6), (6, 8, 8, 8, 8, 8, 6)):
        with pytest.raises(ValueError, match="expected as many of both, 3 to 5"):
            deep_mlp_state(*layers(*widths), 1)
    weights, biases = layers(6, 8, 8, 6)
    with pytest.raises(ValueError, match="found 3 weights and 2 biases"):
        deep_mlp_state(weights, biases[1:], 1)
    wrong = r"W2 has shape \[2, 8, 9\], expected \[2, 8, 8\].*b2 has.*W3 has shape \[2, 9, 6\]"
    with pytest.raises(ValueError, match=wrong):
        deep_mlp_state(*layers(6, 8, 9, 6), 1)
    with pytest.raises(ValueError, match=r"b3 is torch.float64"):
        deep_mlp_state(weights, [*biases[:2], biases[2].double()], 1)
    with pytest.raises(ValueError, match="W1 has shape"):
        deep_mlp_state([weights[0][0], *weights[1:]], biases, 1)

    case = make_case("mlp 3", 1, 2, 5)
    with pytest.raises(ValueError, match=r"state has 3 inner layer\(s\), expected 1"):
        case.run(case.fresh(), op=ttt_linear)
    two = make_case("mlp", 1, 2, 5)
    state = mlp_state(*(two.x[n] for n in ("W1", "b1", "W2", "b2")), 1)
    assert case.run(state)[1].depth == 2
    fresh = case.fresh()
    cut = (*fresh.weights[:4], fresh.weights[4][..., :5], fresh.weights[5])
    with pytest.raises(ValueError, match=r"state.W3 has shape \[1, 2, 18, 5\], expected"):
        case.run(InnerState(cut, fresh.pending, fresh.offset))
