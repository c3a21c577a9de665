"""Reading a dataset's files ahead of training: every problem, and what training takes anyhow."""

import json

import numpy as np
import pytest

from launch.check_data import check_data, find_data, parse_arguments
from tests.unit.data_cases import open_sources, stereo, write_dataset
from tests.wav import write_wav
from ttt_dist.data.check import check_contents, collect_notes, too_few_pieces, too_few_recordings
from ttt_dist.data.manifest import DataError, all_recordings, scan_sources


def reports_of(manifest, **options):
    sources, problems = scan_sources(str(manifest), field="data.train_data")
    assert problems == []
    return check_contents(all_recordings(sources), **options)


def write_words(path, words):
    path.write_text(json.dumps({"alignments": words}))


def test_good_files_have_nothing_to_tell(tmp_path):
    manifest = write_dataset(tmp_path, [2.0, 1.0])
    for index in range(2):
        write_words(tmp_path / f"train{index}.json", [["tea", [0.1, 0.4], "SPEAKER_MAIN"]])
    calls = []
    reports = reports_of(manifest, decode=True, progress=lambda: calls.append(1))
    assert [report.problems for report in reports] == [(), ()]
    assert collect_notes(reports) == []
    assert [report.pieces(0.75) for report in reports] == [3, 2]
    assert len(calls) == 2


def test_a_missing_file_hides_no_other_problem(tmp_path):
    manifest = write_dataset(tmp_path, [1.0] * 2)
    (tmp_path / "train0.wav").unlink()
    (tmp_path / "train0.json").write_text("{")
    write_wav(tmp_path / "train1.wav", stereo(4.0)[:1])
    (tmp_path / "train1.json").unlink()
    first, second = reports_of(manifest)
    for report, parts in (
        (first, ["there is no audio file", "is no JSON"]),
        (second, ["1 channel,", "lasts 4.00 s", "there is no alignment file"]),
    ):
        assert len(report.problems) == len(parts)
        for problem, part in zip(report.problems, parts, strict=True):
            assert problem.startswith(f"{manifest}:{report.recording.line}: ")
            assert part in problem
    assert first.seconds == 0


MAIN, OTHER = "SPEAKER_MAIN", "SPEAKER_00"


@pytest.mark.parametrize(
    ("words", "problem", "remark"),
    [
        ([["a", [0.5, 0.6], MAIN], ["b", [0.1, 0.2], MAIN]], None, "not ascending"),
        ([["a", [0.5, 0.5], MAIN]], None, "end before they last"),
        ([["a", [0.5, 0.6], MAIN], ["b", [0.5, 0.6], OTHER]], None, "of other speakers"),
        ([["a", [0.5, 0.6], MAIN], ["b", [1.2, 1.3], MAIN]], None, "just outside"),
        ([], None, "no words"),
        ([["a", [0.5, 0.6], OTHER]], "no word is of 'SPEAKER_MAIN', found 'SPEAKER_00'", None),
        ([["a", [0.5, 0.6], MAIN], ["b", [30, 31], MAIN]], "1 of 2 words start outside", None),
        ([["a", [-3, 0.6], MAIN]], "('a' at -3 s)", None),
        ([["a", [0.5], MAIN]], "alignments[0]: found", None),
    ],
)
def test_alignments(tmp_path, words, problem, remark):
    manifest = write_dataset(tmp_path, [1.0])
    write_words(tmp_path / "train0.json", words)
    (report,) = reports_of(manifest)
    for found, wanted in ((report.problems, problem), (report.remarks, remark)):
        assert len(found) == (wanted is not None)
        assert wanted is None or wanted in found[0]


