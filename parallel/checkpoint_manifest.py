"""What a checkpoint's files must be: their sizes and SHA-256, told by `manifest.json` beside them.

DCP keeps no checksums (of 150 single flipped bits 23 loaded silently wrong), so a checkpoint counts
as good only where every file is what the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes, and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


def hash_file(path: Path) -> FileRecord:
    """Read the whole file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write `folder/manifest.json`; `files` by name, all that the folder holds beside it."""
    listed = {name: asdict(record) for name, record in sorted(files.items())}
    text = json.dumps({"format": _FORMAT, "files": listed}, indent=2)
    (folder / MANIFEST).write_text(text + "\n")


def structure_problems(folder: Path) -> list[str]:
    """Why a checkpoint can't be whole, told without reading its tensors: names and sizes.

    Files that the manifest doesn't list are nobody's business: a person's notes, NFS's own.
    """
    try:
        files = _read_manifest(folder)
    except (OSError, AttributeError, TypeError, KeyError, ValueError) as error:
        return [f"{MANIFEST} can't be read: {error}"]
    problems = []
    for name, record in sorted(files.items()):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} can't be read: {error}")
        else:
            if size != record.bytes:
                problems.append(f"{name} has {size:,} bytes of {record.bytes:,}")
    return problems


def content_problems(folder: Path, *, alone: bool = False) -> list[str]:
    """Why a checkpoint isn't good, for which every file is read; empty: it is.

    Args:
        alone: this process reads all; otherwise all ranks call it together, and each reads some.
    """
    rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    problems = structure_problems(folder)
    if not problems:
        files = _read_manifest(folder)
        problems = _changed(folder, files, sorted(files)[rank::world_size])
    if alone:
        return problems
    gathered: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, problems)
    return list(dict.fromkeys(problem for found in gathered for problem in found))


def _changed(folder: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> list[str]:
    problems = []
    for name in names:
        try:
            if hash_file(folder / name) != files[name]:
                problems.append(f"{name} is not what was saved (SHA-256 differs)")
        except OSError as error:
            problems.append(f"{name} can't be read: {error}")
    return problems


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    found = json.loads((folder / MANIFEST).read_text())
    if found["format"] != _FORMAT:
        raise ValueError(f"format {found['format']} is not {_FORMAT}")
    files = {name: FileRecord(**record) for name, record in found["files"].items()}
    for name, record in files.items():
        # Names alone, so that nothing outside the folder is ever read.
        if os.path.basename(name) != name or not isinstance(record.bytes, int):
            raise ValueError(f"{name!r} is no entry for a file")
    return files
