"""Signals that end a run: after the step under way, with a checkpoint, and resumable."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from parallel.checkpoint import checkpoint_step, list_checkpoints
from tests.faults.jobs import (
    assert_good,
    assert_taken_up,
    interrupt,
    ranks_of,
    torchrun,
)
from tests.faults.test_torchrun_signals import listening
from tests.integration.runs import TRAIN
from tests.ranks import REPO

pytestmark = pytest.mark.faults
STEP = 3  # that train_with_fault.py's signals come in
LOOPBACK = "0100007F"  # 127.0.0.1 as /proc/net/tcp writes it


def one_rank(folder):
    """The highest of a job's ranks."""
    return ranks_of(folder)[-1]


@pytest.mark.parametrize("fault", ["SIGTERM to torchrun", "SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(setting, tmp_path, fault):
    run = setting.run_with(fault, 1, tmp_path / "run")
    name = fault.partition(" ")[0]
    status = run.status
    assert (status["state"], status["reason"], status["step"]) == ("preempted", name, STEP)
    assert f"ended by {name} after step {STEP}; to go on: resume=true" in run.job.stdout
    assert "Traceback" not in run.job.stdout
    if fault == name:  # torchrun itself exits with 1 when it is signalled
        assert run.job.returncode == 0, run.job.stderr
    assert_good(run, 2, STEP)
    assert_taken_up(setting, run, after=STEP)


def test_a_signal_before_the_first_logged_step_ends_the_run_as_well(setting, tmp_path):
    run = setting.run_with("SIGUSR1", 1, tmp_path / "run", "log_freq=50")
    assert run.job.returncode == 0, run.job.stderr
    assert (run.status["state"], run.status["reason"]) == ("preempted", "SIGUSR1")
    assert run.steps == []
    assert "loss curve" not in run.job.stdout + run.job.stderr
    assert_good(run, 2, STEP)


def test_a_stop_of_a_run_that_saves_nothing_says_so(setting, tmp_path):
    run = setting.run_with("SIGTERM", 1, tmp_path / "run", "do_ckpt=false")
    assert run.job.returncode == 0, run.job.stderr
    how = "without a checkpoint (do_ckpt=false)"
    assert f"rank 1: SIGTERM: stopping after this step, {how}\n" in run.job.stdout
    assert f"ended by SIGTERM {how} after step {STEP}\n" in run.job.stdout
    assert "resume=true" not in run.job.stdout
    assert (run.status["state"], run.status["reason"]) == ("preempted", f"SIGTERM {how}")
    assert_good(run)


def test_a_signal_in_the_last_step_changes_nothing(setting, tmp_path):
    run = setting.run_with(
        "SIGTERM", 1, tmp_path / "run", f"max_steps={STEP}", "do_eval=true", "eval_batches=1"
    )
    assert run.job.returncode == 0, run.job.stderr
    assert "rank 1: SIGTERM: stopping after this step" in run.job.stdout
    assert (run.status["state"], run.status["step"]) == ("finished", STEP)
    assert [row["step"] for row in run.evaluations] == [0, STEP]
    assert_good(run, 2, STEP)


def test_torchrun_sh_ends_well_and_is_reached_from_this_machine_alone(setting, tmp_path):
    """What the ranks themselves listen on; torchrun: test_torchrun_signals.py."""
    folder = tmp_path / "run"
    addresses: list[str] = []

    def look_and_stop(script_pid: int) -> None:
        for rank in ranks_of(folder):
            addresses.extend(listening(rank))
        os.kill(script_pid, signal.SIGTERM)

    command = [str(REPO / "torchrun.sh"), str(TRAIN), *setting.arguments, f"run_dir={folder}"]
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = interrupt(command, folder, look_and_stop, NPROC="2", PATH=python)
    assert run.job.returncode == 0, run.job.stderr
    assert (run.status["state"], run.status["reason"]) == ("preempted", "SIGTERM")
    assert addresses != []
    assert {address.split(":")[0] for address in addresses} == {LOOPBACK}


def test_a_second_interrupt_ends_the_run_at_once(setting, tmp_path):
    """The first reaches a run whose one rank stands still, so no step boundary comes."""
    folder = tmp_path / "run"

    def interrupt_twice(torchrun_pid: int) -> None:
        stuck = one_rank(folder)
        os.kill(stuck, signal.SIGSTOP)
        first = ranks_of(folder)[0]
        os.kill(first, signal.SIGINT)
        time.sleep(1.5)  # two within a second count as one
        os.kill(first, signal.SIGINT)
        time.sleep(1.5)
        os.kill(stuck, signal.SIGCONT)

    run = interrupt(torchrun(setting, folder), folder, interrupt_twice)
    assert run.job.returncode != 0
    assert (run.status["state"], run.status["reason"]) == ("failed", "aborted by a second SIGINT")
    assert "rank 0: SIGINT: stopping after this step" in run.job.stdout
    # A save under way is lost; what stands is good.
    committed = list_checkpoints(folder / "checkpoints")
    assert_good(run, *map(checkpoint_step, committed))
