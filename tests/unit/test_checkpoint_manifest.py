"""Which folders are checkpoints, which of them are whole, and which stay."""

from pathlib import Path

import pytest

from parallel.checkpoint import list_checkpoints
from parallel.checkpoint_manifest import (
    MANIFEST,
    content_problems,
    hash_file,
    structure_problems,
    write_manifest,
)
from parallel.checkpoint_saver import Keep, _prune


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "step-000002"
    folder.mkdir()
    (folder / "tensors").write_bytes(bytes(range(256)))
    (folder / "progress.json").write_text("{}")
    write_manifest(folder, {path.name: hash_file(path) for path in folder.iterdir()})
    return folder


def test_what_was_saved_is_whole_whatever_lies_beside_it(checkpoint):
    (checkpoint / "notes.txt").write_text("The best one so far.")
    (checkpoint / ".nfs0001").symlink_to("gone")
    assert structure_problems(checkpoint) == content_problems(checkpoint, alone=True) == []


def flip(folder: Path) -> None:
    data = bytearray((folder / "tensors").read_bytes())
    data[100] ^= 1
    (folder / "tensors").write_bytes(data)


DAMAGES = {
    "cut": (lambda f: (f / "tensors").write_bytes(bytes(9)), "tensors has 9 bytes of 256", True),
    "gone": (lambda f: (f / "tensors").unlink(), "tensors is missing", True),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json can't be read", True),
    "no JSON": (lambda f: (f / MANIFEST).write_text("{"), "manifest.json can't be read", True),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json can't be read", True),
    "a list of files": (
        lambda f: (f / MANIFEST).write_text('{"format": 1, "files": []}'),
        "manifest.json can't be read",
        True,
    ),
    "later format": (
        lambda f: (f / MANIFEST).write_text('{"format": 2, "files": {}}'),
        "format 2 is not 1",
        True,
    ),
    "another folder": (
        lambda f: (f / MANIFEST).write_text(
            '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}'
        ),
        "'../x' is no entry for a file",
        True,
    ),
    # Sizes alone don't show it.
    "a flipped bit": (flip, "tensors is not what was saved", False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(checkpoint, damage):
    spoil, why, by_structure = DAMAGES[damage]
    spoil(checkpoint)
    assert bool(structure_problems(checkpoint)) is by_structure
    (problem,) = content_problems(checkpoint, alone=True)
    assert why in problem


def test_names_are_read_strictly(tmp_path):
    for name in ("step-000002", "step-000010", "step-1000000", "step-9", "step-9.bak", "step-9\n"):
        (tmp_path / name).mkdir()
    for name in (".saving-step-000012-ab", "damaged-step-000011-x", "step-000003 (copy)"):
        (tmp_path / name).mkdir()
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step-000002", "step-000010", "step-1000000"]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(), [2, 4, 6, 8, 10]),
        (Keep(newest=1), [10]),
        (Keep(newest=2), [8, 10]),
        (Keep(newest=1, every=4), [4, 8, 10]),
        (Keep(newest=9), [2, 4, 6, 8, 10]),
    ],
)
def test_what_stays(tmp_path, keep, left):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert _prune(tmp_path, keep) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:06d}" for s in left]


def test_a_checkpoint_that_cannot_be_removed_is_told_and_the_others_go(tmp_path):
    for name in ("step-000002", ".removing-step-000002/left", "step-000004", "step-000006"):
        (tmp_path / name).mkdir(parents=True)
    (warning,) = _prune(tmp_path, Keep(newest=1))
    assert warning.startswith(f"warning: {tmp_path / 'step-000002'} could not be removed: ")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000006"]
