"""The global order and its batches: complete, independent of the layout, resumable by step."""

import collections
import dataclasses
import threading

import pytest
import torch

from launch.config import read_config
from launch.feeding.feed import _order
from launch.run_checkpoints import order_facts
from tests.unit.data_cases import SPEC, cache_in, open_sources, write_dataset
from ttt_dist.data.batches import StepBatches, eval_batches
from ttt_dist.data.cache import BrokenPieceError
from ttt_dist.data.dataset import GlobalOrder, PieceDataset
from ttt_dist.data.manifest import DataError, all_recordings
from ttt_dist.data.recordings import RecordingDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 pieces of two recordings; every value of a piece is its number, so origins can be told."""
    folder = tmp_path_factory.mktemp("pieces")
    sources = open_sources(write_dataset(folder / "data", [0.2, 0.2]))
    cache = cache_in(folder / "cache")
    numbers = torch.arange(23, dtype=torch.int32)[:, None, None].expand(-1, SPEC.rows, SPEC.frames)
    first, second = cache.keys(sources[0].recordings)
    cache.write(first, numbers[:9])
    cache.write(second, numbers[9:])
    return PieceDataset(sources, cache)


def order(shuffle=True, seed=0):
    return GlobalOrder([23], [1.0], seed=seed, shuffle=shuffle)


def batches(dataset, **changes):
    arguments = {"global_batch_size": 8, "batch_size": 1, "dp_rank": 0, "dp_size": 1}
    return StepBatches(dataset, order(), **(arguments | changes))


def take(steps, count):
    with steps:
        return [next(steps).codes for _ in range(count)]


def numbers_of(step):
    return [int(piece[0, 0]) for batch in step for piece in batch]


def test_every_sample_once_an_epoch(dataset):
    shuffled = order()
    epochs = [[shuffled[23 * epoch + n] for n in range(23)] for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [order(seed=1)[n] for n in range(23)] != epochs[0]
    plain = order(shuffle=False)
    assert [plain[n] for n in range(46)] == [*range(23), *range(23)]


def test_the_order_of_a_seed_never_changes():
    """Runs are resumed with newer versions: these numbers may not depend on numpy's shuffles."""
    assert [order()[n] for n in range(10)] == [11, 3, 20, 13, 2, 21, 15, 1, 18, 19]
    weighted = GlobalOrder([5, 7], [3.0, 1.0], seed=3, shuffle=True)
    assert [weighted[n] for n in range(10)] == [0, 4, 1, 3, 2, 3, 1, 2, 4, 0]


def test_every_stage_has_an_order_of_its_own():
    """Otherwise each would meet the same samples first; the first stage's is the run's."""
    stages = [GlobalOrder([23], [1.0], seed=0, shuffle=True, stage=n) for n in (0, 200, 400)]
    orders = [[stage[n] for n in range(23)] for stage in stages]
    assert orders[0] == [order()[n] for n in range(23)]
    assert len({tuple(each) for each in orders}) == 3
    assert [sorted(each) for each in orders] == [list(range(23))] * 3


def test_sources_are_drawn_by_weight_and_passed_through_evenly():
    weighted = GlobalOrder([50, 10, 7], [2.0, 1.0, 0.25], seed=0, shuffle=True)
    count = 20_000
    drawn = [weighted[n] for n in range(count)]
    seen = collections.Counter(drawn)
    per_source = [
        sum(seen[n] for n in range(*span)) / count for span in ((0, 50), (50, 60), (60, 67))
    ]
    # Blocks hold exact quotas; only the last, cut one may deviate (1024 of 20,000).
    assert per_source == pytest.approx([2 / 3.25, 1 / 3.25, 0.25 / 3.25], abs=0.02)
    for span in ((0, 50), (50, 60), (60, 67)):
        counts = [seen[n] for n in range(*span)]
        assert max(counts) - min(counts) <= 1, "a source is passed through epoch by epoch"
    again = GlobalOrder([50, 10, 7], [2.0, 1.0, 0.25], seed=0, shuffle=True)
    for position in (19_999, 3, 7_000, 1_024, 1_023):
        assert again[position] == drawn[position]


def test_a_tiny_weight_is_drawn_too():
    rare = GlobalOrder([3, 2], [1.0, 0.0005], seed=0, shuffle=False)
    drawn = collections.Counter(rare[n] for n in range(40_000))
    assert 18 <= drawn[3] + drawn[4] <= 22


def open_calls_and_clips(folder, weights):
    """A call of 300 pieces beside three clips of one."""
    calls = write_dataset(folder / "calls", [0.2])
    clips = write_dataset(folder / "clips", [0.2] * 3, seed=50)
    sources = open_sources(f"{calls}:{weights[0]},{clips}:{weights[1]}")
    cache = cache_in(folder / "cache", dataclasses.replace(SPEC, duration_sec=None))
    keys = cache.keys(all_recordings(sources))
    for key, frames in zip(keys, [300 * 5, 5, 4, 1], strict=True):
        cache.write(key, torch.zeros(1, SPEC.rows, frames, dtype=torch.int32))
    return RecordingDataset(sources, cache, 5)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 5)])
