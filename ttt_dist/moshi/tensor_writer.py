"""Writing a `.safetensors` file tensor by tensor: header first, no more than one in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_PIECE = 4 * 2**20  # elements that are cast at a time


@dataclass(frozen=True)
class TensorSpec:
    """What a file's header tells of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """A new `.safetensors` file; a context manager, within which every tensor is written once.

    Tensors go into the file in the order of `order`, and have to be written so.

    Args:
        path: of a file that isn't there yet.
        specs: name to shape and dtype (bfloat16, float32) of every tensor.
        metadata: text by text, for the header's `__metadata__`.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        # The library's own order: wide dtypes first, so that each tensor is aligned to its own.
        self.order: Sequence[str] = sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n))
        self._specs = specs
        self._left = list(self.order)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        start = 0
        for name in self.order:
            spec = specs[name]
            end = start + spec.bytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            if self._left:
                raise ValueError(f"{self._file.name}: never written: {', '.join(self._left)}")
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, name: str, value: Tensor) -> None:
        """Append `value`, cast to the announced dtype; raises ValueError out of turn or shape."""
        spec = self._specs[name]
        if not self._left or name != self._left[0] or tuple(value.shape) != spec.shape:
            raise ValueError(
                f"{self._file.name}: found {name} {list(value.shape)}, next is "
                f"{self._left[:1]} {list(spec.shape)}"
            )
        for piece in value.reshape(-1).split(_PIECE):
            data = piece.detach().to("cpu", spec.dtype).contiguous().view(torch.uint8)
            self._file.write(data.numpy().data)
        self._left.pop(0)
