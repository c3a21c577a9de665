"""`launch/evaluate.py` on a run's checkpoint, beside the whole recordings in one piece."""

import csv
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from launch.evaluate import main as evaluate
from launch.model_source import find_checkpoint, load_model, open_source
from tests.integration.runs import TIMEOUT, single
from tests.ranks import REPO, run_ranks
from tests.unit.data_cases import stereo
from tests.wav import write_wav
from ttt_dist.data.steps import delayed_steps
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.loss import LossConfig, step_weights

pytestmark = pytest.mark.integration
EVALUATE = REPO / "launch" / "evaluate.py"
# Models in float64; Moshi's norms and its rope compute in float32 all the same, and rope's angles
# are those of other places at the same distance (see test_moshi_carry).
TOLERANCE = 1e-6
FRAMES = [790, 150, 37]  # over a minute; several pieces of 96; less than one
PIECES = ("--piece-sec", "8")  # 100 frames: 6 mini-batches of 16


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, demo_base):
    """Codes of three recordings, and their manifest."""
    return make_recordings(tmp_path_factory.mktemp("recordings"), demo_base, FRAMES)


def make_recordings(folder, demo_base, lengths):
    settings = json.loads((demo_base / "config.json").read_text())
    lines, made = [], []
    for number, frames in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(0, settings["text_card"], (1, frames), generator=generator)
        text[0, ::2] = 3  # padding
        rows = settings["n_q"], frames
        codes = torch.cat([text, torch.randint(0, settings["card"], rows, generator=generator)])
        save_file({"codes": codes}, folder / f"{number}.safetensors")
        lines.append(json.dumps({"path": f"{number}.safetensors", "duration": frames / 12.5}))
        made.append(codes)
    (folder / "all.jsonl").write_text("\n".join(lines))
    return made, folder / "all.jsonl"


def arguments(run, data, out, *more):
    return [str(part) for part in (run, "--data", data, "--out", out, *PIECES, *more)]


@pytest.fixture(scope="module")
def evaluated(tp_run, recordings, tmp_path_factory):
    """One process: the run, saved by two ranks that split heads, and its base."""
    out = tmp_path_factory.mktemp("evaluated") / "new" / "one"
    more = ("--base", "--inner-losses")
    job = single(arguments(tp_run.folder, recordings[1], out, *more), script=EVALUATE)
    assert job.returncode == 0, job.stdout + job.stderr
    return job, out


def results_of(out):
    found = json.loads((out / "evaluation.json").read_text())
    assert found["complete"]
    return {(each["checkpoint"], each["ttt"]): each for each in found["results"]}


def overall_losses(model, recordings, dtype):
    """Figures of whole recordings, each in one piece, by the model's own loss."""
    config = LossConfig.of_model(
        model, text_padding_weight=0.5, first_codebook_weight_multiplier=1.0
    )
    text, audio, words = [], [], []
    for codes in recordings:
        steps = delayed_steps(codes, model.delays, model.initial_tokens())[None]
        with torch.no_grad():
            text_ce, audio_ce = model.step_losses(steps)
        text_w, audio_w = step_weights(steps[:, :, 1:], config)
        spoken = ~torch.isin(steps[:, :1, 1:], torch.tensor([0, 3]))
        text.append((text_ce, text_w))
        audio.append((audio_ce, audio_w))
        words.append((text_ce, spoken.double()))

    def mean(pairs):
        total = sum((ce.double() * w).sum() for ce, w in pairs) / sum(w.sum() for _, w in pairs)
        return total.item()

    return {
        "text_loss": mean(text),
        "audio_loss": mean(audio),
        "text_loss_without_padding": mean(words),
        "loss": mean(text) + mean(audio),
        "text_perplexity": math.exp(mean(words)),
    }


