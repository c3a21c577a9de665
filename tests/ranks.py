"""Starting real ranks from a test: torchrun on a free loopback port, with a timeout, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from launch.supervise import descendants

REPO = Path(__file__).resolve().parents[1]


def run_ranks(
    world_size: int,
    script: Path,
    arguments: list[str],
    *,
    timeout: float,
    cwd: Path = REPO,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run `script` on `world_size` gloo ranks; its output is kept, its exit code not judged."""
    command = ranks_command(world_size, script, arguments)
    return run_command(command, timeout=timeout, cwd=cwd, **environment)


def ranks_command(world_size: int, script: Path, arguments: list[str]) -> list[str]:
    """torchrun on this host; port 0 lets each job find a free one."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc_per_node", str(world_size)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        str(script),
        *arguments,
    ]


def run_command(
    command: list[str], *, timeout: float, cwd: Path = REPO, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command; it and all its descendants are killed when time is up."""
    with start_command(command, cwd=cwd, **environment) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_job(process)
            out, err = process.communicate()
            raise AssertionError(f"{command} took over {timeout} s\n{out}\n{err}") from None
        finally:
            kill_job(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start_command(
    command: list[str], *, cwd: Path = REPO, **environment: str
) -> subprocess.Popen[str]:
    """Start a command on CPUs, one thread a process; use it as a context manager."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_take_signals,
    )


def _take_signals() -> None:
    """What started the tests may ignore them, and commands inherit that: nohup does SIGHUP, a
    script's background job SIGINT."""
    for ignored in (signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_DFL)


def kill_job(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a job and all its descendants: torchrun puts each rank into a session of its
    own, so killing torchrun's process group would leave the ranks running."""
    if process.poll() is not None:  # its id may be another process's by now
        return
    doomed = [process.pid, *descendants(process.pid)]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
