"""Codes on disk: computed once, found again by content, never trusted blindly.

One safetensors file a recording: `codes` int32 `[N, R, T]` (N pieces, R = 1 + 2K rows) and
`crc32` int64 `[N]`. Its name is a hash over everything the codes depend on: the bytes of the audio
and of its alignments, Mimi's weights and configuration, the tokenizer, the cut, and the format
version. A whole recording is one piece of its own number of frames; both lie side by side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import uuid
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save

from ttt_dist.data.codes_file import CodesFileError, read_header, tensor_entry
from ttt_dist.data.interleave import TextIds, num_frames
from ttt_dist.data.manifest import DataError, Recording

FORMAT_VERSION = 1
_HASH_THREADS = 8
_NO_ALIGNMENTS = "none"  # in place of their hash, where a recording has none

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodesSpec:
    """What codes are made with, apart from the recording itself.

    Attributes:
        duration_sec: length of a piece; None: recordings stay whole.
        codebooks: Mimi codebooks of one channel (K).
        text_ids: special ids of the text stream.
        mimi: hash over Mimi's weights and configuration.
        tokenizer: hash of the sentencepiece model.
        card, text_card: codes of an audio codebook, and of text, that the model knows; bounds of
            codes that come ready, without influence on those that are made here.
    """

    duration_sec: float | None
    codebooks: int
    text_ids: TextIds
    mimi: str
    tokenizer: str
    card: int = 2048
    text_card: int = 32_000

    @classmethod
    def from_release(cls, info: CheckpointInfo, *, duration_sec: float | None) -> CodesSpec:
        """The specification for a release; reads Mimi's file once to hash it (0.4 GB: a second).

        Raises:
            DataError: the release's model doesn't listen to two channels of equal codebooks.
        """
        config = info.lm_config or {}
        channels_codebooks = int(config.get("n_q", 16))
        if channels_codebooks % 2 != 0:
            raise DataError(
                [
                    f"moshi_paths: the release's config.json has n_q = {channels_codebooks}; two "
                    "channels need an even number (Moshi: 16)"
                ]
            )
        mimi_config = json.dumps(info.mimi_config, sort_keys=True).encode()
        return cls(
            duration_sec=None if duration_sec is None else float(duration_sec),
            codebooks=channels_codebooks // 2,
            text_ids=TextIds.from_lm_config(info.lm_config),
            mimi=_hash_bytes(_hash_file(Path(info.mimi_weights)).encode() + mimi_config),
            tokenizer=_hash_file(Path(info.tokenizer)),
            card=int(config.get("card", 2048)),
            text_card=int(config.get("text_card", 32_000)),
        )

    @property
    def frames(self) -> int | None:
        """T, frames of a piece; None where recordings stay whole, each with its own number."""
        return None if self.duration_sec is None else num_frames(self.duration_sec)

    @property
    def rows(self) -> int:
        """R, rows of codes: text, left channel, right channel."""
        return 1 + 2 * self.codebooks

    @property
    def fingerprint(self) -> str:
        ids = self.text_ids
        parts = [
            FORMAT_VERSION,
            repr(self.duration_sec),
            self.codebooks,
            [ids.padding, ids.end_of_padding, ids.zero],
            self.mimi,
            self.tokenizer,
        ]
        return _hash_bytes(json.dumps(parts).encode())


class BrokenPieceError(DataError):
    """Codes that were there when they were looked up can't be read any more."""


@dataclass(frozen=True)
class CachedCodes:
    """Where the codes of one recording lie: a file, the offset of `codes` in it, and N."""

    path: Path
    offset: int
    checksums: tuple[int, ...]
    rows: int
    frames: int

    @property
    def num_pieces(self) -> int:
        return len(self.checksums)

    def read(self, piece: int) -> torch.Tensor:
        """Codes of one piece, int32 `[R, T]`.

        Raises:
            BrokenPieceError: the file is gone, unreadable, or not what was written.
        """
        count = self.rows * self.frames
        try:
            values = np.fromfile(self.path, "<i4", count, offset=self.offset + 4 * count * piece)
        except OSError as error:
            raise BrokenPieceError([f"{self.path}: cannot be read: {error}"]) from error
        if values.size != count or zlib.crc32(values.tobytes()) != self.checksums[piece]:
            raise BrokenPieceError(
                [f"{self.path}: piece {piece} is damaged; start again, and it is encoded anew"]
            )
        return torch.from_numpy(values.astype(np.int32, copy=False)).view(self.rows, self.frames)


