"""Lanes along recordings: no target lost at a border, and the same lanes in every layout."""

import dataclasses
import itertools
import threading

import pytest
import torch

from tests.unit.data_cases import SPEC, cache_in, open_sources, write_dataset
from tests.unit.moshi_cases import DELAYS, clean_codes, hybrid_model
from ttt_dist.data.cache import BrokenPieceError
from ttt_dist.data.dataset import GlobalOrder
from ttt_dist.data.lanes import LaneBatches, recording_batches
from ttt_dist.data.manifest import DataError
from ttt_dist.data.recordings import RecordingDataset
from ttt_dist.data.steps import delayed_steps, piece_of_steps

T = 5
FRAMES = [12, 4, 5, 23, 1, 10, 11]  # shorter than a piece, whole pieces, one frame more
ROW_DELAYS = [0] + 2 * [0, *[1] * 7]
INITIAL = [900, *[901] * 16]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Seven recordings of two sources; code = 100 · recording + frame, so origins can be told."""
    folder = tmp_path_factory.mktemp("recordings")
    sources = [
        *open_sources(write_dataset(folder / "a", [0.1] * 4)),
        *open_sources(write_dataset(folder / "b", [0.1] * 3, seed=50)),
    ]
    cache = cache_in(folder / "cache", dataclasses.replace(SPEC, duration_sec=None))
    recordings = [recording for source in sources for recording in source.recordings]
    for number, (key, frames) in enumerate(zip(cache.keys(recordings), FRAMES, strict=True)):
        codes = 100 * number + torch.arange(frames, dtype=torch.int32)
        cache.write(key, codes.expand(1, SPEC.rows, frames).contiguous())
    return RecordingDataset(sources, cache, T)


def order_of(dataset, shuffle=True):
    return GlobalOrder(dataset.source_sizes, dataset.weights, seed=3, shuffle=shuffle)


def lanes(dataset, **changes):
    arguments = {
        "num_lanes": 4,
        "batch_size": 1,
        "pieces_per_step": 1,
        "delays": ROW_DELAYS,
        "initial": INITIAL,
        "dp_rank": 0,
        "dp_size": 1,
    }
    return LaneBatches(dataset, order_of(dataset), **(arguments | changes))


def by_lane(ranks):
    """(steps, begins, number) of each lane's pieces in order, of all lanes of all ranks."""
    found = []
    for steps in ranks:
        own: dict[tuple[int, int], list] = {}
        for step in steps:
            numbers = iter(step.samples)
            for group, (pieces, begins) in enumerate(zip(step.steps, step.begins, strict=True)):
                for x, begin in zip(pieces, begins, strict=True):
                    for place, each in enumerate(
                        zip(x, begin.tolist(), next(numbers), strict=True)
                    ):
                        own.setdefault((group, place), []).append(each)
        found += [own[key] for key in sorted(own)]
    return found


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def same(first, second):
    return all(
        torch.equal(x, y) and b == c and s == t
        for lane, other in zip(first, second, strict=True)
        for (x, b, s), (y, c, t) in zip(lane, other, strict=True)
    )