def test_audio_that_breaks_off_is_found_by_decoding_alone(tmp_path):
    manifest = write_dataset(tmp_path, [3.0])
    audio = tmp_path / "train0.wav"
    write_words(audio.with_suffix(".json"), [["tea", [0.1, 0.4], MAIN]])
    audio.write_bytes(audio.read_bytes()[: audio.stat().st_size // 2])
    assert reports_of(manifest)[0].problems == ()
    (problem,) = reports_of(manifest, decode=True)[0].problems
    assert problem.startswith(f"{manifest}:1: {audio}: ")


def test_notes_are_collected_over_recordings(tmp_path):
    manifest = write_dataset(tmp_path, [1.0] * 3)
    for index in range(3):
        write_words(tmp_path / f"train{index}.json", [["tea", [0.1, 0.4], MAIN]])
        write_wav(tmp_path / f"train{index}.wav", np.zeros((2, 8_000)), rate=8_000)
    with manifest.open("a") as file:
        file.write('{"path": "./train1.wav", "duration": 1.0}\n')
    resampled, repeated = collect_notes(reports_of(manifest))
    assert resampled.startswith(f"{manifest}:1: ")
    assert "(and 3 further recordings): 8000 Hz, resampled to 24000" in resampled
    assert repeated.startswith(f"{manifest}:4: ")
    assert f"named before, at {manifest}:2" in repeated


def test_paths_out_of_the_manifests_folder(tmp_path):
    manifest = write_dataset(tmp_path / "set", [1.0])
    write_dataset(tmp_path, [1.0], name="other")
    lines = {
        "../other0.wav": False,
        "a/../../other0.wav": False,
        "..": False,
        "a/../train0.wav": True,
        "..train0.wav": True,
        str(tmp_path / "other0.wav"): True,
    }
    rows = [json.dumps({"path": path, "duration": 1.0}) for path in lines]
    manifest.write_text("\n".join(rows) + "\n")
    sources, problems = scan_sources(str(manifest), field="data.train_data")
    wrong = [number for number, good in enumerate(lines.values(), start=1) if not good]
    assert [f"{manifest}:{number}: path: found" in each for number, each in zip(
        wrong, problems, strict=True
    )] == [True] * 3  # fmt: skip
    assert all("leads out of the manifest's folder" in problem for problem in problems)
    assert [each.line for each in sources[0].recordings] == [4, 5, 6]
    with pytest.raises(DataError, match="leads out"):
        open_sources(manifest)


DEEP, LONG = "[" * 200_000, "9" * 5000


def test_files_made_to_break_readers_are_told_like_others(tmp_path):
    manifest = write_dataset(tmp_path, [1.0] * 2)
    for index, words in enumerate([DEEP, f'{{"alignments": [["a", [0, 1{"0" * 400}], "b"]]}}']):
        (tmp_path / f"train{index}.json").write_text(words)
    found = [problem for report in reports_of(manifest) for problem in report.problems]
    assert ["is no JSON" in found[0], "alignments[0]: found" in found[1]] == [True, True]
    lines = {
        DEEP: "is no JSON",
        f'{{"path": "a.wav", "duration": {LONG}}}': "is no JSON",
        f'{{"path": "a.wav", "duration": 1{"0" * 400}}}': "duration: found 1000",
        '{"path": "a\\u0000.wav", "duration": 1}': "path: found",
        '{"path": "a\\ud800.wav", "duration": 1}': "path: found",
    }
    manifest.write_text("\n".join(lines) + "\n")
    problems = scan_sources(str(manifest), field="data.train_data")[1]
    for number, (problem, part) in enumerate(zip(problems, lines.values(), strict=True), start=1):
        assert problem.startswith(f"{manifest}:{number}: {part}")
    manifest.write_text(json.dumps({"path": "a" * 5000 + ".wav", "duration": 1}) + "\n")
    (report,) = reports_of(manifest)
    assert "there is no audio file" in report.problems[0]


def test_fewer_pieces_than_ranks():
    assert too_few_pieces(4, 4, 10.0, "data.train_data") == []
    (problem,) = too_few_pieces(1, 4, 10.0, "data.train_data")
    assert "holds 1 piece of 10 s for 4 data-parallel ranks" in problem


def test_fewer_recordings_than_lanes():
    assert too_few_recordings(4, 4, "data.train_data") == []
    (problem,) = too_few_recordings(1, 4, "data.train_data")
    assert "holds 1 recording for 4 lanes" in problem
    assert "to at most 1 lane in all, or set ttt.persistent_states: false" in problem


def test_lanes_are_asked_for_where_states_are_carried(tmp_path):
    manifest = write_dataset(tmp_path, [1.0] * 3)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {tmp_path}/run\ndata: {{train_data: {manifest}}}\n"
        "batch_size: 2\nfull_finetuning: true\n"
    )
    arguments = [str(config), "duration_sec=0.25"]
    for more, too_few in (([], False), (["ttt.enable=true", "ttt.persistent_states=true"], True)):
        parsed = parse_arguments([*arguments, *more, "--ranks", "2"])
        problems, _, summary = check_data(find_data(parsed), ranks=parsed.ranks, decode=False)
        told = [problem for problem in problems if "holds 3 recordings for 4 lanes" in problem]
        assert len(problems) == len(told) == too_few
        assert summary[0].endswith("pieces of 0.25 s: 12")
