"""Runs that several tests look at."""

import pytest

from tests.integration.runs import TIMEOUT, TRAIN, Run
from tests.ranks import run_ranks

# Stands for any secret of the person who starts a run.
SECRET = "sentinel-7f3a91c2"


@pytest.fixture(scope="session")
def short(paths: list[str]) -> list[str]:
    """A short run in float64, where layouts agree to the last logged step (see test_train)."""
    return [
        *paths,
        *("param_dtype=float64", "device=cpu", "global_batch_size=2", "max_steps=4"),
        *("ckpt_freq=2", "eval_freq=0", "eval_batches=1"),
    ]


@pytest.fixture(scope="session")
def tp_run(short: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks that split heads and features, from the first to the last step."""
    folder = tmp_path_factory.mktemp("runs") / "tp"
    arguments = [*short, f"run_dir={folder}", "parallel.tp=2"]
    job = run_ranks(2, TRAIN, arguments, timeout=TIMEOUT, WANDB_API_KEY=SECRET, NOTES=SECRET)
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)
