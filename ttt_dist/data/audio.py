"""Audio in, Mimi codes out: pieces of a stereo recording as the two channels' codebooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sphn
import torch
from moshi.models.compression import MimiModel
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from moshi.utils.compile import no_cuda_graph

from ttt_dist.data.codes_file import FRAME_RATE
from ttt_dist.data.manifest import DataError

SAMPLE_RATE = 24_000
FRAME_SAMPLES = round(SAMPLE_RATE / FRAME_RATE)  # 1920

# Formats in which a seek lands on the sample asked for. In mp3 and ogg it lands up to a packet away
# (half of a test signal's samples differed), so those are decoded whole and cut in memory.
_EXACT_SEEK = {".wav", ".flac"}
# A file that ends this much before its header says is damaged, not rounded.
_MISSING_AUDIO_SEC = 0.5
# Whole seconds are whole samples at any rate; an even number of them is whole frames of 80 ms.
_BLOCK_SEC = 10
# A block is resampled with this much on either side, cut off again: the filter reaches 32 ms far.
_CONTEXT_SEC = 1


class StereoFile:
    """A stereo recording, read piece by piece.

    Args:
        may_be_mono: take a mono file too, as the left channel beside a silent one.

    Raises:
        DataError: the file is unreadable, or has another number of channels.
    """

    def __init__(self, path: Path, *, may_be_mono: bool = False) -> None:
        self.path = path
        try:
            self._reader = sphn.FileReader(str(path))
            channels, self.sample_rate = self._reader.channels, int(self._reader.sample_rate)
            self.duration = float(self._reader.duration_sec)
            self._samples: np.ndarray | None = None
            if path.suffix.lower() not in _EXACT_SEEK:
                self._samples = np.asarray(self._reader.decode_all(), dtype=np.float32)
                self.duration = self._samples.shape[-1] / self.sample_rate
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError([f"{path}: cannot be read as audio: {error}"]) from error
        if channels not in ((1, 2) if may_be_mono else (2,)):
            allowed = "stereo or mono" if may_be_mono else "stereo"
            raise DataError([f"{path}: found {channels} channel(s), allowed is {allowed}"])

    def read(self, start_sec: float, duration_sec: float) -> np.ndarray:
        """Samples of `[start_sec, start_sec + duration_sec)` at 24 kHz, float32 `[2, n]`.

        Shorter at the end of the file. As in moshi-finetune, each piece is resampled on its own by
        sphn, whose filter delays by 11 ms from 44.1 or 48 kHz and 32 ms from 16 kHz; its codes
        carry that delay, so it is kept.
        """
        if self._samples is not None:
            first = int(start_sec * self.sample_rate)
            native = self._samples[:, first : first + int(duration_sec * self.sample_rate)]
        else:
            try:
                native = self._reader.decode(start_sec, duration_sec)
            except (ValueError, OSError, RuntimeError) as error:
                where = f"{self.path}: cannot be decoded from {start_sec:.2f} s on"
                raise DataError([f"{where}: {error}"]) from error
        expected = min(duration_sec, self.duration - start_sec)
        if native.shape[1] / self.sample_rate < expected - _MISSING_AUDIO_SEC:
            end = start_sec + native.shape[1] / self.sample_rate
            raise DataError(
                [f"{self.path}: ends at {end:.2f} s, its header says {self.duration:.2f} s"]
            )
        if native.shape[0] == 1:
            native = np.concatenate([native, np.zeros_like(native)])
        if self.sample_rate == SAMPLE_RATE or native.shape[1] == 0:
            return native
        wanted = native.shape[1] * SAMPLE_RATE // self.sample_rate
        # The resampler works in blocks and returns up to one more than the audio's length.
        native = np.ascontiguousarray(native)
        return sphn.resample(native, self.sample_rate, SAMPLE_RATE)[:, :wanted]

    def pieces(self, duration_sec: float) -> Iterator[tuple[float, np.ndarray]]:
        """Consecutive pieces as (start in seconds, samples `[2, n]`); the last may be short."""
        for index in range(math.ceil(self.duration / duration_sec)):
            # moshi-finetune's reader rounds starts to float32, which moves a border by a sample.
            start = float(np.float32(index * duration_sec))
            samples = self.read(start, duration_sec)
            if samples.shape[1] > 0:
                yield start, samples

    def blocks(self) -> Iterator[np.ndarray]:
        """The whole file at 24 kHz in blocks of 10 s, `[2, 240000]`; the last may be shorter.

        Put together they are the file resampled at once, whatever its length. Memory is that of a
        block, but for mp3 and ogg, which are decoded whole.
        """
        context = 0 if self.sample_rate == SAMPLE_RATE else _CONTEXT_SEC
        for start in range(0, math.ceil(self.duration), _BLOCK_SEC):
            begin = max(0, start - context)
            samples = self.read(float(begin), float(start + _BLOCK_SEC + context - begin))
            first = (start - begin) * SAMPLE_RATE
            block = samples[:, first : first + _BLOCK_SEC * SAMPLE_RATE]
            if block.shape[1] > 0:
                yield block
            if block.shape[1] < _BLOCK_SEC * SAMPLE_RATE:
                return


def valid_frames(samples: np.ndarray, frames: int) -> int:
    """Frames of a piece that hold audio: `[2, n]` at 24 kHz, at most `frames`."""
    return min(frames, math.ceil(samples.shape[1] / FRAME_SAMPLES))


@torch.no_grad()
def encode_pieces(
    mimi: MimiModel, pieces: Sequence[np.ndarray], frames: int, *, zero: int = -1
) -> torch.Tensor:
    """Codes of pieces `[2, n]` at 24 kHz, encoded in one batch.

    Args:
        mimi: in eval mode; its active codebooks are those of one channel (K).
        pieces: float32 samples, left and right.
        frames: T, the length of every piece's codes.
        zero: what frames after the end of a short piece hold.

    Returns:
        int32 `[P, 2K, T]` on the CPU: the left channel's codebooks, then the right's. Mimi is
        causal, so the silence that fills up a short piece leaves the frames before it unchanged.
    """
    longest = max(FRAME_SAMPLES, *(piece.shape[1] for piece in pieces))
    length = min(frames, math.ceil(longest / FRAME_SAMPLES)) * FRAME_SAMPLES
    batch = torch.zeros(len(pieces) * 2, 1, length)  # [P * 2, 1, samples]
    for index, piece in enumerate(pieces):
        cut = piece[:, :length]
        batch[2 * index : 2 * index + 2, 0, : cut.shape[1]] = torch.from_numpy(cut)
    device = next(mimi.parameters()).device
    encoded = mimi.encode(batch.to(device)).to("cpu", torch.int32)  # [P * 2, K, frames]
    codebooks = encoded.shape[1]
    codes = torch.full((len(pieces), 2 * codebooks, frames), zero, dtype=torch.int32)
    encoded = encoded.reshape(len(pieces), 2 * codebooks, -1)
    for index, piece in enumerate(pieces):
        valid = valid_frames(piece, frames)
        codes[index, :, :valid] = encoded[index, :, :valid]
    return codes


@torch.no_grad()
def encode_blocks(mimi: MimiModel, blocks: Iterable[np.ndarray]) -> torch.Tensor:
    """Codes of a recording that comes in blocks, Mimi's state being carried from one to the next.

    Args:
        mimi: in eval mode; its active codebooks are those of one channel (K).
        blocks: float32 samples `[2, n]` at 24 kHz, as `StereoFile.blocks` gives them: whole
            frames, but for the last.

    Returns:
        int32 `[2K, F]` on the CPU, what one call for all samples would give (to rounding): the left
        channel's codebooks, then the right's. The last frame is filled up with silence; without
        samples, F is 0.
    """
    device = next(mimi.parameters()).device
    encoded = [torch.zeros(2, mimi.num_codebooks, 0, dtype=torch.int32)]
    # The last block has a shape of its own, which a captured graph would refuse.
    with no_cuda_graph(), _stream(mimi, _BLOCK_SEC * SAMPLE_RATE // FRAME_SAMPLES):
        for block in blocks:
            missing = -block.shape[1] % FRAME_SAMPLES
            samples = torch.from_numpy(np.pad(block, ((0, 0), (0, missing))))[:, None]
            encoded.append(mimi.encode(samples.to(device)).to("cpu", torch.int32))  # [2, K, n]
    return torch.cat(encoded, dim=2).flatten(0, 1)


@contextmanager
def _stream(mimi: MimiModel, frames: int) -> Iterator[None]:
    """Mimi's streaming of two channels, in calls of up to `frames` frames.

    moshi's key caches hold `context` steps. A call of n steps overwrites the oldest n before it
    attends, so all but its last step would see too few; with n - 1 more, each sees its own context,
    as without streaming.
    """
    assert mimi.encoder_transformer is not None
    steps = round(frames * mimi.encoder_frame_rate / mimi.frame_rate)
    with mimi.streaming(2):
        for module in mimi.encoder_transformer.modules():
            if isinstance(module, StreamingMultiheadAttention):
                state = module._streaming_state
                narrow = state.kv_cache.cache  # [2, B, H, context, d]
                _, B, H, context, d = narrow.shape
                state.kv_cache = RingKVCache(
                    B, H, d, context + steps - 1, device=narrow.device, dtype=narrow.dtype
                )
        yield
