"""`launch/generate.py` on checkpoints of real runs, beside moshi's own inference."""

import wave
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch
from moshi.run_inference import InferenceState

from launch.config import load_config
from launch.generate import find_checkpoint, load_model
from tests.integration.runs import side_by_side
from tests.ranks import REPO
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE
from ttt_dist.moshi.release import open_release

pytestmark = pytest.mark.integration
GENERATE = REPO / "launch" / "generate.py"
FRAMES = 60  # over three mini-batches of 16 and windows of 20 and 24 frames
SEED = 7  # moshi's own temperatures: after four steps the likeliest text is silence


def write_wav(path: Path, samples: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(samples.T * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def talks(tp_run, tmp_path_factory):
    """Commands that have ended, and the folder with what they heard and said."""
    folder = tmp_path_factory.mktemp("talks")
    tea, _ = sphn.read(str(REPO / "configs/demo/audio/tea.flac"), sample_rate=SAMPLE_RATE)
    samples = tea[:, 5 * SAMPLE_RATE :][:, : FRAMES * FRAME_SAMPLES - 500]
    write_wav(folder / "stereo.wav", samples)
    write_wav(folder / "mono.wav", samples[1:])
    jobs = side_by_side(
        {
            name: [
                *(str(tp_run.folder), "--seed", str(SEED), "--audio", str(folder / f"{name}.wav")),
                *("--out", str(folder / f"{name}-out.wav")),
                *("--text", str(folder / f"{name}-out.txt")),
            ]
            for name in ("stereo", "mono")
        },
        script=GENERATE,
    )
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


def test_moshis_own_inference_says_the_same(talks, tp_run):
    """The run was saved by two ranks that split heads; here its model runs in moshi's script."""
    config = load_config(tp_run.folder / "config.yaml")
    release = open_release(**config.moshi_paths.model_dump())
    for step in (2, 4):
        _, checkpoint = find_checkpoint(tp_run.folder, step)
        model = load_model(config, release, checkpoint, torch.device("cpu"))
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
