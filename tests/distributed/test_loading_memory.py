"""Loading a base checkpoint of 1.2 GB: a rank needs its shard, and one tensor more at most."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).parent / "loading_worker.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "model.safetensors"
    yield path
    path.unlink()


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (2, 2), (4, 2)])
def test_host_memory_of_a_rank(weights, tmp_path, ranks, tp):
    """Anonymous memory alone counts: pages of the mapped file can be given back at any time."""
    results = tmp_path / "results.json"
    job = run_ranks(ranks, WORKER, [str(weights), str(results), str(tp)], timeout=300)
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(results.read_text())
    assert found["file"] > 1e9
    assert len(found["ranks"]) == ranks
    for rank in found["ranks"]:
        assert rank["own"] < 1.2 * sum(r["own"] for r in found["ranks"]) / ranks
        assert rank["above"] >= 0.95 * rank["own"]  # the shard itself was seen to grow
        assert rank["above"] <= rank["own"] + rank["largest"], rank
