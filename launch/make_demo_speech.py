"""Synthesise the demo's speech, with word times: `python -m launch.make_demo_speech OUT`.

The result is committed under `configs/demo`, so that nobody needs this script to train; it is kept
as the record of how the speech was made. It speaks `configs/demo/dialogues.txt` with espeak-ng
(through `libespeak-ng`, whose events give the sample at which every word and phoneme begins) and
writes moshi-finetune's dataset layout: `train.jsonl`, `eval.jsonl`, and under `audio/` one stereo
FLAC (left Moshi, right the user) with one `.json` of alignments for each dialogue.

FLAC because `sphn` cuts it to the sample; it starts a cut of Ogg Vorbis 512 samples late and
reads neither Opus nor AAC. Needs libespeak-ng and ffmpeg. Two runs give the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

DIALOGUES = Path(__file__).resolve().parents[1] / "configs" / "demo" / "dialogues.txt"
MOSHI_VOICE = "en-us+f3:180:50"  # VOICE:rate:pitch, as in the dialogues
SPEAKERS = {"M": "SPEAKER_MAIN", "U": "SPEAKER_OTHER"}
SAMPLE_RATE = 16_000  # of the files: holds speech up to 8 kHz
DEPTH = 10  # bits a sample that are kept: 45 dB between speech and rounding, half the size of 16
LEVEL = 0.1  # RMS of a turn, of full scale
TAIL_SEC = 0.6

_RETRIEVAL, _PHONEME_EVENTS = 2, 1
_CHARS_ASCII = 1
_EVENT_END_OF_LIST, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7
_PARAM_RATE, _PARAM_PITCH = 1, 3


class DemoSpeechError(ValueError):
    """What stops the synthesis, in one sentence that says how to go on."""


@dataclass(frozen=True)
class Word:
    text: str
    start: int  # samples at espeak-ng's rate, from the start of the turn
    end: int


@dataclass(frozen=True)
class Turn:
    line: int
    speaker: str  # "M" or "U"
    gap: float  # seconds after the end of everything said so far
    text: str


@dataclass
class Dialogue:
    name: str
    split: str  # "train" or "eval"
    user_voice: str  # VOICE:rate:pitch
    turns: list[Turn] = field(default_factory=list)


def parse_dialogues(path: Path) -> list[Dialogue]:
    """Read `path`; its own head explains the format. Raises DemoSpeechError with the line."""
    dialogues: list[Dialogue] = []
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if head := re.fullmatch(r"\[(\w+)\] (train|eval) user=(\S+:\d+:\d+)", line.strip()):
            name, split, voice = head.groups()
            dialogues.append(Dialogue(name, split, voice))
        elif (turn := re.fullmatch(r"([MU])\s+(-?\d+\.\d+)\s+(\S.*)", line.strip())) and dialogues:
            speaker, gap, text = turn.groups()
            dialogues[-1].turns.append(Turn(number, speaker, float(gap), text))
        else:
            raise DemoSpeechError(
                f"{path}, line {number}: expected `[name] train|eval user=VOICE:rate:pitch` or, "
                f"below one, `M|U gap text`; found {line.strip()!r}."
            )
    if not dialogues:
        raise DemoSpeechError(f"{path} holds no dialogue; begin one with `[name] ...`.")
    return dialogues


class _EventId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    """`espeak_EVENT` of espeak-ng's speak_lib.h (1.49 and later: with `sample`)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Espeak:
    """espeak-ng's library in one process: speech as samples, with the sample of each word."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        try:
            self._lib = ctypes.CDLL(name)
        except OSError as error:
            raise DemoSpeechError(
                f"libespeak-ng is missing ({error}). Install espeak-ng (Debian: libespeak-ng1). "
                "Training needs neither: the speech it makes is committed under configs/demo."
            ) from error
        self.sample_rate = int(self._lib.espeak_Initialize(_RETRIEVAL, 0, None, _PHONEME_EVENTS))
        if self.sample_rate <= 0:
            raise DemoSpeechError("espeak_Initialize failed: are espeak-ng's voice data installed?")
        self._pcm: list[npt.NDArray[np.int16]] = []
        self._words: list[tuple[int, int]] = []  # (index of the first character, sample)
        self._phonemes: list[tuple[str, int]] = []  # (name, sample)
        self._callback = _Callback(self._on_audio)  # kept: the library holds only its address
        self._lib.espeak_SetSynthCallback(self._callback)
        self._first_phoneme: dict[str, str] = {}

    def _on_audio(self, wav: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if count > 0 and wav:
            self._pcm.append(np.ctypeslib.as_array(wav, (count,)).copy())
        index = 0
        while (event := events[index]).type != _EVENT_END_OF_LIST:
            if event.type == _EVENT_WORD:
                self._words.append((event.text_position - 1, event.sample))
            elif event.type == _EVENT_PHONEME:
                self._phonemes.append((event.id.string.decode(), event.sample))
            index += 1
        return 0

    def set_voice(self, spec: str) -> None:
        """Choose `VOICE:rate:pitch`; rate in words a minute, pitch from 0 to 99."""
        voice, rate, pitch = spec.split(":")
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DemoSpeechError(
                f"espeak-ng has no voice {voice!r}; `espeak-ng --voices` lists them."
            )
        self._lib.espeak_SetParameter(_PARAM_RATE, int(rate), 0)
        self._lib.espeak_SetParameter(_PARAM_PITCH, int(pitch), 0)

    def _synthesise(self, text: str) -> None:
        self._pcm, self._words, self._phonemes = [], [], []
        data = text.encode("ascii")
        failed = self._lib.espeak_Synth(
            data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _CHARS_ASCII, None, None
        )
        if failed or self._lib.espeak_Synchronize() or not self._pcm:
            raise DemoSpeechError(f"espeak-ng could not speak {text!r}.")

    def speak(self, text: str) -> tuple[Samples, list[Word]]:
        """Speak `text`: samples in [-1, 1] `[n]`, and the words between its spaces."""
        for word in text.split():  # before the sentence: each call overwrites the events
            if word not in self._first_phoneme:
                self._synthesise(word)
                self._first_phoneme[word] = next(
                    name for name, _ in self._phonemes if not name.startswith("_")
                )
        self._synthesise(text)
        words = self._word_times(text)
        return np.concatenate(self._pcm).astype(np.float64) / 32768, words

    def _word_times(self, text: str) -> list[Word]:
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        starts: list[int] = []
        for begin, end in spans:
            samples = [sample for char, sample in self._words if begin <= char < end]
            # Some pairs ("of the") are one unit to espeak-ng, with one event: the second word then
            # begins at the phoneme it begins with when spoken alone.
            word = text[begin:end]
            if not samples and starts:
                following = [s for c, s in self._words if c >= end]
                samples = [
                    sample
                    for name, sample in self._phonemes
                    if name == self._first_phoneme[word]
                    and starts[-1] < sample < min(following, default=sys.maxsize)
                ][-1:]
            if not samples:
                raise DemoSpeechError(
                    f"espeak-ng gives no time for {word!r} in {text!r}: say it another way."
                )
            starts.append(samples[0])
        total = sum(len(part) for part in self._pcm)
        words = []
        for (begin, end), start, following_start in zip(
            spans, starts, [*starts[1:], total], strict=True
        ):
            stop = following_start  # or the pause that reaches up to there
            for name, sample in reversed(self._phonemes):
                if start < sample < following_start:
                    if not name.startswith("_"):
                        break
                    stop = sample
            words.append(Word(text[begin:end], start, stop))
        return words


def compose(
    dialogue: Dialogue, espeak: Espeak
) -> tuple[Samples, list[tuple[str, list[float], str]]]:
    """Speak all turns: stereo samples `[2, n]` at espeak-ng's rate, and alignments by start (s)."""
    rate = espeak.sample_rate
    spoken: list[tuple[int, int, Samples]] = []  # (channel, first sample, samples)
    alignments: list[tuple[str, list[float], str]] = []
    latest, last_of = 0, {"M": 0, "U": 0}
    for turn in dialogue.turns:
        espeak.set_voice(MOSHI_VOICE if turn.speaker == "M" else dialogue.user_voice)
        pcm, words = espeak.speak(turn.text)
        first = latest + round(turn.gap * rate)
        if first < last_of[turn.speaker]:
            raise DemoSpeechError(
                f"line {turn.line} of the dialogues: the turn would start before the speaker's "
                f"own last one has ended; raise its gap of {turn.gap}."
            )
        pcm *= min(LEVEL / float(np.sqrt(np.mean(pcm**2))), 0.95 / float(np.abs(pcm).max()))
        spoken.append(("MU".index(turn.speaker), first, pcm))
        for word in words:
            times = [round((first + at) / rate, 3) for at in (word.start, word.end)]
            alignments.append((word.text, times, SPEAKERS[turn.speaker]))
        last_of[turn.speaker] = first + words[-1].end
        latest = max(latest, last_of[turn.speaker])
    length = latest + round(TAIL_SEC * rate)
    stereo = np.zeros((2, length))
    for channel, first, pcm in spoken:
        part = pcm[: length - first]
        stereo[channel, first : first + len(part)] += part
    return stereo, sorted(alignments, key=lambda alignment: alignment[1])


