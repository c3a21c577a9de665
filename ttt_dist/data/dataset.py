"""The pieces of all recordings, and the one global order in which training visits them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, Unpack

import numpy as np
import torch

from ttt_dist.data.cache import CodesCache
from ttt_dist.data.encode import Codec, encode_missing, missing_seconds
from ttt_dist.data.manifest import MIN_SHARE, DataError, Recording, Source, all_recordings
from ttt_dist.data.ready import open_ready

# Several sources share blocks of this many samples in proportion to their weights.
_MIN_BLOCK = 1024
_MAX_LISTED = 10


class PieceDataset(torch.utils.data.Dataset[torch.Tensor]):
    """All pieces of all recordings of some sources, read from the cache when asked for.

    `dataset[i]` is int64 `[R, T]` (R = 17 for Moshi): text, left channel, right channel; -1 where
    there is no audio. Pieces are numbered source after source, recording after recording.

    Raises:
        DataError: recordings without codes; every rank needs all of them.
        ValueError: the cache is one of whole recordings.
    """

    def __init__(self, sources: Sequence[Source], cache: CodesCache) -> None:
        if cache.spec.frames is None:
            raise ValueError("duration_sec: found None, allowed are pieces' seconds")
        self.source_paths = [source.path for source in sources]
        self.weights = [source.weight for source in sources]
        self.source_sizes: list[int] = []
        self.rows, self.frames = cache.spec.rows, cache.spec.frames
        self._recordings = all_recordings(sources)
        self._codes = find_codes(self._recordings, cache)
        counts = [codes.num_pieces for codes in self._codes]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.source_digests: list[str] = []
        first = 0
        for source in sources:
            last = first + len(source.recordings)
            self.source_sizes.append(sum(counts[first:last]))
            self.source_digests.append(order_digest(source.recordings, counts[first:last]))
            first = last

    @property
    def order_weights(self) -> list[float]:
        """Of each source, for a `GlobalOrder` over pieces."""
        return self.weights

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> torch.Tensor:
        """Codes of piece `index`, int64 `[R, T]`; BrokenPieceError where it can't be read."""
        place, piece = self._locate(index)
        return self._codes[place].read(piece).long()

    def describe(self, index: int) -> str:
        """Where piece `index` comes from: the recording's file, and which of its pieces it is."""
        place, piece = self._locate(index)
        return f"{self._recordings[place].path}, piece {piece}"

    def comes_ready(self, index: int) -> bool:
        """Whether the codes of piece `index` are a file that the manifest names."""
        return self._recordings[self._locate(index)[0]].is_codes

    def _locate(self, index: int) -> tuple[int, int]:
        """The recording that piece `index` is of, and its number in there."""
        if not 0 <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        return place, index - (int(self._ends[place - 1]) if place > 0 else 0)


def order_digest(recordings: Sequence[Recording], pieces: Sequence[int]) -> str:
    """Of what numbers the pieces of a source: its recordings' names and pieces, in order.

    Folders may move, and what the files hold may be mended.
    """
    named = [
        [recording.path.name, count] for recording, count in zip(recordings, pieces, strict=True)
    ]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class StoredCodes(Protocol):
    """Codes of a recording on disk, in the cache or ready, in pieces or whole (then it is one)."""

    @property
    def num_pieces(self) -> int: ...

    @property
    def frames(self) -> int:
        """T, of every piece."""

    def read(self, piece: int) -> torch.Tensor:
        """Codes of one piece, int32 `[R, T]`; BrokenPieceError where they can't be read."""


