"""Stands for `srun` and `scontrol` on a machine without SLURM; `install` puts both on a PATH.

`srun` starts each node's task here, beside the others, and passes signals on, as the real one does.
`scontrol show hostnames` says that all nodes are this host; `scontrol requeue` is only noted.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

REQUEUED = "requeued.txt"


def install(folder: Path) -> Path:
    """Make the two commands in `folder`; returns the file where `scontrol requeue` leaves ids."""
    for name in ("srun", "scontrol"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$0" "$@"\n')
        command.chmod(0o755)
    return folder / REQUEUED


def srun(arguments: list[str]) -> int:
    options = dict(a.partition("=")[::2] for a in arguments if a.startswith("--"))
    nodes = int(options["--nodes"])
    assert int(options["--ntasks"]) == nodes
    assert options["--ntasks-per-node"] == "1"
    first = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
    tasks = [
        subprocess.Popen(
            arguments[first:],
            env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)},
            start_new_session=True,  # as on another machine
        )
        for node in range(nodes)
    ]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(arguments: list[str], folder: Path) -> int:
    match arguments:
        case ["show", "hostnames", _]:
            print("\n".join(["localhost"] * int(os.environ["SLURM_JOB_NUM_NODES"])))
        case ["requeue", job]:
            with (folder / REQUEUED).open("a") as file:
                file.write(f"{job}\n")
        case _:
            raise SystemExit(f"scontrol {arguments}: not known here")
    return 0


if __name__ == "__main__":
    called = Path(sys.argv[1])
    if called.name == "srun":
        sys.exit(srun(sys.argv[2:]))
    sys.exit(scontrol(sys.argv[2:], called.parent))
