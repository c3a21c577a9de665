"""Runs that meet a fault, and what must hold after any of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import torch

from parallel.checkpoint import checkpoint_step, list_checkpoints
from parallel.checkpoint_manifest import content_problems
from tests.integration.runs import TRAIN, Run
from tests.ranks import REPO, kill_job, ranks_command, run_ranks, start_command

FAULTY = REPO / "tests" / "faults" / "train_with_fault.py"
STEPS, EVERY = 6, 2  # steps of a run, and between two of its checkpoints
TIMEOUT = 150.0  # of a command; on 2 idle cores none takes over 20 s


@dataclass(frozen=True)
class Setting:
    """Two data-parallel ranks of the demo, in float64.

    Attributes:
        arguments: of `launch/train.py`, all but `run_dir`.
        whole: the run that met no fault.
    """

    arguments: list[str]
    whole: Run

    def run(self, folder: Path, *extra: str, ranks: int = 2) -> Run:
        """Start, or with `resume=true` take up again, and wait for the end."""
        arguments = [*self.arguments, f"run_dir={folder}", *extra]
        return Run(folder, run_ranks(ranks, TRAIN, arguments, timeout=TIMEOUT))

    def run_with(self, fault: str, rank: int, folder: Path, *extra: str, ranks: int = 2) -> Run:
        """`launch/train.py` with one of `train_with_fault.py`'s faults in this rank."""
        arguments = [fault, str(rank), *self.arguments, f"run_dir={folder}", *extra]
        run = Run(folder, run_ranks(ranks, FAULTY, arguments, timeout=TIMEOUT))
        assert_no_process_of(folder)
        return run


def interrupt(
    command: Sequence[str],
    folder: Path,
    act: Callable[[int], None],
    *,
    after: int = 2,
    **environment: str,
) -> Run:
    """Start a command that trains into `folder`; `act` on its process once steps are logged."""
    deadline = time.monotonic() + TIMEOUT
    with start_command(list(command), **environment) as process:
        try:
            while process.poll() is None and len(logged_steps(folder)) < after:
                assert time.monotonic() < deadline, "no step was logged in time"
                time.sleep(0.05)
            assert process.poll() is None, process.communicate()
            act(process.pid)
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            kill_job(process)
    job = CompletedProcess(list(command), process.returncode, out, err)
    assert_no_process_of(folder)
    return Run(folder, job)


def torchrun(setting: Setting, folder: Path, *extra: str, ranks: int = 2) -> list[str]:
    """The command of `Setting.run`."""
    return ranks_command(ranks, TRAIN, [*setting.arguments, f"run_dir={folder}", *extra])


def logged_steps(folder: Path) -> list[str]:
    rows = folder / "metrics.jsonl"
    return rows.read_text().splitlines() if rows.exists() else []


def processes_of(folder: Path) -> list[int]:
    """Processes that were started with this run folder, ended ones that nobody waited for aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if f"run_dir={folder}".encode() in words:
            found.append(int(entry.name))
    return found


def ranks_of(folder: Path) -> list[int]:
    """The ranks among `processes_of`: torchrun's children."""
    pids = processes_of(folder)
    stats = {pid: Path(f"/proc/{pid}/stat").read_text() for pid in pids}
    # "pid (name) state parent …"
    parents = {pid: int(stat.rpartition(")")[2].split()[1]) for pid, stat in stats.items()}
    return sorted(pid for pid in pids if parents[pid] in pids)


def assert_no_process_of(folder: Path) -> None:
    """Orphans get a moment to see that they are."""
    deadline = time.monotonic() + 10.0
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes {left} were left behind")
        time.sleep(0.1)


def assert_good(run: Run, *steps: int) -> None:
    """Exactly the checkpoints after these steps stand there, and each is good."""
    found = list_checkpoints(run.folder / "checkpoints")
    assert [checkpoint_step(path) for path in found] == list(steps)
    assert [content_problems(path, alone=True) for path in found] == [[] for _ in found]


def assert_taken_up(setting: Setting, broken: Run, *, after: int) -> Run:
    """The run goes on after step `after`, and ends bit for bit as the one without a fault."""
    rows = len(broken.rows)
    resumed = setting.run(broken.folder, "resume=true")
    said = resumed.job.stdout + resumed.job.stderr
    assert resumed.job.returncode == 0, said
    assert f"resumed after step {after} from" in said
    assert resumed.status["state"] == "finished"
    steps = [row for row in resumed.rows[rows:] if "loss" in row]
    expected = setting.whole.steps[after:]
    assert [row["step"] for row in steps] == [row["step"] for row in expected]
    for key in ("loss", "text_loss", "audio_loss", "grad_norm", "lr"):
        assert [row[key] for row in steps] == [row[key] for row in expected], key
    found, wanted = resumed.checkpoint(STEPS), setting.whole.checkpoint(STEPS)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    return resumed
