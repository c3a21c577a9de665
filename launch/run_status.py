"""`status.json`: how far a run is, and how it ended."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

from launch.run_folder import RunFolder, utc_now, write_atomically

State = Literal["running", "finished", "preempted", "failed"]

_EVERY_SECONDS = 10.0  # while it runs


class RunStatus:
    """Keeps `status.json` true: running inside the context, then how it ended, and why.

    Args:
        folder: the run's.
        rank: rank 0 alone writes.
        step: steps that an earlier start has done, as far as is known yet.

    Attributes:
        step: steps done.
        preempted_by: the signal that the run ends for, as `StopSignals.describe` has it, or empty;
            set it before leaving.
    """

    def __init__(self, folder: RunFolder, rank: int, step: int = 0) -> None:
        self._folder = folder
        self._writes = rank == 0
        self._first_step = self.step = step
        self._written = 0.0
        self._lock = threading.Lock()  # the watchdog and a second SIGINT write from their threads
        self.preempted_by = ""

    def __enter__(self) -> RunStatus:
        self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if kind is not None:
            self.failed(f"{kind.__name__}: {error}")
        elif self.preempted_by:
            self._write("preempted", self.preempted_by)
        else:
            self._write("finished")

    def resumed(self, step: int) -> None:
        """This start goes on after `step`."""
        self._first_step = self.step = step
        self._write("running")

    def done(self, step: int) -> None:
        """`step` is done; it is written once in a while, as steps may be short."""
        self.step = step
        if time.monotonic() - self._written >= _EVERY_SECONDS:
            self._write("running")

    def failed(self, reason: str) -> None:
        """The run ends now, for this reason."""
        self._write("failed", reason)

    def goes_on(self) -> None:
        """It doesn't end, after all."""
        self._write("running")

    def _write(self, state: State, reason: str = "") -> None:
        if not self._writes:
            return
        with self._lock:
            write_status(self._folder, state, self.step, reason, first_step=self._first_step)
            self._written = time.monotonic()


def write_status(
    folder: RunFolder, state: State, step: int, reason: str = "", *, first_step: int = 0
) -> None:
    """Say in `status.json` how far the run is, and why it ended.

    Args:
        step: steps done.
        first_step: those that were done before this start.
    """
    status = {"state": state, "step": step, "first_step": first_step, "reason": reason}
    write_atomically(folder.status, json.dumps(status | {"time": utc_now()}, indent=2) + "\n")


def read_status(folder: RunFolder) -> dict[str, Any]:
    """What `write_status` wrote; empty where there is none to read."""
    try:
        status = json.loads(folder.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
