"""Shared by all tests: one thread a process (several ranks on few cores), no compiler."""

import os
from pathlib import Path

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
