"""Safetensors files of codes: their headers, read with a cap and checked before they are used."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

FRAME_RATE = 12.5  # Hz, of all codes
CODES_SUFFIX = ".safetensors"
# Two small tensors need some 300 bytes; safetensors itself would parse headers of 100 MB.
_MAX_HEADER_BYTES = 16_384
_ITEM_BYTES = {"I32": 4, "I64": 8}


class CodesFileError(Exception):
    """A file doesn't hold what it should; the message says why."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: `I32` or `I64`, shape, and the bytes `[start, end)` of the file."""

    dtype: str
    shape: list[int]
    start: int
    end: int


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of `size` bytes, and where its tensors begin.

    Raises:
        CodesFileError: there is none, it is too large, or no JSON object.
    """
    head = file.read(8)
    if len(head) < 8:
        raise CodesFileError(f"it has {size} bytes")
    (header_size,) = struct.unpack("<Q", head)
    if header_size > min(_MAX_HEADER_BYTES, size):
        raise CodesFileError(f"its header claims {header_size} bytes")
    try:
        header = json.loads(file.read(header_size))
    except (ValueError, RecursionError) as error:
        raise CodesFileError("its header is no JSON") from error
    return header if isinstance(header, dict) else {}, 8 + header_size


def tensor_entry(
    header: dict[str, Any], name: str, dtypes: tuple[str, ...], begin: int, size: int
) -> TensorEntry:
    """Tensor `name` of a file of `size` bytes, whose tensors begin at byte `begin`.

    Raises:
        CodesFileError: it isn't there, has another dtype, or its bytes don't fit shape and file.
    """
    entry = header.get(name)
    if isinstance(entry, dict) and entry.get("dtype") in dtypes:
        shape, span = entry.get("shape"), entry.get("data_offsets")
        if _is_counts(shape) and _is_counts(span) and len(span) == 2:
            found = TensorEntry(entry["dtype"], shape, begin + span[0], begin + span[1])
            expected = _ITEM_BYTES[found.dtype]
            for length in shape:
                expected *= length
            if found.end - found.start != expected or found.end > size:
                raise CodesFileError(
                    f"it has {size} bytes, and {name!r} {shape} doesn't fit in its place there"
                )
            return found
    raise CodesFileError(
        f"its header holds no tensor {name!r} of type {' or '.join(dtypes)}, of a shape and place"
    )


def ready_codes_entry(path: Path) -> TensorEntry:
    """The `codes` `[R, F]`, F ≥ 1, of a file that a manifest names.

    Raises:
        CodesFileError: the file holds something else.
        OSError: it can't be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header, begin = read_header(file, size)
    entry = tensor_entry(header, "codes", ("I32", "I64"), begin, size)
    if len(entry.shape) != 2 or min(entry.shape) < 1:
        raise CodesFileError(f"its codes have shape {entry.shape}, expected are [rows, frames]")
    return entry


def _is_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