def find_codes(recordings: Sequence[Recording], cache: CodesCache) -> list[StoredCodes]:
    """Where the codes of each recording lie; DataError where some aren't there."""
    encoded = [recording for recording in recordings if not recording.is_codes]
    cached = iter([cache.find(key) for key in cache.keys(encoded)])
    found: list[StoredCodes] = []
    missing: list[str] = []
    for recording in recordings:
        codes = open_ready(recording.path, cache.spec) if recording.is_codes else next(cached)
        if codes is None:
            missing.append(str(recording.path))
        else:
            found.append(codes)
    if missing:
        names = ", ".join(missing[:_MAX_LISTED]) + (", …" if missing[_MAX_LISTED:] else "")
        raise DataError(
            [
                f"data.cache_dir: {cache.folder} lacks the codes of {len(missing)} of "
                f"{len(recordings)} recordings ({names}); "
                "run launch/prepare.py, with a folder that every node sees"
            ]
        )
    return found


class GlobalOrder:
    """Which sample stands at each position of an endless, layout-independent order.

    `order[position]` is a sample number. A source is passed through epoch after epoch; with
    `shuffle` each epoch has an order of its own, drawn from `seed`, the source and the epoch. With
    several sources, each block of 1024 positions (more where a weight is small) holds every source
    in proportion to its weight, in an order drawn from `seed` and the block. Any position is found
    directly, so a run resumes by its step alone.

    Args:
        sizes: samples of each source, above 0; sample numbers run through the sources in order.
        weights: how often each source is drawn, relative; the smallest share is
            `manifest.MIN_SHARE`.
        seed: 0 or above.
        shuffle: shuffle within a source.
        stage: another one has another order.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        shuffle: bool,
        stage: int = 0,
    ) -> None:
        self._sizes = list(sizes)
        shares = np.asarray(weights, dtype=np.float64)
        if not self._sizes or min(self._sizes) < 1:
            raise ValueError(f"sizes: found {self._sizes}, allowed are sources of 1 sample or more")
        if len(shares) != len(self._sizes) or not (np.isfinite(shares) & (shares > 0)).all():
            raise ValueError(
                f"weights: found {weights}, allowed are {len(self._sizes)} numbers above 0"
            )
        shares = shares / shares.sum()
        if shares.min() < MIN_SHARE:
            raise ValueError(
                f"weights: found {weights}, the smallest is below {MIN_SHARE:g} of all"
            )
        if seed < 0:
            raise ValueError(f"seed: found {seed}, allowed is 0 or above")
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        # Two roundings are off by less than two: with two or more expected, none gets below zero.
        self._block = max(_MIN_BLOCK, int(np.ceil(2 / shares.min())))
        self._bounds = np.concatenate([[0.0], np.cumsum(shares)])
        self._bounds[-1] = 1.0
        self._seed, self._stage = seed, stage
        self._shuffle = shuffle
        self._epochs: dict[int, dict[int, np.ndarray]] = {}
        self._layout: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise IndexError(f"position {position}, allowed is 0 or above")
        source, local = (0, position) if len(self._sizes) == 1 else self._place(position)
        epoch, offset = divmod(local, self._sizes[source])
        if self._shuffle:
            known = self._epochs.setdefault(source, {})
            if epoch not in known:
                # Two, as lanes side by side may stand on either side of an epoch's end.
                if len(known) == 2:
                    del known[min(known)]
                known[epoch] = self._permutation(self._sizes[source], source, epoch)
            offset = int(known[epoch][offset])
        return int(self._starts[source]) + offset

    def _place(self, position: int) -> tuple[int, int]:
        """The source at `position`, and how many of its samples come before."""
        block, offset = divmod(position, self._block)
        if self._layout is None or self._layout[0] != block:
            # Cumulative quotas, rounded: exact over all blocks, and the same whoever computes them.
            before = np.floor(block * self._block * self._bounds + 0.5).astype(np.int64)
            after = np.floor((block + 1) * self._block * self._bounds + 0.5).astype(np.int64)
            taken = np.diff(before)
            sources = np.repeat(np.arange(len(self._sizes)), np.diff(after) - taken)
            # Source numbers from len(sizes) on are free for the blocks' own streams.
            sources = sources[self._permutation(self._block, len(self._sizes), block)]
            locals_ = np.empty(self._block, dtype=np.int64)
            for source, count in enumerate(taken):
                chosen = sources == source
                locals_[chosen] = count + np.arange(int(chosen.sum()))
            self._layout = (block, sources, locals_)
        return int(self._layout[1][offset]), int(self._layout[2][offset])

    def _permutation(self, size: int, stream: int, epoch: int) -> np.ndarray:
        # numpy keeps the raw bits of a bit generator from version to version, its shuffles not.
        entropy = [self._seed, stream, epoch, *([self._stage] if self._stage else [])]
        bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(size)
        return np.argsort(bits, kind="stable")


def default_cache_folder(sources: Sequence[Source]) -> Path:
    """Where codes go when `data.cache_dir` is not set.

    `.cache/codes` beside the first manifest (in the folder that was named, where there is none),
    where that can be written; else `ttt-dist/codes` in the user's cache folder (XDG_CACHE_HOME or
    ~/.cache).
    """
    for recording in all_recordings(sources)[:1]:
        named = recording.manifest
        folder = named if named.is_dir() else named.parent
        if os.access(folder, os.W_OK):
            return folder / ".cache" / "codes"
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "ttt-dist" / "codes"


class EncodingRanks(TypedDict):
    """How the ranks of a job encode together.

    Attributes:
        rank, world_size: of the whole job (tp ranks encode too).
        agree: returns, once every rank has called it, the problems of all of them.
        max_encode_sec: refuse to encode more seconds of audio than this here, because ranks that
            wait in a collective for hours die of its timeout.
        progress: see `encode_missing`.
    """

    rank: int
    world_size: int
    agree: Callable[[list[str]], list[str]]
    max_encode_sec: float
    progress: NotRequired[Callable[[Recording, bool], None] | None]


def open_pieces(
    splits: Mapping[str, Sequence[Source]],
    cache: CodesCache,
    codec: Callable[[], Codec],
    **ranks: Unpack[EncodingRanks],
) -> dict[str, PieceDataset]:
    """What `train.py` calls: encode what is missing, if short, and open every split in pieces.

    Arguments and errors are those of `encode_splits`.
    """
    encode_splits(splits, cache, codec, **ranks)
    return {name: PieceDataset(sources, cache) for name, sources in splits.items()}


def encode_splits(
    splits: Mapping[str, Sequence[Source]],
    cache: CodesCache,
    codec: Callable[[], Codec],
    **ranks: Unpack[EncodingRanks],
) -> None:
    """Encode what the cache lacks of every split, all ranks together, if it isn't long.

    Args:
        splits: name → sources as `read_sources` gives them, e.g. `{"train": …, "eval": …}`.
        cache: of the run's `CodesSpec`; the same folder on all ranks.
        codec: loads Mimi and the tokenizer; called only on ranks that have something to encode.

    Raises:
        DataError: too much is missing (run `launch/prepare.py` first), or data cannot be encoded.
    """
    recordings = [recording for sources in splits.values() for recording in all_recordings(sources)]
    seconds, longest = missing_seconds(recordings, cache), ranks["max_encode_sec"]
    if seconds > longest:
        raise DataError(
            [
                f"data.cache_dir: {cache.folder} lacks the codes of {seconds:.0f} s of audio "
                "(files that weren't hashed since they were moved or modified count, too), and "
                f"training encodes at most data.max_inline_encode_sec = {longest:.0f} s by "
                "itself; run `launch/prepare.py CONFIG` first, under torchrun to split it"
            ]
        )
    problems: list[str] = []
    try:
        encode_missing(
            recordings,
            cache,
            codec,
            rank=ranks["rank"],
            world_size=ranks["world_size"],
            progress=ranks.get("progress"),
        )
    except DataError as error:
        problems = list(error.problems)
    problems = ranks["agree"](problems)
    if problems:
        raise DataError(problems)
