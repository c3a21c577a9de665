"""A process that is stuck ends by its watchdog."""

import subprocess
import sys
import time

from launch.guards.watchdog import EXIT_STUCK, Watchdog
from tests.ranks import REPO

STUCK = """
import time
from launch.guards.watchdog import Watchdog

def tell(message):
    raise OSError("status.json: no space left on device")

with Watchdog(0.2, 0, tell, print, 0.0) as watchdog:
    watchdog.beat("a step")
    time.sleep(60)
"""


def test_a_stuck_process_ends_even_where_it_cannot_leave_word():
    done = subprocess.run(
        [sys.executable, "-c", STUCK], cwd=REPO, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_STUCK
    assert done.stderr.startswith("rank 0: a step has taken over 0.2 s, so this run ends; ")
    assert "waiting in <module> (<string>:" in done.stderr


# As on GPUs, where NCCL's own timeout comes between the two.
TOLD_BEFORE = """
import time
from launch.guards.watchdog import Watchdog

told = []
with Watchdog(0.2, 0, told.append, print, 2.0) as watchdog:
    watchdog.beat("a step")
    while not told:
        time.sleep(0.01)
    time.sleep(1.0)
    print("here", len(told), told[0], flush=True)
    time.sleep(60)
"""


def test_it_tells_before_it_leaves():
    done = subprocess.run(
        [sys.executable, "-c", TOLD_BEFORE], cwd=REPO, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_STUCK
    told = "rank 0: a step has taken over 0.2 s, so this run ends, unless it goes on within 2 s; "
    assert done.stdout.startswith(f"here 1 {told}")
    assert done.stderr.count("rank 0: ") == 1


def test_a_step_that_goes_on_is_taken_back(capsys):
    told: list[str] = []
    deadline = time.monotonic() + 30
    with Watchdog(0.3, 0, told.append, lambda: told.append("goes on"), 60.0) as watchdog:
        watchdog.beat("a step")
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        watchdog.beat("the next")
        while len(told) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert told[1] == "goes on"
    assert "rank 0: a step has gone on, and so does this run\n" in capsys.readouterr().err
