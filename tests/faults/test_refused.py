"""Starts that must not begin: told in one message, before a run folder or a model exists."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.checkpoint_manifest import MANIFEST, hash_file, write_manifest
from tests.faults.jobs import FAULTY, TIMEOUT
from tests.faults.test_damaged import copy_of
from tests.integration.runs import DEMO, side_by_side
from tests.ranks import REPO, run_ranks
from ttt_dist.moshi.tensor_files import HEADER_LIMIT

pytestmark = pytest.mark.faults
WEIGHTS = "model.safetensors"


class Planted:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def base_with(demo_base: Path, folder: Path, weights: bytes | dict[str, torch.Tensor]) -> str:
    """The demo's base checkpoint with other weights, as an argument."""
    shutil.copytree(demo_base, folder)
    if isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    else:
        save_file(weights, folder / WEIGHTS)
    return f"moshi_paths.hf_repo_id={folder}"


@pytest.fixture(scope="module")
def jobs(setting, demo_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")

    twice = folder / "twice.yaml"
    twice.write_text(DEMO.read_text() + "\nmax_steps: 3\n")
    wrong = [
        *(
            "max_stepz=3",
            "batch_size=many",
            "parallel.tp=3",
            "ttt.layers=none",
            "full_finetuning=false",
        ),
    ]

    tensors = load_file(demo_base / WEIGHTS)
    tensors.pop("text_linear.weight")
    tensors["out_norm.alpha"] = tensors["out_norm.alpha"][..., :-1].clone()
    bomb = struct.pack("<Q", HEADER_LIMIT + 1) + b"{" + b" " * HEADER_LIMIT

    run = copy_of(setting.whole, folder / "planted", 2)
    checkpoint = run.folder / "checkpoints" / "step-000002"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Planted(folder / "by-metadata")))
    # Whoever plants a pickle can write the manifest, too.
    names = [path.name for path in checkpoint.iterdir() if path.name != MANIFEST]
    write_manifest(checkpoint, {name: hash_file(checkpoint / name) for name in names})

    starts = {
        "duplicate key": [],
        "wrong keys": wrong,
        "wrong base": [base_with(demo_base, folder / "base", tensors)],
        "pickle as base": [
            base_with(demo_base, folder / "pickle", pickle.dumps(Planted(folder / "by-base")))
        ],
        "header bomb": [base_with(demo_base, folder / "bomb", bomb)],
        "planted metadata": [f"run_dir={run.folder}", "resume=true"],
        "unwritable": ["run_dir=/proc/no-folder-can-be-made-here/run"],
        "existing": [f"run_dir={copy_of(setting.whole, folder / 'existing', 2).folder}"],
    }
    commands = {
        # A folder of its own each: what one leaves may not be what another meets. The last word on
        # a key counts.
        name: [*setting.arguments, f"run_dir={folder / 'runs' / name}", *arguments]
        for name, arguments in starts.items()
    }
    commands["duplicate key"].insert(0, str(twice))
    return side_by_side(commands), folder


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("duplicate key", ["max_steps: written twice, in lines "]),
        (
            "wrong keys",
            ["max_stepz: unknown key", "batch_size: ", "parallel.tp: found 3", "ttt.layers"],
        ),
        ("wrong base", ["text_linear.weight", "out_norm.alpha"]),
        ("pickle as base", [WEIGHTS]),
        ("header bomb", [WEIGHTS, "2,097,152"]),
        ("planted metadata", [".metadata", "mkdir"]),
        ("unwritable", ["run_dir: /proc/no-folder-can-be-made-here/run"]),
        ("existing", ["exists and isn't empty", "resume=true"]),
    ],
)
def test_a_start_is_refused_with_its_cause(jobs, name, wanted):
    job = jobs[0][name]
    assert job.returncode == 2, job.stdout + job.stderr
    assert job.stderr.count("This run can't start: ") == 1
    assert "Traceback" not in job.stderr
    for part in wanted:
        assert part in job.stderr


def test_refused_starts_leave_no_run_folder_and_run_nobodys_code(jobs):
    found = {path.name for path in jobs[1].iterdir()}
    assert found & {"by-metadata", "by-base"} == set()
    runs = jobs[1] / "runs"
    # A base's tensors are looked at once the run folder stands: it says why the run failed.
    assert [path.name for path in runs.iterdir()] == ["wrong base"]
    assert json.loads((runs / "wrong base" / "status.json").read_text())["state"] == "failed"
    assert not (runs / "wrong base" / "checkpoints").exists()


def test_a_run_folder_that_another_node_does_not_see_is_refused(setting, tmp_path):
    arguments = ["another disk", "1", *setting.arguments, "run_dir=run"]
    job = run_ranks(2, FAULTY, arguments, timeout=TIMEOUT, cwd=tmp_path)
    assert job.returncode != 0
    assert job.stderr.count("This run can't start: 1 problem.") == 1
    assert f"run_dir: {tmp_path / 'run'}, made on " in job.stderr
    assert "name a folder on a file system that all nodes share" in job.stderr
    assert f'File "{REPO / "launch"}' not in job.stderr
    assert "loss" not in job.stdout
