"""Training along recordings: what lanes keep between steps, and what a step takes."""

import pytest
import torch

from launch.config import read_config
from launch.errors import UserError
from launch.feeding.batch_plan import LanePlan, backwards_per_step, resolve_lanes
from launch.feeding.lanes import Lanes
from launch.step import accumulate_gradients
from parallel.carry import empty_carry
from tests.distributed.tiny import random_codes
from tests.distributed.training import OneRank, loss_config
from tests.unit.moshi_cases import active_hybrid_model, set_windows

PIECE, LANES = 16, 4


@pytest.fixture
def model():
    return set_windows(active_hybrid_model(dtype=torch.float64)).double()


@pytest.fixture
def steps(model):
    """Two pieces of every lane's recording: `[lanes, K, 2T + 1]`."""
    return model.steps(random_codes(LANES, 2 * PIECE))


def lanes_of(model, batch_size=LANES, tbptt_pieces=1):
    carry = empty_carry(model, LANES, OneRank(), dtype=torch.float64, device="cpu")
    return Lanes(carry, batch_size=batch_size, tbptt_pieces=tbptt_pieces)


def take(model, lanes, steps, pieces, batch_size=LANES, begin=True):
    """One step over these pieces of all lanes: its loss and gradients."""
    parts = [steps[:, :, n * PIECE : (n + 1) * PIECE + 1] for n in pieces]
    groups = [[part[g : g + batch_size] for part in parts] for g in range(0, LANES, batch_size)]
    begins = [[torch.full((batch_size,), begin and n == 0) for n in pieces] for _ in groups]
    microbatches = lanes.pieces(groups, begins)
    loss = accumulate_gradients(model, microbatches, loss_config(model), OneRank())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.total.item(), found


def test_groups_of_lanes_are_the_lanes(model, steps):
    """2e-6: as in test_moshi_carry; sums over lanes in another order."""
    together, apart = lanes_of(model), lanes_of(model, batch_size=2)
    for pieces in ([0], [1]):
        loss, expected = take(model, together, steps, pieces)
        found_loss, found = take(model, apart, steps, pieces, batch_size=2)
        assert found_loss == pytest.approx(loss, rel=2e-6)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    for name, value in together.carry.tensors().items():
        assert torch.allclose(apart.carry.tensors()[name], value, atol=2e-6), name


def test_one_backward_goes_through_as_many_pieces_as_are_asked_for(model, steps):
    whole_loss, whole = take(model, lanes_of(model, tbptt_pieces=2), steps, [0, 1])
    loss, truncated = take(model, lanes_of(model), steps, [0, 1])
    assert loss == whole_loss  # what is read doesn't depend on it
    name = "transformer.layers.1.ttt.layer.W1"
    assert (whole[name] - truncated[name]).norm() > 0.01 * whole[name].norm()
    with pytest.raises(ValueError, match="tbptt_pieces: found 3"):
        take(model, lanes_of(model, tbptt_pieces=3), steps, [0, 1])


def test_a_broken_lane_begins_anew_and_takes_no_other_with_it(model, steps):
    lanes, untouched = lanes_of(model), lanes_of(model)
    take(model, lanes, steps, [0])
    take(model, untouched, steps, [0])
    carry = lanes.carry
    carry.layers[1].inner[0][2, 0, 0, 0] = float("nan")
    carry.layers[3].window.values[1, 0, 0, 0] = float("inf")
    lanes.put(carry)
    assert lanes.forget_broken(None) == 2
    assert lanes.begin_anew.tolist() == [False, True, True, False]
    assert all(value.isfinite().all() for value in lanes.carry.tensors().values())
    loss, gradients = take(model, lanes, steps, [1], begin=False)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert torch.isfinite(torch.tensor(loss))
    assert not lanes.begin_anew.any()
    take(model, untouched, steps, [1], begin=False)
    for name, value in untouched.carry.tensors().items():
        found = lanes.carry.tensors()[name]
        assert torch.equal(found[[0, 3]], value[[0, 3]]), name
    inner = lanes.carry.layers[1].inner[0]
    assert not torch.equal(inner[2], untouched.carry.layers[1].inner[0][2])


SETTINGS = ["run_dir=x", "ttt.enable=true", "ttt.persistent_states=true", "data.train_data=x"]


def plan_of(*settings, dp=2):
    return resolve_lanes(read_config(None, [*SETTINGS, *settings]).config, dp)


def test_pieces_are_whole_mini_batches():
    """10 s are 125 frames."""
    assert plan_of("batch_size=2") == LanePlan(4, 1, 16)
    assert plan_of("batch_size=1", "num_microbatches=3") == LanePlan(2, 3, 16)
    assert plan_of("num_lanes=6", "global_batch_size=12") == LanePlan(6, 2, 16)
    assert plan_of().piece_frames(10.0) == 112
    assert plan_of("ttt.persistent_states=false") is None


def test_backward_passes_of_a_step():
    def found(*settings):
        return backwards_per_step(read_config(None, [*SETTINGS, *settings]).config, dp=2)

    assert found() == 1
    assert found("num_microbatches=6") == 6
    assert found("global_batch_size=8", "batch_size=2") == 2
    pieces = ["num_lanes=4", "global_batch_size=24"]  # 6 of each of a rank's 2 lanes
    assert found(*pieces, "ttt.tbptt_pieces=3") == 4
    # The key means nothing where pieces stand alone.
    assert found(*pieces, "ttt.tbptt_pieces=3", "ttt.persistent_states=false") == 12


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["num_lanes=3"], ["num_lanes: found 3", "multiples of batch_size * dp = 1 * 2 = 2"]),
        (["num_lanes=4", "global_batch_size=6"], ["global_batch_size: found 6", "the 4 lanes"]),
        (["ttt.tbptt_pieces=2"], ["ttt.tbptt_pieces: found 2", "divisors of the 1 pieces"]),
        (["duration_sec=1"], ["duration_sec: found 1, 13 frames", "16 frames", "1.28"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, parts):
    with pytest.raises(UserError) as error:
        plan_of(*settings)
    for part in parts:
        assert part in str(error.value.problems)