def test_a_weight_is_a_share_of_pieces_along_recordings_too(tmp_path, weights):
    """Drawn as often as a clip, the call would be nearly all that is trained on."""
    recordings = open_calls_and_clips(tmp_path, weights)
    assert recordings.weights == list(weights)  # as they are written, which a checkpoint keeps
    settings = ["run_dir=x", "data.train_data=x", "max_steps=9"]
    drawn = _order(read_config(None, settings).config, recordings, stage=0)
    pieces = [0, 0]
    for position in range(30_000):
        pieces[min(drawn[position], 1)] += recordings.pieces_of(drawn[position])
    # Calls are drawn 20 times at least, to within one.
    assert pieces[0] / sum(pieces) == pytest.approx(weights[0] / sum(weights), abs=0.02)


def test_a_weight_too_small_for_its_long_recordings_is_refused(tmp_path):
    recordings = open_calls_and_clips(tmp_path, (0.00003, 1))
    with pytest.raises(DataError, match=r"by the mean length of recordings\): .*calls.* is 1e-07"):
        recordings.order_weights  # noqa: B018


@pytest.mark.parametrize(
    ("sizes", "weights", "seed"),
    [
        ([], [], 0),
        ([3, 0], [1, 1], 0),
        ([3], [0], 0),
        ([3], [1, 1], 0),
        ([3], [1], -1),
        ([3, 3], [1, 1e-9], 0),
        ([3], [float("nan")], 0),
    ],
)
def test_impossible_orders_are_refused(sizes, weights, seed):
    with pytest.raises(ValueError, match="found"):
        GlobalOrder(sizes, weights, seed=seed, shuffle=True)


def test_the_facts_of_an_order_know_what_pieces_are_numbered_by(dataset, tmp_path):
    """Not what the recordings hold, nor where they lie."""

    def digest(lengths: list[float], pieces: list[int], name: str = "train") -> str:
        folder = tmp_path / f"{pieces[0]}{name}"
        sources = open_sources(write_dataset(folder / "data", lengths, name=name))
        cache = cache_in(folder / "cache")
        for key, count in zip(cache.keys(sources[0].recordings), pieces, strict=True):
            cache.write(key, torch.zeros(count, SPEC.rows, SPEC.frames, dtype=torch.int32))
        (facts,) = order_facts(PieceDataset(sources, cache))
        assert facts["pieces"] == sum(pieces)
        return facts["recordings"]

    (facts,) = order_facts(dataset)
    assert facts["recordings"] == digest([0.3, 0.3], [9, 14])
    others = {digest([0.2, 0.2], [14, 9]), digest([0.2, 0.2], [9, 14], "other")}
    assert len(others - {facts["recordings"]}) == 2


