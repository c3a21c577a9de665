"""Ranks that die, stop or can't write, while they compute or save."""

import json
import re

import pytest
import torch

from tests.faults.jobs import STEPS, assert_good, assert_taken_up
from tests.faults.test_damaged import copy_of
from tests.integration.runs import snapshot

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("fault", "rank", "left"),
    [
        ("killed in a step", 1, None),
        ("killed before the metadata", 0, set()),
        ("killed before the manifest", 0, {".metadata", "progress.json"}),
        ("killed before the rename", 0, {".metadata", "progress.json", "manifest.json"}),
    ],
)
def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(
    setting, tmp_path, fault, rank, left
):
    """`left`: what the save under way had come to, beside the files of tensors."""
    run = setting.run_with(fault, rank, tmp_path / "run")
    assert run.job.returncode != 0
    assert "Signal 9 (SIGKILL) received" in run.job.stderr
    assert run.status["state"] in ("running", "failed")
    assert_good(run, 2)
    unfinished = [name for name in run.checkpoints if name.startswith(".saving-step-000004")]
    assert len(unfinished) == (0 if left is None else 1)
    for name in unfinished:
        files = {path.name for path in (run.folder / "checkpoints" / name).iterdir()}
        assert {file for file in files if not file.endswith(".distcp")} == left
    resumed = assert_taken_up(setting, run, after=2)
    assert_good(resumed, 2, 4, 6)
    for name in unfinished:
        assert f"{name} was never finished" in resumed.job.stdout
        assert name in resumed.checkpoints


def test_a_rank_that_crashes_in_a_library_says_where_it_was(setting, tmp_path):
    run = setting.run_with("crashed in a step", 1, tmp_path / "run")
    assert run.job.returncode != 0
    assert "Signal 11 (SIGSEGV) received" in run.job.stderr
    stack = run.job.stderr.split("Fatal Python error: Segmentation fault")[1]
    assert re.search(r'File ".*/launch/train\.py", line \d+ in train', stack)
    assert_good(run, 2)


def test_a_full_disk_ends_the_run_on_all_ranks_and_leaves_what_was_saved(setting, tmp_path):
    run = setting.run_with("full disk", 1, tmp_path / "run")
    assert run.job.returncode != 0
    assert run.job.stderr.count("The run stopped: 1 problem.") == 1
    assert "step-000004 could not be saved: rank 1: " in run.job.stderr
    assert "File too large" in run.job.stderr
    assert "Traceback" not in run.job.stderr[: run.job.stderr.index("torch/distributed/elastic")]
    assert run.status["state"] == "failed"
    assert "step-000004 could not be saved" in run.status["reason"]
    assert run.job.stdout.count("; trying once more in ") == 1
    assert run.checkpoints == ["step-000002"]  # nothing half-written fills the disk
    assert_good(run, 2)
    assert_taken_up(setting, run, after=2)


def test_a_save_that_fails_once_is_done_again(setting, tmp_path):
    run = setting.run_with("full disk for one save", 1, tmp_path / "run")
    assert run.job.returncode == 0, run.job.stderr
    (warning,) = [line for line in run.job.stdout.splitlines() if "trying once more" in line]
    assert "step-000004 could not be saved: rank 1: " in warning
    assert "File too large" in warning
    assert run.status["state"] == "finished"
    assert run.checkpoints == ["step-000002", "step-000004", "step-000006"]
    assert_good(run, 2, 4, STEPS)
    found, wanted = run.checkpoint(4), setting.whole.checkpoint(4)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_a_rank_that_stops_ends_the_run_with_where_the_others_wait(setting, tmp_path):
    run = setting.run_with("stopped in a step", 1, tmp_path / "run", "timeout_sec=15")
    assert run.job.returncode != 0
    assert "rank 0: step 3 has taken over 15 s" in run.job.stderr
    # It waits for the sum that the gradient norm is made of.
    assert "waiting in the collective " in run.job.stderr
    assert "wait_tensor, called by clip_gradients (" in run.job.stderr
    assert run.status["state"] == "failed"
    assert run.status["reason"].startswith("rank 0: step 3 has taken over 15 s")
    assert_good(run, 2)


def test_a_disk_that_hangs_in_the_last_save_ends_the_run(setting, tmp_path):
    options = ("timeout_sec=15", "max_steps=1")
    run = setting.run_with("disk that hangs", 1, tmp_path / "run", *options)
    assert run.job.returncode != 0
    assert "rank 0: the last checkpoint has taken over 15 s" in run.job.stderr
    assert ", called by _write (" in run.job.stderr
    assert run.status["state"] == "failed"
    assert_good(run)


def test_a_bad_step_is_left_out_by_all_ranks_and_the_run_goes_on(setting, tmp_path):
    run = setting.run_with("one bad step", 1, tmp_path / "run")
    assert run.job.returncode == 0, run.job.stderr
    assert run.status["state"] == "finished"
    steps = [row["step"] for row in run.steps]
    assert steps == [1, 2, 4, 5, 6]
    assert [row["skipped_steps"] for row in run.steps] == [0, 0, 1, 1, 1]
    for row, expected in zip(run.steps[:2], setting.whole.steps, strict=False):
        assert row["loss"] == expected["loss"]
    (bad,) = [json.loads(line) for line in (run.folder / "bad_steps.jsonl").open()]
    assert (bad["step"], bad["problem"]) == (3, "loss nan")
    # The fault comes with gradients alone, so that these tell where it was.
    again = "the forward, computed again, is finite; gradient of "
    assert bad["not_finite"].startswith(again)
    assert bad["not_finite"] in run.job.stdout
    # One sample a rank: the one whose loss isn't a number is named, and no other.
    (sample,) = bad["samples"]
    assert ".flac, piece " in sample
    assert sample in run.job.stdout
    assert_good(run, 2, 4, 6)
    assert all(value.isfinite().all() for value in run.checkpoint(STEPS).values())


def test_bad_steps_in_a_row_stop_the_run_with_finite_weights(setting, tmp_path):
    run = setting.run_with("bad steps", 1, tmp_path / "run", "bad_steps.max_in_a_row=2")
    assert run.job.returncode != 0
    assert run.job.stderr.count("The run stopped: 2 problems.") == 1
    assert "2 steps in a row were left out" in run.job.stderr
    assert run.status["state"] == "failed"
    assert_good(run, 2, 4)
    before, after = run.checkpoint(2), run.checkpoint(4)
    assert all(value.isfinite().all() for value in after.values())
    weights = [name for name in before if name.startswith(("model.", "optimizer."))]
    assert all((before[name] == after[name]).all() for name in weights)


def test_a_checkpoint_is_never_written_over(setting, tmp_path):
    whole = copy_of(setting.whole, tmp_path / "run", 2, 4, STEPS)
    before = snapshot(whole.folder)
    again = setting.run(whole.folder, "resume=true")
    assert again.job.returncode != 0
    assert "nothing is left to do" in again.job.stderr
    assert snapshot(whole.folder) == before
