"""Real signals to real processes: the first asks for a stop, a second SIGINT ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from launch.guards.stop_signals import ABORTED, StopSignals
from launch.supervise import SAME_KEY_PRESS
from tests.ranks import REPO, kill_job

HEAD = """
import os, signal, sys, threading, time
from launch.guards.stop_signals import StopSignals
say = lambda line: print(line, flush=True)
"""
# Ends by itself once a stop is asked for, as the training loop does.
LOOP = """
before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
with StopSignals(announce=say, saves=True, on_abort=lambda: say("aborting")) as stop:
    say("ready")
    while stop.received is None or sys.argv[1:] == ["stay"]:
        time.sleep(0.01)
    say(f"received {stop.received}")
assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
assert signal.set_wakeup_fd(-1) == -1
assert threading.active_count() == 1
"""
# Never comes back to the interpreter, as a rank in a collective whose partner is gone: a mutex
# that this thread locked already is waited for in C, and signals don't interrupt that wait.
STUCK = """
import ctypes
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
with StopSignals(announce=say, saves=True, on_abort=lambda: say("aborting")):
    libc.pthread_mutex_lock(mutex)
    say("ready")
    libc.pthread_mutex_lock(mutex)
"""
# torchrun's place: starts a rank, says its id, waits to be killed.
PARENT = """
import subprocess
rank = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], env=os.environ | {"TORCHELASTIC_RUN_ID": "none"}
)
print(rank.pid, flush=True)
rank.wait()
"""


@contextmanager
def started(body: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HEAD + body, *arguments]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            kill_job(process)


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=20)
    assert err == ""
    return process.returncode, out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_one_signal_asks_for_a_stop_and_everything_is_put_back(name):
    with started(LOOP) as process:
        assert read(process) == "ready"
        process.send_signal(signal.Signals[name])
        code, out = finish(process)
    again = "; once more aborts" if name == "SIGINT" else ""
    assert code == 0
    assert out.splitlines() == [
        f"{name}: stopping after this step, with a checkpoint{again}",
        f"received {name}",
    ]


@pytest.mark.parametrize("body", [LOOP, STUCK])
def test_a_second_interrupt_ends_the_process_at_once_even_in_c(body):
    with started(body, "stay") as process:
        assert read(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert read(process).startswith("SIGINT: stopping")
        # The same key press once more, by a launcher that passes it on; and other signals.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        time.sleep(SAME_KEY_PRESS + 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        code, out = finish(process)
    assert (code, out) == (ABORTED, "aborting\n")


def test_the_first_signal_keeps_its_name():
    with started(LOOP, "stay") as process:
        assert read(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert read(process) == "SIGTERM: stopping after this step, with a checkpoint"
        # A first SIGINT asks for what is asked for already.
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux")
def test_a_rank_whose_torchrun_is_killed_is_asked_to_stop():
    with started(PARENT, HEAD + LOOP) as parent:
        rank = int(read(parent))
        try:
            assert read(parent) == "ready"
            parent.kill()
            assert read(parent) == "SIGTERM: stopping after this step, with a checkpoint"
            assert read(parent) == "received SIGTERM"
            deadline = time.monotonic() + 10
            while os.path.exists(f"/proc/{rank}/exe") and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not os.path.exists(f"/proc/{rank}/exe")
        finally:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def test_only_the_main_thread_can_take_signals():
    errors: list[ValueError] = []

    def enter() -> None:
        try:
            with StopSignals(announce=print, saves=True, on_abort=lambda: None):
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1
