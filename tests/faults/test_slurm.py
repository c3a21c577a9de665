"""`launch/slurm/train.sbatch` on two "nodes" of this machine, through the real torchrun.sh.

What SLURM would do is done by `slurm_stub`, and by the tests: they run a copy of the script, as
slurmd does, and send signals to it alone, as `--signal=B:` has it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest

from tests.faults import slurm_stub
from tests.ranks import REPO, kill_job, start_command

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
SCRIPT = REPO / "launch" / "slurm" / "train.sbatch"
# The port at which its nodes meet follows from a job's number: another for each run of the tests.
JOB, STEPS = str(os.getpid()), 12


@dataclass
class Cluster:
    """A folder to submit from, the stub's commands, and what they noted."""

    folder: Path
    requeued: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / f"slurm-{JOB}"

    @property
    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def start(
        self, *arguments: str, nodes: int = 1, restarts: int = 0, **environment: str
    ) -> Popen[str]:
        copy = self.folder / "slurm_script"
        shutil.copy(SCRIPT, copy)
        settings = {
            "PATH": f"{self.requeued.parent}:{os.environ['PATH']}",
            "REPO": str(REPO),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_GPUS_ON_NODE": "",
        }
        if restarts:  # SLURM doesn't set it before
            settings["SLURM_RESTART_COUNT"] = str(restarts)
        return start_command(
            ["bash", str(copy), *arguments], cwd=self.folder, **(settings | environment)
        )

    def run(self, *arguments: str, **settings) -> tuple[int, str, str]:
        with self.start(*arguments, **settings) as process:
            try:
                out, err = process.communicate(timeout=240)
            finally:
                kill_job(process)
        return process.returncode, out, err

    def noted(self) -> list[str]:
        return self.requeued.read_text().split() if self.requeued.exists() else []


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    commands = tmp_path / "bin"
    commands.mkdir()
    return Cluster(tmp_path, slurm_stub.install(commands))


def demo(cluster: Cluster, base: Path) -> list[str]:
    """Arguments of training."""
    return [
        str(REPO / "configs" / "demo.yaml"),
        *(f"moshi_paths.hf_repo_id={base}", f"data.cache_dir={cluster.folder / 'codes'}"),
        *(f"max_steps={STEPS}", "global_batch_size=4", "batch_size=1", "device=cpu"),
        *("do_eval=false", "tensorboard=false", "ckpt_freq=0"),
    ]


def stopped(
    cluster: Cluster, script: Popen[str], stop: Callable[[], object]
) -> tuple[int, str, str]:
    """Exit code and output of a script that is stopped once its run has logged a step."""
    metrics = cluster.run_dir / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
            assert script.poll() is None, script.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stop()
        out, err = script.communicate(timeout=120)
    finally:
        kill_job(script)
    return script.returncode, out, err


def saved_step(cluster: Cluster, reason: str) -> int:
    """The step after which the run was stopped, with a checkpoint."""
    status = cluster.status
    assert (status["state"], status["reason"]) == ("preempted", reason)
    assert 1 <= status["step"] < STEPS
    checkpoints = cluster.run_dir / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [f"step-{status['step']:06d}"]
    return status["step"]


def test_a_run_on_two_nodes_is_preempted_requeued_and_resumed(cluster, demo_base):
    training = [*demo(cluster, demo_base), "parallel.tp=2"]
    here = {"NPROC": "2", "GLOO_SOCKET_IFNAME": "lo"}
    metrics = cluster.run_dir / "metrics.jsonl"
    with cluster.start(*training, nodes=2, **here) as first:
        code, out, err = stopped(cluster, first, lambda: first.send_signal(signal.SIGUSR1))
    assert code == 0, out + err
    step = saved_step(cluster, "SIGUSR1")
    assert f"preempted after step {step}; requeued" in out
    assert cluster.noted() == [JOB]

    code, out, err = cluster.run(*training, nodes=2, restarts=1, **here)
    assert code == 0, out + err
    assert f"resumed after step {step} from" in out
    assert cluster.status["state"] == "finished"
    assert f"finished after step {STEPS}" in out
    assert cluster.noted() == [JOB]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    # Each rank's output, by start, node and rank on it.
    logs = cluster.run_dir.with_name(f"slurm-{JOB}.logs")
    kept = {str(path.relative_to(logs)) for path in logs.rglob("stdout.log")}
    places = {(name.split("/")[0], name.split("/")[1], name.split("/")[-2]) for name in kept}
    assert places == {
        (f"start-{JOB}-{start}", f"node-{node}", str(rank))
        for start in range(2)
        for node in range(2)
        for rank in range(2)
    }

    # A third start, which SLURM may make after a node's failure at the very end.
    code, out, _ = cluster.run(*training, nodes=2, restarts=2, **here)
    assert (code, cluster.status["state"]) == (0, "finished")
    assert out.splitlines() == [f"train.sbatch: the run in {cluster.run_dir} is finished"]


