"""Tensors of a release, read slice by slice: one `.safetensors` file, or an index of several.

An index is what the hub's libraries write for large models, `model.safetensors.index.json` with a
`weight_map` from tensor to file. Files are mapped, never read whole; their headers are looked at
first, for a header may be made to fill the memory, and a file may be something else altogether.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ttt_dist.moshi.errors import ReleaseError, read_json_object

INDEX_SUFFIX = ".index.json"
# Bytes of a header: Moshi 7B's takes 40 KB. The library would take 100 MB, and needs 16 s for 63.
HEADER_LIMIT = 2 * 2**20
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def is_index(path: Path) -> bool:
    """Whether `path` names an index of `.safetensors` files."""
    return path.name.endswith(".safetensors" + INDEX_SUFFIX)


def files_behind(path: Path) -> list[Path]:
    """The `.safetensors` files of `path`: itself, or those that an index names, in its folder.

    Raises:
        ReleaseError: the index isn't one, names files elsewhere, or files that are not there.
    """
    return sorted(set(_files_by_key(path).values())) if is_index(path) else [path]


def check_tensor_files(path: Path) -> None:
    """Refuse what is no sound `.safetensors`, from its first and last bytes, without reading it.

    Raises:
        ReleaseError: naming the file, what was found and what is allowed.
    """
    for file in files_behind(path):
        _check_header(file)


class TensorFiles:
    """All tensors of a file or an index, opened once; a context manager.

    Args:
        path: of the file or the index.
        over: of another, whose tensors stand in place of those of the same names.

    Raises:
        ReleaseError: as `check_tensor_files`, or an index and its files tell of different tensors.
    """

    def __init__(self, path: Path, over: Path | None = None) -> None:
        self._stack = ExitStack()
        self._by_key: dict[str, Any] = {}
        try:
            for source in (path,) if over is None else (path, over):
                self._by_key |= self._opened(source)
        except ReleaseError:
            self._stack.close()
            raise

    def _opened(self, path: Path) -> dict[str, Any]:
        """Name of each tensor to the open file that holds it."""
        check_tensor_files(path)
        by_key: dict[str, Any] = {}
        for file in files_behind(path):
            opened = self._stack.enter_context(_open(file))
            by_key |= dict.fromkeys(opened.keys(), opened)
        if is_index(path):
            _compare_with_index(path, set(by_key))
        return by_key

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._by_key)

    def slice(self, key: str) -> Any:
        """The tensor `key`, of which indexing reads what is asked for."""
        return self._by_key[key].get_slice(key)

    def shape(self, key: str) -> list[int]:
        """Of the tensor `key`."""
        return list(self.slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """As safetensors names it, e.g. `BF16`."""
        return str(self.slice(key).get_dtype())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ReleaseError(f"{file}: cannot be read as safetensors: {error}") from error


def _check_header(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > size - 8:
            raise ReleaseError(
                f"{file}: cannot be read as safetensors: it has {size:,} bytes, too few for the "
                f"header that it announces ({header:,}); it is truncated, or another kind of file"
            )
        if header > HEADER_LIMIT:
            raise ReleaseError(
                f"{file}: its header has {header:,} bytes, allowed are {HEADER_LIMIT:,}: no model "
                "of this family needs more"
            )
        try:
            entries = json.loads(opened.read(header))
        except ValueError as error:
            raise ReleaseError(f"{file}: cannot be read as safetensors: {error}") from error
    ends = [
        entry["data_offsets"][-1]
        for name, entry in (entries.items() if isinstance(entries, dict) else ())
        if name != "__metadata__" and isinstance(entry, dict) and entry.get("data_offsets")
    ]
    wanted = 8 + header + max(ends, default=0)
    if size != wanted:
        raise ReleaseError(
            f"{file}: cannot be read as safetensors: it has {size:,} bytes, its header tells of "
            f"{wanted:,}; fetch or copy it again"
        )
    _open(file)  # the library checks every entry


def names_in_index(index: Path) -> list[str]:
    """Names of the files that an index lists; raises ReleaseError where it isn't one."""
    return sorted(set(_weight_map(index).values()))


def _files_by_key(index: Path) -> dict[str, Path]:
    files = {key: index.parent / name for key, name in _weight_map(index).items()}
    counts = Counter(file for file in files.values() if not file.is_file())
    if counts:
        told = ", ".join(f"{file} ({n} tensors)" for file, n in sorted(counts.items()))
        raise ReleaseError(f"{index}: names files that are not there: {told}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ReleaseError(
            f"{index}: found no weight_map; an index of .safetensors files maps every tensor to "
            "the file that holds it"
        )
    strange = sorted({str(name) for name in weight_map.values() if not _is_plain_name(name)})
    if strange:
        raise ReleaseError(
            f"{index}: weight_map: found {', '.join(strange)}; allowed are names of .safetensors "
            "files in the index's own folder"
        )
    return weight_map


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _compare_with_index(index: Path, found: set[str]) -> None:
    listed = set(_files_by_key(index))
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names))}"
        for what, names in (
            ("listed, but in none of its files", listed - found),
            ("in its files, but not listed", found - listed),
        )
        if names
    ]
    if problems:
        raise ReleaseError(f"{index}: doesn't tell of its files' tensors: {'; '.join(problems)}")