def test_pieces_are_found_across_recordings(dataset):
    assert len(dataset) == 23
    for index in (0, 8, 9, 22):
        assert torch.equal(dataset[index], torch.full((17, 25), index))
    for index in (-1, 23):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize(("dp_size", "batch_size"), [(1, 1), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_a_step_holds_the_same_samples_in_every_layout(dataset, dp_size, batch_size):
    layout = {"dp_size": dp_size, "batch_size": batch_size}
    ranks = [take(batches(dataset, dp_rank=rank, **layout), 7) for rank in range(dp_size)]
    for step in range(7):
        expected = [order()[position] for position in range(8 * step, 8 * step + 8)]
        found = []
        for rank in ranks:
            assert len(rank[step]) == 8 // (dp_size * batch_size)
            for batch in rank[step]:
                assert batch.shape == (batch_size, 17, 25)
                assert batch.dtype == torch.int64
        for microbatch in range(len(ranks[0][step])):
            for rank in ranks:
                found += numbers_of([rank[step][microbatch]])
        assert found == expected


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_run_resumes_by_its_step(dataset, prefetch):
    whole = [numbers_of(step) for step in take(batches(dataset, prefetch=prefetch), 12)]
    tail = take(batches(dataset, start_step=5, prefetch=prefetch), 7)
    assert [numbers_of(step) for step in tail] == whole[5:]


def test_the_thread_reads_no_further_than_it_should(dataset, monkeypatch):
    read = []
    original = StepBatches._read
    monkeypatch.setattr(
        StepBatches, "_read", lambda self, step: (read.append(step), original(self, step))[1]
    )
    steps = batches(dataset, prefetch=3)
    next(steps)
    steps.close()
    assert max(read, default=0) <= 3
    assert read == sorted(set(read))


def test_indivisible_batches_name_what_is_allowed(dataset):
    with pytest.raises(
        ValueError, match=r"found 8, allowed are multiples of .* = 2 × 3 = 6: 6, 12"
    ):
        batches(dataset, dp_size=3, batch_size=2)
    with pytest.raises(ValueError, match="dp_rank: found 2, allowed are 0 to 1"):
        batches(dataset, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        batches(dataset, batch_size=0)
    with pytest.raises(ValueError, match="start_step"):
        batches(dataset, start_step=-1)


@pytest.fixture
def broken(dataset, monkeypatch):
    """One sample of the third step can't be read; returned with what is raised for it."""
    original = PieceDataset.__getitem__
    broken = order()[2 * 8 + 3]
    # 23 samples an epoch: that sample isn't met in the first two steps.
    assert broken not in [order()[n] for n in range(16)]
    told = {broken: BrokenPieceError([f"piece {broken} is damaged"])}

    def fail(self, index):
        if index in told:
            raise told[index]
        return original(self, index)

    monkeypatch.setattr(PieceDataset, "__getitem__", fail)
    return told


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_goes_wrong_in_the_thread_is_raised_at_its_step(dataset, broken, prefetch):
    (index,) = broken
    broken[index] = DataError(["no disk"])
    with batches(dataset, prefetch=prefetch) as steps:
        next(steps)
        next(steps)
        with pytest.raises(DataError, match="no disk"):
            next(steps)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_broken_piece_is_empty_and_named_and_all_others_keep_their_places(
    dataset, broken, batch_size
):
    (index,) = broken
    with batches(dataset, batch_size=batch_size) as steps:
        taken = [next(steps) for _ in range(3)]
    assert [step.broken for step in taken] == [{}, {}, {index: f"piece {index} is damaged"}]
    samples = [number for step in taken for each in step.samples for number in each]
    expected = [order()[position] for position in range(24)]
    assert samples == expected
    pieces = torch.cat([codes for step in taken for codes in step.codes])
    for number, piece in zip(expected, pieces, strict=True):
        assert (piece == (-1 if number == index else number)).all()


def test_what_another_rank_could_not_read_is_left_out_too(dataset):
    with batches(dataset, batch_size=2) as steps:
        step = next(steps)
    chosen = step.samples[1][1]
    step.leave_out({chosen, 99})
    for samples, codes in zip(step.samples, step.codes, strict=True):
        for number, piece in zip(samples, codes, strict=True):
            assert (piece == (-1 if number == chosen else number)).all()


def test_an_evaluation_goes_on_over_a_broken_piece_and_names_it(dataset, broken):
    (index,) = broken
    met: dict[int, str] = {}
    given = list(eval_batches(dataset, batch_size=2, dp_rank=0, dp_size=1, broken=met))
    assert met == {index: f"piece {index} is damaged"}
    expected = [-1 if number == index else number for number in range(23)]
    assert numbers_of(given)[:23] == expected


def test_closing_ends_the_thread(dataset):
    before = set(threading.enumerate())
    steps = batches(dataset, prefetch=4)
    next(steps)
    assert len(set(threading.enumerate()) - before) == 1
    steps.close()
    steps.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(ValueError, match="closed"):
        next(steps)
    with pytest.raises(KeyError), batches(dataset, prefetch=1):
        raise KeyError
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(("dp_size", "batch_size"), [(1, 1), (1, 4), (2, 3), (4, 1), (4, 8)])
def test_an_evaluation_meets_every_piece_once(dataset, dp_size, batch_size):
    ranks = [
        list(eval_batches(dataset, batch_size=batch_size, dp_rank=rank, dp_size=dp_size, broken={}))
        for rank in range(dp_size)
    ]
    assert {len(rank) for rank in ranks} == {-(-23 // (dp_size * batch_size))}
    numbers = [number for rank in ranks for number in numbers_of(rank)]
    assert sorted(number for number in numbers if number >= 0) == list(range(23))
    for rank in ranks:
        for batch in rank:
            assert batch.shape == (batch_size, 17, 25)
            empty = batch[:, 0, 0] == -1
            assert (batch[empty] == -1).all()


def test_a_limited_evaluation_is_spread_over_the_dataset(dataset):
    found = numbers_of(
        eval_batches(dataset, batch_size=2, dp_rank=0, dp_size=1, limit=4, broken={})
    )
    assert found == [0, 5, 11, 17]
    more = numbers_of(
        eval_batches(dataset, batch_size=1, dp_rank=0, dp_size=1, limit=99, broken={})
    )
    assert more == list(range(23))
    with pytest.raises(ValueError, match="limit"):
        next(eval_batches(dataset, batch_size=1, dp_rank=0, dp_size=1, limit=0, broken={}))
