"""Starting real ranks from a test: torchrun on a free loopback port, with a timeout, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def run_ranks(
    world_size: int,
    script: Path,
    arguments: list[str],
    *,
    timeout: float,
    cwd: Path = REPO,
) -> subprocess.CompletedProcess[str]:
    """Run `script` on `world_size` gloo ranks; its output is kept, its exit code not judged."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc_per_node", str(world_size)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        str(script),
        *arguments,
    ]
    return run_command(command, timeout=timeout, cwd=cwd)


def run_command(
    command: list[str], *, timeout: float, cwd: Path = REPO, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, which is killed whole when time is up."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{command} took over {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
