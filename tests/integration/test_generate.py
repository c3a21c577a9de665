"""`launch/generate.py` on checkpoints of real runs, beside moshi's own inference."""

import wave
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch
from moshi.run_inference import InferenceState

from launch.export import main as export
from launch.generate import main as generate
from launch.model_source import find_checkpoint, load_model, open_source
from launch.talking.talker import load_talker
from tests.integration.runs import side_by_side
from tests.ranks import REPO
from tests.wav import write_wav
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE

pytestmark = pytest.mark.integration
GENERATE = REPO / "launch" / "generate.py"
FRAMES = 60  # over three mini-batches of 16 and windows of 20 and 24 frames
FIRST = 27  # frames of a conversation's first part: in the middle of a mini-batch
SEED = 7  # moshi's own temperatures: after four steps the likeliest text is silence


def talking(
    checkpoint: Path, folder: Path, name: str, *more: str | Path, out: str = ""
) -> list[str]:
    """Arguments of a command that hears `name`.wav, and says `name`-out.wav (or `out`) and .txt."""
    said = folder / (out or f"{name}-out.wav")
    paths = [checkpoint, "--audio", folder / f"{name}.wav", "--out", said]
    return [str(part) for part in (*paths, "--text", said.with_suffix(".txt"), *more)]


@pytest.fixture(scope="module")
def talks(tp_run, tmp_path_factory):
    """Commands that have ended, and the folder with what they heard and said.

    "first" and "second" are "mono" in two parts. There is an export of the run too, in float32.
    """
    folder = tmp_path_factory.mktemp("talks")
    tea, _ = sphn.read(str(REPO / "configs/demo/audio/tea.flac"), sample_rate=SAMPLE_RATE)
    samples = tea[:, 5 * SAMPLE_RATE :][:, : FRAMES * FRAME_SAMPLES - 500]
    cut = FIRST * FRAME_SAMPLES
    write_wav(folder / "stereo.wav", samples)
    for name, part in (
        ("mono", samples[1:]),
        ("first", samples[1:, :cut]),
        ("second", samples[1:, cut:]),
    ):
        write_wav(folder / f"{name}.wav", part)
    run, state, seed = tp_run.folder, folder / "state", ("--seed", str(SEED))
    export([str(run), "--dtype", "float32", "--out", str(folder / "export")])
    jobs = {}
    commands = {
        "first": talking(run, folder, "first", *seed, "--save-state", state),
        "stereo": talking(run, folder, "stereo", *seed),
    }
    jobs |= side_by_side(commands, script=GENERATE)
    commands = {
        "second": talking(run, folder, "second", "--load-state", state),
        "mono": talking(run, folder, "mono", *seed),
    }
    jobs |= side_by_side(commands, script=GENERATE)
    for job in jobs.values():
        assert job.returncode == 0, job.stdout + job.stderr
    return jobs, folder


def test_every_frame_is_answered_and_settings_are_the_runs_own(talks, tp_run):
    job, folder = talks[0]["stereo"], talks[1]
    samples, rate = sphn.read(str(folder / "stereo-out.wav"))
    assert (samples.shape, rate) == ((1, FRAMES * FRAME_SAMPLES), SAMPLE_RATE)
    assert samples.std() > 0
    lines = job.stdout.splitlines()
    (windows,) = [line for line in tp_run.job.stdout.splitlines() if "attention context:" in line]
    assert windows in lines
    for index in (1, 2):
        (line,) = [line for line in lines if line.startswith(f"layer {index}: TTT-mlp")]
        assert "W1 [8, 16, 64], b1 [8, 1, 64], W2 [8, 64, 16]" in line
        assert "mini-batches of 16, base_lr 1, inner_eps 1e-06" in line
    assert f"checkpoint: {tp_run.folder / 'checkpoints' / 'step-000004'}" in lines
    assert "compute in float64 on cpu" in lines
    assert any("stereo: the right channel is the user" in line for line in lines)
    assert any(
        line.startswith("4.8 s of audio in ") and "real-time factor" in line for line in lines
    )


def test_the_users_channel_alone_decides(talks):
    for suffix in ("out.wav", "out.txt"):
        stereo, mono = ((talks[1] / f"{name}-{suffix}").read_bytes() for name in ("stereo", "mono"))
        assert stereo == mono
        assert len(stereo) > 1


