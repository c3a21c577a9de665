"""`launch/train.py` with a fault that one rank meets:

    torchrun … tests/faults/train_with_fault.py FAULT RANK [arguments of launch/train.py]

The faults are real: a process that is killed or stopped, a full disk, a number that isn't finite.
What is planted is when.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from launch import held_out, run_folder, train
from launch.guards.stop_signals import StopSignals
from parallel import checkpoint_saver
from parallel.checkpoint_saver import CheckpointSaver
from parallel.mesh import leave_job
from ttt_dist.moshi.block import TTTMoshi

STEP = 3  # that the fault meets; checkpoints are due after each second one
FILE_BYTES = 2**20  # more than every file but a checkpoint's


def send_self(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def at_call(holder: Any, name: str, call: int, act: Callable[[], None]) -> None:
    """Act in the `call`-th call of `holder.name`, counted from 1, before it does anything."""
    original, calls = getattr(holder, name), 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*arguments, **keywords)

    setattr(holder, name, wrapped)


def in_step(act: Callable[[], None]) -> None:
    """After forward and backward, before anything is agreed upon, and with no save under way: what
    stands then doesn't depend on how fast it was written."""
    original = train.CheckpointSaver.__enter__

    def enter(saver: CheckpointSaver) -> CheckpointSaver:
        def wait_and_act() -> None:
            saver.finish()
            act()

        at_call(train, "clip_gradients", STEP, wait_and_act)
        return original(saver)

    train.CheckpointSaver.__enter__ = enter


def asked_to_stop(send: Callable[[], None]) -> None:
    """A signal is sent in STEP, and that step doesn't end before this rank has noted it."""
    original = train.StopSignals.__enter__

    def enter(signals: StopSignals) -> StopSignals:
        def act() -> None:
            send()
            while signals.received is None:
                time.sleep(0.01)

        in_step(act)
        return original(signals)

    train.StopSignals.__enter__ = enter


def no_numbers(steps: int) -> None:
    """From STEP on, so many steps in which this rank's text losses aren't finite."""
    original, calls = TTTMoshi.step_losses, 0

    def wrapped(model: TTTMoshi, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        text, audio = original(model, sequence)
        if not torch.is_grad_enabled():
            return text, audio
        calls += 1
        return (text * float("nan") if STEP <= calls < STEP + steps else text), audio

    TTTMoshi.step_losses = wrapped


def damage_codes() -> None:
    """Flip the bits of one byte; which, the test says as FILE:OFFSET."""
    path, _, offset = os.environ["DAMAGED_BYTE"].rpartition(":")
    with Path(path).open("r+b") as file:
        file.seek(int(offset))
        (byte,) = file.read(1)
        file.seek(int(offset))
        file.write(bytes([byte ^ 255]))


def damaged_codes_slow_evaluation() -> None:
    at_call(held_out, "evaluate", 1, lambda: time.sleep(4.0))
    in_step(damage_codes)


def limit_files(size: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def fill_disk() -> None:
    limit_files(FILE_BYTES)


def fill_disk_for_one_save() -> None:
    """The second save fails; its second try is the third time that files are written."""
    in_step(fill_disk)
    at_call(checkpoint_saver._Writer, "write_data", 3, lambda: limit_files(resource.RLIM_INFINITY))


def another_disk() -> None:
    """Relative paths lead this rank elsewhere, as a path of a node's own disk does on each node."""
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    os.chdir(elsewhere)
    run_folder._SEEN_WITHIN_SEC = 1.0  # it never will be


KILL = send_self(signal.SIGKILL)
SECOND = 2  # save
FAULTS: dict[str, Callable[[], None]] = {
    "killed in a step": lambda: in_step(KILL),
    "crashed in a step": lambda: in_step(send_self(signal.SIGSEGV)),
    "stopped in a step": lambda: in_step(send_self(signal.SIGSTOP)),
    "disk that hangs": lambda: at_call(checkpoint_saver, "hash_file", 1, lambda: time.sleep(3600)),
    "killed before the metadata": lambda: at_call(
        checkpoint_saver.dcp.FileSystemWriter, "finish", SECOND, KILL
    ),
    "killed before the manifest": lambda: at_call(checkpoint_saver, "write_manifest", SECOND, KILL),
    # Files are synced before the rename, the folder after it.
    "killed before the rename": lambda: at_call(checkpoint_saver, "_sync", 2 * SECOND - 1, KILL),
    "another disk": another_disk,
    "full disk": lambda: in_step(fill_disk),
    "full disk for one save": fill_disk_for_one_save,
    "one bad step": lambda: no_numbers(1),
    "bad steps": lambda: no_numbers(2),
    "damaged codes": lambda: in_step(damage_codes),
    "damaged codes, slow evaluation": damaged_codes_slow_evaluation,
    "SIGTERM": lambda: asked_to_stop(send_self(signal.SIGTERM)),
    "SIGUSR1": lambda: asked_to_stop(send_self(signal.SIGUSR1)),
    "SIGINT": lambda: asked_to_stop(send_self(signal.SIGINT)),
    "SIGTERM to torchrun": lambda: asked_to_stop(lambda: os.kill(os.getppid(), signal.SIGTERM)),
}


if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        FAULTS[fault]()
    sys.argv[1:] = arguments
    train.main(arguments)
    leave_job(0)
