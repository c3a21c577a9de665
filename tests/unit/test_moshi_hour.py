"""An hour of speech, 45,000 frames, in one piece through the tiny model, on a CPU."""

import json
import math
import sys
from itertools import pairwise

import pytest

from tests.ranks import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HOUR = 45_000


def measured(frames, mode):
    command = [sys.executable, "-m", "tests.unit.hour_worker", str(frames), mode]
    job = run_command(command, timeout=600, NO_TORCH_COMPILE="1")
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    print(frames, mode, found)
    assert math.isfinite(found["loss"])
    return found


def test_memory_of_a_step_grows_as_the_frames():
    """Twice the frames, twice the resident bytes: 15 % for what the allocator keeps."""
    sizes = [measured(frames, "none")["bytes"] for frames in (HOUR // 4, HOUR // 2, HOUR)]
    for small, large in pairwise(sizes):
        assert large < 2 * 1.15 * small, sizes


@pytest.mark.parametrize("mode", ["layer", "evaluate"])
def test_an_hour_takes_less_than_one_dense_mask(mode):
    """A dense mask of booleans, one layer's, is HOUR² bytes."""
    assert measured(HOUR, mode)["bytes"] < HOUR**2