def test_a_conversation_in_two_parts_is_the_whole_one(talks):
    """To the last bit, text and audio; sampled, so the random numbers go on too."""
    jobs, folder = talks
    parts, whole = [], []
    for names, found in ((("first", "second"), parts), (("mono",), whole)):
        for name in names:
            with wave.open(str(folder / f"{name}-out.wav")) as file:
                found.append(file.readframes(file.getnframes()))
    assert b"".join(parts) == whole[0]
    text = [(folder / f"{n}-out.txt").read_text().removesuffix("\n") for n in ("first", "second")]
    assert "".join(text) + "\n" == (folder / "mono-out.txt").read_text()
    state = folder / "state"
    assert f"conversation: {state}, 27 frames (2.2 s) heard" in jobs["first"].stdout.splitlines()
    assert f"goes on: {state}, after 27 frames (2.2 s)" in jobs["second"].stdout.splitlines()
    assert not list(folder.glob(".*"))


@pytest.fixture
def on_cpu(monkeypatch):
    """Commands in this process find no GPU, as those that tests start."""
    monkeypatch.setattr("launch.generate.chosen_device", lambda _: torch.device("cpu"))


def test_another_models_conversation_is_refused_before_a_word(talks, tp_run, capsys, on_cpu):
    """The run's, saved in float64, in its export in float32; and after another step."""
    folder = talks[1]
    for checkpoint, more, why in (
        (folder / "export", [], "was saved with other settings: dtype: float64, here float32"),
        (tp_run.folder, ["--step", "2"], "was saved with other weights (fingerprint "),
    ):
        more += ["--load-state", folder / "state"]
        with pytest.raises(SystemExit) as stop:
            generate(talking(checkpoint, folder, "second", *more, out="never.wav"))
        assert stop.value.code == 2
        (head, line) = capsys.readouterr().err.splitlines()
        assert head == "Can't talk: 1 problem."
        assert f"--load-state: {folder / 'state'} {why}" in line
    assert not (folder / "never.wav").exists()


def test_an_export_is_the_same_model(talks, tp_run, capsys, on_cpu):
    jobs, folder = talks
    generate(talking(folder / "export", folder, "first", out="exported.wav"))
    told = [line for line in jobs["mono"].stdout.splitlines() if line.startswith("layer ")]
    lines = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    for line in told:
        assert line in lines
    (windows,) = [line for line in tp_run.job.stdout.splitlines() if "attention context:" in line]
    assert windows in lines
    assert f"release: {folder / 'export'}" in lines
    assert "compute in float32 on cpu" in lines
    cpu = torch.device("cpu")
    models = [
        load_talker(open_source(*find_checkpoint(path, None), cpu)).model
        for path in (tp_run.folder, folder / "export")
    ]
    trained, exported = (model.state_dict() for model in models)
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name].float(), exported[name]) for name in trained)
    samples, _ = sphn.read(str(folder / "exported.wav"))
    assert samples.shape == (1, FIRST * FRAME_SAMPLES)
    assert samples.std() > 0


def test_moshis_own_inference_says_the_same(talks, tp_run):
    """The run was saved by two ranks that split heads; here its model runs in moshi's script."""
    for step in (2, 4):
        source = open_source(*find_checkpoint(tp_run.folder, step), torch.device("cpu"))
        model, release = load_model(source), source.release
        saved = tp_run.checkpoint(step)
        for name, value in model.state_dict().items():
            assert torch.equal(value, saved[f"model.{name}"]), name
    user, _ = sphn.read(str(talks[1] / "mono.wav"))
    user = np.pad(user, ((0, 0), (0, FRAMES * FRAME_SAMPLES - user.shape[1])))
    with torch.no_grad():
        mimi = release.get_mimi()
        tokenizer = release.get_text_tokenizer()
        state = InferenceState(release, mimi, tokenizer, model, 1, 1.0, "cpu")
        torch.manual_seed(SEED)
        ((tokens, samples),) = state.run(torch.from_numpy(user)[None])
    written, _ = sphn.read(str(talks[1] / "stereo-out.wav"))
    # 16 bits: half a step of 1 / 32767, and the reader's division by 32768.
    assert np.abs(written[0] - samples[0].clamp(-1, 1).numpy()).max() < 5e-5
    silent = (model.text_padding_token_id, model.end_of_text_padding_id)
    pieces = [tokenizer.id_to_piece(t) for t in tokens.flatten().tolist() if t not in silent]
    text = (talks[1] / "stereo-out.txt").read_text()
    assert text == "".join(pieces).replace("▁", " ") + "\n"
