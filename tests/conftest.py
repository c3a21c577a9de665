"""Shared by all tests: one thread a process, no compiler; a base checkpoint, the demo's codes."""

import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

# Before torch and moshi are imported; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_TORCH_COMPILE", "1")

import pytest


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built demo base checkpoint; read it, don't write into it."""
    from launch.make_demo_base import make_demo_base

    out = tmp_path_factory.mktemp("release") / "demo-base"
    make_demo_base(out)
    return out


class Prepared(NamedTuple):
    """Codes of the demo speech, encoded ahead of every run."""

    folder: Path
    job: CompletedProcess[str]
    files: dict[str, tuple[int, int]]


@pytest.fixture(scope="session")
def prepared(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    from tests.integration.runs import PREPARE, single, snapshot

    folder = tmp_path_factory.mktemp("codes")
    job = single(
        [f"moshi_paths.hf_repo_id={demo_base}", f"data.cache_dir={folder}"], script=PREPARE
    )
    return Prepared(folder, job, snapshot(folder))


@pytest.fixture(scope="session")
def paths(demo_base: Path, prepared: Prepared) -> list[str]:
    """Overrides that keep a run away from the checkout's own files."""
    return [f"moshi_paths.hf_repo_id={demo_base}", f"data.cache_dir={prepared.folder}"]
