"""Word alignments to the text stream at 12.5 Hz, token for token as moshi-finetune builds it.

Moshi (Défossez et al. 2024, "Moshi: a speech-text foundation model for real-time dialogue", section
3.4.4, the inner monologue) hears one text token a frame: the words it says as they begin, padding
between them, and an end-of-padding token in the frame before a word.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import sentencepiece

from ttt_dist.data.codes_file import FRAME_RATE
from ttt_dist.data.manifest import LONGEST_SEC, DataError

MAIN_SPEAKER = "SPEAKER_MAIN"
_MAX_PROBLEMS_A_FILE = 5


@dataclass(frozen=True)
class TextIds:
    """Special ids of the text stream; they belong to the language model, not to the tokenizer."""

    padding: int = 3
    end_of_padding: int = 0
    zero: int = -1

    @classmethod
    def from_lm_config(cls, lm_config: Mapping[str, Any] | None) -> TextIds:
        """The ids that `LMModel(**lm_config)` uses; None stands for Moshi 7B."""
        config = lm_config or {}
        return cls(
            padding=int(config.get("existing_text_padding_id", 3)),
            end_of_padding=int(config.get("existing_text_end_padding_id", 0)),
        )


@dataclass(frozen=True)
class Word:
    """A spoken word; `start` and `end` in seconds from the beginning of the recording or piece."""

    text: str
    start: float
    end: float
    speaker: str


def num_frames(duration_sec: float) -> int:
    """Frames T of a piece of `duration_sec` seconds."""
    return math.ceil(duration_sec * FRAME_RATE)


def parse_alignments(content: bytes, path: Path) -> list[Word]:
    """`read_words`, sorted by start."""
    return sorted(read_words(content, path), key=attrgetter("start"))


def read_words(content: bytes, path: Path) -> list[Word]:
    """The words of an alignment file in its own order; `path` only names it in messages.

    Raises:
        DataError: no JSON, no list `alignments`, entries of another form (the first five are
            named), or `text_conditions`, which need a conditioned model that isn't built here.
    """
    form = '{"alignments": [[word, [start_sec, end_sec], speaker], ...]}'
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:  # of nesting or a number without an end, too
        raise DataError([f"{path}: is no JSON ({error}); it must hold {form}"]) from error
    if not isinstance(data, dict) or not isinstance(data.get("alignments"), list):
        raise DataError([f"{path}: found no list `alignments`; it must hold {form}"])
    if data.get("text_conditions"):
        raise DataError(
            [f"{path}: text_conditions: conditioned models are not supported; remove the key"]
        )
    words: list[Word] = []
    problems: list[str] = []
    for index, entry in enumerate(data["alignments"]):
        word = _parse_word(entry)
        if word is not None:
            words.append(word)
        elif len(problems) < _MAX_PROBLEMS_A_FILE:
            problems.append(
                f"{path}: alignments[{index}]: found {json.dumps(entry)[:120]}, allowed is "
                "[word, [start_sec, end_sec], speaker]"
            )
    if problems:
        raise DataError(problems)
    return words


def _parse_word(entry: object) -> Word | None:
    match entry:
        case [str(text), [float() | int() as start, float() | int() as end], str(speaker)]:
            if abs(start) < LONGEST_SEC and abs(end) < LONGEST_SEC:
                return Word(text, float(start), float(end), speaker)
    return None


def piece_words(words: Sequence[Word], start_sec: float, duration_sec: float) -> list[Word]:
    """Moshi's own words that *start* inside the piece, times shifted to it.

    `words` is sorted by start. Words without a duration (end ≤ start) are dropped.
    """
    first = bisect_left(words, start_sec, key=attrgetter("start"))
    last = bisect_left(words, start_sec + duration_sec, key=attrgetter("start"))
    return [
        Word(word.text, word.start - start_sec, word.end - start_sec, word.speaker)
        for word in words[first:last]
        if word.speaker == MAIN_SPEAKER and word.start < word.end
    ]


def tokenize_word(tokenizer: sentencepiece.SentencePieceProcessor, word: str) -> list[int]:
    """Token ids of one word on its own, without BOS; the newline piece joins lines in it."""
    first, *others = word.strip().split("\n")
    tokens = list(tokenizer.encode(first))
    for line in others:
        tokens += [*tokenizer.encode("\n")[-1:], *tokenizer.encode(line)]
    return tokens


def text_stream(
    words: Sequence[Word], frames: int, tokenize: Callable[[str], Sequence[int]], ids: TextIds
) -> list[int]:
    """Text tokens of a piece, one a frame.

    Args:
        words: as `piece_words` returns them.
        frames: length of the stream.
        tokenize: token ids of one word.
        ids: padding and end-of-padding.

    A frame takes up every word that starts before its end; a newer word replaces what is left of
    an older one. Then one waiting token is emitted. Frames without one hold padding, and the one
    before the first token of a run, if it holds padding, end-of-padding.
    """
    stream = [ids.padding] * frames
    waiting: deque[int] = deque()
    upcoming = 0
    for frame in range(frames):
        while upcoming < len(words) and words[upcoming].start * FRAME_RATE < frame + 1:
            waiting = deque(tokenize(words[upcoming].text))
            upcoming += 1
        if waiting:
            if frame > 0 and stream[frame - 1] == ids.padding:
                stream[frame - 1] = ids.end_of_padding
            stream[frame] = waiting.popleft()
    return stream
