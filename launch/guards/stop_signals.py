"""Signals that ask a run to stop: at the next step boundary, with a checkpoint if it writes any.

SIGTERM comes from torchrun, a scheduler or a person, SIGUSR1 from SLURM ahead of the time limit,
SIGINT from the keyboard.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from launch.supervise import SAME_KEY_PRESS, signal_when_parent_dies

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOT_SAVED = "without a checkpoint (do_ckpt=false)"
ABORTED = 128 + signal.SIGINT  # the exit code that shells give a process ended by SIGINT


class StopSignals:
    """Notes the first of SIGTERM, SIGUSR1 and SIGINT; a second SIGINT ends this process at once.

    A rank that waits in a collective doesn't return to Python, and a handler written in Python
    would never run there. So the handler in C writes the signal's number into a pipe
    (`signal.set_wakeup_fd`) and a thread reads it: the abort works wherever the rank is stuck.

    Under torchrun, a rank whose torchrun has died gets SIGTERM too (Linux): none is left behind.

    Args:
        announce: told once, from the thread, that a stop was asked for.
        saves: whether the run saves a checkpoint where it is stopped (`do_ckpt`).
        on_abort: called from the thread before the process ends with exit code `ABORTED`. It must
            not wait for other ranks.

    Attributes:
        received: name of the first signal, such as "SIGTERM"; None as long as there is none. Ranks
            see it at different times, so they have to agree on it, for instance once a step.

    Raises:
        ValueError: entered on another thread than the main one.
    """

    def __init__(
        self, *, announce: Callable[[str], None], saves: bool, on_abort: Callable[[], None]
    ) -> None:
        self._announce = announce
        self._saves = saves
        self._on_abort = on_abort
        self._first_interrupt: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._read_end, self._write_end = -1, -1
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end)
        self._thread.start()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, _leave_to_the_thread)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # A torchrun that is killed, or gets a signal that it doesn't handle, leaves its ranks
            # behind.
            signal_when_parent_dies(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)  # the thread reads the end of the pipe
        self._thread.join()
        os.close(self._read_end)

    @property
    def number(self) -> int:
        """The number of `received`; 0 as long as there is none."""
        return 0 if self.received is None else int(signal.Signals[self.received])

    def describe(self, number: int) -> str:
        """What a run that ends for this signal says of it, in `status.json` too."""
        return signal.Signals(number).name + ("" if self._saves else f" {_NOT_SAVED}")

    def _watch(self) -> None:
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > SAME_KEY_PRESS:
                self._abort()
        if self.received is None:
            self.received = number.name
            again = "; once more aborts" if number == signal.SIGINT else ""
            saved = "with a checkpoint" if self._saves else _NOT_SAVED
            self._announce(f"{number.name}: stopping after this step, {saved}{again}")

    def _abort(self) -> None:
        try:
            self._on_abort()
        finally:
            # Without the interpreter's tidying up, which waits for threads and buffers that may
            # never come free.
            os._exit(ABORTED)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """In place of the default action, which would end the process."""
