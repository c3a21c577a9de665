"""Run a torchrun command so that signals reach its ranks and no rank outlives it.

    python launch/supervise.py [--grace SECONDS] [--remove FOLDER] COMMAND [ARGUMENTS]

`torchrun.sh` starts everything through this. torchrun by itself ends with exit code 1 on a signal
although all ranks end well, gives them 30 s (torch 2.11 knows no other time), passes a second
SIGINT on as SIGTERM, and leaves its ranks behind when it is killed or gets a signal that it
doesn't handle. Here, a signal goes to the ranks and torchrun only sees them end:

    SIGTERM, SIGUSR1, SIGINT    to the ranks, as they are; SIGHUP (a lost terminal) as SIGTERM
    SIGQUIT                     to the ranks, whose default it is to die
    GRACE seconds after the first of them, or 10 s after a second SIGINT, what still runs is killed
    torchrun dies of a signal   its ranks get SIGTERM and the same time
    this process is killed      torchrun gets SIGTERM (Linux)

The exit code is torchrun's, or 128 + the signal that it died of.
"""

# The standard library alone, and nothing of this repository, whose packages import torch: this
# process lives as long as the job.
from __future__ import annotations

import argparse
import ctypes
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# One key press can come twice, by the terminal or SLURM and by a launcher that passes it on.
SAME_KEY_PRESS = 1.0  # seconds
AFTER_SECOND_INTERRUPT = 10.0  # seconds
# What a launcher that ended by itself may leave for a moment, such as a logger's last upload.
LEFTOVERS = 5.0  # seconds

FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGQUIT: signal.SIGQUIT,
    signal.SIGHUP: signal.SIGTERM,
}
# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervise(command: Sequence[str], *, grace: float) -> int:
    """Run `command` to its end and return its exit code; see the module's text.

    Args:
        command: torchrun and its arguments. Its children count as the ranks.
        grace: seconds from the first signal until what still runs is killed.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of torchrun become children of this process
    with _signals() as arrived:
        launcher = subprocess.Popen(
            command,
            # A key press is for this process alone to pass on.
            start_new_session=True,
            preexec_fn=lambda: signal_when_parent_dies(signal.SIGTERM),
        )
        deadline = _wait(launcher, arrived, grace)
        if launcher.returncode < 0 and descendants(os.getpid()):
            print(f"torchrun died of signal {-launcher.returncode}", file=sys.stderr, flush=True)
            _send(signal.SIGTERM, _children(os.getpid()))
            deadline = min(deadline, time.monotonic() + grace)
        else:
            deadline = min(deadline, time.monotonic() + LEFTOVERS)
        _end_leftovers(arrived, deadline)
    code = launcher.returncode
    return code if code >= 0 else 128 - code


def _wait(
    launcher: subprocess.Popen[bytes], arrived: queue.SimpleQueue[int], grace: float
) -> float:
    """Pass signals on until the launcher has ended; returns when what still runs has to end."""
    deadline, first_interrupt = float("inf"), float("inf")
    while launcher.poll() is None:
        number = _next(arrived, deadline)
        now = time.monotonic()
        if now >= deadline:
            print("time is up: killing what still runs", file=sys.stderr, flush=True)
            _kill(descendants(os.getpid()))
            launcher.wait()
            break
        if number not in FORWARDED:
            continue
        deadline = min(deadline, now + grace)
        if number == signal.SIGINT:
            if now - first_interrupt > SAME_KEY_PRESS:
                deadline = min(deadline, now + AFTER_SECOND_INTERRUPT)
            first_interrupt = min(first_interrupt, now)
        ranks = _children(launcher.pid)
        if ranks:
            _send(FORWARDED[signal.Signals(number)], ranks)
        else:  # it hasn't started any yet
            _send(signal.SIGTERM, [launcher.pid])
    return deadline


def _end_leftovers(arrived: queue.SimpleQueue[int], deadline: float) -> None:
    """Wait for all descendants until `deadline`, then kill them; signals are passed on."""
    while running := descendants(os.getpid()):
        _reap()
        if time.monotonic() >= deadline:
            _kill(running)
        number = _next(arrived, min(deadline, time.monotonic() + 0.2))
        if number in FORWARDED:
            _send(FORWARDED[signal.Signals(number)], _children(os.getpid()))


@contextmanager
def _signals() -> Iterator[queue.SimpleQueue[int]]:
    """The numbers of signals as they arrive, SIGCHLD among them, which ends a wait."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

    def note(number: int, frame: FrameType | None) -> None:
        arrived.put(number)

    previous = {}
    for number in (*FORWARDED, signal.SIGCHLD):
        # What the caller ignores (nohup does SIGHUP, a shell's background job SIGINT) stays so.
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, note)
    try:
        yield arrived
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _next(arrived: queue.SimpleQueue[int], deadline: float) -> int | None:
    """The next signal's number; None where `deadline` comes first."""
    # A second at most: a signal may come just before the wait for it begins.
    left = min(deadline - time.monotonic(), 1.0)
    try:
        return arrived.get(timeout=max(left, 0.0))
    except queue.Empty:
        return None


def _send(number: signal.Signals, pids: Sequence[int]) -> None:
    """A signal for processes and, where they lead a group as torchrun's ranks do, for all of it."""
    for pid in pids:
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reap() -> None:
    """Take the exit codes of orphans that ended, or they would stay as zombies."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(pid: int) -> list[int]:
    """Process ids of all children, children's children, …; zombies don't count."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for ancestor in found:
        found += children.get(ancestor, [])
    return found[1:]


def _children(pid: int) -> list[int]:
    return [child for child, parent in _parents().items() if parent == pid]


def _parents() -> dict[int, int]:
    """Process id → its parent's, of all processes but zombies."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent …", where the name may hold anything, ")" too.
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            parents[int(file.parent.name)] = int(parent)
    if not parents:  # no /proc: macOS
        table = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True
        )
        for line in table.stdout.splitlines():
            child, parent, state = line.split()
            if not state.startswith("Z"):
                parents[int(child)] = int(parent)
    return parents


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send `number` to this process when its parent ends; Linux alone can."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died just before
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    """Set a property of this process; nothing but on Linux."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, int(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Run torchrun; see the module's text.")
    parser.add_argument("--grace", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--remove", type=Path, metavar="FOLDER", help="deleted at the end")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    try:
        return supervise(options.command, grace=options.grace)
    finally:
        if options.remove is not None:
            shutil.rmtree(options.remove)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
