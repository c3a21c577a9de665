"""Which recordings a run reads: moshi-finetune's `train_data` / `eval_data` specification.

A specification is one `.jsonl`, a folder of them, or several of these as `path:weight,path:weight`.
A manifest has one JSON object a line, `{"path": "a.wav", "duration": 24.52}`; `path` is relative to
the manifest and stays in its folder (no `..` leads out), or is absolute. `a.json` beside the audio
holds the word alignments.

A `path` that ends in `.safetensors` holds codes instead of audio: `codes`, int32 or int64 `[R, F]`,
12.5 frames a second: text, the left channel's codebooks, the right one's; -1 where there is none.
It needs no `.json`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import sphn

from ttt_dist.data.codes_file import (
    CODES_SUFFIX,
    FRAME_RATE,
    CodesFileError,
    ready_codes_entry,
)

# A manifest's duration is often rounded; beyond this the line describes another file.
DURATION_TOLERANCE_SEC = 1.0
DURATION_TOLERANCE_SHARE = 0.01
LONGEST_SEC = 1e9  # above every recording; a whole number in JSON may be too large for a float
# Headers lie on network disks more often than not: latency, not work, is what threads hide.
CHECK_THREADS = 8
# Of a source's weight in all: the order holds every source in proportion, in blocks of 2 / share.
MIN_SHARE = 1e-6
# A manifest of the wrong kind fails on every line; the first ones tell all there is to tell.
_MAX_PROBLEMS_A_MANIFEST = 20


class DataError(ValueError):
    """The data cannot be used; `problems` lists everything found, one sentence each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Recording:
    """One stereo file of a manifest: left channel Moshi, right channel the user; or its codes.

    Attributes:
        path: the audio file, or the file of codes, absolute.
        duration: seconds, as the manifest says (used for estimates; pieces are cut from the audio).
        alignments_path: the `.json` beside the audio; of codes, there is none.
        manifest, line: where it was named, for messages; lines count from 1.
        may_be_mono: take a mono file too, as Moshi's channel beside a silent user; not in training.
        has_text: False: there are no alignments, and the text is padding throughout; not in
            training.
    """

    path: Path
    duration: float
    alignments_path: Path
    manifest: Path
    line: int
    may_be_mono: bool = False
    has_text: bool = True

    @property
    def where(self) -> str:
        return f"{self.manifest}:{self.line}"

    @property
    def is_codes(self) -> bool:
        """Whether the file holds codes, not audio."""
        return self.path.suffix == CODES_SUFFIX


@dataclass(frozen=True)
class Source:
    """One item of a specification: its recordings, and how often it is drawn (relative weight)."""

    path: Path
    weight: float
    recordings: tuple[Recording, ...]


def read_sources(spec: str, *, field: str, check_files: bool = True) -> tuple[Source, ...]:
    """Read a specification and every manifest it names.

    Args:
        spec, field: as for `scan_sources`.
        check_files: look at every audio header, and for every alignment file, too. One rank is
            enough.

    Raises:
        DataError: with every problem of every manifest and file, not only the first.
    """
    sources, problems = scan_sources(spec, field=field)
    if check_files:
        problems += check_recordings(all_recordings(sources))
    if problems:
        raise DataError(problems)
    return sources


def scan_sources(spec: str, *, field: str) -> tuple[tuple[Source, ...], list[str]]:
    """What can be read of a specification and its manifests, and all that is wrong with them.

    Args:
        spec: as in the module's docstring; relative paths start from the working folder.
        field: the configuration key it comes from, named in messages (`data.train_data`).
    """
    problems: list[str] = []
    sources: list[Source] = []
    seen: set[Path] = set()
    items = [item.strip() for item in spec.split(",") if item.strip()]
    if not items:
        problems.append(
            f"{field}: found {spec!r}, allowed are a .jsonl manifest, a folder of them, "
            "or several as path:weight,path:weight"
        )
    for item in items:
        path, weight, problem = _parse_item(item, field)
        if problem is not None:
            problems.append(problem)
            continue
        if path in seen:
            problems.append(f"{field}: {path} is named twice; name it once, with one weight")
            continue
        seen.add(path)
        recordings: list[Recording] = []
        for manifest in _manifests(path, field, problems):
            recordings += _read_manifest(manifest, problems)
        sources.append(Source(path, weight, tuple(recordings)))
    weights = [source.weight for source in sources]
    problems += small_shares([source.path for source in sources], weights, field=field)
    return tuple(sources), problems


def small_shares(paths: Sequence[Path], weights: Sequence[float], *, field: str) -> list[str]:
    """Sources whose share of all weights is smaller than an order can give them, as problems."""
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    return [
        f"{field}: the weight of {path} is {share:.3g} of all, allowed is {MIN_SHARE:g} or more; "
        "raise it, lower the others, or leave this source out"
        for path, share in zip(paths, shares.tolist(), strict=True)
        if share < MIN_SHARE
    ]


def all_recordings(sources: Iterable[Source]) -> list[Recording]:
    """The recordings of all sources, in order."""
    return [recording for source in sources for recording in source.recordings]


def check_recordings(recordings: Sequence[Recording]) -> list[str]:
    """What is wrong with the files behind `recordings`; reads audio headers, no samples."""
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        return [problem for found in pool.map(check_recording, recordings) for problem in found]


