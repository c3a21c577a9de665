"""Filling the cache: which recordings lack codes, and encoding them, split over ranks.

No process group is involved: a rank takes its share by number alone, so the same code serves a run
that encodes its own little data and a job of hours on many nodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import CheckpointInfo
from moshi.models.loaders import _mimi_config as MIMI_CONFIG

from ttt_dist.data.audio import (
    SAMPLE_RATE,
    StereoFile,
    encode_blocks,
    encode_pieces,
    valid_frames,
)
from ttt_dist.data.cache import CodesCache, CodesSpec
from ttt_dist.data.codes_file import FRAME_RATE
from ttt_dist.data.interleave import (
    Word,
    parse_alignments,
    piece_words,
    text_stream,
    tokenize_word,
)
from ttt_dist.data.manifest import DataError, Recording
from ttt_dist.data.ready import open_ready

# Mimi's first layers hold some 6 MB a second and activation at full width; this keeps a batch of
# pieces near one gigabyte. Longer pieces are encoded one at a time.
_BATCH_SECONDS = 30.0


@dataclass(frozen=True)
class Codec:
    """What turns a recording into codes: Mimi (eval mode, on its device) and the tokenizer."""

    mimi: MimiModel
    tokenizer: sentencepiece.SentencePieceProcessor


@dataclass(frozen=True)
class EncodeReport:
    """What `encode_missing` did with this rank's share. Seconds of audio, and of work."""

    recordings: int
    pieces: int
    audio_sec: float
    encoded: int
    encoded_sec: float
    work_sec: float

    @property
    def cached(self) -> int:
        """Recordings whose codes were there already."""
        return self.recordings - self.encoded


def load_codec(info: CheckpointInfo, spec: CodesSpec, device: torch.device | str) -> Codec:
    """Load a release's Mimi and tokenizer, and check that they fit its language model.

    Raises:
        DataError: Mimi's rates or codebooks, or the tokenizer's size, don't fit.
    """
    problems = mimi_config_problems(info)
    if problems:
        raise DataError(problems)
    config = info.lm_config or {}
    mimi = info.get_mimi(device=device).eval()
    mimi.set_num_codebooks(spec.codebooks)
    tokenizer = info.get_text_tokenizer()
    if mimi.sample_rate != SAMPLE_RATE or mimi.frame_rate != FRAME_RATE:
        problems.append(
            f"Mimi ({info.mimi_weights}): found {mimi.sample_rate} Hz and {mimi.frame_rate} frames "
            f"a second, allowed are {SAMPLE_RATE} and {FRAME_RATE}"
        )
    if mimi.cardinality != config.get("card", 2048):
        problems.append(
            f"Mimi ({info.mimi_weights}): codebooks of {mimi.cardinality} codes don't fit the "
            f"model's card = {config.get('card', 2048)}"
        )
    window = (info.mimi_config or MIMI_CONFIG)["transformer"].get("context")
    if spec.frames is None and window is None:
        problems.append(
            f"Mimi ({info.mimi_weights}): its transformer has no context, so a recording can't be "
            "encoded block by block; use the Mimi of a release, or ttt.persistent_states: false"
        )
    if tokenizer.vocab_size() > config.get("text_card", 32_000):
        problems.append(
            f"tokenizer ({info.tokenizer}): {tokenizer.vocab_size()} tokens don't fit the model's "
            f"text_card = {config.get('text_card', 32_000)}"
        )
    if problems:
        raise DataError(problems)
    return Codec(mimi, tokenizer)


def mimi_config_problems(info: CheckpointInfo) -> list[str]:
    """Why Mimi can't be built, or can't give its language model's codebooks; reads no weight."""
    if info.mimi_config is None:  # Kyutai's own: 32 codebooks
        return []
    missing = sorted(MIMI_CONFIG.keys() - info.mimi_config.keys())
    if missing:
        return [
            f"Mimi's configuration (mimi_config_name in config.json): {', '.join(missing)}: not "
            "there; use the file that was released with Mimi"
        ]
    quantizer = info.mimi_config["quantizer"]
    codebooks = quantizer.get("n_q") if isinstance(quantizer, dict) else None
    wanted = int((info.lm_config or {}).get("n_q", 16)) // 2
    if not isinstance(codebooks, int) or codebooks < wanted:
        return [
            f"Mimi's configuration (mimi_config_name in config.json): quantizer: n_q: found "
            f"{codebooks!r}; the model hears and speaks {wanted} codebooks: use the Mimi that was "
            "released with it"
        ]
    return []


def missing_seconds(recordings: Sequence[Recording], cache: CodesCache) -> float:
    """Seconds of audio without cached codes, by the manifests' durations; reads no audio.

    A recording whose content wasn't hashed under its present path since it was last modified counts
    as missing, so after a move of the data this is an upper bound.
    """
    total = 0.0
    for recording in recordings:
        if recording.is_codes:
            continue
        key = cache.likely_key(recording)
        if key is None or cache.find(key) is None:
            total += recording.duration
    return total


def share_of(recordings: Sequence[Recording], rank: int, world_size: int) -> list[Recording]:
    """The recordings that `rank` encodes; together the shares are all of them, each once.

    Longest first, dealt out in turn, so that shares last about equally long. A file that is named
    twice counts once. What is cached plays no part, since other ranks change that meanwhile.
    """
    unique = {recording.path: recording for recording in recordings}
    ordered = sorted(unique.values(), key=lambda item: (-item.duration, str(item.path)))
    return ordered[rank::world_size]


