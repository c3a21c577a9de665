"""Broken datasets at the real commands, and codes that are damaged while a run reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.config import load_config
from launch.prepare import open_cache, read_splits
from tests.faults.jobs import TIMEOUT, Setting, assert_good, assert_taken_up
from tests.integration.runs import DEMO, PREPARE, TRAIN, Run, side_by_side, single
from tests.ranks import REPO, run_ranks
from tests.wav import write_wav
from ttt_dist.data.cache import CachedCodes, CodesSpec
from ttt_dist.data.dataset import GlobalOrder, PieceDataset
from ttt_dist.moshi.release import open_release

pytestmark = pytest.mark.faults
CHECK = REPO / "launch" / "check_data.py"
WORD = ["tea", [0.1, 0.4], "SPEAKER_MAIN"]
SECONDS = 2.0


def write_recording(path: Path, *, rate: int = 24_000, channels: int = 2) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (channels, round(SECONDS * rate)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, samples, rate=rate)
    path.with_suffix(".json").write_text(json.dumps({"alignments": [WORD]}))


def write_manifest(path: Path, lines: list[tuple[str, float]]) -> Path:
    rows = [json.dumps({"path": name, "duration": seconds}) for name, seconds in lines]
    path.write_text("\n".join(rows) + "\n")
    return path


# Manifest line, and what is said of it: by training's start and check_data.py alike,
EVERYWHERE = {
    "missing.wav": "there is no audio file",
    "noise.wav": "the audio header of",
    "mono.wav": "has 1 channel, allowed is stereo",
    "lonely.wav": "there is no alignment file",
    "long.wav": "duration: found 9 s, but",
    "../outside.wav": "leads out of the manifest's folder",
}
# and by check_data.py, ahead of encoding.
AHEAD = {
    "torn.wav": "is no JSON",
    "speaker.wav": "no word is of 'SPEAKER_MAIN', found 'A'",
    "late.wav": "1 of 1 words start outside the audio of 2.00 s",
    "cut.wav": "cut.wav: ",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A manifest with a line for each problem, one of another rate, and an empty manifest."""
    folder = tmp_path_factory.mktemp("broken") / "set"
    names = [*EVERYWHERE, *AHEAD, "good.wav", "slow.wav"]
    for name in names:
        write_recording(
            folder / name,
            rate=16_000 if name == "slow.wav" else 24_000,
            channels=1 if name == "mono.wav" else 2,
        )
    (folder / "missing.wav").unlink()
    (folder / "noise.wav").write_text("This is not audio.\n")
    (folder / "lonely.json").unlink()
    (folder / "torn.json").write_text('{"alignments": [["tea", [0.1')
    words = {"speaker": ["tea", [0.1, 0.4], "A"], "late": ["tea", [50.0, 50.4], "SPEAKER_MAIN"]}
    for name, word in words.items():
        (folder / f"{name}.json").write_text(json.dumps({"alignments": [word]}))
    whole = (folder / "cut.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    write_manifest(
        folder / "broken.jsonl", [(name, 9.0 if name == "long.wav" else SECONDS) for name in names]
    )
    write_manifest(folder / "encoded.jsonl", [(f"{name}.wav", SECONDS) for name in ("good", "cut")])
    write_manifest(folder / "sound.jsonl", [(f"{name}.wav", SECONDS) for name in ("good", "slow")])
    (folder / "empty.jsonl").write_text("\n")
    return folder


def problems_of(stderr: str, title: str) -> list[str]:
    assert "Traceback" not in stderr
    assert stderr.count(title) == 1, stderr
    return [line[4:] for line in stderr.splitlines() if line.startswith("  - ")]


def assert_told(problems: list[str], manifest: Path, wanted: dict[str, str]) -> None:
    """One problem of each line that has one, with manifest and line."""
    lines = [json.loads(row)["path"] for row in manifest.read_text().splitlines()]
    for name, part in wanted.items():
        start = f"{manifest}:{lines.index(name) + 1}: "
        (found,) = [problem for problem in problems if problem.startswith(start)]
        assert part in found


