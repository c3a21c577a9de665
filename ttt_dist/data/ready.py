"""Codes that a manifest names in the place of audio: encoded elsewhere, or made by a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ttt_dist.data.cache import BrokenPieceError, CodesSpec
from ttt_dist.data.codes_file import CodesFileError, ready_codes_entry
from ttt_dist.data.manifest import DataError
from ttt_dist.data.steps import NO_CODE

_DTYPES = {"I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class ReadyCodes:
    """Codes `[R, F]` of one recording in a file, given whole or in pieces.

    Attributes:
        path, dtype, offset: the file, numpy's name of the numbers in it, and the byte of the first.
        rows: R.
        total_frames: F.
        frames: T of a piece; F where recordings stay whole.
        cards: of every row, the number of codes; they run from 0, and -1 is none.
    """

    path: Path
    dtype: str
    offset: int
    rows: int
    total_frames: int
    frames: int
    cards: tuple[int, ...]

    @property
    def num_pieces(self) -> int:
        return -(-self.total_frames // self.frames)

    def read(self, piece: int) -> torch.Tensor:
        """Codes of one piece, int32 `[R, T]`; frames after the recording's end hold -1.

        Raises:
            BrokenPieceError: the file is gone, unreadable, or holds other values than the model's.
        """
        first = piece * self.frames
        count = min(self.frames, self.total_frames - first)
        codes = torch.full((self.rows, self.frames), NO_CODE, dtype=torch.int32)
        for row, card in enumerate(self.cards):
            values = self._values(row * self.total_frames + first, count)
            lowest, highest = int(values.min()), int(values.max())
            if lowest < NO_CODE or highest >= card:
                raise BrokenPieceError(
                    [
                        f"{self.path}: row {row} holds codes from {lowest} to {highest}; allowed "
                        f"are those of the model, 0 to {card - 1}, and -1 where there is none"
                    ]
                )
            codes[row, :count] = torch.from_numpy(values.astype(np.int32))
        return codes

    def _values(self, first: int, count: int) -> np.ndarray:
        try:
            offset = self.offset + first * np.dtype(self.dtype).itemsize
            values = np.fromfile(self.path, self.dtype, count, offset=offset)
        except OSError as error:
            raise BrokenPieceError([f"{self.path}: cannot be read: {error}"]) from error
        if values.size != count:
            raise BrokenPieceError([f"{self.path}: ends early; it was longer when the run began"])
        return values


def open_ready(path: Path, spec: CodesSpec) -> ReadyCodes:
    """The codes of a file, cut as `spec` has it; reads the header alone.

    Raises:
        DataError: the file holds none, or not the rows of the model.
    """
    try:
        entry = ready_codes_entry(path)
    except (CodesFileError, OSError) as error:
        raise DataError([f"{path}: cannot be read as codes: {error}"]) from error
    rows, frames = entry.shape
    if rows != spec.rows:
        raise DataError(
            [
                f"{path}: found {rows} rows of codes; the model has {spec.rows}: text, and twice "
                f"{spec.codebooks} codebooks"
            ]
        )
    cards = (spec.text_card, *[spec.card] * (rows - 1))
    dtype, cut = _DTYPES[entry.dtype], spec.frames or frames
    return ReadyCodes(path, dtype, entry.start, rows, frames, cut, cards)