def _parse_item(item: str, field: str) -> tuple[Path, float, str | None]:
    text, colon, tail = item.rpartition(":")
    weight = 1.0
    if colon and not Path(item).expanduser().exists():
        try:
            weight = float(tail)
        except ValueError:
            return (
                Path(item),
                0.0,
                f"{field}: found {item!r}, which is no file or folder, and {tail!r} is no weight; "
                "write path or path:weight",
            )
        if not (math.isfinite(weight) and weight > 0):
            return (
                Path(text),
                0.0,
                f"{field}: found weight {tail!r} for {text}, allowed are numbers above 0",
            )
    else:
        text = item
    path = Path(text).expanduser().absolute()
    if not path.exists():
        return path, weight, f"{field}: found {text!r}, but there is no file or folder {path}"
    return path, weight, None


def _manifests(path: Path, field: str, problems: list[str]) -> list[Path]:
    if path.is_file():
        return [path]
    # Sorted, because a folder's own order differs from host to host and so would the data order.
    manifests = sorted(path.rglob("*.jsonl"))
    if not manifests:
        problems.append(f"{field}: the folder {path} holds no .jsonl manifest")
    return manifests


def _read_manifest(manifest: Path, problems: list[str]) -> list[Recording]:
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{manifest}: cannot be read as text: {error}")
        return []
    recordings: list[Recording] = []
    faults: list[str] = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        outcome = _parse_line(text, manifest, number)
        if isinstance(outcome, Recording):
            recordings.append(outcome)
        else:
            faults.append(outcome)
    if len(faults) > _MAX_PROBLEMS_A_MANIFEST:
        more = len(faults) - _MAX_PROBLEMS_A_MANIFEST
        faults = [*faults[:_MAX_PROBLEMS_A_MANIFEST], f"{manifest}: {more} further bad lines"]
    problems += faults
    if not recordings and not faults:
        problems.append(
            f"{manifest}: holds no recording; each line must be "
            '{"path": "file.wav", "duration": seconds}'
        )
    return recordings


def _is_file_name(name: object) -> TypeGuard[str]:
    """Whether a system can be asked for it: no NUL, and no half of a surrogate pair."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_line(text: str, manifest: Path, number: int) -> Recording | str:
    where = f"{manifest}:{number}"
    form = '{"path": "file.wav", "duration": seconds}'
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:  # of nesting or a number without an end, too
        return f"{where}: is no JSON ({error}); each line must be {form}"
    if not isinstance(entry, dict):
        return f"{where}: found a JSON {type(entry).__name__}, each line must be {form}"
    name, duration = entry.get("path"), entry.get("duration")
    if not _is_file_name(name):
        return f"{where}: path: found {name!r}, allowed is a file name; each line must be {form}"
    if (
        not isinstance(duration, (int, float))
        or isinstance(duration, bool)
        or not 0 < duration < LONGEST_SEC
    ):
        return f"{where}: duration: found {duration!r}, allowed are seconds above 0 ({name})"
    if not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return (
            f"{where}: path: found {name!r}, which leads out of the manifest's folder "
            f"{manifest.parent}; allowed are paths below it, and absolute ones"
        )
    path = (manifest.parent / name).absolute()
    return Recording(path, float(duration), path.with_suffix(".json"), manifest, number)


@dataclass(frozen=True)
class AudioHeader:
    """What an audio file says of itself."""

    channels: int
    sample_rate: int  # Hz
    seconds: float


def read_header(path: Path) -> AudioHeader:
    """The header of an audio file; reads no samples.

    Raises:
        DataError: the file can't be opened, or is no audio.
    """
    try:
        reader = sphn.FileReader(str(path))
        return AudioHeader(reader.channels, int(reader.sample_rate), float(reader.duration_sec))
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(
            [
                f"the audio header of {path} is unreadable ({error}); "
                "use wav, flac, mp3 or ogg vorbis"
            ]
        ) from error


def check_recording(recording: Recording) -> list[str]:
    """What is wrong with the files of a recording, as far as its header tells."""
    # Unlike Path.is_file, it raises for no name and no folder that can't be looked into.
    if not os.path.isfile(recording.path):
        # Its name is what is wrong, and the other file's follows from it.
        kind = "file of codes" if recording.is_codes else "audio file"
        return [f"{recording.where}: there is no {kind} {recording.path}"]
    if recording.is_codes:
        return [f"{recording.where}: {problem}" for problem in _check_codes(recording)]
    problems = _check_audio(recording)
    if recording.has_text and not os.path.isfile(recording.alignments_path):
        problems.append(
            f"there is no alignment file {recording.alignments_path} beside the audio; it "
            'must hold {"alignments": [[word, [start, end], speaker], ...]}'
        )
    return [f"{recording.where}: {problem}" for problem in problems]


def _check_audio(recording: Recording) -> list[str]:
    path = recording.path
    try:
        header = read_header(path)
    except DataError as error:
        return list(error.problems)
    problems = []
    if header.channels not in ((1, 2) if recording.may_be_mono else (2,)):
        problems.append(
            f"{path} has {header.channels} channel{'' if header.channels == 1 else 's'}, allowed "
            f"is stereo{' or mono' * recording.may_be_mono}: left Moshi, right the user"
        )
    return problems + _check_duration(recording, header.seconds)


def _check_codes(recording: Recording) -> list[str]:
    try:
        frames = ready_codes_entry(recording.path).shape[1]
    except (CodesFileError, OSError) as error:
        return [f"{recording.path}: cannot be read as codes: {error}"]
    return _check_duration(recording, frames / FRAME_RATE)


def _check_duration(recording: Recording, seconds: float) -> list[str]:
    tolerance = max(DURATION_TOLERANCE_SEC, DURATION_TOLERANCE_SHARE * recording.duration)
    if abs(seconds - recording.duration) <= tolerance:
        return []
    return [
        f"duration: found {recording.duration:g} s, but {recording.path} lasts {seconds:.2f} s; "
        "write the file's duration into the manifest"
    ]