def test_all_problems_of_a_dataset_are_told_at_once(dataset, paths, tmp_path):
    broken, empty = dataset / "broken.jsonl", dataset / "empty.jsonl"
    train = [
        *(*paths, f"data.train_data={broken},{empty}", "do_eval=false"),
        f"run_dir={tmp_path / 'run'}",
    ]
    job = single(train)
    assert job.returncode == 2
    told = problems_of(job.stderr, "This run can't start: ")
    assert_told(told, broken, EVERYWHERE)
    assert len(told) == len(EVERYWHERE) + 1
    assert f"{empty}: holds no recording" in "\n".join(told)
    assert not (tmp_path / "run").exists()

    jobs = side_by_side(
        {
            "broken": [f"{broken},{empty}", "--decode"],
            "sound": [str(dataset / "sound.jsonl"), "--decode"],
            "few": [str(DEMO), f"data.train_data={dataset / 'sound.jsonl'}", "--ranks", "3"],
        },
        script=CHECK,
    )
    assert jobs["broken"].returncode == 2
    told = problems_of(jobs["broken"].stderr, "This data can't be used: ")
    assert_told(told, broken, EVERYWHERE | AHEAD)
    assert len(told) == len(EVERYWHERE | AHEAD) + 1
    assert jobs["sound"].returncode == 0, jobs["sound"].stderr
    assert "16000 Hz, resampled to 24000" in jobs["sound"].stdout
    assert "recordings: 2, hours: 0.00, pieces of 10 s: 2" in jobs["sound"].stdout
    assert "problems: 0, notes: 1" in jobs["sound"].stdout
    assert jobs["few"].returncode == 2
    (few,) = problems_of(jobs["few"].stderr, "This data can't be used: ")
    assert few.startswith("data.train_data: holds 2 pieces of 8.4 s for 3 data-parallel ranks")


def test_audio_that_fails_while_it_is_encoded(dataset, demo_base, tmp_path):
    """What is good is encoded and kept; the rest is named, and nothing is trained."""
    manifest = dataset / "encoded.jsonl"
    arguments = [
        *(f"moshi_paths.hf_repo_id={demo_base}", f"data.cache_dir={tmp_path / 'codes'}"),
        *(f"data.train_data={manifest}", "data.eval_data=", "do_eval=false"),
        f"run_dir={tmp_path / 'run'}",
    ]
    titles = {TRAIN: "This run can't start: ", PREPARE: "Can't prepare the data: "}
    for script, title in titles.items():
        job = single(arguments, script=script)
        assert job.returncode == 2
        (told,) = problems_of(job.stderr, title)
        assert told.startswith(f"{manifest}:2: {dataset / 'cut.wav'}")
        assert len(list((tmp_path / "codes").glob("??/*.safetensors"))) == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0)


def test_ranks_that_prepare_finish_their_shares_and_tell_all_together(dataset, demo_base, tmp_path):
    """Rank 0 has audio that breaks off and good audio, rank 1 torn alignments."""
    manifest = write_manifest(
        dataset / "shares.jsonl", [("cut.wav", 2.2), ("torn.wav", 2.1), ("good.wav", 2.0)]
    )
    arguments = [
        *(f"moshi_paths.hf_repo_id={demo_base}", f"data.cache_dir={tmp_path / 'codes'}"),
        *("do_eval=false", "device=cpu"),
    ]
    job = run_ranks(2, PREPARE, [*arguments, f"data.train_data={manifest}"], timeout=TIMEOUT)
    ours = job.stderr[: job.stderr.index("torch/distributed/elastic")]
    told = problems_of(ours, "Can't prepare the data: 2 problems.")
    assert_told(told, manifest, {"cut.wav": "cut.wav: ", "torn.wav": "is no JSON"})
    report = job.stderr[job.stderr.index("Root Cause") :]
    assert "exitcode  : 2 " in report
    assert "rank      : 0 " in report
    assert len(list((tmp_path / "codes").glob("??/*.safetensors"))) == 1

    sound = [*arguments, f"data.train_data={dataset / 'sound.jsonl'}"]
    job = run_ranks(2, PREPARE, sound, timeout=TIMEOUT)
    assert job.returncode == 0, job.stderr
    assert sorted(line.split(",")[0] for line in job.stdout.splitlines()) == [
        "rank 0 of 2: 1 recordings",
        "rank 1 of 2: 1 recordings",
    ]
    assert len(list((tmp_path / "codes").glob("??/*.safetensors"))) == 2


def copy_codes(setting: Setting, folder: Path) -> Setting:
    """The same runs on codes of their own."""
    (prepared,) = [a for a in setting.arguments if a.startswith("data.cache_dir=")]
    shutil.copytree(prepared.partition("=")[2], folder)
    others = [a for a in setting.arguments if a != prepared]
    return replace(setting, arguments=[*others, f"data.cache_dir={folder}"])


def open_split(setting: Setting, name: str) -> PieceDataset:
    config = load_config(DEMO, setting.arguments)
    splits = read_splits(config, check_files=False)
    spec = CodesSpec.from_release(
        open_release(**config.moshi_paths.model_dump()), duration_sec=config.duration_sec
    )
    return PieceDataset(splits[name], open_cache(config, splits, spec))