@pytest.mark.parametrize("makes_way", [False, True])
def test_sigterm_ends_with_a_checkpoint(cluster, demo_base, makes_way):
    """To the script, or to the tasks first and to the script as well, as where a job makes way."""
    settings = {"NPROC": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with cluster.start(*demo(cluster, demo_base), **settings) as script:

        def stop() -> None:
            if makes_way:
                (cluster.requeued.parent / slurm_stub.PREEMPTED).write_text("2021-06-10T14:00:00")
                slurm_stub.scancel(["--signal=TERM", JOB], cluster.requeued.parent)
            script.send_signal(signal.SIGTERM)

        code, out, err = stopped(cluster, script, stop)
    step = saved_step(cluster, "SIGTERM")
    if makes_way:
        assert (code, cluster.noted()) == (0, [JOB]), out + err
        assert f"preempted after step {step}; requeued" in out
    else:
        assert (code, cluster.noted()) == (1, []), out + err
        assert f"stopped by SIGTERM after step {step}, so not requeued" in err


def test_a_node_that_sees_no_gpu_is_refused(cluster, demo_base):
    """SLURM gave it two; this machine shows none."""
    training = [argument for argument in demo(cluster, demo_base) if argument != "device=cpu"]
    code, out, err = cluster.run(*training, SLURM_GPUS_ON_NODE="2")
    assert code == 1, out + err
    assert "device: found cuda, but no GPU is visible" in out + err
    assert "the run is not started" in err
    ranks = cluster.run_dir.with_name(f"slurm-{JOB}.logs").rglob("stderr.log")
    assert {path.parent.name for path in ranks} == {"0", "1"}


def test_a_run_that_cannot_start_is_not_requeued(cluster):
    code, out, err = cluster.run("no/such.yaml", NPROC="1")
    assert code == 1  # torchrun's, whatever its ranks' is
    assert "no/such.yaml" in out + err
    assert "the run is not started (exit code 1), so not requeued" in err
    assert cluster.noted() == []


# In place of torchrun.sh: ends at once, and leaves the status that a run would.
ENDED = """#!/bin/sh
mkdir -p "$RUN"
cat > "$RUN/status.json" <<JSON
{"state": "STATE", "step": STEP, "first_step": 3, "reason": "REASON", "time": "TIME"}
JSON
echo "$@"
exit CODE
"""


@pytest.mark.parametrize(
    ("state", "step", "reason", "code", "message", "expected"),
    [
        ("preempted", 7, "SIGUSR1", 0, "preempted after step 7; requeued", 0),
        ("preempted", 3, "SIGUSR1", 0, "no step done since step 3, so not requeued", 1),
        ("preempted", 7, "SIGTERM", 0, "stopped by SIGTERM after step 7, so not requeued", 1),
        (
            *("preempted", 7, "SIGUSR1 without a checkpoint (do_ckpt=false)", 0),
            *("stopped by SIGUSR1_without_a_checkpoint_(do_ckpt=false) after step 7, so not", 1),
        ),
        ("failed", 7, "RuntimeError: x", 9, "the run is failed (exit code 9), so not requeued", 9),
        ("running", 7, "", 137, "died without a word after step 7 (exit code 137), so not", 137),
        ("finished", 7, "", 0, "finished after step 7", 0),
    ],
)
def test_what_the_status_says_decides(cluster, state, step, reason, code, message, expected):
    # It had got further than its last checkpoint, from which this start goes on.
    before = {"state": "running", "step": 9, "first_step": 0, "reason": "", "time": "earlier"}
    cluster.run_dir.mkdir(parents=True)
    (cluster.run_dir / "status.json").write_text(json.dumps(before))
    values = {"STATE": state, "STEP": step, "REASON": reason, "TIME": "later", "CODE": code}
    script = ENDED
    for name, value in values.items():
        script = script.replace(name, str(value))
    standin = cluster.folder / "torchrun.sh"
    standin.write_text(script)
    standin.chmod(0o755)
    # With python3 from the PATH, as without a .venv.
    found = f"{cluster.requeued.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"REPO": str(cluster.folder), "RUN": str(cluster.run_dir), "PATH": found}
    exit_code, out, err = cluster.run("a.yaml", "seed=1", restarts=3, **settings)
    assert exit_code == expected
    assert message in out + err
    # Nothing is asked of a device where SLURM gave no GPUs.
    assert f"launch/train.py a.yaml seed=1 run_dir={cluster.run_dir} resume=true\n" in out
    assert cluster.noted() == ([JOB] if "; requeued" in message else [])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["run_dir=runs/mine"], {}, "found run_dir=runs/mine; it is RUN_DIR=FOLDER sbatch"),
        (["resume=true"], {}, "found resume=true; it is"),
        ([], {"RUN_DIR": "runs/demo-${time}"}, "another folder at every start"),
        ([], {"REPO": "/nowhere"}, "no torchrun.sh in /nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_starts(cluster, arguments, environment, message):
    code, out, err = cluster.run(*arguments, **environment)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not cluster.run_dir.exists()
