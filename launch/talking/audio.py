"""What Moshi hears and says in `launch/generate.py`: audio in by frames, audio and text out."""

import codecs
import math
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import sphn

from launch.errors import UserError
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE

# Audio is read in blocks, so that hours take no more memory than seconds. Whole seconds are whole
# samples at any rate, and exact in the float32 in which the reader takes times.
BLOCK_SEC = 8
# Resampled together with a block on either side and cut off again: its filter reaches 32 ms far.
CONTEXT_SEC = 1
# Formats in which a seek lands on the sample asked for (see `ttt_dist.data.audio`).
EXACT_SEEK = (".wav", ".flac")


class UserAudio:
    """The user's side of a conversation, from a mono file or the right channel of a stereo one.

    Raises:
        UserError: the file is no readable audio, is empty, or has more than two channels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: np.ndarray | None = None  # [channels, n] where the format can't seek
        try:
            self._reader = sphn.FileReader(str(path))
            self.channels = int(self._reader.channels)
            self.rate = int(self._reader.sample_rate)
            samples = round(float(self._reader.duration_sec) * self.rate)
            if path.suffix.lower() not in EXACT_SEEK:
                self._samples = np.asarray(self._reader.decode_all(), dtype=np.float32)
                samples = self._samples.shape[-1]
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(
                f"--audio: {path}: cannot be read as audio: {error}; allowed: wav, flac, mp3, ogg"
            ) from error
        if self.channels not in (1, 2):
            raise UserError(
                f"--audio: {path}: found {self.channels} channels, allowed: mono (the user), or "
                "stereo with the user on the right, as in training"
            )
        if samples == 0:
            raise UserError(f"--audio: {path}: holds no audio")
        self.native_samples = samples
        self.samples = max(1, samples * SAMPLE_RATE // self.rate)  # at Mimi's rate

    @property
    def seconds(self) -> float:
        """Length of the file."""
        return self.native_samples / self.rate

    @property
    def frames(self) -> int:
        """Mimi's frames, the last one filled up with silence."""
        return math.ceil(self.samples / FRAME_SAMPLES)

    def describe(self) -> str:
        """What of the file is taken, and how, in one line."""
        taken = "mono" if self.channels == 1 else "stereo: the right channel is the user"
        if self.rate == SAMPLE_RATE:
            rate = f"{SAMPLE_RATE} Hz"
        else:
            rate = f"resampled from {self.rate} to {SAMPLE_RATE} Hz"
        return f"user audio: {self.path}, {self.seconds:.2f} s, {taken}, {rate}"

    def read_frames(self) -> Iterator[np.ndarray]:
        """Every frame, float32 `[FRAME_SAMPLES]` at 24 kHz.

        Raises:
            UserError: the file cannot be decoded, or ends before its header says.
        """
        rest: np.ndarray = np.zeros(0, dtype=np.float32)
        for samples in self._blocks():
            rest = np.concatenate([rest, samples])
            whole = len(rest) // FRAME_SAMPLES * FRAME_SAMPLES
            yield from rest[:whole].reshape(-1, FRAME_SAMPLES)
            rest = rest[whole:]
        if len(rest):
            yield np.pad(rest, (0, FRAME_SAMPLES - len(rest)))

    def _blocks(self) -> Iterator[np.ndarray]:
        """All samples at 24 kHz, block after block; as if the whole file were resampled at once."""
        for start in range(0, math.ceil(self.seconds), BLOCK_SEC):
            last = self.samples - start * SAMPLE_RATE
            if last <= 0:
                return
            wanted = min(BLOCK_SEC * SAMPLE_RATE, last)
            if self.rate == SAMPLE_RATE:
                yield self._native(start, start + BLOCK_SEC)[:wanted]
                continue
            begin = max(0, start - CONTEXT_SEC)
            native = self._native(begin, start + BLOCK_SEC + CONTEXT_SEC)
            skip = (start - begin) * SAMPLE_RATE
            resampled = sphn.resample(native[None], self.rate, SAMPLE_RATE)[0]
            yield resampled[skip : skip + wanted]

    def _native(self, start: int, end: int) -> np.ndarray:
        """The user's channel in seconds `[start, end)`, at the file's rate; shorter at its end."""
        first, last = start * self.rate, min(end * self.rate, self.native_samples)
        if self._samples is not None:
            samples = self._samples[:, first:last]
        else:
            try:
                samples = self._reader.decode(float(start), float(end - start))
            except (ValueError, OSError, RuntimeError) as error:
                raise UserError(
                    f"--audio: {self.path}: cannot be decoded from {start} s on: {error}"
                ) from error
        if samples.shape[1] < last - first:
            ends = start + samples.shape[1] / self.rate
            raise UserError(
                f"--audio: {self.path}: ends at {ends:.2f} s, its header says {self.seconds:.2f} s"
            )
        return np.ascontiguousarray(samples[-1, : last - first], dtype=np.float32)


class MoshiAudio:
    """A mono 16-bit wav file at 24 kHz that grows frame by frame; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = wave.open(str(path), "wb")  # noqa: SIM115
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(SAMPLE_RATE)

    def write(self, samples: np.ndarray) -> None:
        """Append float samples `[n]`, clipped to `[-1, 1]`."""
        scaled = np.round(np.clip(samples, -1.0, 1.0) * 32767.0)
        self._file.writeframes(scaled.astype("<i2").tobytes())

    def __enter__(self) -> "MoshiAudio":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class MoshiText:
    """Text tokens to text as they come; characters spelt in several byte tokens are put together.

    Args:
        tokenizer: the release's.
        silent: ids that say nothing: padding and its end.

    `pending` is the start of a character whose other bytes are still to come, at most 3 bytes; it
    can be set, to go on with a text that another has begun.
    """

    def __init__(
        self, tokenizer: sentencepiece.SentencePieceProcessor, silent: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        return self._bytes.getstate()[0]

    @pending.setter
    def pending(self, value: bytes) -> None:
        self._bytes.setstate((value, 0))

    def text_of(self, token: int) -> str:
        """What `token` adds to the text; empty for most frames."""
        if token in self._silent or not 0 <= token < self._tokenizer.vocab_size():
            return ""
        if self._tokenizer.is_control(token) or self._tokenizer.is_unknown(token):
            return ""
        piece = self._tokenizer.id_to_piece(token)
        if self._tokenizer.is_byte(token):
            return self._bytes.decode(bytes([int(piece[3:-1], 16)]))
        unfinished = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return unfinished + piece.replace("▁", " ")
