"""Stands for a training script in tests of the launcher: starts at once, and notes its signals.

    standin.py FOLDER stop|stay

Appends to FOLDER/<rank>.txt: its process id, then each signal's name, then "saved". It stops at the
first signal, half a second later, as if it wrote a checkpoint; with "stay" it never does, as a rank
that hangs in a collective.
"""

import os
import signal
import sys
import time
from pathlib import Path

folder, mode = Path(sys.argv[1]), sys.argv[2]
arrived: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: arrived.append(number))
with (folder / f"{os.environ['RANK']}.txt").open("a", buffering=1) as notes:
    notes.write(f"{os.getpid()}\n")
    written = 0
    stops_at = float("inf")
    while time.monotonic() < stops_at:
        time.sleep(0.02)
        for number in arrived[written:]:
            notes.write(f"{signal.Signals(number).name}\n")
            written += 1
            if mode == "stop":
                stops_at = min(stops_at, time.monotonic() + 0.5)
    notes.write("saved\n")
