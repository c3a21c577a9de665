"""What the data tests share: a small real Mimi and tokenizer, and recordings made on the spot."""

import copy
import functools
import io
import json
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.quantization.core_vq import EuclideanCodebook

from tests.wav import write_wav
from ttt_dist.data.cache import CodesCache, CodesSpec
from ttt_dist.data.encode import Codec
from ttt_dist.data.interleave import TextIds
from ttt_dist.data.manifest import Source, read_sources

WORDS = [
    "hello",
    "there",
    "how",
    "are",
    "you",
    "today",
    "fine",
    "thanks",
    "and",
    "good",
    "morning",
    "to",
    "the",
    "tea",
]
SPEC = CodesSpec(duration_sec=2.0, codebooks=8, text_ids=TextIds(), mimi="m", tokenizer="t")


def small_mimi_config() -> dict:
    """Kyutai's configuration of Mimi, narrow and with 64 codes a codebook."""
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=32, n_filters=4)
    config["transformer"].update(
        d_model=32, num_heads=4, num_layers=1, dim_feedforward=64, input_dimension=32
    )
    config["transformer"]["output_dimensions"] = [32]
    config["quantizer"].update(dimension=16, n_q=8, bins=64, input_dimension=32)
    config["quantizer"]["output_dimension"] = 32
    return config


@functools.cache
def small_mimi() -> MimiModel:
    """moshi's own Mimi, narrow, random weights, with codebooks on the scale of its latents."""
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, small_mimi_config())
    latents = []
    quantizers = [mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest]
    with torch.no_grad():
        noise = torch.randn(1, 1, 24_000 * 8) * torch.rand(8).repeat_interleave(24_000)
        latent = mimi.encode_to_latent(noise, quantize=False)
        for quantizer in quantizers:
            latents.append(quantizer.input_proj(latent)[0].T)  # [frames, dimension]
        for quantizer, points in zip(quantizers, latents, strict=True):
            for index, codebook in enumerate(
                module for module in quantizer.modules() if isinstance(module, EuclideanCodebook)
            ):
                chosen = points[torch.randperm(len(points))[:64]]
                # Later codebooks see residuals: small differences around zero.
                codebook.embedding_sum.copy_(chosen if index == 0 else (chosen - points.mean(0)))
                codebook._initialized.fill_(1)
    return mimi


@functools.cache
def small_tokenizer() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def small_codec() -> Codec:
    return Codec(small_mimi(), small_tokenizer())


def stereo(seconds: float, *, rate: int = 24_000, seed: int = 0) -> np.ndarray:
    """Two unequal channels of tones and noise that change every half second, [2, n]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    part = (time * 2).astype(int)
    pitch = rng.uniform(80, 2000, (2, part[-1] + 1))[:, part]
    loudness = rng.uniform(0.02, 0.4, (2, part[-1] + 1))[:, part]
    noise = rng.normal(0, 0.3, (2, len(time)))
    return (loudness * (np.sin(2 * np.pi * pitch * time) + noise)).astype(np.float32)


def alignments(seconds: float, *, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    starts = np.arange(0.1, seconds - 0.3, 0.45)
    speakers = ["SPEAKER_MAIN", "SPEAKER_OTHER"]
    return [
        [
            str(rng.choice(WORDS)),
            [round(float(t), 3), round(float(t) + 0.3, 3)],
            speakers[n % 4 == 3],
        ]
        for n, t in enumerate(starts)
    ]


def write_dataset(
    folder: Path, seconds: list[float], *, name: str = "train", seed: int = 0
) -> Path:
    """Recordings of these lengths with alignments and a manifest, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, length in enumerate(seconds):
        audio = folder / f"{name}{index}.wav"
        write_wav(audio, stereo(length, seed=seed + index))
        words = alignments(length, seed=seed + index)
        audio.with_suffix(".json").write_text(json.dumps({"alignments": words}))
        lines.append(json.dumps({"path": audio.name, "duration": length}))
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def change_ctime(path: Path) -> None:
    """As chown, chmod and hard links do; the clock of file times may need another tick for it."""
    before = path.stat()
    deadline = time.monotonic() + 10.0
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        assert time.monotonic() < deadline, "ctime stands still"
        path.chmod(before.st_mode)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def open_sources(spec: object) -> tuple[Source, ...]:
    return read_sources(str(spec), field="data.train_data")


def cache_in(folder: Path, spec: CodesSpec = SPEC) -> CodesCache:
    return CodesCache(folder, spec)
