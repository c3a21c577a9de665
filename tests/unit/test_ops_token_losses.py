"""Inner losses of every token at W0, before and after its step: what they are compared to."""

from dataclasses import replace

import pytest
import torch

from tests.unit.ops_cases import DEPTHS, make_case
from ttt_dist.ops import InnerState, reference_scan, token_losses
from ttt_dist.ops.reference import inner_network, inner_norm

EPS, C = 1e-6, 4
# Three mini-batches and a remainder, read in two pieces.
LENGTH, BORDER = 15, 8


def losses_of(case, state, start=0, stop=None, *, eta_factor=1.0, initial=None):
    k, v, eta = (case.x[n][:, :, start:stop] for n in ("k", "v", "eta"))
    norms = (case.x["ln_weight"], case.x["ln_bias"])
    initial = initial or case.fresh().weights
    losses, _ = token_losses(
        k, v, eta * eta_factor, *norms, state, initial, mini_batch_size=C, inner_eps=EPS
    )
    return losses


def carried(case, eta_factor=1.0):
    """The state after the first piece, as the next one takes it."""
    scaled = replace(case, x=case.x | {"eta": case.x["eta"] * eta_factor})
    state = scaled.run(scaled.fresh(), 0, BORDER)[1].detach()
    return InnerState.at_border(state.weights)


def oracle(case, state, start=0, stop=None):
    """The same curves by definition: the reference's states, and each token's loss written out."""
    x = {n: case.x[n].detach()[:, :, start:stop] for n in ("q", "k", "v", "eta")}
    norms = (case.x["ln_weight"].detach(), case.x["ln_bias"].detach())
    initial = [w.detach() for w in case.fresh().weights]
    B, _, L, _ = x["k"].shape
    curves = torch.zeros(3, *x["k"].shape[:3], dtype=torch.float64)
    for first in range(0, L, C):
        part = slice(first, min(first + C, L))
        before = state.weights
        frames = [x[n][:, :, part] for n in ("q", "k", "v", "eta")]
        _, state = reference_scan(*frames, *norms, state, mini_batch_size=C, inner_eps=EPS)
        after = [w - p for w, p in zip(state.weights, state.pending, strict=True)]
        for row, weights in enumerate((initial, before, after)):
            for b in range(B):
                for i in range(part.start, part.stop):
                    k, v = x["k"][b, :, i], x["v"][b, :, i]
                    read = inner_norm(inner_network(k, [w[b] for w in weights]), *norms, EPS)
                    curves[row, b, :, i] = 0.5 * (read - (v - k)).square().sum(-1)
    return curves


@pytest.mark.parametrize("inner", ["mlp", "linear", "mlp 3"])
def test_they_are_those_of_the_definition(inner):
    """1e-10: as the ops themselves; another order of float64 sums."""
    case = make_case(inner, 2, 3, LENGTH)
    state = case.fresh().detach()
    assert torch.allclose(losses_of(case, state), oracle(case, state), rtol=1e-10)
    later = carried(case)
    found, expected = losses_of(case, later, BORDER), oracle(case, later, BORDER)
    assert torch.allclose(found, expected, rtol=1e-10)


def check_w0(case, initial=lambda state: None):
    """What must hold whatever the state does; `initial`: what is taken for W0, if not that."""
    states = {rate: carried(case, rate) for rate in (1.0, 2.0, 0.0)}
    once, twice, never = (
        losses_of(case, state, BORDER, eta_factor=rate, initial=initial(state))
        for rate, state in states.items()
    )
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[0], never[0])
    # Where nothing is learned there is but one set of weights.
    assert torch.equal(never[0], never[1])
    assert torch.equal(never[1], never[2])


@pytest.mark.parametrize("inner", DEPTHS)
def test_w0_is_that_of_the_parameters_whatever_was_learned(inner):
    check_w0(make_case(inner, 2, 3, LENGTH))


def test_running_weights_in_place_of_the_parameters_are_noticed():
    """The bug of the prototypes: their W0 had learned too."""
    with pytest.raises(AssertionError):
        check_w0(make_case("mlp", 2, 3, LENGTH), initial=lambda state: state.weights)


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_they_part_after_the_first_mini_batch_and_steps_help(inner):
    case = make_case(inner, 2, 3, LENGTH)
    w0, before, after = losses_of(case, case.fresh(), eta_factor=0.2)
    assert torch.equal(w0[:, :, :C], before[:, :, :C])
    assert (w0[:, :, C:] != before[:, :, C:]).all()
    assert after.mean() < before.mean()
    w0, before, _ = losses_of(case, carried(case), BORDER)
    assert (w0 != before).all()  # a later piece has no first mini-batch


def test_lanes_inside_a_mini_batch_are_refused():
    case = make_case("mlp", 2, 3, LENGTH)
    state = case.run(case.fresh(), 0, 3)[1]
    with pytest.raises(ValueError, match="border of a mini-batch"):
        losses_of(case, state, 3)
