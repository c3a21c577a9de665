"""Wav files for tests."""

import wave
from pathlib import Path

import numpy as np


def write_wav(path: Path, samples: np.ndarray, rate: int = 24_000) -> Path:
    """16-bit wav of float samples `[channels, n]`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples.T.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path
