"""All that the files of a dataset can show to be wrong, and what training makes of the rest.

Training itself looks at manifests and audio headers when it starts (`manifest.check_recordings`)
and at alignments and samples when it encodes them; here everything is read ahead of that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ttt_dist.data.audio import SAMPLE_RATE, StereoFile
from ttt_dist.data.interleave import MAIN_SPEAKER, Word, read_words
from ttt_dist.data.manifest import (
    CHECK_THREADS,
    DURATION_TOLERANCE_SEC,
    DataError,
    Recording,
    check_recording,
    read_header,
)

_DECODED_SEC = 30.0  # at once


@dataclass(frozen=True)
class FileReport:
    """What was found in the files of one recording.

    Attributes:
        seconds: of audio, as its header says; 0 where there is none to read.
        problems: whole sentences that name manifest line and file.
        remarks: what training takes, but in its own way; without names, so that they can be
            collected over files.
    """

    recording: Recording
    seconds: float
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    def pieces(self, duration_sec: float) -> int:
        """How many pieces of this length training cuts it into; the last may be short."""
        return math.ceil(self.seconds / duration_sec)


def check_contents(
    recordings: Sequence[Recording],
    *,
    decode: bool = False,
    progress: Callable[[], object] | None = None,
) -> list[FileReport]:
    """Read every audio header and every alignment file.

    Args:
        decode: read all samples too, as encoding will.
        progress: called after each recording.
    """

    def check(recording: Recording) -> FileReport:
        report = _check_files(recording, decode=decode)
        if progress is not None:
            progress()
        return report

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        return list(pool.map(check, recordings))


def collect_notes(reports: Iterable[FileReport]) -> list[str]:
    """Every remark once, with the first recording it is about, and recordings named repeatedly."""
    about: dict[str, list[Recording]] = {}
    first: dict[Path, Recording] = {}
    repeated = []
    for report in reports:
        recording = report.recording
        for remark in report.remarks:
            about.setdefault(remark, []).append(recording)
        earlier = first.setdefault(recording.path.resolve(), recording)
        if earlier is not recording:
            repeated.append(
                f"{recording.where}: {recording.path} is named before, at {earlier.where}; "
                "training meets it each time"
            )
    notes = []
    for remark, found in about.items():
        more = f" (and {len(found) - 1} further recordings)" if len(found) > 1 else ""
        notes.append(f"{found[0].where}: {found[0].path}{more}: {remark}")
    return notes + repeated


def too_few_pieces(pieces: int, data_ranks: int, duration_sec: float, field: str) -> list[str]:
    """Why `pieces` can't be spread over ranks: each takes others, and one of its own at least."""
    if pieces >= data_ranks:
        return []
    return [
        f"{field}: holds {pieces} piece{'' if pieces == 1 else 's'} of {duration_sec:g} s for "
        f"{data_ranks} data-parallel ranks; add recordings, shorten duration_sec, or start at most "
        f"{max(1, pieces)}"
    ]


def too_few_recordings(recordings: int, lanes: int, field: str) -> list[str]:
    """Why `recordings` can't fill the lanes of training along them: each follows others."""
    if recordings >= lanes:
        return []
    return [
        f"{field}: holds {recordings} recording{'' if recordings == 1 else 's'} for {lanes} lanes, "
        "which are followed side by side (ttt.persistent_states: true); add recordings, or lower "
        f"batch_size, num_microbatches, global_batch_size or the number of ranks to at most "
        f"{recordings} lane{'' if recordings == 1 else 's'} in all, or set "
        "ttt.persistent_states: false"
    ]


def _check_files(recording: Recording, *, decode: bool) -> FileReport:
    problems, remarks = check_recording(recording), []
    if recording.is_codes:
        # Its values are a matter of the model: they are checked where that is known.
        return FileReport(recording, 0.0 if problems else recording.duration, tuple(problems), ())
    seconds = 0.0
    found: list[str] = []
    try:
        header = read_header(recording.path)
    except DataError:  # `check_recording` has told
        pass
    else:
        seconds = header.seconds
        if header.sample_rate != SAMPLE_RATE:
            remarks.append(f"{header.sample_rate} Hz, resampled to {SAMPLE_RATE}")
        if decode and header.channels == 2:
            found += _decode(recording.path)
    if os.path.isfile(recording.alignments_path):
        wrong, unusual = _check_alignments(recording.alignments_path, seconds)
        found += wrong
        remarks += unusual
    problems += [f"{recording.where}: {problem}" for problem in found]
    return FileReport(recording, seconds, tuple(problems), tuple(remarks))


def _decode(path: Path) -> list[str]:
    try:
        for _ in StereoFile(path).pieces(_DECODED_SEC):
            pass
    except DataError as error:
        return list(error.problems)
    return []


def _check_alignments(path: Path, seconds: float) -> tuple[list[str], list[str]]:
    """Problems and remarks; `seconds` of the audio, 0 where they aren't known."""
    try:
        words = read_words(path.read_bytes(), path)
    except OSError as error:
        return [f"{path}: cannot be read: {error}"], []
    except DataError as error:
        return list(error.problems), []
    problems, remarks = [], []
    outside = [word for word in words if word.start < 0 or (seconds and word.start >= seconds)]
    far = [word for word in outside if _distance(word, seconds) > DURATION_TOLERANCE_SEC]
    if far:
        problems.append(
            f"{path}: {len(far)} of {len(words)} words start outside the audio of {seconds:.2f} s "
            f"({far[0].text!r} at {far[0].start:g} s); training would leave them out: times are in "
            "seconds from the beginning of the file that they belong to"
        )
    elif outside:
        remarks.append("words that start just outside the audio, left out")
    speakers = {word.speaker for word in words}
    if speakers and MAIN_SPEAKER not in speakers:
        names = ", ".join(sorted(map(repr, speakers)))
        problems.append(
            f"{path}: no word is of {MAIN_SPEAKER!r}, found {names}; training would take Moshi as "
            f"silent: name the left channel's speaker {MAIN_SPEAKER}"
        )
    elif len(speakers) > 1:
        remarks.append("words of other speakers, left out")
    elif not speakers:
        remarks.append("no words: Moshi's text is padding throughout")
    if any(word.end <= word.start for word in words):
        remarks.append("words that end before they last, left out")
    starts = [word.start for word in words]
    if starts != sorted(starts):
        remarks.append("times not ascending, sorted")
    return problems, remarks


def _distance(word: Word, seconds: float) -> float:
    """From the audio's beginning or end, in seconds, of a word that starts outside."""
    return max(-word.start, word.start - seconds)
