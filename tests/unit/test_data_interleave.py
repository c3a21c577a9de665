"""The text stream, against moshi-finetune's own output and its rules one by one."""

import json
from pathlib import Path

import pytest
from moshi.models.lm import LMModel

from tests.unit.data_cases import small_tokenizer
from ttt_dist.data.interleave import (
    TextIds,
    Word,
    num_frames,
    parse_alignments,
    piece_words,
    text_stream,
    tokenize_word,
)
from ttt_dist.data.manifest import DataError

GOLDENS = json.loads(
    (Path(__file__).parents[1] / "assets" / "goldens" / "interleave.json").read_text()
)
MAIN, OTHER = "SPEAKER_MAIN", "SPEAKER_OTHER"


@pytest.mark.parametrize("case", GOLDENS["cases"])
def test_streams_equal_moshi_finetune(case):
    ids = TextIds(GOLDENS["text_padding"], GOLDENS["end_of_text_padding"], GOLDENS["zero_padding"])
    words = parse_alignments(
        json.dumps({"alignments": case["alignments"]}).encode(), Path("a.json")
    )
    duration = case["duration_sec"]
    stream = text_stream(
        piece_words(words, 0.0, duration), num_frames(duration), case["tokens"].__getitem__, ids
    )
    assert stream == case["text_stream"]


def test_a_piece_takes_the_words_that_start_in_it():
    words = [
        Word("before", 1.9, 2.4, MAIN),
        Word("first", 2.0, 2.2, MAIN),
        Word("theirs", 2.5, 2.7, OTHER),
        Word("instant", 3.0, 3.0, MAIN),
        Word("last", 3.99, 4.5, MAIN),
        Word("after", 4.0, 4.1, MAIN),
    ]
    taken = piece_words(words, 2.0, 2.0)
    assert [(word.text, word.start) for word in taken] == [("first", 0.0), ("last", 3.99 - 2.0)]


def test_a_newer_word_replaces_what_is_left_of_an_older_one():
    tokens = {"long": [10, 11, 12, 13], "new": [20]}
    words = [Word("long", 0.1, 0.2, MAIN), Word("new", 0.24, 0.5, MAIN)]
    # 0.24 s lies at the end of frame 2 (0.16 to 0.24 s), so the word belongs to frame 3.
    assert text_stream(words, 6, tokens.__getitem__, TextIds()) == [0, 10, 11, 20, 3, 3]


def test_words_are_tokenised_on_their_own_without_bos():
    tokenizer = small_tokenizer()
    hello = tokenizer.encode("hello")
    assert tokenize_word(tokenizer, " hello\n") == hello
    assert tokenizer.bos_id() not in hello
    newline = tokenizer.encode("\n")[-1:]
    assert tokenize_word(tokenizer, "hello\ntea") == [*hello, *newline, *tokenizer.encode("tea")]


def test_the_special_ids_are_the_language_models():
    config = {"dim": 16, "num_heads": 2, "num_layers": 1, "card": 8, "text_card": 40, "n_q": 2}
    config |= {"delays": [0, 0, 0], "dep_q": 1, "depformer_dim": 16, "depformer_num_heads": 2}
    config |= {"depformer_num_layers": 1, "existing_text_padding_id": 5}
    model = LMModel(**config)
    assert TextIds.from_lm_config(config) == TextIds(
        model.text_padding_token_id, model.end_of_text_padding_id, model.zero_token_id
    )
    assert TextIds.from_lm_config(None) == TextIds(3, 0, -1)


def test_alignments_are_sorted_and_faults_are_all_named():
    unsorted = [["b", [2.0, 2.5], MAIN], ["a", [1, 1.5], MAIN]]
    content = json.dumps({"alignments": unsorted}).encode()
    assert [word.text for word in parse_alignments(content, Path("a.json"))] == ["a", "b"]

    bad = [["a", [1.0], MAIN], ["b", [1.0, 2.0], MAIN], ["c", [1, 2]], ["d", ["1", 2], MAIN]]
    with pytest.raises(DataError) as raised:
        parse_alignments(json.dumps({"alignments": bad}).encode(), Path("a.json"))
    assert [problem[: len("a.json: alignments[0]")] for problem in raised.value.problems] == [
        "a.json: alignments[0]",
        "a.json: alignments[2]",
        "a.json: alignments[3]",
    ]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "no JSON"),
        (b"[]", "no list `alignments`"),
        (b'{"alignments": 3}', "no list `alignments`"),
        (b'{"alignments": [["a", [NaN, 1.0], "SPEAKER_MAIN"]]}', "alignments[0]"),
        (b'{"alignments": [], "text_conditions": {"mood": "calm"}}', "text_conditions"),
        (b"\xff\xfe\x00", "no JSON"),
    ],
)
def test_unusable_alignment_files_are_refused(content, found):
    with pytest.raises(DataError, match=r"^some/a\.json: ") as raised:
        parse_alignments(content, Path("some/a.json"))
    assert found in str(raised.value)