def encode_missing(
    recordings: Sequence[Recording],
    cache: CodesCache,
    codec: Callable[[], Codec],
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Recording, bool], None] | None = None,
) -> EncodeReport:
    """Encode this rank's share of the recordings that the cache lacks.

    Of recordings that are codes already, it checks every value.

    Args:
        recordings: of all ranks, in the same order everywhere.
        cache: where codes are looked for and written.
        codec: called once, and only where something is missing.
        rank, world_size: this process's share.
        progress: called after each recording of the share with (recording, was it encoded now).

    Raises:
        DataError: alignment files and ready codes that cannot be used (before anything is encoded),
            or audio that cannot be decoded (after all the rest is encoded and kept).
    """
    begin = time.monotonic()
    everything = share_of(recordings, rank, world_size)
    share = [recording for recording in everything if not recording.is_codes]
    keys = cache.keys(share)
    problems: list[str] = []
    words: dict[int, list[Word]] = {}
    pieces = 0
    audio_sec = encoded_sec = 0.0
    for recording in everything:
        if recording.is_codes:
            try:
                pieces += _check_ready(recording, cache.spec)
            except DataError as error:
                problems += [f"{recording.where}: {problem}" for problem in error.problems]
            audio_sec += recording.duration
            if progress is not None:
                progress(recording, False)
    for index, (recording, key) in enumerate(zip(share, keys, strict=True)):
        found = cache.find(key, verify=True)
        if found is not None:
            pieces += found.num_pieces
            audio_sec += recording.duration
            if progress is not None:
                progress(recording, False)
            continue
        if not recording.has_text:
            words[index] = []
            continue
        try:
            words[index] = parse_alignments(
                recording.alignments_path.read_bytes(), recording.alignments_path
            )
        except DataError as error:
            problems += [f"{recording.where}: {problem}" for problem in error.problems]
        except OSError as error:
            problems.append(
                f"{recording.where}: {recording.alignments_path} cannot be read: {error}"
            )
    if problems:
        raise DataError(problems)

    loaded = codec() if words else None
    for index, aligned in words.items():
        recording = share[index]
        assert loaded is not None
        try:
            codes = encode_recording(recording, aligned, loaded, cache.spec)
        except DataError as error:
            problems += [f"{recording.where}: {problem}" for problem in error.problems]
            continue
        cache.write(keys[index], codes)
        pieces += codes.shape[0]
        audio_sec += recording.duration
        encoded_sec += recording.duration
        if progress is not None:
            progress(recording, True)
    if problems:
        raise DataError(problems)
    return EncodeReport(
        recordings=len(everything),
        pieces=pieces,
        audio_sec=audio_sec,
        encoded=len(words),
        encoded_sec=encoded_sec,
        work_sec=time.monotonic() - begin,
    )


def _check_ready(recording: Recording, spec: CodesSpec) -> int:
    """Pieces of ready codes; DataError where they don't fit the model."""
    codes = open_ready(recording.path, spec)
    for piece in range(codes.num_pieces):
        codes.read(piece)
    return codes.num_pieces


def encode_recording(
    recording: Recording, words: Sequence[Word], codec: Codec, spec: CodesSpec
) -> torch.Tensor:
    """Codes of a recording, int32 `[N, R, T]`, in pieces or whole, as `spec` has it.

    Rows: text, the left channel's codebooks (Moshi), the right channel's (the user). A short last
    piece is kept; its frames after the recording's end hold -1. Whole, N is 1 and T the frames of
    the recording, the last one filled up with silence.
    """
    duration_sec, frames = spec.duration_sec, spec.frames
    if duration_sec is None or frames is None:
        codes = _encode_whole(recording, words, codec, spec)[None]
    else:
        codes = _encode_pieces(recording, words, codec, spec, duration_sec, frames)
    if codes.numel() == 0:
        raise DataError([f"{recording.path} holds no audio"])
    return codes


def _encode_whole(
    recording: Recording, words: Sequence[Word], codec: Codec, spec: CodesSpec
) -> torch.Tensor:
    """`[R, F]`; what is said and heard runs on without borders."""
    file = StereoFile(recording.path, may_be_mono=recording.may_be_mono)
    audio = encode_blocks(codec.mimi, file.blocks())
    text = _text(piece_words(words, 0.0, math.inf), audio.shape[1], codec, spec)
    return torch.cat([text[None], audio])


def _encode_pieces(
    recording: Recording,
    words: Sequence[Word],
    codec: Codec,
    spec: CodesSpec,
    duration_sec: float,
    frames: int,
) -> torch.Tensor:
    """`[N, R, T]`; every piece on its own."""
    zero = spec.text_ids.zero
    batch_size = max(1, int(_BATCH_SECONDS // duration_sec))
    encoded = [torch.zeros(0, spec.rows, frames, dtype=torch.int32)]
    batch: list[tuple[float, np.ndarray]] = []

    def flush() -> None:
        audio = encode_pieces(codec.mimi, [samples for _, samples in batch], frames, zero=zero)
        text = torch.full((len(batch), 1, frames), zero, dtype=torch.int32)
        for row, (start, samples) in zip(text, batch, strict=True):
            valid = valid_frames(samples, frames)
            row[0, :valid] = _text(piece_words(words, start, duration_sec), valid, codec, spec)
        encoded.append(torch.cat([text, audio], dim=1))
        batch.clear()

    file = StereoFile(recording.path, may_be_mono=recording.may_be_mono)
    for piece in file.pieces(duration_sec):
        batch.append(piece)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    return torch.cat(encoded)


def _text(words: Sequence[Word], frames: int, codec: Codec, spec: CodesSpec) -> torch.Tensor:
    """The text stream, int32 `[frames]`."""
    stream = text_stream(
        words, frames, lambda word: tokenize_word(codec.tokenizer, word), spec.text_ids
    )
    return torch.tensor(stream, dtype=torch.int32)
