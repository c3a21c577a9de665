"""Lengths of pieces over steps: which feed a step is read from, also after a resume."""

from contextlib import contextmanager
from itertools import count

import pytest

from launch.config import dump_yaml, load_config, read_config
from launch.feeding.batch_plan import describe_step, length_stages, resolve_lanes
from launch.feeding.stages import StagedFeed

SCHEDULE = "duration_sec={200: 9, 0: 3, 400: 18}"


class Numbers:
    """A feed whose batches are its name and the step in it; counts those that are open."""

    def __init__(self, name: str) -> None:
        self.name, self.open, self.finished, self.restored = name, 0, 0, False

    def carried(self) -> dict[str, str]:
        return {"carry": self.name}

    def restore(self, carried: dict[str, str]) -> None:
        assert carried == {"carry": "a"}
        self.restored = True

    def finish(self) -> None:
        self.finished += 1

    @contextmanager
    def batches(self, first_step: int):
        self.open += 1
        try:
            yield ((self.name, step) for step in count(first_step))
        finally:
            self.open -= 1


@pytest.fixture
def feeds() -> list[Numbers]:
    return [Numbers("a"), Numbers("b"), Numbers("c")]


@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 6])
def test_every_step_has_the_batch_of_its_stage(feeds, first_step):
    staged = StagedFeed(dict(zip((0, 2, 5), feeds, strict=True)))
    expected = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    with staged.batches(first_step) as batches:
        for step in range(first_step, 8):
            feed, batch = next(batches)
            assert feed is staged.at(step)
            assert batch == expected[step]
            assert [each.open for each in feeds] == [int(each is feed) for each in feeds]
            assert [each.finished for each in feeds] == [
                int(first_step < end <= step) for end in (2, 5, 8)
            ]
    assert not any(each.open for each in feeds)
    assert staged.last is feeds[2]


@pytest.mark.parametrize("step", [0, 1, 4, 7])
def test_what_a_checkpoint_holds_goes_to_the_stage_at_hand(feeds, step):
    """The one that lent its shapes is freed before."""
    staged = StagedFeed(dict(zip((0, 2, 5), feeds, strict=True)))
    staged.restore(step, staged.carried())
    assert [each.restored for each in feeds] == [each is staged.at(step) for each in feeds]
    assert [each.finished for each in feeds] == [1, 0, 0]


def config_of(*settings: str):
    return read_config(None, ["run_dir=x", "data.train_data=x", "max_steps=500", *settings]).config


def test_a_schedule_is_read_in_order_and_saved():
    config = config_of(SCHEDULE)
    assert list(length_stages(config).items()) == [(0, 3.0), (200, 9.0), (400, 18.0)]
    assert list(length_stages(config_of("duration_sec=7")).items()) == [(0, 7.0)]
    steps = config.model_copy(update={"global_batch_size": 8})
    assert describe_step(steps, None) == (
        "8 pieces of 3 s, 9 s from step 201 on, 18 s from step 401 on"
    )


def test_a_saved_schedule_loads_again(tmp_path):
    config = config_of(SCHEDULE, "full_finetuning=true")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "config.yaml").duration_sec == config.duration_sec


def test_pieces_of_lanes_are_whole_mini_batches_at_every_length():
    """3 s are 38 frames, 9 s are 113."""
    config = config_of(SCHEDULE, "ttt.enable=true", "ttt.persistent_states=true")
    plan = resolve_lanes(config, 2)
    assert [plan.piece_frames(sec) for sec in length_stages(config).values()] == [32, 112, 224]
    assert "of 2.56 s, 8.96 s from step 201 on" in describe_step(config, plan)


@pytest.mark.parametrize(
    ("schedule", "part"),
    [
        ("{1: 3}", "no length for the first steps"),
        ("{0: 3, 500: 9}", "a length from step 500 on"),
        ("{0: -3}", "allowed: a number > 0 or a mapping from whole numbers to a number > 0 each"),
        ("{-1: 3}", "allowed: a number > 0 or a mapping"),
        ("soon", "allowed: a number > 0 or a mapping"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule, part):
    settings = ["run_dir=x", "data.train_data=x", "max_steps=500", f"duration_sec={schedule}"]
    problems = read_config(None, [*settings, "full_finetuning=true"]).problems
    assert len(problems) == 1, problems
    assert problems[0].startswith("duration_sec: ")
    assert part in problems[0]
