"""Which steps are left out, and when a run of them stops."""

import math

import pytest

from launch.guards.step_guard import BadStep, StepGuard, too_many_bad_steps


@pytest.mark.parametrize(
    ("loss", "norm", "told"),
    [
        (math.nan, 1.0, "loss nan"),
        (math.inf, 1.0, "loss inf"),
        (1.0, math.inf, "gradient norm inf"),
        (1.0, math.nan, "gradient norm nan"),
        (1.0, 1e9, None),
    ],
)
def test_numbers_that_are_none(loss, norm, told):
    assert StepGuard(3, None).problem(loss, norm) == told


def test_a_spike_is_judged_by_the_usual_norm_once_that_is_known():
    guard = StepGuard(3, 10.0)
    for _ in range(19):
        assert guard.problem(1.0, 1000.0) is None
        guard.accept(2.0)
    assert guard.problem(1.0, 1000.0) is None
    guard.accept(2.0)
    # All norms were 2, so the running one is 2 to rounding however few they are.
    assert guard.problem(1.0, 19.9) is None
    assert guard.problem(1.0, 20.1) == "gradient norm 20.1, 10.1 times the usual"


def test_it_goes_on_as_if_it_had_not_been_interrupted():
    whole, first = StepGuard(3, 4.0), StepGuard(3, 4.0)
    norms = [1.0 + 0.1 * (step % 7) for step in range(40)]
    for norm in norms[:25]:
        first.accept(norm)
    first.skip()
    second = StepGuard(3, 4.0, first.counters)
    for norm in norms[25:]:
        second.accept(norm)
    for norm in norms:
        whole.accept(norm)
    assert second.counters == whole.counters | {"skipped_steps": 1}


def test_steps_in_a_row_stop_the_run():
    guard = StepGuard(2, None)
    guard.skip()
    assert not guard.must_stop
    guard.accept(1.0)
    guard.skip()
    assert not guard.must_stop
    guard.skip()
    assert guard.must_stop
    assert guard.skipped == 3


@pytest.mark.parametrize(
    ("saved", "told"), [(True, "and are saved;"), (False, "and are not saved (do_ckpt=false);")]
)
def test_what_is_told_of_the_weights_is_true(saved, told):
    guard = StepGuard(1, None)
    guard.skip()
    _, weights = too_many_bad_steps(guard, BadStep(1, "loss nan", None, ["a"]), saved=saved)
    assert told in weights
