"""`launch/generate.py` without a model: its ears, its voice, its text, and a person's mistakes."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import sphn
import torch
from moshi.run_inference import InferenceState
from safetensors.torch import load_file, save_file

from launch.configuration.release_settings import read_ttt_section
from launch.errors import UserError
from launch.generate import main
from launch.model_source import load_model, open_source
from launch.talking.audio import MoshiAudio, MoshiText, UserAudio
from launch.talking.conversation import Conversation
from launch.talking.talker import load_talker
from parallel.checkpoint_manifest import write_manifest
from tests.ranks import REPO
from tests.unit.release_cases import LAYERS, WINDOWS, write_ttt_release
from tests.wav import write_wav
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE
from ttt_dist.moshi.lora import LoRASettings, adapter_shapes
from ttt_dist.moshi.packed import stock_state_dict
from ttt_dist.moshi.released_lora import describe_adapters

TEA = REPO / "configs" / "demo" / "audio" / "tea.flac"


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
    assert lines[0].startswith("Can't talk: ")
    assert all(line.startswith("  - ") for line in lines[1:])
    return lines[1:]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder without usable checkpoints."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {})
    config = (REPO / "configs" / "demo.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("${repo}/.cache/demo-base", str(tmp_path)))
    return folder


def test_mistakes_are_told_together(capsys, tmp_path, run):
    three = write_wav(tmp_path / "three.wav", np.zeros((3, 100), dtype=np.float32), SAMPLE_RATE)
    arguments = [str(run), "--audio", str(three), "--out", str(tmp_path / "no" / "o.wav")]
    arguments += ["--save-state", str(three), "--load-state", str(run)]
    lines = told(capsys, [*arguments, "--text", str(tmp_path), "--step", "7"])
    for line, parts in zip(
        lines,
        (
            ["--out", "no is no folder"],
            ["--text", "is a folder"],
            ["--save-state", "three.wav exists; nothing is ever overwritten"],
            ["--audio, --out, --text, --save-state, --load-state: name different files"],
            ["--step: found 7", "allowed: 4"],
            ["three.wav", "found 3 channels", "mono", "stereo"],
            ["--load-state", "run is no file"],
        ),
        strict=True,
    ):
        assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("checkpoint", "audio", "parts"),
    [
        ("nowhere", TEA, ["CHECKPOINT", "nowhere is no folder"]),
        (".", TEA, ["CHECKPOINT", "holds no config.yaml and no config.json"]),
        ("empty", TEA, ["CHECKPOINT", "holds no checkpoint (step-NNNNNN)"]),
        ("run", REPO / "README.md", ["--audio", "README.md", "cannot be read as audio"]),
        ("run", "silence.wav", ["--audio", "silence.wav", "holds no audio"]),
        ("run", "missing.wav", ["--audio", "missing.wav", "cannot be read as audio"]),
        ("run", TEA, ["moshi_paths.hf_repo_id", "no config.json"]),
        ("run/checkpoints/step-000004", TEA, ["moshi_paths.hf_repo_id", "no config.json"]),
        ("broken", TEA, ["config.yaml: max_stops: unknown key", "max_steps"]),
    ],
)
def test_a_mistake_is_told(capsys, tmp_path, run, checkpoint, audio, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((run / "config.yaml").read_text())
    shutil.copytree(run, tmp_path / "broken")
    config = (run / "config.yaml").read_text().replace("max_steps:", "max_stops:")
    (tmp_path / "broken" / "config.yaml").write_text(config)
    write_wav(tmp_path / "silence.wav", np.zeros((1, 0), dtype=np.float32), SAMPLE_RATE)
    arguments = [str(tmp_path / checkpoint), "--audio", str(tmp_path / audio)]
    (line,) = told(capsys, [*arguments, "--out", str(tmp_path / "o.wav")])
    assert all(part in line for part in parts), line
    assert not (tmp_path / "o.wav").exists()


def test_a_run_that_looks_ahead_cannot_talk(tmp_path, run, release):
    config = (
        (run / "config.yaml")
        .read_text()
        .replace(f"hf_repo_id: {tmp_path}", f"hf_repo_id: {release}")
    )
    (run / "config.yaml").write_text(config.replace("ttt:", "ttt:\n  causal: false"))
    with pytest.raises(UserError, match=r"ttt.causal: found false; .* can't stream"):
        open_source(run, run / "checkpoints" / "step-000004", torch.device("cpu"))


def test_audio_is_not_written_over(capsys, tmp_path, run):
    path = write_wav(tmp_path / "a.wav", np.zeros((1, 100), dtype=np.float32), SAMPLE_RATE)
    (line,) = told(capsys, [str(run), "--audio", str(path), "--out", str(path)])
    assert "name different files" in line
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--audio", str(path), "--out", "o.wav", "--temp", "-1"])
    assert stop.value.code == 2
    assert "found -1, allowed: 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def release(demo_base, tmp_path_factory) -> Path:
    return write_ttt_release(demo_base, tmp_path_factory.mktemp("release") / "with-ttt")


def test_a_release_says_itself_what_its_ttt_is(release):
    talker = load_talker(open_source(release, None, torch.device("cpu")))
    assert f"release: {release}" in talker.lines
    assert "attention context: TTT layers=10 (2 layers), other layers=12 (2 layers)" in talker.lines
    for index in LAYERS:
        (line,) = [
            line for line in talker.lines if line.startswith(f"layer {index}: TTT-mlp, W1 [")
        ]
        assert "mini-batches of 8, base_lr 2, inner_eps 1e-06; mean gate 0.2913" in line
    saved = load_file(release / "model.safetensors")
    found = stock_state_dict(talker.model)
    assert all(torch.equal(found[name], saved[name]) for name in found if ".ttt." in name)
    assert sum(".ttt." in name for name in found) == sum(".ttt." in name for name in saved) == 38


def test_a_release_without_ttt_talks_as_stock_moshi(demo_base):
    """The same windows, weights and samples as `moshi.run_inference` has of the folder."""
    source = open_source(demo_base, None, torch.device("cpu"))
    talker = load_talker(source)
    assert "attention context: other layers=3000 (4 layers)" in talker.lines
    assert "no TTT layers: stock Moshi" in talker.lines
    user = np.random.default_rng(0).normal(0, 0.1, (20, FRAME_SAMPLES)).astype(np.float32)
    torch.manual_seed(1)
    with Conversation(talker.model, talker.codec, {}) as conversation:
        found = [answer for frame in user if (answer := conversation.hear(frame)) is not None]
    with torch.no_grad():
        mimi, stock = source.release.get_mimi(), source.release.get_moshi(dtype=torch.float32)
        state = InferenceState(
            source.release, mimi, talker.codec.tokenizer, stock.eval(), 1, 1.0, "cpu"
        )
        torch.manual_seed(1)
        ((_, samples),) = state.run(torch.from_numpy(user.reshape(1, 1, -1)))
    assert np.array_equal(np.concatenate([said for _, said in found]), samples[0].numpy())


def test_adapters_of_a_release_are_merged(release, tmp_path):
    """Products of ones of rank 4 on the text head, nothing elsewhere."""
    folder = tmp_path / "adapted"
    shutil.copytree(release, folder)
    config = json.loads((folder / "config.json").read_text())
    lora = LoRASettings(rank=4, scaling=0.5)
    (folder / "config.json").write_text(json.dumps(config | describe_adapters(lora)))
    cpu = torch.device("cpu")
    plain = load_model(open_source(release, None, cpu))
    shapes = adapter_shapes(plain, lora.rank)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for end in ("A", "B"):
        tensors[f"text_linear.lora_{end}.weight"].fill_(1.0)
    save_file(tensors, folder / "lora.safetensors")
    talker = load_talker(open_source(folder, None, cpu))
    assert f"adapters: {folder / 'lora.safetensors'}, merged" in talker.lines
    assert talker.settings == load_talker(open_source(release, None, cpu)).settings
    before = plain.state_dict()
    for name, value in talker.model.state_dict().items():
        added = 2.0 if name == "text_linear.weight" else 0.0
        assert torch.equal(value, before[name] + added), name


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"mini_batch_size": "8"}, ["ttt.mini_batch_size: found '8'", "integer"]),
        ({"mini_batch_size": 0}, ["ttt: TTTConfig: mini_batch_size: found 0"]),
        ({"base_lr": float("nan")}, ["ttt.base_lr: found nan", "finite"]),
        ({"layers": [1, 9]}, ["ttt: found [1, 9]: [9] lie outside the model"]),
        ({"layers": []}, ["ttt: found [], which names no layer"]),
        ({"layers": [2, 1]}, ["ttt.layers: found [2, 1], allowed: [1, 2]"]),
        ({"causal": False}, ["ttt.causal: found False", "looks ahead"]),
        ({"ttt_layer_context": None}, ["ttt.ttt_layer_context: found None"]),
        ({"non_ttt_layer_context": 0}, ["ttt.non_ttt_layer_context: found 0"]),
        ({"deep": 3}, ["ttt.deep: found 3", "not permitted"]),
        ({"inner_model": "linear"}, ["ttt.ttt_mlp_expansion_factor: found 4, allowed: nothing"]),
    ],
)
def test_a_section_that_export_would_not_write_is_refused(release, changes, parts):
    config = json.loads((release / "config.json").read_text())
    placement, windows = read_ttt_section(config["ttt"], config)
    assert placement is not None
    assert (placement.layers, windows) == (LAYERS, WINDOWS)
    with pytest.raises(UserError) as refused:
        read_ttt_section(config["ttt"] | changes, config)
    problem = refused.value.problems[0]
    assert problem.startswith("config.json: ttt")
    assert all(part in problem for part in parts), problem
    with pytest.raises(UserError, match=r"config.json: ttt: found \[\]"):
        read_ttt_section([], config)


def test_a_release_that_cannot_talk_is_refused(capsys, tmp_path, release):
    folder = tmp_path / "release"
    shutil.copytree(release, folder)
    config = json.loads((folder / "config.json").read_text())
    delays = [*config["delays"], *[1] * 8]
    (folder / "config.json").write_text(json.dumps(config | {"n_q": 24, "delays": delays}))
    arguments = ["--audio", str(TEA), "--out", str(tmp_path / "o.wav")]
    (line,) = told(capsys, [str(folder), *arguments])
    assert "config.json: n_q, dep_q: found 24 and 8; allowed are n_q = 2 * dep_q" in line
    (folder / "config.json").write_text(json.dumps(config | {"context": None}))
    (line,) = told(capsys, [str(folder), *arguments])
    assert "config.json: context: found none; streaming needs" in line
    delays = [0, 0, *[2] * 7, 0, *[2] * 7]
    (folder / "config.json").write_text(json.dumps(config | {"delays": delays}))
    (line,) = told(capsys, [str(folder), *arguments])
    assert "config.json: delays: found up to 2 frames; a conversation here is made for" in line
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dim"}))
    (line,) = told(capsys, [str(folder), *arguments])
    assert "config.json: dim: not there, so it doesn't describe" in line
    (folder / "config.json").write_text(json.dumps(config))
    (line,) = told(capsys, [str(folder), *arguments, "--step", "3"])
    assert "--step: found 3, but CHECKPOINT is a release folder" in line
    (folder / "model.safetensors").write_bytes(b"not a model")
    (line,) = told(capsys, [str(folder), *arguments])
    assert "model.safetensors: cannot be read as safetensors" in line
    assert not (tmp_path / "o.wav").exists()
