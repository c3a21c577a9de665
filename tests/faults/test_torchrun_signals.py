"""Signals to torchrun.sh, and to the torchrun that it starts: ranks get them, none is left behind.

The ranks are a stand-in that only notes its signals; tests of training send signals to the real
command.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest

from launch.supervise import AFTER_SECOND_INTERRUPT, SAME_KEY_PRESS, descendants
from tests.ranks import REPO, run_command, start_command

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]
STANDIN = Path(__file__).with_name("standin.py")
RANKS = 2
# Seconds for what takes 1 to 5 on idle cores, and 30 s where torchrun's own time is at work.
PATIENCE = 60


@dataclass
class Job:
    """torchrun.sh with two ranks, all of which run and handle signals by now."""

    process: Popen[str]
    folder: Path
    torchrun: int
    ranks: list[int]

    def notes(self) -> list[list[str]]:
        """What each rank noted after its process id."""
        files = [self.folder / f"{rank}.txt" for rank in range(RANKS)]
        return [file.read_text().split()[1:] for file in files]

    def end(self, timeout: float) -> tuple[int, str]:
        """Exit code and messages; nothing that this job started may live on."""
        _, err = self.process.communicate(timeout=timeout)
        assert not any(alive(pid) for pid in (self.torchrun, *self.ranks))
        return self.process.returncode, err


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


@contextmanager
def job(folder: Path, mode: str, **environment: str) -> Iterator[Job]:
    command = [str(REPO / "torchrun.sh"), str(STANDIN), str(folder), mode]
    scratch = folder / "tmp"
    scratch.mkdir()
    settings = {"NPROC": str(RANKS), "TMPDIR": str(scratch)} | environment
    with start_command(command, **settings) as process:
        started: list[int] = []
        try:
            wait_until(lambda: len(list(folder.glob("*.txt"))) == RANKS)
            started = descendants(process.pid)
            torchrun, *ranks = started
            assert len(ranks) == RANKS
            yield Job(process, folder, torchrun, ranks)
            assert list(scratch.iterdir()) == []
        finally:
            for pid in (process.pid, *started):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGUSR1", "SIGUSR1"),
        ("SIGINT", "SIGINT"),
        ("SIGHUP", "SIGTERM"),
    ],
)
def test_a_signal_reaches_each_rank_once_and_a_clean_stop_is_exit_code_0(tmp_path, sent, arrives):
    with job(tmp_path, "stop") as running:
        # To the whole process group, as a terminal does.
        os.killpg(running.process.pid, signal.Signals[sent])
        code, err = running.end(timeout=PATIENCE)
        assert running.notes() == [[arrives, "saved"]] * RANKS
    assert (code, err) == (0, "")


def test_one_rank_that_gets_a_signal_is_left_to_the_ranks(tmp_path):
    with job(tmp_path, "stop") as running:
        os.kill(running.ranks[0], signal.SIGTERM)
        wait_until(lambda: not alive(running.ranks[0]))
        assert alive(running.ranks[1])  # training's ranks agree on a stop; these don't
        running.process.send_signal(signal.SIGTERM)
        code, _ = running.end(timeout=PATIENCE)
        assert sorted(running.notes()) == [["SIGTERM", "saved"]] * RANKS
    assert code == 0


def test_ranks_that_hang_are_killed_after_the_grace_time(tmp_path):
    with job(tmp_path, "stay", GRACE="3") as running:
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        # No signal buys more time.
        running.process.send_signal(signal.SIGUSR1)
        code, err = running.end(timeout=PATIENCE)
        assert running.notes() == [["SIGTERM", "SIGUSR1"]] * RANKS
    assert code == 128 + signal.SIGKILL
    assert "time is up" in err


def test_a_second_interrupt_gives_ranks_that_hang_a_shorter_time(tmp_path):
    with job(tmp_path, "stay") as running:
        running.process.send_signal(signal.SIGINT)
        time.sleep(SAME_KEY_PRESS + 0.2)
        running.process.send_signal(signal.SIGINT)
        code, err = running.end(timeout=AFTER_SECOND_INTERRUPT + PATIENCE)
        assert running.notes() == [["SIGINT", "SIGINT"]] * RANKS
    assert code == 128 + signal.SIGKILL
    assert "time is up" in err


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1"])
def test_a_signal_for_torchrun_itself_is_passed_on(tmp_path, sent):
    with job(tmp_path, "stop") as running:
        os.kill(running.torchrun, signal.Signals[sent])
        code, _ = running.end(timeout=PATIENCE)
        assert running.notes() == [[sent, "saved"]] * RANKS
    assert code == 1  # torchrun's own way


def test_two_interrupts_for_torchrun_itself_leave_no_rank_behind(tmp_path):
    with job(tmp_path, "stay", GRACE="3") as running:
        for _ in range(3):
            os.kill(running.torchrun, signal.SIGINT)
            time.sleep(0.3)
        code, _ = running.end(timeout=PATIENCE)
    assert code != 0


def test_ranks_of_a_torchrun_that_was_killed_are_asked_to_stop(tmp_path):
    with job(tmp_path, "stop") as running:
        os.kill(running.torchrun, signal.SIGKILL)
        code, err = running.end(timeout=PATIENCE)
        assert running.notes() == [["SIGTERM", "saved"]] * RANKS
    assert code == 128 + signal.SIGKILL
    assert f"torchrun died of signal {signal.SIGKILL:d}" in err


def test_ranks_stop_when_everything_above_torchrun_is_killed(tmp_path):
    with job(tmp_path, "stop") as running:
        running.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in (running.torchrun, *running.ranks)))
        assert running.notes() == [["SIGTERM", "saved"]] * RANKS
        # Nobody was left to remove it.
        for file in sorted((tmp_path / "tmp").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


def test_torchrun_listens_on_no_port_on_one_node(tmp_path):
    with job(tmp_path, "stop") as running:
        assert listening(running.torchrun) == []
        assert listening(running.process.pid) == []
        running.process.send_signal(signal.SIGTERM)
        running.end(timeout=PATIENCE)


def listening(pid: int) -> list[str]:
    """Local addresses (hexadecimal, as in /proc/net/tcp) that a process listens on."""
    names = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = {name[len("socket:[") : -1] for name in names if name.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A" and rest[5] in sockets:  # TCP_LISTEN
                found.append(address)
    return found


def test_output_of_each_rank_is_kept_where_log_dir_says(tmp_path):
    logs = tmp_path / "logs"
    with job(tmp_path, "stop", LOG_DIR=str(logs)) as running:
        running.process.send_signal(signal.SIGTERM)
        running.end(timeout=PATIENCE)
    kept = {str(path.relative_to(logs)) for path in logs.rglob("stdout.log")}
    assert len(kept) == RANKS
    assert all(re.fullmatch(r".+/attempt_0/[01]/stdout.log", name) for name in kept)


def test_several_nodes_need_to_know_where_to_meet(tmp_path):
    command = [str(REPO / "torchrun.sh"), str(STANDIN), str(tmp_path), "stop"]
    done = run_command(command, timeout=PATIENCE, NPROC="2", NNODES="2", NODE_RANK="1")
    assert done.returncode == 2
    assert done.stderr.startswith("NNODES=2 needs RDZV_ENDPOINT too")
