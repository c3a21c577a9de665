"""Encoding what the cache lacks: once, split over ranks, with every mistake told."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import CheckpointInfo
from moshi.models.loaders import _mimi_config as MIMI_CONFIG

from tests.unit.data_cases import (
    SPEC,
    cache_in,
    change_ctime,
    open_sources,
    small_codec,
    stereo,
    write_dataset,
)
from tests.wav import write_wav
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.dataset import PieceDataset, default_cache_folder, open_pieces
from ttt_dist.data.encode import (
    encode_missing,
    load_codec,
    mimi_config_problems,
    missing_seconds,
    share_of,
)
from ttt_dist.data.interleave import TextIds
from ttt_dist.data.manifest import DataError
from ttt_dist.data.recordings import open_recordings


@pytest.fixture
def encoded_pieces(monkeypatch):
    """Counts what goes through Mimi: one entry a call, the shape of its batch."""
    calls = []
    original = MimiModel.encode

    def encode(self, x):
        calls.append(tuple(x.shape))
        return original(self, x)

    monkeypatch.setattr(MimiModel, "encode", encode)
    return calls


def must_not_load():
    raise AssertionError("Mimi was loaded although nothing is missing")


def test_a_second_run_encodes_nothing(tmp_path, encoded_pieces):
    (source,) = open_sources(write_dataset(tmp_path / "data", [5.3, 3.0, 0.5]))
    cache = cache_in(tmp_path / "cache")
    assert missing_seconds(source.recordings, cache) == pytest.approx(8.8)
    first = encode_missing(source.recordings, cache, small_codec)
    assert (first.recordings, first.encoded, first.cached, first.pieces) == (3, 3, 0, 6)
    # All pieces of a recording in one batch, both channels: 3, 2 and 1 pieces.
    assert [shape[0] for shape in encoded_pieces] == [6, 4, 2]
    seen = []
    second = encode_missing(
        source.recordings,
        cache_in(tmp_path / "cache"),
        must_not_load,
        progress=lambda recording, encoded: seen.append((recording.path.name, encoded)),
    )
    assert (second.encoded, second.cached, second.pieces) == (0, 3, 6)
    assert seen == [(f"train{n}.wav", False) for n in range(3)]
    assert len(encoded_pieces) == 3
    assert missing_seconds(source.recordings, cache) == 0.0
    for path in (source.recordings[0].path, source.recordings[1].alignments_path):
        change_ctime(path)
    assert missing_seconds(source.recordings, cache) == 0.0
    os.utime(source.recordings[0].path, (1, 1))
    assert missing_seconds(source.recordings, cache) == pytest.approx(5.3)


def test_shares_cover_all_recordings_once(tmp_path):
    (source,) = open_sources(write_dataset(tmp_path, [0.5, 0.9, 0.3, 0.7, 0.4]))
    doubled = [*source.recordings, source.recordings[0]]
    for world_size in (1, 2, 3, 8):
        shares = [share_of(doubled, rank, world_size) for rank in range(world_size)]
        paths = [recording.path for share in shares for recording in share]
        assert sorted(paths) == sorted(recording.path for recording in source.recordings)
    assert [item.duration for item in share_of(doubled, 0, 2)] == [0.9, 0.5, 0.3]


def test_bad_alignments_stop_before_encoding_and_bad_audio_after_the_rest(tmp_path, encoded_pieces):
    manifest = write_dataset(tmp_path / "data", [1.0] * 4)
    (source,) = open_sources(manifest)
    cache = cache_in(tmp_path / "cache")
    files = [recording.alignments_path for recording in source.recordings]
    good = files[1].read_text()
    files[1].write_text("{}")
    files[3].write_text("[")
    with pytest.raises(DataError) as raised:
        encode_missing(source.recordings, cache, small_codec)
    assert [str(files[1]) in raised.value.problems[0], len(raised.value.problems)] == [True, 2]
    assert encoded_pieces == []

    files[1].write_text(good)
    files[3].write_text(good)
    source.recordings[0].path.write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"train0\.wav") as raised:
        encode_missing(source.recordings, cache, small_codec)
    assert len(raised.value.problems) == 1
    write_wav(source.recordings[0].path, stereo(1.0))
    assert encode_missing(source.recordings, cache, small_codec).encoded == 1


def test_where_codes_go_by_default(tmp_path, monkeypatch):
    sources = open_sources(write_dataset(tmp_path / "data", [0.5]))
    assert default_cache_folder(sources) == tmp_path / "data" / ".cache" / "codes"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert default_cache_folder(sources) == tmp_path / "user" / "ttt-dist" / "codes"


def test_opening_pieces_on_two_ranks(tmp_path):
    """Each rank encodes its share, waits for the other, and then sees all pieces."""
    train = open_sources(write_dataset(tmp_path / "data", [2.0, 3.0, 1.0]))
    held_out = open_sources(write_dataset(tmp_path / "data", [1.5], name="eval", seed=9))
    barrier = threading.Barrier(2)
    found = {}
    small_codec()

    def run(rank):
        found[rank] = open_pieces(
            {"train": train, "eval": held_out},
            cache_in(tmp_path / "cache"),
            small_codec,
            rank=rank,
            world_size=2,
            agree=lambda problems: (barrier.wait(30), problems)[1],
            max_encode_sec=100.0,
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert {name: len(dataset) for name, dataset in found[rank].items()} == {
            "train": 4,
            "eval": 1,
        }
    train_0, train_1 = found[0]["train"], found[1]["train"]
    assert train_0.source_sizes == [4]
    for index in range(4):
        assert train_0[index].dtype == torch.int64
        assert train_0[index].shape == (17, 25)
        assert torch.equal(train_0[index], train_1[index])
    with pytest.raises(IndexError):
        train_0[4]


def test_opening_whole_recordings(tmp_path, encoded_pieces):
    sources = open_sources(write_dataset(tmp_path / "data", [2.0, 11.0]))
    spec = dataclasses.replace(SPEC, duration_sec=None)
    opened = [
        open_recordings(
            {"train": sources, "eval": sources[:1]},
            cache_in(tmp_path / "cache", spec),
            small_codec,
            piece_frames=32,
            rank=0,
            world_size=1,
            agree=lambda problems: problems,
            max_encode_sec=limit,
        )
        for limit in (100.0, 0.0)
    ]
    # Longest first, in blocks of 10 s, both channels; the second time nothing.
    assert encoded_pieces == [(2, 1, 240_000), (2, 1, 24_960), (2, 1, 48_000)]
    for found in opened:
        assert list(found) == ["train", "eval"]
        train = found["train"]
        assert [train.frames_of(n) for n in range(2)] == [25, 138]  # 11 s are 137.5 frames
        assert (len(train), train.codes(1).shape) == (6, (17, 138))
    with pytest.raises(DataError, match="the disk of rank 1"):
        open_recordings(
            {"train": sources},
            cache_in(tmp_path / "cache", spec),
            must_not_load,
            piece_frames=32,
            rank=0,
            world_size=2,
            agree=lambda problems: [*problems, "the disk of rank 1"],
            max_encode_sec=0.0,
        )


def test_long_encoding_is_left_to_prepare(tmp_path):
    train = open_sources(write_dataset(tmp_path / "data", [3.0]))
    waited = []
    arguments = {"rank": 0, "world_size": 1, "agree": lambda told: (waited.append(told), told)[1]}
    told = r"lacks the codes of 3 s of audio \(files that .* modified count, too\), .*prepare\.py"
    with pytest.raises(DataError, match=told):
        open_pieces(
            {"train": train},
            cache_in(tmp_path / "cache"),
            must_not_load,
            max_encode_sec=2.9,
            **arguments,
        )
    assert waited == []
    encode_missing(train[0].recordings, cache_in(tmp_path / "cache"), small_codec)
    opened = open_pieces(
        {"train": train},
        cache_in(tmp_path / "cache"),
        must_not_load,
        max_encode_sec=0.0,
        **arguments,
    )
    assert len(opened["train"]) == 2
    assert len(waited) == 1


def test_pieces_without_codes_are_told(tmp_path):
    sources = open_sources(write_dataset(tmp_path / "data", [0.5] * 12))
    with pytest.raises(DataError, match=r"lacks the codes of 12 of 12 recordings .*, …\)"):
        PieceDataset(sources, cache_in(tmp_path / "cache"))


@pytest.mark.parametrize("whole", [False, True])
def test_a_codec_that_does_not_fit_the_model_is_refused(whole):
    class Info:
        """The parts of moshi's CheckpointInfo that loading a codec reads."""

        lm_config = {"n_q": 16, "dep_q": 8, "card": 2048, "text_card": 20}  # noqa: RUF012
        mimi_config = MIMI_CONFIG | {"transformer": MIMI_CONFIG["transformer"] | {"context": None}}
        mimi_weights = tokenizer = Path("a")

        def get_mimi(self, device):
            return small_codec().mimi

        def get_text_tokenizer(self):
            return small_codec().tokenizer

    with pytest.raises(DataError) as raised:
        load_codec(Info(), CodesSpec(None if whole else 2.0, 8, TextIds(), "m", "t"), "cpu")
    assert ("can't be encoded block by block" in str(raised.value)) == whole
    assert "codebooks of 64 codes don't fit the model's card = 2048" in str(raised.value)
    assert "tokens don't fit the model's text_card = 20" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"quantizer": {"n_q": 8, "bins": 64}}, "n_q: found 8; the model hears and speaks 16 code"),
        ({"quantizer": {"bins": 64}}, "n_q: found None; the model"),
        ({"quantizer": 32}, "n_q: found None; the model"),
        ({"seanet": None, "frame_rate": None}, "frame_rate, seanet: not there; use the file"),
    ],
)
def test_a_mimi_of_other_codebooks_is_refused_by_its_configuration(changes, part):
    """Before anything is loaded: moshi's own code fails without a word."""
    settings = {key: value for key, value in (MIMI_CONFIG | changes).items() if value is not None}
    info = CheckpointInfo(Path(), Path(), Path(), lm_config={"n_q": 32}, mimi_config=settings)
    (problem,) = mimi_config_problems(info)
    assert part in problem
    with pytest.raises(DataError, match="Mimi's configuration"):
        load_codec(info, CodesSpec(2.0, 16, TextIds(), "m", "t"), "cpu")
    info.mimi_config = None
    assert mimi_config_problems(info) == []
