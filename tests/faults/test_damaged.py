"""Checkpoints that are not what was saved, and resuming on other ranks."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.faults.jobs import (
    Setting,
    assert_good,
    assert_taken_up,
)
from tests.integration.runs import TRAIN, Run, side_by_side, snapshot
from tests.ranks import REPO

pytestmark = pytest.mark.faults
DATA = REPO / "configs" / "demo"


def copy_of(whole: Run, folder: Path, *steps: int) -> Run:
    """A run that ended after the last of these steps, and left these checkpoints alone."""
    shutil.copytree(whole.folder, folder)
    for name in whole.checkpoints:
        if int(name.removeprefix("step-")) not in steps:
            shutil.rmtree(folder / "checkpoints" / name)
    return Run(folder, whole.job)


def flip_a_bit(file: Path, bit: int = 0) -> None:
    """In the middle, among the tensors."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_damaged_checkpoints_are_named_and_the_newest_good_one_is_taken(setting, tmp_path):
    """Flipped bits, a torn folder, an empty one, and names that are no checkpoint's."""
    run = copy_of(setting.whole, tmp_path / "run", 2, 4)
    folder = run.folder / "checkpoints"
    flip_a_bit(folder / "step-000004" / "__1_0.distcp")
    for name in ("step-000003", "step-000005"):
        shutil.copytree(folder / "step-000002", folder / name)
    (folder / "step-000003" / ".metadata").unlink()
    flip_a_bit(folder / "step-000005" / "progress.json", bit=7)  # no UTF-8 any more
    (folder / "step-000006").mkdir()
    (folder / ".removing-step-000001").mkdir()
    shutil.copytree(setting.whole.folder / "checkpoints" / "step-000006", folder / "step-9.bak")
    good = snapshot(folder / "step-000002")
    resumed = assert_taken_up(setting, run, after=2)
    for line in (
        "step-000003 is damaged (.metadata is missing)",
        "step-000004 is damaged (__1_0.distcp is not what was saved (SHA-256 differs))",
        "step-000005 is damaged (progress.json is not what was saved (SHA-256 differs))",
        "step-000006 is damaged (manifest.json can't be read",
        ".removing-step-000001 was being removed, and isn't used; you may delete it",
    ):
        assert resumed.job.stdout.count(line) == 1, line
    assert snapshot(folder / "step-000002") == good
    aside = [name[:19] for name in resumed.checkpoints if name.startswith("damaged-")]
    assert aside == [f"damaged-step-00000{step}" for step in (3, 4, 5, 6)]
    assert_good(resumed, 2, 4, 6)


@pytest.fixture(scope="module")
def refused(setting: Setting, tmp_path_factory):
    """Runs that can't go on: jobs, folders, and their files before.

    None of their checkpoints is good, or it was made with other data.
    """
    folder = tmp_path_factory.mktemp("refused")
    names = ("torn", "flipped", "other data")
    runs = {name: copy_of(setting.whole, folder / name, 2, 4) for name in names}
    for step in ("step-000002", "step-000004"):
        cut(runs["torn"].folder / "checkpoints" / step / "__0_0.distcp")
        flip_a_bit(runs["flipped"].folder / "checkpoints" / step / "__0_0.distcp")
    before = {name: snapshot(run.folder / "checkpoints") for name, run in runs.items()}
    arguments = {
        name: [*setting.arguments, f"run_dir={run.folder}", "resume=true"]
        for name, run in runs.items()
    }
    arguments["other data"] += [f"data.train_data={DATA / 'train.jsonl'},{DATA / 'eval.jsonl'}"]
    return side_by_side(arguments, script=TRAIN), runs, before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torn", ["__0_0.distcp has"] * 2),
        ("flipped", ["__0_0.distcp is not what"] * 2),
        ("other data", ["2 sources, but the checkpoint was made with 1", "put the data back"]),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_not_begun_anew(refused, name, told):
    jobs, runs, before = refused
    assert jobs[name].returncode == 2
    assert "Traceback" not in jobs[name].stderr
    assert jobs[name].stderr.count("This run can't start: ") == 1
    for part in told:
        assert jobs[name].stderr.count(part) == told.count(part)
    assert snapshot(runs[name].folder / "checkpoints") == before[name]


def test_a_run_goes_on_over_other_ranks(setting, tmp_path):
    """2 ranks, then 4 that also split heads, then one; each step as the two ranks took it.

    In float64, where sums in another order differ by about 1e-16; Moshi's norms are float32 and
    leave 1e-7 (tests/distributed/test_layouts.py), which the steps of AdamW carry on.
    """
    run = copy_of(setting.whole, tmp_path / "run", 2)
    known = len(run.rows)
    on_four = setting.run_with("SIGTERM", 3, run.folder, "resume=true", "parallel.tp=2", ranks=4)
    assert "resumed after step 2 from" in on_four.job.stdout
    assert on_four.status["state"] == "preempted"
    assert on_four.status["step"] == 5  # the third of its own
    on_one = setting.run(run.folder, "resume=true", ranks=1)
    assert on_one.job.returncode == 0, on_one.job.stderr
    assert "resumed after step 5 from" in on_one.job.stdout
    rows = [row for row in on_one.rows[known:] if "loss" in row]
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    for row, expected in zip(rows, setting.whole.steps[2:], strict=True):
        for key in ("loss", "grad_norm"):
            torch.testing.assert_close(row[key], expected[key], rtol=1e-6, atol=0, msg=key)
    assert_good(on_one, 2, 4, 5, 6)
