"""Checkpoints of nodes that don't share a file system are never announced."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "saving_worker.py"


def test_a_checkpoint_whose_files_rank_0_does_not_see_is_none(tmp_path):
    results = tmp_path / "results.json"
    job = run_ranks(2, WORKER, [str(tmp_path), str(results)], timeout=100)
    assert job.returncode == 0, job.stdout + job.stderr
    (failure, said), (failure_of_other, said_by_other) = json.loads(results.read_text())
    target = tmp_path / "0" / "step-000001"
    why = (
        f" could not be saved: rank 0: __1_0.distcp is missing; is {target.parent} on a file "
        "system that all nodes share?"
    )
    assert failure == f"{target}{why}"
    assert failure_of_other == f"{tmp_path / '1' / target.name}{why}"
    assert said == [f"warning: {failure}; trying once more in 0.5 s"]
    assert said_by_other == []
    assert list(target.parent.iterdir()) == []
