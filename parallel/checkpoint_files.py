"""Reading a sharded checkpoint's files: what its metadata may hold, and tensors one at a time."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from parallel.checkpoint_metadata import CheckpointError, read_metadata


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader, whose metadata can run no code and tells of tensors alone.

    DCP unpickles `.metadata` as it is, and entries that are no tensors with it. Here
    `checkpoint_metadata.py` reads it, and such entries are refused; tensors are read with
    `weights_only=True` by DCP itself. The metadata is read once, however often tensors are loaded.

    Args:
        path: a folder `step-NNNNNN`.

    Raises:
        CheckpointError: `.metadata` is missing, damaged or names anything else, an entry is no
            tensor or incomplete, or a file of tensors is missing or too short. (Raised here: DCP
            would pass over it and tell that there is no metadata.)
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = read_metadata(path / ".metadata")
        problems = _problems(path, self._metadata)
        if problems:
            raise CheckpointError(f"{path}: is damaged: {'; '.join(problems)}")
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The checkpoint's `Metadata`, as it was when this reader was made."""
        return self._metadata


def load_tensors(
    tensors: dict[str, Tensor],
    reader: CheckpointReader,
    failure: str,
    *,
    planner: DefaultLoadPlanner | None = None,
    alone: bool = False,
) -> None:
    """Read a checkpoint's values into `tensors` (plain or DTensors, by saved name), in place.

    Args:
        failure: how the error's message begins.
        planner: DCP's own if None.
        alone: this process reads by itself, with or without a process group; otherwise all ranks
            call it together.

    Raises:
        CheckpointError: `failure`, and each rank's causes.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=alone)
    except dcp.CheckpointException as error:
        causes = [
            str(cause) if alone else f"rank {rank}: {cause}"
            for rank, (cause, _) in error.failures.items()
        ]
        raise CheckpointError(f"{failure}: {'; '.join(causes)}") from error


class SavedTensors:
    """A checkpoint's tensors, whole, one at a time; one process, no process group.

    Args:
        path: a folder `step-NNNNNN`, saved on any layout.

    Raises:
        CheckpointError: as `CheckpointReader`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = CheckpointReader(path)
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        return {name: tuple(entry.size) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in the saved dtype.

        Beside the tensor itself this takes as much memory as the largest part that a rank saved.

        Raises:
            CheckpointError: its bytes cannot be read.
        """
        entry = self._entries[name]
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        failure = f"{self._path}: {name} cannot be read"
        load_tensors(tensors, self._reader, failure, planner=planner, alone=True)
        return tensors[name]


def _problems(folder: Path, metadata: Metadata) -> list[str]:
    """What the metadata tells of and the folder doesn't hold."""
    problems = []
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is no tensor")
        elif sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            problems.append(f"the parts of {name} don't make {list(entry.size)}")
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        end = part.offset + part.length
        ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
    for file_name, end in sorted(ends.items()):
        file = folder / file_name
        if file.parent != folder:
            problems.append(f"{file_name} lies in another folder")
        elif not file.is_file():
            problems.append(f"{file_name} is missing")
        elif file.stat().st_size < end:
            problems.append(
                f"{file_name} has {file.stat().st_size:,} bytes, its tensors end at {end:,}"
            )
    return problems