class CodesCache:
    """A folder of codes for one `CodesSpec`, shared by ranks, runs and data sets.

    Writes go to a file of their own and are renamed, so a reader sees a whole file or none, and
    ranks that encode the same recording at once do no harm. Hashes of files are remembered by path,
    size and times, in `hashes/`.
    """

    def __init__(self, folder: Path, spec: CodesSpec) -> None:
        self.folder = folder
        self.spec = spec

    def keys(self, recordings: Iterable[Recording]) -> list[str]:
        """Names of the recordings' codes; hashes the files that are new or changed."""
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            return list(pool.map(self.key, recordings))

    def key(self, recording: Recording) -> str:
        """Name of the recording's codes; raises DataError where a file cannot be read."""
        audio = self._content_hash(recording.path)
        if not recording.has_text:
            return self._combine(audio, _NO_ALIGNMENTS)
        return self._combine(audio, self._content_hash(recording.alignments_path))

    def likely_key(self, recording: Recording) -> str | None:
        """As `key` without reading content, for estimates: None where no hash is remembered.

        Size and time of modification are enough here: a new owner, mode or hard link changes ctime,
        and not the content.
        """
        audio = self._remembered_hash(recording.path, exact=False)
        alignments: str | None = _NO_ALIGNMENTS
        if recording.has_text:
            alignments = self._remembered_hash(recording.alignments_path, exact=False)
        return None if audio is None or alignments is None else self._combine(audio, alignments)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def find(self, key: str, *, verify: bool = False) -> CachedCodes | None:
        """The codes named `key`, or None where they are absent or unusable (with a warning).

        Header and file size are always checked, the values of every piece with `verify`.
        """
        path = self.path(key)
        try:
            codes = _open_codes(path, self.spec)
            if verify:
                for piece in range(codes.num_pieces):
                    codes.read(piece)
        except FileNotFoundError:
            return None
        except (CodesFileError, DataError, OSError) as error:
            logger.warning("cached codes %s are not used and encoded anew: %s", path, error)
            return None
        return codes

    def write(self, key: str, codes: torch.Tensor) -> None:
        """Store int32 codes `[N, R, T]` under `key`, whole or not at all.

        Raises:
            DataError: the folder cannot be written.
        """
        if codes.dtype != torch.int32 or not _fits(list(codes.shape), self.spec):
            raise ValueError(
                f"codes: found {codes.dtype} {list(codes.shape)}, allowed is int32 "
                f"{_expected_shape(self.spec)}"
            )
        array = np.ascontiguousarray(codes.numpy().astype("<i4", copy=False))
        checksums = [zlib.crc32(piece.tobytes()) for piece in array]
        content = save({"codes": codes.contiguous(), "crc32": torch.tensor(checksums)})
        try:
            _replace(self.path(key), content)
        except OSError as error:
            raise DataError(
                [
                    f"data.cache_dir: cannot write codes into {self.folder} ({error}); name a "
                    "writable folder that every node sees"
                ]
            ) from error

    def _combine(self, audio: str, alignments: str) -> str:
        return _hash_bytes(f"{self.spec.fingerprint} {audio} {alignments}".encode())

    def _memo_path(self, path: Path) -> Path:
        return self.folder / "hashes" / f"{_hash_bytes(str(path).encode())}.json"

    def _remembered_hash(self, path: Path, *, exact: bool) -> str | None:
        """The hash that was taken of a file as it is now; not `exact`: with whatever ctime."""
        try:
            memo = json.loads(self._memo_path(path).read_bytes())
            state = _file_state(path)
        except (OSError, ValueError):
            return None
        then = memo.get("state") if isinstance(memo, dict) else None
        if not isinstance(then, list) or (then if exact else [*then[:2], state[2]]) != state:
            return None
        value = memo.get("sha256")
        return value if isinstance(value, str) else None

    def _content_hash(self, path: Path) -> str:
        remembered = self._remembered_hash(path, exact=True)
        if remembered is not None:
            return remembered
        try:
            # Taken before the bytes are read: if the file changes meanwhile, the memo won't fit.
            state = _file_state(path)
            value = _hash_file(path)
        except OSError as error:
            raise DataError([f"{path}: cannot be read: {error}"]) from error
        memo = {"path": str(path), "state": state, "sha256": value}
        try:
            _replace(self._memo_path(path), json.dumps(memo).encode())
        except OSError as error:
            # It only saves time: a folder of prepared codes may be read-only.
            logger.debug("cannot remember the hash of %s: %s", path, error)
        return value


def _fits(shape: list[int], spec: CodesSpec) -> bool:
    """Whether codes of a recording may have this shape."""
    if len(shape) != 3 or min(shape) < 1 or shape[1] != spec.rows:
        return False
    return shape[0] == 1 if spec.frames is None else shape[2] == spec.frames


def _expected_shape(spec: CodesSpec) -> str:
    return f"[1, {spec.rows}, T]" if spec.frames is None else f"[N, {spec.rows}, {spec.frames}]"


def _open_codes(path: Path, spec: CodesSpec) -> CachedCodes:
    size = path.stat().st_size
    with path.open("rb") as file:
        header, begin = read_header(file, size)
        codes = tensor_entry(header, "codes", ("I32",), begin, size)
        crc = tensor_entry(header, "crc32", ("I64",), begin, size)
        if not _fits(codes.shape, spec) or crc.shape != codes.shape[:1]:
            raise CodesFileError(
                f"its codes have shape {codes.shape}, expected are {_expected_shape(spec)}"
            )
        pieces, rows, frames = codes.shape
        first, second = sorted([codes, crc], key=lambda entry: entry.start)
        if (first.start, second.start, size) != (begin, first.end, second.end):
            raise CodesFileError(f"it has {size} bytes, and not those of two tensors alone")
        file.seek(crc.start)
        checksums = struct.unpack(f"<{pieces}q", file.read(crc.end - crc.start))
    return CachedCodes(path, codes.start, checksums, rows, frames)


def _file_state(path: Path) -> list[int]:
    """Size, mtime and ctime."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def _replace(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, with the folder's usual permissions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
