"""Any split of a stream with the state carried is one call; lanes out of step; padded frames.

float64: a split changes the order of sums alone, 1e-15 a step; 1e-10 is the contract's bound.
"""

import random

import pytest
import torch

from tests.unit.ops_cases import gradients, make_case, objective, relative, state_errors
from ttt_dist.ops import InnerState, reference_scan

pytestmark = pytest.mark.usefixtures("either_code")

TOLERANCE = 1e-10


def random_split(length, seed):
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, length), rng.randint(1, length - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length])]


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("seed", range(25))
def test_any_split_equals_one_call(inner, seed):
    """Outputs, returned state, and the gradients of everything through all calls."""
    C = 1 + seed % 6
    case = make_case(inner, 2, 2, 19, C=C, seed=seed)
    whole = case.run(case.fresh())
    pieces = case.run_pieces(random_split(19, seed))
    grads, grads_pieces = (gradients(objective(*r), case.x) for r in (whole, pieces))
    errors = {"out": relative(pieces[0], whole[0])} | state_errors(pieces[1], whole[1])
    errors |= {n: relative(grads_pieces[n], grads[n]) for n in grads}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_one_frame_at_a_time(inner):
    case = make_case(inner, 2, 2, 14)
    out, after = case.run(case.fresh())
    outs, after_frames = case.run_pieces([1] * 14)
    assert relative(outs, out) < TOLERANCE
    assert max(state_errors(after_frames, after).values()) < TOLERANCE


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_bidirectional_splits_at_borders_only(inner):
    case = make_case(inner, 2, 2, 14, causal=False)
    out, after = case.run(case.fresh())
    outs, after_pieces = case.run_pieces([4, 8, 2])
    assert relative(outs, out) < TOLERANCE
    assert max(state_errors(after_pieces, after).values()) < TOLERANCE
    with pytest.raises(ValueError, match=r"state.offset is \[2, 2\], expected 0 in every lane"):
        case.run(after)


def test_state_holds_completed_mini_batches_only():
    case = make_case("mlp", 1, 2, 7)
    _, at_border = case.run(case.fresh(), 0, 4)
    _, later = case.run(case.fresh(), 0, 7)
    assert later.offset.tolist() == [3]
    # The same sums in the same order: bitwise.
    assert all(map(torch.equal, later.weights, at_border.weights))
    assert all(p.count_nonzero() == 0 for p in at_border.pending)
    assert all(p.count_nonzero() > 0 for p in later.pending)
    assert not torch.equal(later.W1, case.fresh().W1)


def lane_streams(inner, lengths, **kwargs):
    """A padded batch, and each lane's stream by itself."""
    batch = make_case(inner, len(lengths), 2, max(lengths), **kwargs)
    with torch.no_grad():
        for lane, n in enumerate(lengths):
            batch.x["eta"][lane, :, n:] = 0
    return batch


def one_lane(state, lane):
    return InnerState(
        tuple(w[lane : lane + 1] for w in state.weights),
        tuple(p[lane : lane + 1] for p in state.pending),
        state.offset[lane : lane + 1],
        state.mini_batch_size,
    )


