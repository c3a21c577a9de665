"""The committed demo speech: what configs/demo promises, and word times that the audio confirms."""

import ctypes
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sphn

from launch import make_demo_speech as speech

DATA = Path(__file__).resolve().parents[2] / "configs" / "demo"
CHANNELS = ("SPEAKER_MAIN", "SPEAKER_OTHER")  # left, right
TRAIN, HELD_OUT = (
    [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    for name in ("train.jsonl", "eval.jsonl")
)
RECORDINGS = {Path(entry["path"]).stem: entry for entry in TRAIN + HELD_OUT}


def words_of(name: str, speaker: str | None = None) -> list[tuple[str, float, float]]:
    alignments = json.loads((DATA / "audio" / f"{name}.json").read_text())["alignments"]
    return [(word, *span) for word, span, who in alignments if speaker in (None, who)]


def energy(samples: np.ndarray, start: float, end: float, rate: int) -> float:
    """Mean square between two times in seconds."""
    return float(np.mean(samples[max(0, round(start * rate)) : round(end * rate)] ** 2))


def test_size_and_length() -> None:
    assert 180 <= sum(entry["duration"] for entry in RECORDINGS.values()) <= 300
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) <= 3_000_000


def test_held_out_files_are_not_trained_on() -> None:
    assert TRAIN
    assert HELD_OUT
    assert not {entry["path"] for entry in TRAIN} & {entry["path"] for entry in HELD_OUT}
    audio = {f"audio/{file.name}" for file in (DATA / "audio").glob("*.flac")}
    assert audio == {entry["path"] for entry in TRAIN + HELD_OUT}


@pytest.mark.parametrize("name", RECORDINGS)
def test_manifest_matches_audio(name: str) -> None:
    entry = RECORDINGS[name]
    samples, rate = sphn.read(str(DATA / entry["path"]))
    assert samples.shape[0] == 2
    # FLAC holds its length in samples: no tolerance but float division.
    assert samples.shape[1] / rate == pytest.approx(entry["duration"], abs=1e-9)
    assert sphn.durations([str(DATA / entry["path"])])[0] == pytest.approx(entry["duration"])
    cut, _ = sphn.read(str(DATA / entry["path"]), start_sec=7.04, duration_sec=3.2)
    first = round(7.04 * rate)
    assert np.array_equal(cut, samples[:, first : first + round(3.2 * rate)])


@pytest.mark.parametrize("name", RECORDINGS)
def test_alignments_are_ordered_and_inside(name: str) -> None:
    spans = [(start, end) for _, start, end in words_of(name)]
    assert spans == sorted(spans)
    assert all(0 <= start < end <= RECORDINGS[name]["duration"] for start, end in spans)
    for speaker in CHANNELS:
        own = words_of(name, speaker)
        assert len(own) >= 20
        assert all(before[2] <= after[1] for before, after in pairwise(own))


@pytest.mark.parametrize("name", RECORDINGS)
def test_speakers_overlap_and_pause(name: str) -> None:
    main, other = (words_of(name, speaker) for speaker in CHANNELS)
    assert any(a[1] < b[2] and b[1] < a[2] for a in main for b in other)
    spans = sorted((start, end) for _, start, end in main + other)
    silences, latest = [], spans[0][1]
    for start, end in spans:
        silences.append(start - latest)
        latest = max(latest, end)
    assert max(silences) >= 0.4


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("channel", [0, 1])
def test_word_times_are_true(name: str, channel: int) -> None:
    """Energy lies in the words alone, begins where they begin and ends where they end."""
    samples, rate = sphn.read(str(DATA / RECORDINGS[name]["path"]))
    own = samples[channel]
    words = words_of(name, CHANNELS[channel])
    in_words = sum(
        float(np.sum(own[round(start * rate) : round(end * rate)] ** 2)) for _, start, end in words
    )
    # Measured 0.9998 and more; times that are 20 ms late lose more than the 0.1 % left here.
    assert in_words >= 0.999 * float(np.sum(own**2))
    for word, start, end in words:
        # Turns have a level of 0.1; the faintest word measures 0.053, pauses are digital silence.
        assert energy(own, start, end, rate) ** 0.5 > 0.03, word
    ends = [0.0, *(end for _, _, end in words)]
    for silent_from, word in zip(ends, words, strict=False):
        _, start, _ = word
        if start - silent_from > 0.2:  # measured at most 0.002
            onset = energy(own, start, start + 0.1, rate)
            assert energy(own, start - 0.05, start, rate) < 0.01 * onset, word
    for word, following in pairwise(words):
        _, _, end = word
        if following[1] - end > 0.2:  # measured at most 0.03: the voice rings for some milliseconds
            assert energy(own, end, end + 0.1, rate) < 0.1 * energy(own, end - 0.1, end, rate), word


def test_speech_says_what_the_dialogues_say() -> None:
    dialogues = speech.parse_dialogues(speech.DIALOGUES)
    assert {dialogue.name for dialogue in dialogues} == set(RECORDINGS)
    assert {d.name for d in dialogues if d.split == "eval"} == {
        Path(entry["path"]).stem for entry in HELD_OUT
    }
    assert len({dialogue.user_voice for dialogue in dialogues}) >= 4
    for dialogue in dialogues:
        for letter, speaker in speech.SPEAKERS.items():
            said = " ".join(turn.text for turn in dialogue.turns if turn.speaker == letter)
            assert [word for word, _, _ in words_of(dialogue.name, speaker)] == said.split()


@pytest.mark.parametrize(
    "text",
    ["M 0.4 Hello.\n", "[a] train user=en:160:50\nM soon Hello.\n", "[a] test user=en:1:1\n"],
)
def test_a_bad_dialogue_names_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dialogues.txt"
    path.write_text(text)
    with pytest.raises(speech.DemoSpeechError, match=rf"line {text.count(chr(10))}: expected"):
        speech.parse_dialogues(path)


def test_an_existing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speech.main([str(tmp_path)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_missing_ffmpeg_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(speech.DemoSpeechError, match=r"ffmpeg is not on the PATH\. Install it"):
        speech.make_demo_speech(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_espeak_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(speech.DemoSpeechError, match=r"libespeak-ng is missing.*Training needs"):
        speech.Espeak()
