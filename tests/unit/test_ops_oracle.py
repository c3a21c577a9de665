"""Ops against the definition in primal form (`reference_scan`): values and every gradient.

Both compute the same real function in float64; sums in another order leave 1e-15 a step, amplified
by at most a few dozen inner steps: 1e-10 is far above that and far below any wrong term.
"""

import pytest
import torch

from tests.unit.ops_cases import gradients, make_case, objective, relative, state_errors
from ttt_dist.ops import InnerState, reference_scan
from ttt_dist.ops.reference import inner_network

pytestmark = pytest.mark.usefixtures("either_code")

TOLERANCE = 1e-10
# B, H, L, C: L not a multiple of C, a multiple, C > L, one frame, C = 1, B and H of 1.
SHAPES = [(2, 3, 11, 4), (1, 1, 12, 4), (2, 1, 3, 7), (1, 2, 1, 4), (3, 2, 5, 1), (1, 2, 13, 2)]


def compare(case, state=None, real=None, **settings):
    """Outputs, returned state and gradients of op and reference, from `state` (default: fresh).

    A carried state's weights and pending parts are leaves of their own. `real` `[B, L]` is False in
    padded frames: their outputs, and gradients of their zero rates, carry no meaning.
    """
    leaves = dict(case.x)
    if state is not None:
        tensors = {n: t.detach().clone() for n, t in state.tensors().items()}
        leaves = {n: t for n, t in leaves.items() if n not in tensors}
        leaves |= {n: t.requires_grad_() for n, t in tensors.items() if n != "offset"}
        state = InnerState.from_tensors(tensors, state.mini_batch_size)
    results = []
    for op in (None, reference_scan):
        out, after = case.run(state or case.fresh(), op=op, **settings)
        if real is not None:
            out = out * real[:, None, :, None]
        results.append((out, after, gradients(objective(out, after), leaves)))
        if real is not None:
            results[-1][2]["eta"].mul_(real[:, None])
    (out, after, grads), (out_ref, after_ref, grads_ref) = results
    errors = {"out": relative(out, out_ref)} | state_errors(after, after_ref)
    errors |= {f"grad {n}": relative(grads[n], grads_ref[n]) for n in grads}
    assert max(errors.values()) < TOLERANCE, errors
    return after


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_state(inner, shape, causal):
    B, H, L, C = shape
    after = compare(make_case(inner, B, H, L, C=C, causal=causal))
    assert after.offset.tolist() == [L % C] * B


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_carried_state(inner, before, length):
    """Every offset, calls that end inside, at and past the end of the started mini-batch."""
    _, state = make_case(inner, 2, 2, before, seed=5).run(make_case(inner, 2, 2, 1).fresh())
    after = compare(make_case(inner, 2, 2, length), state)
    assert after.offset.tolist() == [(before + length) % 4] * 2


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_bidirectional_carried_at_a_border(inner):
    _, state = make_case(inner, 2, 2, 8, seed=5).run(
        make_case(inner, 2, 2, 1).fresh(), causal=False
    )
    compare(make_case(inner, 2, 2, 6, causal=False), state)


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 13])
def test_lanes_out_of_step(inner, length):
    """Four lanes, four offsets."""
    ragged = make_case(inner, 4, 2, 7, seed=5)
    with torch.no_grad():
        for lane, n in enumerate((7, 4, 1, 2)):
            ragged.x["eta"][lane, :, n:] = 0
    _, state = ragged.run(ragged.fresh())
    assert state.offset.tolist() == [3, 0, 1, 2]
    compare(make_case(inner, 4, 2, length), state)


def test_reference_takes_three_layers():
    """The oracle is ready for deeper inner networks: its update is the gradient it claims to be."""
    g = torch.Generator().manual_seed(0)
    sizes = [(4, 5), (5, 3), (3, 4)]
    shapes = [s for i, o in sizes for s in ((1, 2, i, o), (1, 2, 1, o))]
    weights = tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    zeros = tuple(torch.zeros_like(w) for w in weights)
    state = InnerState(weights, zeros, torch.zeros(1, dtype=torch.int64))
    q, k, v = torch.randn(3, 1, 2, 1, 4, generator=g, dtype=torch.float64)
    norm = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    eta = torch.full((1, 2, 1), 0.5, dtype=torch.float64)
    _, after = reference_scan(q, k, v, eta, *norm, state, mini_batch_size=1)

    def loss(moved):
        y = inner_network(k[0, :, 0], [w[0] for w in moved])
        y = torch.nn.functional.layer_norm(y, (4,), eps=1e-6)
        return 0.5 * (y - (v - k)[0, :, 0]).square().sum()

    step = 1e-6
    for i, (old, new) in enumerate(zip(weights, after.weights, strict=True)):
        direction = torch.randn(old.shape, generator=g, dtype=torch.float64)
        up, down = (
            loss([*weights[:i], old + s * step * direction, *weights[i + 1 :]]) for s in (1, -1)
        )
        expected = (old - new).mul(direction).sum() / 0.5
        # Central differences at a step of 1e-6 keep about 9 digits.
        torch.testing.assert_close((up - down) / (2 * step), expected, rtol=1e-6, atol=1e-8)