def run_lane(case, state, lane, stop):
    """The unpadded stream of one lane."""
    only = make_case(case.inner, 1, 2, 1)
    only.settings = case.settings
    frames = {"q", "k", "v", "eta"}
    only.x = {n: t[lane : lane + 1, :, :stop] if n in frames else t for n, t in case.x.items()}
    return only.run(state)


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("group_size", [0, 2])
def test_padding_leaves_no_trace(inner, group_size):
    """Three padded calls, every lane out of step, equal each lane's own unpadded stream."""
    calls = [[9, 4, 0, 1, 8], [0, 7, 3, 1, 6], [5, 1, 2, 11, 0]]
    state = make_case(inner, 5, 2, 1).fresh()
    alone = [one_lane(state, lane) for lane in range(5)]
    for seed, lengths in enumerate(calls):
        batch = lane_streams(inner, lengths, seed=seed, checkpoint_group_size=group_size)
        out, state = batch.run(state)
        for lane, n in enumerate(lengths):
            if n == 0:
                continue
            lane_out, alone[lane] = run_lane(batch, alone[lane], lane, n)
            assert relative(out[lane : lane + 1, :, :n], lane_out) < TOLERANCE
            assert max(state_errors(one_lane(state, lane), alone[lane]).values()) < TOLERANCE
    assert state.offset.tolist() == [sum(n) % 4 for n in zip(*calls)]


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@pytest.mark.parametrize("length", [1, 3, 4, 9])
@pytest.mark.parametrize("fed", [0, 4, 6])
def test_all_padding_returns_the_state_unchanged(inner, length, fed):
    """Bitwise, on a fresh state, at a border and within a mini-batch; also where the padding alone
    would fill up the mini-batch."""
    case = make_case(inner, 2, 2, max(fed, 1))
    state = case.fresh()
    if fed:
        _, state = case.run(state)
    padding = lane_streams(inner, [length, length], seed=3)
    with torch.no_grad():
        padding.x["eta"].zero_()
    _, after = padding.run(state)
    for name, tensor in after.tensors().items():
        assert torch.equal(tensor, state.tensors()[name]), name


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_padded_frames_reach_no_gradient_of_the_real_ones(inner):
    """What stands in padded frames changes no real output and no gradient through them."""
    batch = lane_streams(inner, [6, 11], checkpoint_group_size=2)
    results = []
    for fill in (0.0, 100.0):
        with torch.no_grad():
            for name in ("q", "k", "v"):
                batch.x[name][0, :, 6:] = fill
        out, after = batch.run(batch.fresh())
        real = torch.cat([out[0, :, :6], out[1]], dim=1)
        results.append((real, gradients(objective(real, after), batch.x), after))
    (real, grads, after), (real2, grads2, after2) = results
    assert torch.equal(real, real2)
    assert all(torch.equal(grads[n], grads2[n]) for n in grads if n != "eta")
    assert all(map(torch.equal, after.weights + after.pending, after2.weights + after2.pending))


def test_zero_rate_within_a_lane_is_an_ordinary_token():
    """Only trailing zeros are padding, and only where every head has them."""
    case = make_case("mlp", 2, 2, 7)
    with torch.no_grad():
        case.x["eta"][0, :, 1:3] = 0
        case.x["eta"][1, 0, 3:] = 0
    out, after = case.run(case.fresh())
    expected, after_expected = case.run(case.fresh(), op=reference_scan)
    assert after.offset.tolist() == [3, 3]
    assert relative(out, expected) < TOLERANCE
    assert max(state_errors(after, after_expected).values()) < TOLERANCE


def test_state_is_a_plain_bag_of_tensors():
    """Taking it apart and putting it together is lossless; lanes reset by mask start anew."""
    case = make_case("mlp", 3, 2, 6)
    _, state = case.run(case.fresh(), 0, 6)
    again = InnerState.from_tensors(state.tensors(), state.mini_batch_size)
    assert all(map(torch.equal, again.tensors().values(), state.tensors().values()))
    assert not any(t.requires_grad for t in state.detach().tensors().values())

    start, mask = case.fresh(), torch.tensor([False, True, False])
    reset = {
        n: torch.where(mask.view(-1, *[1] * (t.ndim - 1)), start.tensors()[n], t)
        for n, t in state.tensors().items()
    }
    mixed = InnerState.from_tensors(reset, state.mini_batch_size)
    out, _ = case.run(mixed)
    fresh_out, _ = case.run(start)
    carried_out, _ = case.run(state)
    assert relative(out[1], fresh_out[1]) < TOLERANCE
    assert relative(out[[0, 2]], carried_out[[0, 2]]) < TOLERANCE
    with pytest.raises(ValueError, match="a state has the tensors"):
        InnerState.from_tensors({"W1": state.W1}, 4)
