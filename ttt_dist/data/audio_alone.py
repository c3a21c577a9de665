"""What an evaluation may read and training may not: audio alone, mono, a folder without manifest.

A recording without alignments has a text stream of padding: it is heard, and what is said isn't
known. A mono recording is Moshi's own channel, beside a user who is silent, for Moshi predicts the
codes of its own channel alone.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ttt_dist.data.manifest import (
    CHECK_THREADS,
    DataError,
    Recording,
    Source,
    all_recordings,
    check_recordings,
    read_header,
    scan_sources,
)

AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".wav")


def scan_audio_sources(
    spec: str, *, field: str, check_files: bool = True
) -> tuple[tuple[Source, ...], list[str]]:
    """What can be read of a specification, audio without text and mono too, and all mistakes in it.

    Args:
        spec: as `manifest.read_sources` takes it; or a folder of audio files without any manifest:
            all files in it and below it, in the order of their names.
        field: what it is called in messages.
        check_files: look at every audio header of a manifest. One rank is enough.
    """
    folder = Path(spec).expanduser().absolute()
    files = _audio_files(folder)
    if not files:
        sources, problems = scan_sources(spec, field=field)
        sources = tuple(
            dataclasses.replace(source, recordings=tuple(map(_heard, source.recordings)))
            for source in sources
        )
        if check_files:
            problems += check_recordings(all_recordings(sources))
        return sources, problems
    recordings, problems = [], []
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        found = pool.map(_seconds, files)  # there is no other word on how long they are
        for number, (path, seconds) in enumerate(zip(files, found, strict=True), start=1):
            if isinstance(seconds, str):
                problems.append(f"{field}: {seconds}")
                continue
            recording = Recording(path, seconds, path.with_suffix(".json"), folder, number)
            recordings.append(_heard(recording))
    return (Source(folder, 1.0, tuple(recordings)),), problems


def _audio_files(folder: Path) -> list[Path]:
    """All audio files in and below a folder that holds no manifest; none where it isn't such."""
    if not folder.is_dir() or next(folder.rglob("*.jsonl"), None) is not None:
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)


def _seconds(path: Path) -> float | str:
    """How long a file lasts, or why it can't be heard."""
    try:
        header = read_header(path)
    except DataError as error:
        return "; ".join(error.problems)
    if header.channels not in (1, 2):
        return f"{path} has {header.channels} channels, allowed is mono or stereo"
    if not header.seconds > 0:
        return f"{path} holds no audio"
    return header.seconds


def _heard(recording: Recording) -> Recording:
    """The same, mono or not, with the text that there is."""
    has_text = recording.is_codes or os.path.isfile(recording.alignments_path)
    return dataclasses.replace(recording, may_be_mono=True, has_text=has_text)
