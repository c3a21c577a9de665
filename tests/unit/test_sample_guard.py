"""What is said of pieces that can't be read while a run trains, and how to mend it."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from launch.errors import UserError
from launch.guards.sample_guard import SampleGuard, refuse_broken_evaluation
from parallel.mesh import init_process_group
from tests.unit.data_cases import SPEC, cache_in, open_sources, small_codec, write_dataset
from ttt_dist.data.batches import StepBatches
from ttt_dist.data.dataset import GlobalOrder, PieceDataset
from ttt_dist.data.encode import encode_missing

CHECKPOINT = Path("/run/checkpoints/step-000003")
DISK = "look at the disk of data.cache_dir"
PUT_BACK = "put the files of ready codes back as they were"


@pytest.fixture(autouse=True)
def one_rank():
    init_process_group(timedelta(seconds=60), on_cpu=True)
    yield
    dist.destroy_process_group()


@pytest.fixture
def pieces(tmp_path):
    """A piece of encoded audio, and one of codes that came ready."""
    manifest = write_dataset(tmp_path / "data", [1.0])
    ready = tmp_path / "data" / "ready.safetensors"
    save_file({"codes": torch.zeros(SPEC.rows, SPEC.frames, dtype=torch.int32)}, ready)
    with manifest.open("a") as file:
        file.write('{"path": "ready.safetensors", "duration": 2.0}\n')
    sources = open_sources(manifest)
    cache = cache_in(tmp_path / "cache")
    encode_missing(sources[0].recordings, cache, small_codec)
    return PieceDataset(sources, cache)


def damage(pieces, numbers):
    for number in numbers:
        pieces._codes[number].path.unlink()


def stop(pieces, numbers, newest):
    """What is said after the lines that name the pieces."""
    damage(pieces, numbers)
    order = GlobalOrder(pieces.source_sizes, pieces.weights, seed=0, shuffle=False)
    layout = {"global_batch_size": 2, "batch_size": 1, "dp_rank": 0, "dp_size": 1, "prefetch": 0}
    with StepBatches(pieces, order, **layout) as batches:
        guard = SampleGuard(0, {})
        told = guard.leave_out(next(batches), pieces)
    assert guard.must_stop
    assert len(told) == len(numbers)
    (way_out,) = guard.why_it_stops(4, told, newest)[1 + len(told) :]
    return way_out


def test_a_stopped_run_says_how_its_broken_codes_are_mended(pieces):
    assert stop(pieces, [0], CHECKPOINT) == (
        f"{DISK}; a new start encodes anew what is damaged; "
        f"resume=true then goes on from {CHECKPOINT}"
    )


@pytest.mark.parametrize("newest", [CHECKPOINT, None])
def test_ready_codes_are_put_back_and_never_encoded(pieces, newest):
    """Without their lines the order is another, which only a run without checkpoint may have."""
    told = stop(pieces, [1], newest)
    assert told.startswith(PUT_BACK)
    assert ("without them resume is refused" in told) == (newest is not None)
    assert ("or take their lines out of the manifest" in told) == (newest is None)
    assert told.endswith("no checkpoint to go on from" if newest is None else str(newest))


def test_both_kinds_of_codes_are_told_apart(pieces):
    told = stop(pieces, [0, 1], CHECKPOINT)
    assert told.startswith(DISK)
    assert f"; {PUT_BACK}" in told


@pytest.mark.parametrize("is_last", [False, True])
def test_held_out_lines_of_ready_codes_may_go(pieces, is_last):
    broken = {1: "ready.safetensors: ends early"}
    with pytest.raises(UserError) as raised:
        refuse_broken_evaluation(broken, pieces, lambda: CHECKPOINT, is_last=is_last)
    told = raised.value.problems[-1]
    assert told.startswith(PUT_BACK)
    last = "all steps are done" if is_last else "resume=true then goes on from"
    assert f"or take their lines out of the manifest; {last}" in told
