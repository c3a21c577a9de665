"""`srun`, `scancel` and `scontrol` for a machine without SLURM; `install` puts them on a PATH.

`srun` starts each node's task here, beside the others. As the real one does, it passes SIGUSR1 on,
and kills all that its tasks have started at SIGTERM. `scancel --signal` signals the tasks.
`scontrol show hostnames` says that all nodes are this host, `show job` whether another job preempts
this one, and `requeue` is only noted.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

REQUEUED, TASKS, PREEMPTED = "requeued.txt", "tasks.txt", "preempted.txt"
STEP = {"SLURM_STEP_ID": "0"}


def install(folder: Path) -> Path:
    """Make the commands in `folder`; returns the file where `scontrol requeue` leaves ids."""
    for name in ("srun", "scancel", "scontrol"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$0" "$@"\n')
        command.chmod(0o755)
    return folder / REQUEUED


def srun(arguments: list[str], folder: Path) -> int:
    options = dict(a.partition("=")[::2] for a in arguments if a.startswith("--"))
    nodes = int(options["--nodes"])
    assert int(options["--ntasks"]) == nodes
    assert options["--ntasks-per-node"] == "1"
    first = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
    tasks = [
        subprocess.Popen(
            arguments[first:],
            env=os.environ | STEP | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)},
            start_new_session=True,  # as on another machine
        )
        for node in range(nodes)
    ]
    (folder / TASKS).write_text(" ".join(str(task.pid) for task in tasks))

    def kill(number: int, _: object) -> None:
        print("srun: forcing job termination", file=sys.stderr, flush=True)
        while pids := of_step():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
    signal.signal(signal.SIGTERM, kill)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def of_step() -> list[int]:
    """Process ids of the tasks and of all that they have started."""
    variables = {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"]} | STEP
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile, or is another person's
            if wanted <= set(file.read_bytes().split(b"\0")):
                found.append(int(file.parent.name))
    return found


def scancel(arguments: list[str], folder: Path) -> int:
    match arguments:
        case ["--signal=TERM", _]:
            for pid in (folder / TASKS).read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
        case _:
            raise SystemExit(f"scancel {arguments}: not known here")
    return 0


def scontrol(arguments: list[str], folder: Path) -> int:
    match arguments:
        case ["show", "hostnames", _]:
            print("\n".join(["localhost"] * int(os.environ["SLURM_JOB_NUM_NODES"])))
        case ["show", "job", job]:
            file = folder / PREEMPTED
            time = file.read_text() if file.exists() else "None"
            print(f"JobId={job} JobName=ttt-dist")
            print(f"   PreemptEligibleTime=2021-06-10T13:32:46 PreemptTime={time}")
            print("   SuspendTime=None SecsPreSuspend=0")
        case ["requeue", job]:
            with (folder / REQUEUED).open("a") as file:
                file.write(f"{job}\n")
        case _:
            raise SystemExit(f"scontrol {arguments}: not known here")
    return 0


if __name__ == "__main__":
    called = Path(sys.argv[1])
    command = {"srun": srun, "scancel": scancel, "scontrol": scontrol}[called.name]
    sys.exit(command(sys.argv[2:], called.parent))