def test_states_go_along_recordings_and_modes_are_what_they_say(
    evaluated, tp_run, recordings, demo_base
):
    results = results_of(evaluated[1])
    label = f"{tp_run.folder.name}/step-000004"
    base = f"base {demo_base.name}"
    assert list(results) == [*((label, m) for m in ("on", "off", "reset")), (base, "none")]
    cpu = torch.device("cpu")
    model = load_model(open_source(*find_checkpoint(tp_run.folder, None), cpu))
    expected = {"on": overall_losses(model, recordings[0], torch.float64)}
    for layer in transformer_layers(model):
        if layer.ttt is not None:
            layer.ttt.alpha.data.zero_()
    expected["off"] = overall_losses(model, recordings[0], torch.float64)
    stock = load_model(open_source(demo_base, None, cpu))
    for (name, mode), wanted in {
        (label, "on"): expected["on"],
        (label, "off"): expected["off"],
        (base, "none"): overall_losses(stock, recordings[0], torch.float32),
    }.items():
        found = results[name, mode]["overall"]
        # The base's weights compute in float32.
        tolerance = 1e-5 if mode == "none" else TOLERANCE
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=tolerance), mode
    on, off, reset = (results[label, mode]["overall"]["loss"] for mode in ("on", "off", "reset"))
    assert abs(reset - on) > 100 * TOLERANCE
    assert abs(off - on) > 100 * TOLERANCE


