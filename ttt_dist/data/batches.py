"""Batches of a data-parallel rank: steps of the global order, prefetched, and evaluation passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from ttt_dist.data.ahead import ReadAhead
from ttt_dist.data.cache import BrokenPieceError
from ttt_dist.data.dataset import GlobalOrder, PieceDataset


class Samples(Protocol):
    """A dataset whose samples have numbers."""

    def describe(self, index: int) -> str:
        """Where sample `index` comes from, for messages."""

    def comes_ready(self, index: int) -> bool:
        """Whether its codes are a file that the manifest names, and not encoded audio."""


class SampledStep(Protocol):
    """A rank's share of a step, as far as its samples go."""

    @property
    def samples(self) -> list[list[int]]:
        """Of each microbatch, in the order in which they are computed."""

    @property
    def broken(self) -> dict[int, str]:
        """Samples that couldn't be read, and why."""

    def leave_out(self, broken: Iterable[int]) -> None:
        """Take these samples out of the loss, wherever they stand here."""


@dataclass(frozen=True)
class Step:
    """A rank's share of a step.

    Attributes:
        samples: of each microbatch, as the dataset numbers them.
        codes: of each microbatch, int64 `[batch_size, R, T]` on the CPU.
        broken: samples that couldn't be read, and why; their codes are -1.
    """

    samples: list[list[int]]
    codes: list[torch.Tensor]
    broken: dict[int, str]

    def leave_out(self, broken: Iterable[int]) -> None:
        """Set the codes of these samples to -1, which carries no loss, wherever they stand here."""
        found = set(broken)
        for samples, codes in zip(self.samples, self.codes, strict=True):
            for place, index in enumerate(samples):
                if index in found:
                    codes[place] = -1


class StepBatches(ReadAhead[Step]):
    """The microbatches of each step, for one data-parallel rank; endless.

    Step s takes samples `[s·G, (s+1)·G)` of the order, whatever the layout is: microbatch m of rank
    r is the r-th of `dp_size` consecutive batches inside the m-th part of the step. A run resumes
    by `start_step` alone. Ranks of one tp group pass the same `dp_rank` and get the same batches.

    Iterating yields steps of G / (dp_size · batch_size) microbatches. A piece that can't be read is
    given as -1 throughout, and named.

    Args:
        dataset, order: the samples and their order; the order covers the dataset.
        global_batch_size: G, samples of a step over all ranks and microbatches.
        batch_size: samples of a microbatch on one rank.
        dp_rank, dp_size: this rank's place, all dp dimensions flattened.
        start_step: first step to yield, counted from 0.
        prefetch: steps read ahead by a thread; 0: none, read when asked for.

    Raises:
        ValueError: G is no multiple of dp_size · batch_size, or a number is out of range.
    """

    def __init__(
        self,
        dataset: PieceDataset,
        order: GlobalOrder,
        *,
        global_batch_size: int,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        check_layout(batch_size, dp_rank, dp_size)
        together = check_shared_out("global_batch_size", global_batch_size, batch_size, dp_size)
        self._dataset = dataset
        self._order = order
        self._global_batch_size = global_batch_size
        self._batch_size = batch_size
        self._offsets = range(dp_rank * batch_size, global_batch_size, together)
        super().__init__(start_step, prefetch)

    def _read(self, step: int) -> Step:
        first = step * self._global_batch_size
        samples = [
            [self._order[first + offset + place] for place in range(self._batch_size)]
            for offset in self._offsets
        ]
        broken: dict[int, str] = {}
        codes = [
            torch.stack([_piece(self._dataset, index, broken) for index in each])
            for each in samples
        ]
        return Step(samples, codes, broken)


def eval_batches(
    dataset: PieceDataset,
    *,
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    broken: dict[int, str],
    limit: int | None = None,
) -> Iterator[torch.Tensor]:
    """One pass over the dataset for one rank: int64 `[batch_size, R, T]` on the CPU.

    Every piece is met once over all ranks, and all ranks get the same number of batches, as FSDP's
    collectives demand; what is left over is filled with pieces of -1 throughout: they carry no
    loss.

    Args:
        broken: pieces that can't be read are added to it, by number and with the cause, and given
            as -1. Without them the losses can't be compared with earlier ones: see to it that all
            ranks hear of them at the end, since no rank may leave the others' collectives.
        limit: take that many pieces, spread evenly over the dataset; None: all.
    """
    check_layout(batch_size, dp_rank, dp_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, allowed is 1 or above, or None")
    size = len(dataset)
    total = size if limit is None else min(size, limit)
    chosen = [place * size // total for place in range(total)]
    empty = _empty_piece(dataset)
    together = batch_size * dp_size
    for start in range(dp_rank * batch_size, -(-total // together) * together, together):
        places = range(start, start + batch_size)
        yield torch.stack(
            [_piece(dataset, chosen[place], broken) if place < total else empty for place in places]
        )


def _piece(dataset: PieceDataset, index: int, broken: dict[int, str]) -> torch.Tensor:
    try:
        return dataset[index]
    except BrokenPieceError as error:
        broken[index] = str(error)
        return _empty_piece(dataset)


def _empty_piece(dataset: PieceDataset) -> torch.Tensor:
    return torch.full((dataset.rows, dataset.frames), -1, dtype=torch.int64)


def check_shared_out(name: str, found: int, batch_size: int, dp_size: int) -> int:
    """How many all ranks' batches hold together; ValueError where `found` is no multiple of it."""
    together = batch_size * dp_size
    if found < 1 or found % together != 0:
        raise ValueError(
            f"{name}: found {found}, allowed are multiples of batch_size × data-parallel ranks = "
            f"{batch_size} × {dp_size} = {together}: {together}, {2 * together}, {3 * together}, …"
        )
    return together


def check_layout(batch_size: int, dp_rank: int, dp_size: int) -> None:
    """Raise ValueError where these can't be a rank's batch size and place."""
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, allowed is 1 or above")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank: found {dp_rank}, allowed are 0 to {dp_size - 1}")
