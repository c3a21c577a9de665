"""Whole recordings, for training along them: their codes, and their numbering into pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import numpy as np
import torch

from ttt_dist.data.cache import CodesCache
from ttt_dist.data.dataset import EncodingRanks, encode_splits, find_codes, order_digest
from ttt_dist.data.encode import Codec
from ttt_dist.data.manifest import DataError, Source, all_recordings, small_shares


class RecordingDataset:
    """All recordings of some sources, each whole; codes are read when asked for.

    Recordings are numbered source after source. Their pieces of `piece_frames` frames, the last of
    each short or not, are the samples that messages name: numbered recording after recording, and
    only numbered, since nothing is cut here.

    Attributes:
        source_paths: of each source, as it was named.
        weights, source_sizes: of each source, its weight and its recordings.
        source_pieces: of each source, pieces of all its recordings.
        source_digests: of each source, its `order_digest`.
        rows: R, rows of codes: text, left channel, right channel.
        frames: T, frames of a piece.

    Raises:
        DataError: recordings without codes; every rank needs all of them.
        ValueError: the cache is one of pieces, or a piece has no frames.
    """

    def __init__(self, sources: Sequence[Source], cache: CodesCache, piece_frames: int) -> None:
        if cache.spec.frames is not None:
            raise ValueError(f"duration_sec: found {cache.spec.duration_sec}, allowed is None")
        if piece_frames < 1:
            raise ValueError(f"piece_frames: found {piece_frames}, allowed is 1 or above")
        self.source_paths = [source.path for source in sources]
        self.weights = [source.weight for source in sources]
        self.source_sizes = [len(source.recordings) for source in sources]
        self.rows, self.frames = cache.spec.rows, piece_frames
        self._recordings = all_recordings(sources)
        self._codes = find_codes(self._recordings, cache)
        counts = [self.pieces_of(recording) for recording in range(self.num_recordings)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        borders = np.cumsum([0, *self.source_sizes])
        self.source_pieces = [sum(counts[a:b]) for a, b in itertools.pairwise(borders)]
        self.source_digests = [
            order_digest(source.recordings, counts[a:b])
            for source, (a, b) in zip(sources, itertools.pairwise(borders), strict=True)
        ]

    def __len__(self) -> int:
        """Pieces of all recordings."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def order_weights(self) -> list[float]:
        """Of each source, for a `GlobalOrder` over recordings: a weight is a share of pieces.

        Raises:
            DataError: a source's recordings are too long to be drawn as rarely as that takes.
        """
        weights = [
            weight * size / pieces
            for weight, size, pieces in zip(
                self.weights, self.source_sizes, self.source_pieces, strict=True
            )
        ]
        field = "data.train_data (weights by the mean length of recordings)"
        problems = small_shares(self.source_paths, weights, field=field)
        if problems:
            raise DataError(problems)
        return weights

    @property
    def num_recordings(self) -> int:
        return len(self._recordings)

    def frames_of(self, recording: int) -> int:
        """F, frames of a recording; known without reading its codes."""
        return self._codes[recording].frames

    def pieces_of(self, recording: int) -> int:
        """Pieces that a recording is cut into; the last may be short."""
        return -(-self.frames_of(recording) // self.frames)

    def codes(self, recording: int) -> torch.Tensor:
        """Codes of a recording, int64 `[R, F]`; BrokenPieceError where they can't be read."""
        return self._codes[recording].read(0).long()

    def index(self, recording: int, piece: int) -> int:
        """The number of a recording's piece among all pieces."""
        return (int(self._ends[recording - 1]) if recording > 0 else 0) + piece

    def locate(self, index: int) -> tuple[int, int]:
        """The recording that piece `index` is of, and its number in there."""
        if not 0 <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        recording = int(np.searchsorted(self._ends, index, side="right"))
        return recording, index - self.index(recording, 0)

    def has_text(self, recording: int) -> bool:
        """Whether its text says what is spoken; otherwise it is padding, for want of alignments."""
        return self._recordings[recording].has_text

    def path(self, recording: int) -> str:
        """The recording's file, for messages."""
        return str(self._recordings[recording].path)

    def describe(self, index: int) -> str:
        """Where piece `index` comes from: the recording's file, and which of its pieces it is."""
        recording, piece = self.locate(index)
        return f"{self.path(recording)}, piece {piece}"

    def comes_ready(self, index: int) -> bool:
        """Whether the codes of piece `index` are a file that the manifest names."""
        return self._recordings[self.locate(index)[0]].is_codes


def open_recordings(
    splits: Mapping[str, Sequence[Source]],
    cache: CodesCache,
    codec: Callable[[], Codec],
    *,
    piece_frames: int,
    **ranks: Unpack[EncodingRanks],
) -> dict[str, RecordingDataset]:
    """As `dataset.open_pieces`, for whole recordings, numbered in pieces of `piece_frames`."""
    encode_splits(splits, cache, codec, **ranks)
    return {
        name: RecordingDataset(sources, cache, piece_frames) for name, sources in splits.items()
    }
