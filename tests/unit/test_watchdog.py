"""A process that is stuck ends by its watchdog."""

import subprocess
import sys

from launch.guards.watchdog import EXIT_STUCK
from tests.ranks import REPO

STUCK = """
import time
from launch.guards.watchdog import Watchdog

def tell(message):
    raise OSError("status.json: no space left on device")

with Watchdog(0.2, 0, tell) as watchdog:
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
