"""Steps of data that are read by a thread while the model computes."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """An endless iterator over what `_read` gives for step `start_step`, and for every next one.

    Use it as a context manager, or call `close()`: it owns a thread. Steps are read in order, each
    once. What goes wrong in the thread is raised at the step that it belongs to.

    Args:
        start_step: first step to yield, counted from 0.
        prefetch: steps read ahead by the thread; 0: none, read when asked for.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, start_step: int, prefetch: int) -> None:
        if start_step < 0 or prefetch < 0:
            raise ValueError(
                f"start_step, prefetch: found {start_step}, {prefetch}, allowed is 0 or above"
            )
        self._next_step = start_step
        self._prefetch = prefetch
        self._ahead: deque[Future[T]] = deque()
        # One worker, so steps are read in order and what reads them has one user at a time.
        self._worker: ThreadPoolExecutor | None = None
        self._closed = False
        if prefetch > 0:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._fill()

    @abstractmethod
    def _read(self, step: int) -> T:
        """What the step holds; whatever this needs is set before `super().__init__`."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise ValueError("these batches are closed; build new ones with start_step")
        if self._worker is None:
            self._next_step += 1
            return self._read(self._next_step - 1)
        step = self._ahead.popleft().result()
        self._fill()
        return step

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
