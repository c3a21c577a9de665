"""A checkpoint's files: read tensor by tensor, and its metadata can't run code."""

import json
import os
import pickle
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from parallel.checkpoint import Progress, load_weights
from parallel.checkpoint_files import CheckpointReader, SavedTensors
from parallel.checkpoint_metadata import CheckpointError, read_metadata
from parallel.checkpoint_saver import _Writer

TENSORS = {
    "model.weight": torch.arange(12.0).view(3, 4),
    "model.half": torch.arange(6).to(torch.bfloat16),
    "model.scalar": torch.tensor(3.5, dtype=torch.float64),
    "random.0.cpu": torch.arange(9, dtype=torch.uint8),
}


def save(values: dict, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant here
        dcp.save(values, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(dict(TENSORS), tmp_path / "step-000001")


def test_tensors_come_back_one_by_one(folder):
    saved = SavedTensors(folder)
    assert saved.shapes() == {name: tuple(value.shape) for name, value in TENSORS.items()}
    for name in reversed(TENSORS):
        value = saved.read(name)
        assert value.dtype == TENSORS[name].dtype
        assert torch.equal(value, TENSORS[name]), name


class Planted:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["alone", "within"])
def test_code_planted_into_the_metadata_does_not_run(folder, tmp_path, place):
    file, mark = folder / ".metadata", tmp_path / "it-ran"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data["model.weight"] = Planted(mark)
    content = pickle.dumps(Planted(mark) if place == "alone" else metadata)
    pickle.loads(content)
    assert mark.is_dir()  # the plant works
    mark.rmdir()
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, which no checkpoint") as caught:
        CheckpointReader(folder)
    assert str(file) in str(caught.value)
    assert not mark.exists()
    # And where weights are loaded into a model.
    progress = Progress(step=1, global_batch_size=1, scheduler_steps=1, layout={})
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        load_weights(folder, nn.Linear(4, 3, bias=False))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["load", "compile", "hub.load", "serialization.load", "nn.Module", "float64.__class__"],
)
def test_of_torch_dtypes_alone_are_allowed(tmp_path, name):
    """Protocol 4 names attributes of attributes, so a prefix check wouldn't do."""
    file = tmp_path / ".metadata"
    file.write_bytes(
        b"\x80\x04\x8c\x05torch" + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    )
    with pytest.raises(CheckpointError, match="which no checkpoint of tensors needs"):
        read_metadata(file)


def rewrite(folder: Path, change) -> None:
    file = folder / ".metadata"
    metadata: Metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def drop_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.weight"].chunks.clear()


def save_an_object(folder: Path) -> None:
    shutil.rmtree(folder)
    save({"a": {1, 2}, "b": torch.ones(2)}, folder)


def lead_elsewhere(metadata: Metadata) -> None:
    for part in metadata.storage_data.values():
        part.relative_path = "../" + part.relative_path


DAMAGES = {
    "truncated": (
        lambda f: (p := f / ".metadata").write_bytes(p.read_bytes()[:-40]),
        "cannot be read as a checkpoint's metadata",
    ),
    "empty": (lambda f: (f / ".metadata").write_bytes(b""), "EOFError"),
    "a text": (lambda f: (f / ".metadata").write_text("version 1\n"), "cannot be read as a"),
    "a list": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "holds a list"),
    "gone": (lambda f: (f / ".metadata").unlink(), "cannot be read: "),
    "a part less": (lambda f: rewrite(f, drop_chunk), "the parts of model.weight don't make"),
    "a file less": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "another folder": (lambda f: rewrite(f, lead_elsewhere), "lies in another folder"),
    "a short file": (
        lambda f: (p := f / "__0_0.distcp").write_bytes(p.read_bytes()[:-1]),
        "__0_0.distcp has",
    ),
    "an object": (save_an_object, "a is no tensor"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(folder, damage):
    spoil, why = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        SavedTensors(folder)
    assert why in str(caught.value)
    assert str(folder) in str(caught.value)


def test_bytes_that_are_no_tensor_are_told(folder):
    data = folder / "__0_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(CheckpointError, match=r"model\.weight cannot be read"):
        SavedTensors(folder).read("model.weight")


def test_saving_opens_no_stream_of_a_gpu(tmp_path, monkeypatch):
    """DCP's own writer does where there is one, on GPU 0 for every rank: what is written lies on
    the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    streams: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.append(1))
    writer = dcp.FileSystemWriter(tmp_path / "dcp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        with suppress(dcp.CheckpointException):  # where there is no GPU
            dcp.save(dict(TENSORS), storage_writer=writer, no_dist=True)
        assert streams != []  # the test sees them
        streams.clear()
        dcp.save(dict(TENSORS), storage_writer=_Writer(tmp_path / "ours"), no_dist=True)
    assert streams == []
    saved = SavedTensors(tmp_path / "ours")
    assert all(torch.equal(saved.read(name), TENSORS[name]) for name in TENSORS)
