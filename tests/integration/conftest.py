"""Runs that several tests look at."""

from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest

from tests.integration.runs import PREPARE, TIMEOUT, TRAIN, Run, single, snapshot
from tests.ranks import run_ranks

# Stands for any secret of the person who starts a run.
SECRET = "sentinel-7f3a91c2"


class Prepared(NamedTuple):
    """Codes of the demo speech, encoded ahead of every run."""

    folder: Path
    job: CompletedProcess[str]
    files: dict[str, tuple[int, int]]


@pytest.fixture(scope="session")
def prepared(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("codes")
    job = single(
        [f"moshi_paths.hf_repo_id={demo_base}", f"data.cache_dir={folder}"], script=PREPARE
    )
    return Prepared(folder, job, snapshot(folder))


@pytest.fixture(scope="session")
def paths(demo_base: Path, prepared: Prepared) -> list[str]:
    """Overrides that keep a run away from the checkout's own files."""
    return [f"moshi_paths.hf_repo_id={demo_base}", f"data.cache_dir={prepared.folder}"]


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
