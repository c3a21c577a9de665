"""Manifests: what a specification means, and that every mistake is told, all at once."""

import json

import numpy as np
import pytest

from tests.unit.data_cases import open_sources, stereo, write_dataset
from tests.wav import write_wav
from ttt_dist.data.dataset import GlobalOrder
from ttt_dist.data.manifest import DataError, all_recordings, read_sources


def test_a_manifest_names_files_beside_it(tmp_path):
    manifest = write_dataset(tmp_path / "set", [1.0, 0.5])
    (source,) = open_sources(manifest)
    assert source.weight == 1.0
    first, second = source.recordings
    assert first.path == tmp_path / "set" / "train0.wav"
    assert first.alignments_path == tmp_path / "set" / "train0.json"
    assert (second.duration, second.line, second.manifest) == (0.5, 2, manifest)


def test_folders_and_weights(tmp_path, monkeypatch):
    folder = tmp_path / "many"
    write_dataset(folder / "b", [0.5], name="late")
    write_dataset(folder / "a", [0.5, 0.5], name="early")
    single = write_dataset(tmp_path / "one", [0.5])
    monkeypatch.chdir(tmp_path)
    many, one = open_sources(f"many:3, {single}:0.5")
    assert (many.weight, one.weight) == (3.0, 0.5)
    names = [recording.path.name for recording in many.recordings]
    assert names == ["early0.wav", "early1.wav", "late0.wav"]
    assert len(all_recordings([many, one])) == 4


def test_a_colon_may_be_part_of_a_path(tmp_path):
    manifest = write_dataset(tmp_path / "take:2", [0.5])
    assert open_sources(manifest)[0].weight == 1.0
    assert open_sources(f"{manifest}:2")[0].weight == 2.0


def test_weights_too_small_for_an_order_are_told_with_the_sources(tmp_path):
    """Not by the order itself, which is made when all audio is encoded."""
    first, second = (write_dataset(tmp_path / name, [0.5]) for name in "ab")
    with pytest.raises(DataError) as raised:
        open_sources(f"{first}:2000000,{second}:1,nowhere.jsonl")
    small, missing = sorted(raised.value.problems, key=lambda problem: "nowhere" in problem)
    assert small.startswith(f"data.train_data: the weight of {second} is 5e-07 of all, allowed is")
    assert "there is no file or folder" in missing
    weights = [source.weight for source in open_sources(f"{first}:999999,{second}:1")]
    assert GlobalOrder([1, 1], weights, seed=0, shuffle=False)[0] in (0, 1)


def test_all_mistakes_are_told_at_once(tmp_path):
    manifest = write_dataset(tmp_path, [1.0] * 6)
    audio = [tmp_path / f"train{index}.wav" for index in range(6)]
    audio[0].unlink()
    audio[1].with_suffix(".json").unlink()
    audio[2].write_bytes(b"no audio at all")
    write_wav(audio[3], stereo(1.0)[:1])
    write_wav(audio[4], stereo(4.0))
    with manifest.open("a") as file:
        file.write('{"path": "x.wav"\n')
        file.write('["x.wav", 3]\n')
        file.write('{"path": 7, "duration": 3}\n')
        for duration in (0, -2, "3", None, True):
            file.write(json.dumps({"path": "y.wav", "duration": duration}) + "\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    (tmp_path / "bare").mkdir()
    spec = f"{manifest},{empty},{tmp_path / 'bare'},nowhere.jsonl,{manifest}:2,{empty}:x,{empty}:-1"
    with pytest.raises(DataError) as raised:
        open_sources(spec)
    told = list(raised.value.problems)
    for expected in (
        f"{manifest}:1: there is no audio file {audio[0]}",
        f"{manifest}:2: there is no alignment file",
        f"{manifest}:3: the audio header of {audio[2]} is unreadable",
        f"{manifest}:4: {audio[3]} has 1 channel, allowed is stereo",
        f"{manifest}:5: duration: found 1 s, but {audio[4]} lasts 4.00 s",
        f"{manifest}:7: is no JSON",
        f"{manifest}:8: found a JSON list",
        f"{manifest}:9: path: found 7",
        f"{manifest}:10: duration: found 0, allowed are seconds above 0",
        f"{manifest}:11: duration: found -2",
        f"{manifest}:12: duration: found '3'",
        f"{manifest}:13: duration: found None",
        f"{manifest}:14: duration: found True",
        f"{empty}: holds no recording",
        f"data.train_data: the folder {tmp_path / 'bare'} holds no .jsonl",
        "data.train_data: found 'nowhere.jsonl', but there is no file or folder",
        f"data.train_data: {manifest} is named twice",
        f"data.train_data: found '{empty}:x', which is no file",
        "data.train_data: found weight '-1'",
    ):
        (match,) = [problem for problem in told if problem.startswith(expected)]
        told.remove(match)
    assert told == []


def test_a_thousand_bad_lines_make_a_short_message(tmp_path):
    manifest = tmp_path / "wrong.jsonl"
    manifest.write_text("word\n" * 1000)
    with pytest.raises(DataError) as raised:
        open_sources(manifest)
    assert len(raised.value.problems) == 21
    assert raised.value.problems[-1] == f"{manifest}: 980 further bad lines"


@pytest.mark.parametrize("spec", ["", "  ", ","])
def test_no_data_is_told_by_its_field(spec):
    with pytest.raises(DataError, match=r"^data\.eval_data: found"):
        read_sources(spec, field="data.eval_data")


def test_other_rates_and_rounded_durations_are_fine(tmp_path):
    manifest = write_dataset(tmp_path, [1.0, 1.0])
    manifest.write_text(
        manifest.read_text().replace('1.wav", "duration": 1.0', '1.wav", "duration": 100')
    )
    write_wav(tmp_path / "train0.wav", np.zeros((2, 15_000)), rate=8_000)  # 1.875 s
    write_wav(tmp_path / "train1.wav", np.zeros((2, 8_000 * 99 + 80)), rate=8_000)  # 99.01 s
    assert len(open_sources(manifest)[0].recordings) == 2


def test_files_are_left_alone_where_another_rank_checks_them(tmp_path):
    manifest = write_dataset(tmp_path, [0.5])
    (tmp_path / "train0.wav").unlink()
    assert len(read_sources(str(manifest), field="f", check_files=False)[0].recordings) == 1