def expected_lane(dataset, lane, num_lanes, count):
    """A lane by its definition: the order's recordings, delayed whole, cut with one overlap."""
    order, position, found = order_of(dataset), lane, []
    while len(found) < count:
        recording = order[position]
        steps = delayed_steps(dataset.codes(recording), ROW_DELAYS, INITIAL)
        first = sum(-(-frames // T) for frames in FRAMES[:recording])
        for piece in range(-(-FRAMES[recording] // T)):
            cut = steps[:, piece * T : (piece + 1) * T + 1]
            padded = torch.full((SPEC.rows, T + 1), -1)
            padded[:, : cut.shape[1]] = cut
            found.append((padded, piece == 0, first + piece))
        position += num_lanes
    return found[:count]


@pytest.mark.parametrize("frames", [1, 2, 37])
def test_steps_are_those_of_the_models_own_loss(frames):
    """What `TTTMoshi.step_losses` gives its backbone and Depformer, and their targets."""
    model = hybrid_model(None)
    codes = clean_codes(1, frames)
    seen = {}
    forward_text, forward_depformer = model.forward_text, model.forward_depformer_training
    model.forward_text = lambda inputs: (seen.update(inputs=inputs), forward_text(inputs))[1]
    model.forward_depformer_training = lambda targets, out: (
        seen.update(targets=targets),
        forward_depformer(targets, out),
    )[1]
    with torch.no_grad():
        model.step_losses(model.steps(codes))
    steps = delayed_steps(codes[0], model.delays, model.initial_tokens())
    assert model.delays == DELAYS
    assert steps.dtype == torch.int64
    assert torch.equal(steps[:, :-1], seen["inputs"][0])
    assert torch.equal(steps[:, 1:], seen["targets"][0])


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 20, 23])
@pytest.mark.parametrize("size", [1, 5, 7, 40])
def test_pieces_lose_no_step_at_a_border(frames, size):
    codes = torch.arange(17 * frames).view(17, frames)
    steps = delayed_steps(codes, ROW_DELAYS, INITIAL)
    pieces = [piece_of_steps(steps, piece, size) for piece in range(-(-frames // size))]
    inputs = torch.cat([piece[:, :-1] for piece in pieces], dim=1)
    targets = torch.cat([piece[:, 1:] for piece in pieces], dim=1)
    assert torch.equal(targets[:, :frames], steps[:, 1:])
    assert (targets[:, frames:] == -1).all()
    assert torch.equal(inputs[:, : frames + 1], steps[:, : inputs.shape[1]])
    for before, after in itertools.pairwise(pieces):
        assert torch.equal(before[:, -1], after[:, 0])


def test_rows_without_delay_or_token_are_refused():
    codes = torch.zeros(3, 4, dtype=torch.int64)
    for delays, initial in (([0, 1], [1, 1, 1]), ([0, 1, 1], [1, 1]), ([0, -1, 0], [1, 1, 1])):
        with pytest.raises(ValueError, match="allowed are 3 delays"):
            delayed_steps(codes, delays, initial)


def test_recordings_and_their_pieces_are_numbered(dataset):
    assert (dataset.num_recordings, dataset.source_sizes, dataset.frames) == (7, [4, 3], T)
    assert dataset.source_pieces == [10, 6]
    assert [path.parent.name for path in dataset.source_paths] == ["a", "b"]
    assert [dataset.pieces_of(n) for n in range(7)] == [3, 1, 1, 5, 1, 2, 3]
    assert len(dataset) == 16
    places = [dataset.locate(index) for index in range(16)]
    assert places == [(n, piece) for n in range(7) for piece in range(dataset.pieces_of(n))]
    assert [dataset.index(*place) for place in places] == list(range(16))
    assert dataset.describe(9).endswith("train3.wav, piece 4")
    for index in (-1, 16):
        with pytest.raises(IndexError):
            dataset.describe(index)
    assert dataset.codes(5).dtype == torch.int64
    assert torch.equal(dataset.codes(5)[3], 500 + torch.arange(10))


@pytest.mark.parametrize("pieces_per_step", [1, 3])
@pytest.mark.parametrize(
    ("dp_size", "batch_size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
)
def test_lanes_are_the_same_in_every_layout(dataset, dp_size, batch_size, pieces_per_step):
    layout = {"dp_size": dp_size, "batch_size": batch_size, "pieces_per_step": pieces_per_step}
    ranks = [take(lanes(dataset, dp_rank=rank, **layout), 15) for rank in range(dp_size)]
    groups = 4 // (dp_size * batch_size)
    for step in (step for rank in ranks for step in rank):
        assert [len(pieces) for pieces in step.steps] == [pieces_per_step] * groups
        assert len(step.samples) == groups * pieces_per_step
        assert all(
            x.shape == (batch_size, 17, T + 1) and x.dtype == torch.int64
            for group in step.steps
            for x in group
        )
        assert all(b.dtype == torch.bool for group in step.begins for b in group)
    # More than two epochs of the smaller source: 60 pieces and more of 16.
    expected = [expected_lane(dataset, lane, 4, 15 * pieces_per_step) for lane in range(4)]
    assert same(by_lane(ranks), expected)


@pytest.mark.parametrize("start", [1, 6, 29])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_run_goes_on_by_its_step(dataset, start, prefetch):
    settings = {"pieces_per_step": 2, "batch_size": 2, "prefetch": prefetch}
    whole = take(lanes(dataset, **settings), start + 5)
    tail = take(lanes(dataset, start_step=start, **settings), 5)
    assert same(by_lane([tail]), by_lane([whole[start:]]))


def test_a_recording_is_read_once_and_passed_over_unread(dataset, monkeypatch):
    read = []
    original = RecordingDataset.codes
    monkeypatch.setattr(
        RecordingDataset, "codes", lambda self, n: (read.append(n), original(self, n))[1]
    )
    take(lanes(dataset, num_lanes=1, start_step=40, prefetch=0), 8)
    order = order_of(dataset)
    position = left = 0
    for position in range(100):
        left += dataset.pieces_of(order[position])
        if left > 40:
            break
    assert read == [order[position + n] for n in range(len(read))]
    assert 2 <= len(read) <= 8


def test_indivisible_lanes_name_what_is_allowed(dataset):
    with pytest.raises(
        ValueError, match=r"num_lanes: found 4, allowed are multiples of .* = 1 × 3 = 3: 3, 6"
    ):
        lanes(dataset, dp_size=3)
    with pytest.raises(ValueError, match="num_lanes: found 0"):
        lanes(dataset, num_lanes=0)
    with pytest.raises(ValueError, match="pieces_per_step: found 0"):
        lanes(dataset, pieces_per_step=0)
    with pytest.raises(ValueError, match="start_step"):
        lanes(dataset, start_step=-1)
    with pytest.raises(ValueError, match="dp_rank: found 2, allowed are 0 to 1"):
        lanes(dataset, dp_rank=2, dp_size=2)


@pytest.fixture
def broken(dataset, monkeypatch):
    """A recording of five pieces can't be read; returned with what is raised for it."""
    told = {3: BrokenPieceError(["recording 3 is damaged"])}
    original = RecordingDataset.codes

    def fail(self, recording):
        if recording in told:
            raise told[recording]
        return original(self, recording)

    monkeypatch.setattr(RecordingDataset, "codes", fail)
    return told


def test_a_broken_recording_is_empty_and_each_piece_named(dataset, broken):
    steps = take(lanes(dataset, batch_size=2, pieces_per_step=2), 8)
    first = dataset.index(3, 0)
    for step in steps:
        met = {number for numbers in step.samples for number in numbers}
        own = met & set(range(first, first + 5))
        assert step.broken == dict.fromkeys(own, "recording 3 is damaged")
    assert sum(len(step.broken) for step in steps) >= 5
    for found, expected in zip(
        by_lane([steps]), [expected_of(dataset, n, 16) for n in range(4)], strict=True
    ):
        for (x, begins, number), (number_wanted, begins_wanted) in zip(
            found, expected, strict=True
        ):
            assert (number, begins) == (number_wanted, begins_wanted)
            assert (x == -1).all() == (first <= number < first + 5)


def expected_of(dataset, lane, count):
    """Numbers and beginnings of a lane's pieces, without reading any."""
    order, position, found = order_of(dataset), lane, []
    while len(found) < count:
        recording = order[position]
        found += [
            (dataset.index(recording, piece), piece == 0)
            for piece in range(dataset.pieces_of(recording))
        ]
        position += 4
    return found[:count]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_else_goes_wrong_is_raised_at_its_step_and_from_there_on(dataset, broken, prefetch):
    broken[3] = DataError(["no disk"])
    first = next(n for n in range(40) if order_of(dataset)[n] == 3)
    assert first < 4, "lane `first` starts with it"
    with lanes(dataset, prefetch=prefetch) as batches:
        with pytest.raises(DataError, match="no disk"):
            next(batches)
        with pytest.raises(ValueError, match="step 0 could not be read"):
            next(batches)


def test_what_another_rank_could_not_read_is_left_out_too(dataset):
    (step,) = take(lanes(dataset, batch_size=2, pieces_per_step=2), 1)
    chosen = step.samples[3][1]
    before = [[x.clone() for x in group] for group in step.steps]
    step.leave_out({chosen, 99})
    numbers = iter(step.samples)
    for group, old in zip(step.steps, before, strict=True):
        for x, was in zip(group, old, strict=True):
            for number, lane, own in zip(next(numbers), x, was, strict=True):
                assert torch.equal(lane, torch.full_like(own, -1) if number == chosen else own)


def test_the_thread_reads_ahead_and_ends(dataset):
    before = set(threading.enumerate())
    batches = lanes(dataset, prefetch=3)
    next(batches)
    assert len(set(threading.enumerate()) - before) == 1
    batches.close()
    batches.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("dp_size", "batch_size"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1), (4, 4)]
)
def test_an_evaluation_follows_every_recording_once(dataset, dp_size, batch_size):
    settings = {"delays": ROW_DELAYS, "initial": INITIAL, "batch_size": batch_size, "broken": {}}
    ranks = [
        list(recording_batches(dataset, dp_rank=rank, dp_size=dp_size, **settings))
        for rank in range(dp_size)
    ]
    (count,) = {len(rank) for rank in ranks}
    # The longest recording, or an even share, or (of unequal ones) a little above.
    assert max(5, -(-16 // (dp_size * batch_size))) <= count <= 5 + 16 // (dp_size * batch_size)
    pieces = {}
    for rank in ranks:
        following = [-1] * batch_size
        for batch in rank:
            assert batch.steps.shape == (batch_size, 17, T + 1)
            for lane in range(batch_size):
                recording, offset = batch.recordings[lane], batch.offsets[lane]
                assert bool(batch.begins[lane]) == (recording >= 0 and offset == 0)
                if recording < 0:
                    assert (batch.steps[lane] == -1).all()
                elif offset > 0:
                    assert following[lane] == recording
                following[lane] = recording
                if recording >= 0:
                    assert (recording, offset) not in pieces
                    pieces[recording, offset] = batch.steps[lane]
    assert sorted(pieces) == [(n, p) for n in range(7) for p in range(0, FRAMES[n], T)]
    for recording in range(7):
        steps = delayed_steps(dataset.codes(recording), ROW_DELAYS, INITIAL)
        targets = [x[:, 1:] for (n, _), x in sorted(pieces.items()) if n == recording]
        found = torch.cat(targets, dim=1)
        assert torch.equal(found[:, : FRAMES[recording]], steps[:, 1:])
        assert (found[:, FRAMES[recording] :] == -1).all()


def test_an_evaluation_of_some_recordings_is_spread_over_the_dataset(dataset):
    settings = {"delays": ROW_DELAYS, "initial": INITIAL, "dp_rank": 0, "dp_size": 1, "broken": {}}
    for limit, chosen in ((2, {0, 3}), (99, set(range(7)))):
        batches = recording_batches(dataset, batch_size=2, limit=limit, **settings)
        met = {recording for batch in batches for recording in batch.recordings}
        assert met - {-1} == chosen
    with pytest.raises(ValueError, match="limit"):
        next(recording_batches(dataset, batch_size=2, limit=0, **settings))


def test_a_broken_recording_is_named_by_an_evaluation_and_leaves_no_rank_waiting(dataset, broken):
    settings = {"delays": ROW_DELAYS, "initial": INITIAL, "batch_size": 1, "dp_size": 2}
    found = [{}, {}]
    ranks = [
        list(recording_batches(dataset, dp_rank=rank, broken=found[rank], **settings))
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1])
    first = dataset.index(3, 0)
    assert found[0] | found[1] == dict.fromkeys(range(first, first + 5), "recording 3 is damaged")
    for batch in (batch for rank in ranks for batch in rank):
        assert (batch.steps == -1).all() == (batch.recordings[0] in (3, -1))