def _ffmpeg(arguments: list[str], data: bytes) -> bytes:
    command = ["ffmpeg", "-v", "error", "-bitexact", "-f", "s16le", "-ac", "2", *arguments]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        raise DemoSpeechError(f"`{' '.join(command)}` failed: {done.stderr.decode().strip()}")
    return done.stdout


def write_flac(stereo: Samples, rate: int, path: Path) -> float:
    """Write `[2, n]` samples at `rate` Hz as FLAC of SAMPLE_RATE Hz; returns the duration in s."""
    pcm = np.round(stereo.T.clip(-1, 1) * 32767).astype("<i2").tobytes()
    to_rate = ["-ar", str(rate), "-i", "-", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-"]
    samples = np.frombuffer(_ffmpeg(to_rate, pcm), "<i2").astype(np.float64)
    step = 1 << (16 - DEPTH)
    rounded = (np.round(samples / step) * step).clip(-32768, 32768 - step).astype("<i2")
    to_flac = ["-ar", str(SAMPLE_RATE), "-i", "-", "-c:a", "flac", "-compression_level", "12"]
    _ffmpeg([*to_flac, "-bitexact", str(path)], rounded.tobytes())
    return len(rounded) / 2 / SAMPLE_RATE


def make_demo_speech(out: Path, dialogues_path: Path = DIALOGUES) -> None:
    """Write the data set into `out`, which must not exist; nothing half-written stays.

    Raises:
        DemoSpeechError: `out` exists, espeak-ng or ffmpeg is missing, or it cannot say a word.
    """
    if out.exists():
        raise DemoSpeechError(f"{out} exists; name a folder that doesn't (nothing is overwritten).")
    if shutil.which("ffmpeg") is None:
        raise DemoSpeechError("ffmpeg is not on the PATH. Install it (Debian: ffmpeg).")
    dialogues = parse_dialogues(dialogues_path)
    espeak = Espeak()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        (folder / "audio").mkdir(parents=True)
        manifests: dict[str, list[str]] = {"train": [], "eval": []}
        for dialogue in dialogues:
            stereo, alignments = compose(dialogue, espeak)
            audio = folder / "audio" / f"{dialogue.name}.flac"
            duration = write_flac(stereo, espeak.sample_rate, audio)
            lines = ",\n".join(json.dumps(alignment) for alignment in alignments)
            audio.with_suffix(".json").write_text(f'{{"alignments": [\n{lines}\n]}}\n')
            entry = {"path": f"audio/{audio.name}", "duration": duration}
            manifests[dialogue.split].append(json.dumps(entry) + "\n")
            print(f"{audio.name}: {duration:.2f} s, {len(alignments)} words, {dialogue.split}")
        for split, entries in manifests.items():
            (folder / f"{split}.jsonl").write_text("".join(entries))
        os.rename(folder, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Synthesise the demo's two-speaker speech.")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dialogues", type=Path, default=DIALOGUES, help="what is said, and when")
    options = parser.parse_args(arguments)
    try:
        make_demo_speech(options.out, options.dialogues)
    except (DemoSpeechError, OSError) as error:
        print(f"make_demo_speech: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
