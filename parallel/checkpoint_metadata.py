"""The one place that unpickles: DCP's `.metadata`, of which nothing but data is taken.

A pickle can name any function and have it called. The unpickler here knows the classes and dtypes
of which DCP's metadata of tensors consists, and refuses every other name before it is looked up.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

# All that DCP's own metadata names; dtypes come on top.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    # Where it was saved; a Path's module differs between versions of Python.
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and what is wrong."""


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"{self._path}: names {module}.{name}, which no checkpoint of tensors needs and "
                "which may run code; the file was not read further"
            )
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """What DCP wrote into the file `path`, a checkpoint's `.metadata`.

    Raises:
        CheckpointError: the file is missing, damaged, or names anything but DCP's own classes.
    """
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint's metadata: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, allowed is Metadata")
    return metadata
