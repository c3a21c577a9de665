"""Ends a process whose step doesn't end: where it waits, its rank and its step are told first."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from parallel.mesh import leave_job

T = TypeVar("T")

EXIT_STUCK = 4
_OTHERS_GRACE_SEC = 5.0  # torchrun ends all ranks once one has left: the first tells, and writes


class Watchdog:
    """Watches a rank's main thread from a thread of its own. Use it as a context manager.

    Args:
        limit_sec: longest time between two calls of `beat`.
        rank: rank 0 leaves first.
        on_stuck: called with the message before the process ends, which it does even if this
            raises.
    """

    def __init__(self, limit_sec: float, rank: int, on_stuck: Callable[[str], None]) -> None:
        self._limit, self._rank, self._on_stuck = limit_sec, rank, on_stuck
        self._doing, self._since = "starting", time.monotonic()
        self._main = threading.get_ident()
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, doing: str) -> None:
        """The rank is alive, and begins `doing` ("step 12")."""
        self._doing, self._since = doing, time.monotonic()

    def over(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """The items, each of which may take as long as the limit."""
        for item in items:
            self.beat(doing)
            yield item
        self.beat(f"what follows {doing}")

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 4)):
            if time.monotonic() - self._since > self._limit:
                self._leave()

    def _leave(self) -> None:
        message = (
            f"rank {self._rank}: {self._doing} has taken over {self._limit:g} s, so this run ends; "
            f"waiting in {_where(sys._current_frames(), self._main)}"
        )
        if self._rank != 0:
            time.sleep(_OTHERS_GRACE_SEC)
        try:
            print(message, file=sys.stderr, flush=True)
            self._on_stuck(message)
        finally:
            # Even where the message can't be written: nobody else would end this process.
            leave_job(EXIT_STUCK)


def _where(frames: dict[int, FrameType], main: int) -> str:
    """The way from a line of ours into a collective, in whatever thread is in one."""
    # The main thread first; on a GPU, gradients are reduced by autograd's threads.
    threads = sorted(frames, key=lambda thread: thread != main)
    for thread in threads:
        stack = traceback.extract_stack(frames[thread])
        inside = [entry.name for entry in stack if "/torch/distributed/" in entry.filename]
        if not inside:
            continue
        ours = [entry for entry in stack if "site-packages" not in entry.filename]
        return f"the collective {' > '.join(inside)}, called by {_line(ours or stack)}"
    return _line(traceback.extract_stack(frames[main]))


def _line(stack: list[traceback.FrameSummary]) -> str:
    entry = stack[-1]
    return f"{entry.name} ({entry.filename}:{entry.lineno})"
