"""Lanes: training and evaluation along recordings, piece after piece, for one dp rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ttt_dist.data.ahead import ReadAhead
from ttt_dist.data.batches import check_layout, check_shared_out
from ttt_dist.data.cache import BrokenPieceError
from ttt_dist.data.dataset import GlobalOrder
from ttt_dist.data.recordings import RecordingDataset
from ttt_dist.data.steps import NO_CODE, delayed_steps, piece_of_steps


@dataclass(frozen=True)
class LaneStep:
    """A rank's share of a step: some pieces of each of its lanes, lanes taken by groups.

    Attributes:
        steps: of each group, its pieces in order, int64 `[batch_size, R, T + 1]` on the CPU: inputs
            are the first T, targets the last T; -1 where there is neither.
        begins: nested alike, bool `[batch_size]`: this piece is the first of the lane's recording,
            so states that were carried are reset before it.
        samples: of each microbatch (a group's piece; groups one after the other), the numbers that
            `RecordingDataset` gives its pieces.
        broken: samples that couldn't be read, and why; their steps are -1.
    """

    steps: list[list[torch.Tensor]]
    begins: list[list[torch.Tensor]]
    samples: list[list[int]]
    broken: dict[int, str]

    def leave_out(self, broken: Iterable[int]) -> None:
        """Set the steps of these samples to -1, which carries no loss, wherever they stand here."""
        found = set(broken)
        microbatches = [steps for group in self.steps for steps in group]
        for samples, steps in zip(self.samples, microbatches, strict=True):
            for place, index in enumerate(samples):
                if index in found:
                    steps[place] = NO_CODE


class LaneBatches(ReadAhead[LaneStep]):
    """The steps of one data-parallel rank along recordings; endless.

    A run has N lanes, whatever its layout: lane j takes the recordings at positions j, j + N,
    j + 2N, … of the order, each from its first piece to its last, then the next. Every step takes
    it `pieces_per_step` pieces further. Rank r of `dp_size` has the N / dp_size lanes from
    r · N / dp_size on, in groups of `batch_size`. All of this depends on the order and N alone, so
    a run resumes by `start_step` alone: recordings are passed over by their lengths, unread. Ranks
    of one tp group pass the same `dp_rank` and get the same lanes.

    A lane keeps the codes of its present recording in memory (3 MB an hour). The pieces of a
    recording that can't be read are given as -1 throughout, and each is named.

    Args:
        dataset, order: the recordings and their order; the order covers `dataset.source_sizes`.
        num_lanes: N, lanes over all ranks; a multiple of dp_size · batch_size.
        batch_size: lanes that are computed together on one rank.
        pieces_per_step: consecutive pieces that every lane takes in a step.
        delays, initial: of every row of codes, as `steps.delayed_steps` takes them.
        dp_rank, dp_size: this rank's place, all dp dimensions flattened.
        start_step, prefetch: see `ReadAhead`.

    Raises:
        ValueError: N is no multiple of dp_size · batch_size, or a number is out of range.
    """

    def __init__(
        self,
        dataset: RecordingDataset,
        order: GlobalOrder,
        *,
        num_lanes: int,
        batch_size: int,
        pieces_per_step: int,
        delays: Sequence[int],
        initial: Sequence[int],
        dp_rank: int,
        dp_size: int,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        check_layout(batch_size, dp_rank, dp_size)
        check_shared_out("num_lanes", num_lanes, batch_size, dp_size)
        if pieces_per_step < 1:
            raise ValueError(f"pieces_per_step: found {pieces_per_step}, allowed is 1 or above")
        if start_step < 0:
            raise ValueError(f"start_step: found {start_step}, allowed is 0 or above")
        self._dataset, self._order = dataset, order
        self._num_lanes, self._batch_size = num_lanes, batch_size
        self._pieces_per_step = pieces_per_step
        own = num_lanes // dp_size
        lanes = range(dp_rank * own, (dp_rank + 1) * own)
        places = [_Place(lane, lane, order[lane]) for lane in lanes]
        self._pass_over(places, start_step * pieces_per_step)
        self._lanes = [(place, _Loaded(dataset, delays, initial)) for place in places]
        self._due = start_step
        super().__init__(start_step, prefetch)

    def _read(self, step: int) -> LaneStep:
        if step != self._due:
            raise ValueError(f"step {self._due} could not be read, so its lanes stand still")
        broken: dict[int, str] = {}
        steps, begins, samples = [], [], []
        for first in range(0, len(self._lanes), self._batch_size):
            group = self._lanes[first : first + self._batch_size]
            pieces = [self._next_pieces(group, broken) for _ in range(self._pieces_per_step)]
            steps.append([piece for piece, _, _ in pieces])
            begins.append([begin for _, begin, _ in pieces])
            samples += [numbers for _, _, numbers in pieces]
        self._due += 1
        return LaneStep(steps, begins, samples, broken)

    def _next_pieces(
        self, group: list[tuple[_Place, _Loaded]], broken: dict[int, str]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The next piece of every lane of a group, whether a recording begins, and its number."""
        pieces, begins, samples = [], [], []
        for place, loaded in group:
            pieces.append(loaded.piece(place.recording, place.piece, broken))
            begins.append(place.piece == 0)
            samples.append(self._dataset.index(place.recording, place.piece))
            place.piece += 1
            if place.piece == self._dataset.pieces_of(place.recording):
                self._go_on(place)
        return torch.stack(pieces), torch.tensor(begins), samples

    def _pass_over(self, places: list[_Place], pieces: int) -> None:
        """Move every lane on by so many pieces, without reading any."""
        left = {place.lane: pieces for place in places}
        moving = places
        # Lanes side by side: the order remembers few epochs, and each alone would pass them all.
        while moving:
            still = []
            for place in moving:
                count = self._dataset.pieces_of(place.recording)
                if left[place.lane] < count:
                    place.piece = left[place.lane]
                else:
                    left[place.lane] -= count
                    self._go_on(place)
                    still.append(place)
            moving = still

    def _go_on(self, place: _Place) -> None:
        """To the beginning of the lane's next recording."""
        place.position += self._num_lanes
        place.recording, place.piece = self._order[place.position], 0


@dataclass
class _Place:
    """Where a lane stands: before a piece of the recording at a position of the order."""

    lane: int
    position: int
    recording: int
    piece: int = 0


class _Loaded:
    """The steps of one recording at a time, read when its first piece is asked for."""

    def __init__(
        self, dataset: RecordingDataset, delays: Sequence[int], initial: Sequence[int]
    ) -> None:
        self._dataset, self._delays, self._initial = dataset, delays, initial
        self._recording = -1
        self._steps = torch.zeros(0)  # int32 [R, F + 1]
        self._why_broken: str | None = None

    def piece(self, recording: int, piece: int, broken: dict[int, str]) -> torch.Tensor:
        """int64 `[R, T + 1]`; -1, and named in `broken`, where the recording can't be read.

        That is tried once: what comes after a gap is no longer what the recording says.
        """
        if self._recording != recording or piece == 0:
            self._load(recording)
        if self._why_broken is not None:
            broken[self._dataset.index(recording, piece)] = self._why_broken
            return _no_piece(self._dataset)
        return piece_of_steps(self._steps, piece, self._dataset.frames)

    def _load(self, recording: int) -> None:
        self._steps, self._why_broken = torch.zeros(0), None  # frees the last one before the next
        try:
            codes = self._dataset.codes(recording).int()
        except BrokenPieceError as error:
            self._why_broken = str(error)
        else:
            self._steps = delayed_steps(codes, self._delays, self._initial)
        self._recording = recording


def _no_piece(dataset: RecordingDataset) -> torch.Tensor:
    return torch.full((dataset.rows, dataset.frames + 1), NO_CODE)


@dataclass(frozen=True)
class RecordingBatch:
    """Pieces of several recordings, one a lane, in an evaluation along recordings.

    Attributes:
        steps: int64 `[batch_size, R, T + 1]` on the CPU, as a piece of `LaneStep`.
        begins: bool `[batch_size]`: a recording begins, so carried states are reset before it.
        recordings: of each lane, the number of its recording; -1: the lane has none left.
        offsets: of each lane, the frames of its recording that came before this piece; 0 without.
    """

    steps: torch.Tensor
    begins: torch.Tensor
    recordings: list[int]
    offsets: list[int]


def recording_batches(
    dataset: RecordingDataset,
    *,
    batch_size: int,
    delays: Sequence[int],
    initial: Sequence[int],
    dp_rank: int,
    dp_size: int,
    broken: dict[int, str],
    limit: int | None = None,
) -> Iterator[RecordingBatch]:
    """One pass over the recordings for one rank, each whole, from its first piece to its last.

    There are dp_size · batch_size lanes. The longest recording that is left goes to the lane with
    the least to do (Graham 1969, "Bounds on multiprocessing timing anomalies"), so lanes end at
    about the same time. All ranks get the same number of batches, as FSDP's collectives demand; a
    lane that is done gives -1 throughout.

    Args:
        delays, initial: of every row of codes, as `steps.delayed_steps` takes them.
        broken: as `batches.eval_batches` has it; every piece of a recording that can't be read.
        limit: take that many recordings, spread evenly over the dataset; None: all.
    """
    check_layout(batch_size, dp_rank, dp_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, allowed is 1 or above, or None")
    size = dataset.num_recordings
    total = size if limit is None else min(size, limit)
    chosen = [place * size // total for place in range(total)]
    plan = _plan_lanes(dataset, chosen, batch_size * dp_size)
    length = max(sum(dataset.pieces_of(recording) for recording in lane) for lane in plan)
    own = plan[dp_rank * batch_size : (dp_rank + 1) * batch_size]
    lanes = [
        _along(dataset, recordings, _Loaded(dataset, delays, initial), broken) for recordings in own
    ]
    empty = (_no_piece(dataset), -1, 0)
    for _ in range(length):
        pieces = [next(lane, empty) for lane in lanes]
        recordings = [recording for _, recording, _ in pieces]
        offsets = [piece * dataset.frames for _, _, piece in pieces]
        begins = [recording >= 0 and piece == 0 for _, recording, piece in pieces]
        steps = torch.stack([each for each, _, _ in pieces])
        yield RecordingBatch(steps, torch.tensor(begins), recordings, offsets)


def _plan_lanes(dataset: RecordingDataset, recordings: list[int], lanes: int) -> list[list[int]]:
    """Which recordings each lane takes, in order."""
    plan: list[list[int]] = [[] for _ in range(lanes)]
    waiting = [(0, lane) for lane in range(lanes)]  # pieces so far, a heap
    for recording in sorted(recordings, key=lambda each: (-dataset.pieces_of(each), each)):
        pieces, lane = heapq.heappop(waiting)
        plan[lane].append(recording)
        heapq.heappush(waiting, (pieces + dataset.pieces_of(recording), lane))
    return plan


def _along(
    dataset: RecordingDataset, recordings: list[int], loaded: _Loaded, broken: dict[int, str]
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Every piece of these recordings, with the recording and the piece's number in there."""
    for recording in recordings:
        for piece in range(dataset.pieces_of(recording)):
            yield loaded.piece(recording, piece, broken), recording, piece
