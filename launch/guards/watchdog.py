"""Ends a process whose step doesn't end: where it waits, its rank and its step are told first."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import TypeVar

from parallel.mesh import leave_job

T = TypeVar("T")

EXIT_STUCK = 4
# At its own timeout NCCL writes what its last collectives were and aborts the process: later than
# the watchdog tells, so that the log names the step, and status.json the failure.
GROUPS_LATER_SEC = 30.0
# From the message until the process ends, on GPUs: NCCL's timeout counts from the collective, which
# may have begun a minute after its step.
LEAVES_LATER_SEC = 90.0
_OTHERS_GRACE_SEC = 5.0  # torchrun ends all ranks once one has left: the first tells, and writes


class Watchdog:
    """Watches a rank's main thread from a thread of its own. Use it as a context manager.

    Args:
        limit_sec: longest time between two calls of `beat`; then it is told where the rank is.
        rank: rank 0 is first.
        on_stuck: called with the message; it may raise.
        on_going_on: called where there is a `beat` after that.
        leaves_later_sec: from the message until the process ends, if there is none.
    """

    def __init__(
        self,
        limit_sec: float,
        rank: int,
        on_stuck: Callable[[str], None],
        on_going_on: Callable[[], None],
        leaves_later_sec: float,
    ) -> None:
        self._limit, self._rank, self._leaves_later = limit_sec, rank, leaves_later_sec
        self._on_stuck, self._on_going_on = on_stuck, on_going_on
        self._beat = ("starting", time.monotonic())
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # How the run ended is written after what this thread may still be writing.
        self._thread.join(_OTHERS_GRACE_SEC)

    def beat(self, doing: str) -> None:
        """The rank is alive, and begins `doing` ("step 12")."""
        self._beat = (doing, time.monotonic())

    def over(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """The items, each of which may take as long as the limit."""
        for item in items:
            self.beat(doing)
            yield item
        self.beat(f"what follows {doing}")

    def _watch(self) -> None:
        limit = self._limit + (_OTHERS_GRACE_SEC if self._rank else 0.0)
        told: tuple[str, float] | None = None
        while not self._ended.wait(min(1.0, self._limit / 4)):
            beat = self._beat
            silent = time.monotonic() - beat[1]
            if told is not None and told != beat:
                self._take_back(told[0])
                told = None
            if told is None and silent > limit:
                self._tell(beat[0])
                told = beat
            if told is not None and silent > limit + self._leaves_later:
                leave_job(EXIT_STUCK)

    def _take_back(self, doing: str) -> None:
        with suppress(Exception):
            line = f"rank {self._rank}: {doing} has gone on, and so does this run"
            print(line, file=sys.stderr, flush=True)
            self._on_going_on()

    def _tell(self, doing: str) -> None:
        unless = (
            f", unless it goes on within {self._leaves_later:g} s" if self._leaves_later else ""
        )
        # Even where the message can't be written: nobody else would end this process.
        with suppress(Exception):
            message = (
                f"rank {self._rank}: {doing} has taken over {self._limit:g} s, so this run ends"
                f"{unless}; waiting in {_where(sys._current_frames(), self._main)}"
            )
            print(message, file=sys.stderr, flush=True)
            self._on_stuck(message)


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