def test_figures_are_by_minute_and_tables_are_printed(evaluated, tp_run):
    job, out = evaluated
    results = results_of(out)
    for each in results.values():
        first, second = each["by_minute"]
        assert [first["minute"], second["minute"]] == [0, 1]
        assert first["frames"] == 750 + FRAMES[1] + FRAMES[2]
        assert second["frames"] == FRAMES[0] - 750
        assert each["overall"]["frames"] == sum(FRAMES)
        assert 0.5 <= each["overall"]["padding_share"] < 0.6
        assert each["overall"]["audio_loss_8"] > 0
    rows = list(csv.DictReader((out / "evaluation.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(results)
    assert (out / "evaluation.png").stat().st_size > 10_000
    inner = json.loads(
        (out / results[f"{tp_run.folder.name}/step-000004", "on"]["inner_losses"]).read_text()
    )
    assert sum(inner["frames"]) >= sum(FRAMES)  # the last step of each, too, where it is read
    assert inner["mean"]["w0"][-1] > inner["mean"]["after"][-1]
    assert "pieces of 96 frames (7.68 s)" in job.stdout
    assert "attention context: TTT layers=20 (2 layers), other layers=24 (2 layers)" in job.stdout
    assert "attention context: other layers=3000 (4 layers)" in job.stdout  # the base's own
    assert "loss by minute" in job.stdout


@pytest.mark.parametrize(
    ("ranks", "more"), [(2, []), pytest.param(4, ["--tp", "2"], marks=pytest.mark.slow)]
)
def test_figures_are_the_same_on_ranks(evaluated, tp_run, recordings, tmp_path, ranks, more):
    out = tmp_path / "ranks"
    checkpoint = tp_run.folder / "checkpoints" / "step-000004"
    command = arguments(checkpoint, recordings[1], out, "--inner-losses", *more)
    job = run_ranks(ranks, EVALUATE, command, timeout=TIMEOUT)
    assert job.returncode == 0, job.stdout + job.stderr
    one = evaluated[1]
    found, expected = results_of(out), results_of(one)
    assert list(found) == list(expected)[:3]
    for key, each in found.items():
        wanted = expected[key]
        assert each["overall"] == pytest.approx(wanted["overall"], rel=TOLERANCE), key
        for row, other in zip(each["by_minute"], wanted["by_minute"], strict=True):
            assert row == pytest.approx(other, rel=TOLERANCE), key
    inner, wanted = (json.loads((o / "inner-losses-1.json").read_text()) for o in (out, one))
    assert inner["frames"] == wanted["frames"]
    for curve, values in inner["mean"].items():
        assert values == pytest.approx(wanted["mean"][curve], rel=TOLERANCE), curve


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_half_an_hour_is_the_same_in_pieces_of_any_length(tp_run, demo_base, tmp_path):
    """22,500 frames: 30 minutes in pieces of 80 s on two ranks, and of 5 minutes on one."""
    _, data = make_recordings(tmp_path, demo_base, [22_500])
    found = []
    for ranks, seconds in ((2, "80"), (1, "300")):
        out = tmp_path / seconds
        command = [str(tp_run.folder), "--data", str(data), "--out", str(out)]
        command += ["--piece-sec", seconds]
        job = run_ranks(ranks, EVALUATE, command, timeout=600)
        assert job.returncode == 0, job.stdout + job.stderr
        results = results_of(out)
        found.append({mode: results[key] for key in results for mode in key[1:]})
    short, long = found
    assert len(short["on"]["by_minute"]) == 30
    for mode in ("on", "off"):
        for row, other in zip(short[mode]["by_minute"], long[mode]["by_minute"], strict=True):
            assert row == pytest.approx(other, rel=TOLERANCE), mode
    # Where TTT begins anew matters.
    assert short["reset"]["overall"]["loss"] != pytest.approx(long["reset"]["overall"]["loss"])


def test_a_folder_of_mono_files(tp_run, tmp_path):
    (tmp_path / "mono").mkdir()
    for number, seconds in enumerate((9.0, 2.0)):
        audio = stereo(seconds, rate=16_000, seed=number)
        write_wav(tmp_path / "mono" / f"{number}.wav", audio[:1], rate=16_000)
    codes = ("--cache-dir", tmp_path / "codes")
    command = arguments(tp_run.folder, tmp_path / "mono", tmp_path / "out", *codes)
    job = single(command, script=EVALUATE)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "note: 2 of 2 recordings have no alignments" in job.stdout
    for each in results_of(tmp_path / "out").values():
        overall = each["overall"]
        assert overall["frames"] == 113 + 25
        assert [overall[key] for key in ("loss", "text_loss", "padding_share")] == [None] * 3
        assert math.isfinite(overall["audio_loss"])
    assert not (tmp_path / "mono" / ".cache").exists()
    assert any((tmp_path / "codes").iterdir())


def test_mistakes_are_told_at_once_before_a_weight_is_read(tp_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.evaluate.chosen_device", lambda _: torch.device("cpu"))
    (tmp_path / "there").mkdir()
    command = [
        *(str(tp_run.folder), str(tmp_path / "nothing"), str(tmp_path / "there")),
        *("--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "there")),
        *("--tp", "3", "--batch-size", "0"),
    ]
    with pytest.raises(SystemExit) as stop:
        evaluate(command)
    assert stop.value.code == 2
    head, *told = capsys.readouterr().err.splitlines()
    assert head == "Can't evaluate: 6 problems."
    for start in (
        f"--out: {tmp_path / 'there'} exists",
        "--batch-size: found 0",
        "--tp: found 3, which doesn't divide 1",
        "--data: found",
        f"{tmp_path / 'nothing'}: CHECKPOINT: ",
        f"{tmp_path / 'there'}: CHECKPOINT: ",
    ):
        assert sum(line.startswith(f"  - {start}") for line in told) == 1, told
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "new"
    with pytest.raises(SystemExit):
        evaluate(arguments(tp_run.folder, REPO / "configs/demo/eval.jsonl", out))
    assert f"--out: {out} can't be made in {tmp_path / 'file'}" in capsys.readouterr().err
    command = arguments(tp_run.folder, REPO / "configs/demo/eval.jsonl", tmp_path / "new")
    with pytest.raises(SystemExit) as stop:
        evaluate([*command, "--piece-sec", "1", "--text-padding-weight", "-1"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--piece-sec: found 1; pieces end at a border of mini-batches of 16 frames" in told
    assert "--text-padding-weight: found -1" in told
    assert not (tmp_path / "new").exists()
