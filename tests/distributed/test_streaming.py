"""Heads split over ranks, streamed frame by frame: what the whole model's training forward gives.

1e-4 in float32, as on one process (tests/unit/test_moshi_streaming.py).
"""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_streams_under_tensor_parallelism(tmp_path):
    results = tmp_path / "results.json"
    worker = Path(__file__).parent / "streaming_worker.py"
    job = run_ranks(2, worker, [str(results)], timeout=240)
    assert job.returncode == 0, job.stdout + job.stderr
    measured = json.loads(results.read_text())
    for inner in ("mlp", "linear"):
        assert measured[inner]["heads"] == [2, 2]  # of four
        assert measured[inner]["error"] < 1e-4
