"""Batches of a data-parallel rank: steps of the global order, prefetched, and evaluation passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ttt_dist.data.dataset import GlobalOrder, PieceDataset

# Samples of every microbatch, and their codes.
Step = tuple[list[list[int]], list[torch.Tensor]]


class StepBatches:
    """The microbatches of each step, for one data-parallel rank; endless.

    Step s takes samples `[s·G, (s+1)·G)` of the order, whatever the layout is: microbatch m of rank
    r is the r-th of `dp_size` consecutive batches inside the m-th part of the step. A run resumes
    by `start_step` alone. Ranks of one tp group pass the same `dp_rank` and get the same batches.

    Iterating yields lists of G / (dp_size · batch_size) tensors, int64 `[batch_size, R, T]` on the
    CPU. Use it as a context manager, or call `close()`: it owns a thread. What goes wrong in that
    thread is raised at the step that it belongs to.

    Attributes:
        samples: of each microbatch of the step last yielded, as the dataset numbers them.

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
        _check_layout(batch_size, dp_rank, dp_size)
        together = batch_size * dp_size
        if global_batch_size < 1 or global_batch_size % together != 0:
            raise ValueError(
                f"global_batch_size: found {global_batch_size}, allowed are multiples of "
                f"batch_size × data-parallel ranks = {batch_size} × {dp_size} = {together}: "
                f"{together}, {2 * together}, {3 * together}, …"
            )
        if start_step < 0 or prefetch < 0:
            raise ValueError(
                f"start_step, prefetch: found {start_step}, {prefetch}, allowed is 0 or above"
            )
        self._dataset = dataset
        self._order = order
        self._global_batch_size = global_batch_size
        self._batch_size = batch_size
        self._offsets = range(dp_rank * batch_size, global_batch_size, together)
        self._next_step = start_step
        self._prefetch = prefetch
        self.samples: list[list[int]] = []
        self._ahead: deque[Future[Step]] = deque()
        # One worker, so steps are read in order and the order's caches have one user at a time.
        self._worker: ThreadPoolExecutor | None = None
        self._closed = False
        if prefetch > 0:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="step-batches")
            self._fill()

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        return self

    def __next__(self) -> list[torch.Tensor]:
        if self._closed:
            raise ValueError("these batches are closed; build new ones with start_step")
        if self._worker is None:
            self._next_step += 1
            self.samples, codes = self._read(self._next_step - 1)
            return codes
        self.samples, codes = self._ahead.popleft().result()
        self._fill()
        return codes

    def close(self) -> None:
        """End the thread after the step that it is reading; may be called more than once."""
        self._closed = True
        self._ahead.clear()
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        assert self._worker is not None
        while len(self._ahead) < self._prefetch:
            self._ahead.append(self._worker.submit(self._read, self._next_step))
            self._next_step += 1

    def _read(self, step: int) -> Step:
        first = step * self._global_batch_size
        samples = [
            [self._order[first + offset + place] for place in range(self._batch_size)]
            for offset in self._offsets
        ]
        codes = [torch.stack([self._dataset[index] for index in each]) for each in samples]
        return samples, codes

    def __enter__(self) -> StepBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eval_batches(
    dataset: PieceDataset,
    *,
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    limit: int | None = None,
) -> Iterator[torch.Tensor]:
    """One pass over the dataset for one rank: int64 `[batch_size, R, T]` on the CPU.

    Every piece is met once over all ranks, and all ranks get the same number of batches, as FSDP's
    collectives demand; what is left over is filled with pieces of -1 throughout: they carry no
    loss.

    Args:
        limit: take that many pieces, spread evenly over the dataset; None: all.
    """
    _check_layout(batch_size, dp_rank, dp_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, allowed is 1 or above, or None")
    size = len(dataset)
    total = size if limit is None else min(size, limit)
    chosen = [place * size // total for place in range(total)]
    empty = torch.full((dataset.rows, dataset.frames), -1, dtype=torch.int64)
    together = batch_size * dp_size
    for start in range(dp_rank * batch_size, -(-total // together) * together, together):
        places = range(start, start + batch_size)
        yield torch.stack([dataset[chosen[place]] if place < total else empty for place in places])


def _check_layout(batch_size: int, dp_rank: int, dp_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, allowed is 1 or above")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank: found {dp_rank}, allowed are 0 to {dp_size - 1}")