def byte_of_sample(setting: Setting, position: int) -> tuple[str, str]:
    """`byte_of_piece` of the training piece at a place of the global order."""
    config, pieces = load_config(DEMO, setting.arguments), open_split(setting, "train")
    order = GlobalOrder(
        pieces.source_sizes, pieces.weights, seed=config.seed, shuffle=config.data.shuffle
    )
    index = order[position]
    assert index not in [order[earlier] for earlier in range(position)]
    return byte_of_piece(pieces, index)


def byte_of_piece(pieces: PieceDataset, index: int) -> tuple[str, str]:
    """FILE:OFFSET of a byte of a piece, and its description."""
    place, number = pieces._locate(index)
    codes = pieces._codes[place]
    assert isinstance(codes, CachedCodes)
    return f"{codes.path}:{codes.offset + 4 * codes.rows * codes.frames * number}", pieces.describe(
        index
    )


# Damaged by rank 0 in step 3, read by rank 1 in step 4: a step is 2 pieces, rank 1 has the second.
POSITION = 2 * 3 + 1


def test_codes_damaged_under_a_run_are_left_out_within_the_budget(setting, tmp_path, monkeypatch):
    own = copy_codes(setting, tmp_path / "codes")
    byte, piece = byte_of_sample(own, POSITION)
    monkeypatch.setenv("DAMAGED_BYTE", byte)
    options = ("data.prefetch=0", "data.max_bad_samples=1")
    run = own.run_with("damaged codes", 0, tmp_path / "run", *options)
    assert run.job.returncode == 0, run.job.stderr
    assert run.status["state"] == "finished"
    assert run.job.stdout.count(f"warning: step 4: a piece is left out: {piece}: ") == 1
    assert "is damaged" in run.job.stdout
    assert [row["skipped_samples"] for row in run.steps] == [0, 0, 0, 1, 1, 1]
    same = [a["loss"] == b["loss"] for a, b in zip(run.steps, setting.whole.steps, strict=True)]
    assert same == [True, True, True, False, False, False]
    assert_good(run, 2, 4, 6)
    progress = run.folder / "checkpoints" / "step-000004" / "progress.json"
    assert json.loads(progress.read_text())["counters"]["skipped_samples"] == 1


def test_beyond_the_budget_the_run_stops_and_a_new_start_heals_it(setting, tmp_path, monkeypatch):
    own = copy_codes(setting, tmp_path / "codes")
    byte, piece = byte_of_sample(own, POSITION)
    monkeypatch.setenv("DAMAGED_BYTE", byte)
    run: Run = own.run_with("damaged codes", 0, tmp_path / "run", "data.prefetch=0")
    assert run.job.returncode != 0
    assert run.job.stderr.count("The run stopped: ") == 1
    assert f'File "{REPO / "launch"}' not in run.job.stderr
    for part in (
        "step 4: 1 piece of this run could not be read; data.max_bad_samples allows 0",
        piece,
        f"goes on from {run.folder / 'checkpoints' / 'step-000003'}",
    ):
        assert run.job.stderr.count(part) == 1, part
    assert run.status["state"] == "failed"
    assert_good(run, 2, 3)
    assert_taken_up(own, run, after=3)


def test_a_held_out_piece_damaged_under_a_run_ends_it_on_all_ranks(setting, tmp_path, monkeypatch):
    """Read by rank 1 alone; the checkpoint that is due with the evaluation is there."""
    own = copy_codes(setting, tmp_path / "codes")
    own = replace(own, arguments=[*own.arguments, "do_eval=true", "eval_freq=4"])
    byte, piece = byte_of_piece(open_split(own, "eval"), 1)
    monkeypatch.setenv("DAMAGED_BYTE", byte)
    run: Run = own.run_with("damaged codes, slow evaluation", 0, tmp_path / "run")
    assert run.job.returncode != 0
    assert run.job.stderr.count("The run stopped: ") == 1
    assert f'File "{REPO / "launch"}' not in run.job.stderr
    for part in (
        "an evaluation: 1 piece of data.eval_data could not be read",
        piece,
        f"goes on from {run.folder / 'checkpoints' / 'step-000004'}",
    ):
        assert run.job.stderr.count(part) == 1, part
    assert run.status["state"] == "failed"
    assert [row["step"] for row in run.evaluations] == [0]
    # The evaluation before the first step, which took over 4 s, isn't training time.
    between = run.steps[0]["time"] - run.evaluations[0]["time"]
    assert run.steps[0]["seconds"] - between < 2
    assert_good(run, 2, 4)
    resumed = assert_taken_up(own, run, after=4)
    assert [row["step"] for row in resumed.evaluations] == [0, 6]
