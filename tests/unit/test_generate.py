"""`launch/generate.py` without a model: its ears, its voice, its text, and a person's mistakes."""

import io
import wave
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import sphn

from launch.errors import UserError
from launch.generate import main
from launch.generate_audio import MoshiAudio, MoshiText, UserAudio
from tests.ranks import REPO
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE

TEA = REPO / "configs" / "demo" / "audio" / "tea.flac"


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """16-bit wav of float samples `[channels, n]`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples.T * 32767).astype("<i2").tobytes())
    return path


def heard(path: Path) -> tuple[UserAudio, np.ndarray]:
    audio = UserAudio(path)
    frames = list(audio.read_frames())
    assert len(frames) == audio.frames
    assert {frame.shape for frame in frames} == {(FRAME_SAMPLES,)}
    return audio, np.concatenate(frames)


def test_the_users_channel_comes_whole_in_frames(tmp_path):
    """Two blocks and a part of a frame; the right channel of stereo; 16 bits round by 2e-5."""
    length = 17 * SAMPLE_RATE + 1000
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (2, length)).astype(np.float32)
    stereo, found = heard(write_wav(tmp_path / "stereo.wav", samples, SAMPLE_RATE))
    mono, found_mono = heard(write_wav(tmp_path / "mono.wav", samples[1:], SAMPLE_RATE))
    assert np.abs(found[:length] - samples[1]).max() < 5e-5
    assert not found[length:].any()
    assert np.array_equal(found, found_mono)
    assert stereo.frames == mono.frames == 214
    assert "stereo: the right channel is the user, 24000 Hz" in stereo.describe()
    assert "mono, 24000 Hz" in mono.describe()


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_resampling_in_blocks_is_that_of_the_whole_file(tmp_path, rate):
    """1e-6: the resampler's own float32 sums; without the context it would be off by 0.1."""
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, (1, rate * 19 + 777)).astype(np.float32)
    path = write_wav(tmp_path / "user.wav", samples, rate)
    audio, found = heard(path)
    whole = sphn.resample(sphn.read(str(path))[0], rate, SAMPLE_RATE)[0]
    assert audio.samples == samples.shape[1] * SAMPLE_RATE // rate
    assert np.abs(found[: audio.samples] - whole[: audio.samples]).max() < 1e-6
    assert f"mono, resampled from {rate} to 24000 Hz" in audio.describe()


def test_flac_in_blocks(tmp_path):
    audio, found = heard(TEA)
    whole = sphn.resample(np.ascontiguousarray(sphn.read(str(TEA))[0][1:]), 16_000, SAMPLE_RATE)[0]
    assert np.abs(found[: audio.samples] - whole[: audio.samples]).max() < 1e-6


def test_audio_that_ends_before_its_header_says(tmp_path):
    samples = np.full((1, 10 * SAMPLE_RATE), 0.25, dtype=np.float32)
    path = write_wav(tmp_path / "cut.wav", samples, SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[: -4 * SAMPLE_RATE])
    with pytest.raises(UserError, match=r"cut.wav: ends at 8\.00 s, its header says 10\.00 s"):
        list(UserAudio(path).read_frames())


def test_moshis_audio_can_be_read_back(tmp_path):
    path = tmp_path / "out.wav"
    said = np.array([0.0, 0.5, -0.5, 1.5, -1.5], dtype=np.float32)
    with MoshiAudio(path) as file:
        file.write(said[:2])
        file.write(said[2:])
    samples, rate = sphn.read(str(path))
    assert rate == SAMPLE_RATE
    assert samples.shape == (1, 5)
    assert np.abs(samples[0] - np.clip(said, -1, 1)).max() < 1e-4


def test_moshis_text_joins_bytes_and_leaves_padding_out():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello there", "hello you", "here they yell"] * 20),
        model_writer=model,
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    words = MoshiText(tokenizer, frozenset({0, 3}))
    tokens = tokenizer.encode("hello é there")
    assert sum(map(tokenizer.is_byte, tokens)) == 2
    spaced = [token for t in tokens for token in (3, t, 0)]
    assert "".join(map(words.text_of, spaced)) == " hello é there"
    assert words.text_of(tokenizer.vocab_size()) == ""
    # A character that never ends is told as such, and the next word is whole.
    first, second = (t for t in tokens if tokenizer.is_byte(t))
    hello = tokenizer.encode("hello")[-1]
    assert words.text_of(first) == ""
    assert words.text_of(hello).startswith("�")
    assert words.text_of(first) + words.text_of(second) == "é"


def told(capsys, arguments: list[str]) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(("Can't generate: ", "Can't use "))
    assert all(line.startswith("  - ") for line in lines[1:])
    return lines[1:]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder without usable checkpoints."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-000004").mkdir(parents=True)
    config = (REPO / "configs" / "demo.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("${repo}/.cache/demo-base", str(tmp_path)))
    return folder


def test_mistakes_are_told_together(capsys, tmp_path, run):
    three = write_wav(tmp_path / "three.wav", np.zeros((3, 100), dtype=np.float32), SAMPLE_RATE)
    arguments = [str(run), "--audio", str(three), "--out", str(tmp_path / "no" / "o.wav")]
    lines = told(capsys, [*arguments, "--text", str(tmp_path), "--step", "7"])
    for line, parts in zip(
        lines,
        (
            ["--out", "no is no folder"],
            ["--text", "is a folder"],
            ["--step: found 7", "allowed: 4"],
            ["three.wav", "found 3 channels", "mono", "stereo"],
        ),
        strict=True,
    ):
        assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("checkpoint", "audio", "parts"),
    [
        ("nowhere", TEA, ["CHECKPOINT", "nowhere is no folder"]),
        (".", TEA, ["CHECKPOINT", "holds no config.yaml"]),
        ("empty", TEA, ["CHECKPOINT", "holds no step-NNNNNN"]),
        ("run", REPO / "README.md", ["--audio", "README.md", "cannot be read as audio"]),
        ("run", "silence.wav", ["--audio", "silence.wav", "holds no audio"]),
        ("run", "missing.wav", ["--audio", "missing.wav", "cannot be read as audio"]),
        ("run", TEA, ["moshi_paths.hf_repo_id", "no config.json"]),
        ("run/checkpoints/step-000004", TEA, ["moshi_paths.hf_repo_id", "no config.json"]),
    ],
)
def test_a_mistake_is_told(capsys, tmp_path, run, checkpoint, audio, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((run / "config.yaml").read_text())
    write_wav(tmp_path / "silence.wav", np.zeros((1, 0), dtype=np.float32), SAMPLE_RATE)
    arguments = [str(tmp_path / checkpoint), "--audio", str(tmp_path / audio)]
    (line,) = told(capsys, [*arguments, "--out", str(tmp_path / "o.wav")])
    assert all(part in line for part in parts), line
    assert not (tmp_path / "o.wav").exists()


def test_audio_is_not_written_over(capsys, tmp_path, run):
    path = write_wav(tmp_path / "a.wav", np.zeros((1, 100), dtype=np.float32), SAMPLE_RATE)
    (line,) = told(capsys, [str(run), "--audio", str(path), "--out", str(path)])
    assert "name different files" in line
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--audio", str(path), "--out", "o.wav", "--temp", "-1"])
    assert stop.value.code == 2
    assert "found -1, allowed: 0" in capsys.readouterr().err
