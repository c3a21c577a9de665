"""The cache of codes: found by content, computed once, never trusted where damaged."""

import dataclasses
import json
import logging
import os
import struct
import threading
from pathlib import Path

import pytest
import torch

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
from ttt_dist.data.cache import CodesCache
from ttt_dist.data.dataset import PieceDataset
from ttt_dist.data.encode import encode_missing
from ttt_dist.data.interleave import TextIds
from ttt_dist.data.manifest import DataError
from ttt_dist.data.recordings import RecordingDataset

WHOLE = dataclasses.replace(SPEC, duration_sec=None)


def test_the_key_follows_everything_that_codes_depend_on(tmp_path):
    (source,) = open_sources(write_dataset(tmp_path / "data", [1.0]))
    (recording,) = source.recordings
    folder = tmp_path / "cache"
    keys = [cache_in(folder).key(recording)]
    for change in (
        {"duration_sec": 2.5},
        {"duration_sec": None},
        {"codebooks": 4},
        {"text_ids": TextIds(padding=4)},
        {"mimi": "other"},
        {"tokenizer": "other"},
    ):
        keys.append(CodesCache(folder, dataclasses.replace(SPEC, **change)).key(recording))
    samples = stereo(1.0)
    samples[1, -1] += 0.5  # same path, same size
    write_wav(recording.path, samples)
    keys.append(cache_in(folder).key(recording))
    content = recording.alignments_path.read_text()
    recording.alignments_path.write_text(content.replace("0.1,", "0.2,"))
    keys.append(cache_in(folder).key(recording))
    assert len(set(keys)) == len(keys)


def test_the_keys_of_today_are_found_tomorrow():
    """Codes of hours are cached: a key that changes without need has them encoded anew."""
    assert SPEC.fingerprint == "629ef931db05049d94d186c4ab360cc8c96bfab6"
    assert WHOLE.fingerprint == "7f6cfe96de626253cadbc1e9aa2a8efa10ce189b"


def test_the_key_is_the_content_not_the_place_or_time(tmp_path):
    (source,) = open_sources(write_dataset(tmp_path / "data", [1.0]))
    (recording,) = source.recordings
    key = cache_in(tmp_path / "cache").key(recording)
    os.utime(recording.path, (1, 1))
    assert cache_in(tmp_path / "cache").key(recording) == key
    (tmp_path / "data").rename(tmp_path / "moved")
    (moved,) = open_sources(tmp_path / "moved" / "train.jsonl")
    assert cache_in(tmp_path / "other").key(moved.recordings[0]) == key


def test_hashes_of_unchanged_files_are_remembered(tmp_path, monkeypatch):
    (source,) = open_sources(write_dataset(tmp_path / "data", [1.0]))
    (recording,) = source.recordings
    cache = cache_in(tmp_path / "cache")
    assert cache.likely_key(recording) is None
    key = cache.key(recording)
    assert cache.likely_key(recording) == key
    for memo in (tmp_path / "cache" / "hashes").iterdir():
        memo.write_text("[1, 2")  # damaged: hashed again
    assert cache.likely_key(recording) is None
    assert cache.key(recording) == cache.likely_key(recording) == key


def test_another_ctime_leaves_a_key_likely_and_never_certain(tmp_path):
    (source,) = open_sources(write_dataset(tmp_path / "data", [1.0]))
    (recording,) = source.recordings
    cache = cache_in(tmp_path / "cache")
    key = cache.key(recording)
    for path in (recording.path, recording.alignments_path):
        change_ctime(path)
    assert cache.likely_key(recording) == key
    status = recording.path.stat()
    samples = stereo(1.0)
    samples[1, -1] += 0.5
    write_wav(recording.path, samples)  # of the same size
    os.utime(recording.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.likely_key(recording) == key
    assert cache.key(recording) != key
    os.utime(recording.path, (1, 1))
    assert cache.likely_key(recording) is None


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _junk(path: Path) -> None:
    path.write_bytes(os.urandom(4000))


def _claim_a_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 60 << 20) + b"{" + path.read_bytes())


def _other_shape(path: Path) -> None:
    wide = dataclasses.replace(SPEC, duration_sec=4.0)
    other = CodesCache(path.parents[1], wide)
    other.write("ab" + "0" * 38, torch.zeros(2, wide.rows, wide.frames, dtype=torch.int32))
    other.path("ab" + "0" * 38).replace(path)


def _lying_offsets(path: Path) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["codes"]["data_offsets"][1] += 4
    changed = json.dumps(header).encode().ljust(size)
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])


def _padded_header(path: Path) -> None:
    """Right in every value, but with a header beyond the cap: nobody's codes need 17 kB of it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size].ljust(17_000)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _lengthen,
        _flip_a_bit,
        _empty,
        _junk,
        _claim_a_huge_header,
        _other_shape,
        _lying_offsets,
        _padded_header,
    ],
)
@pytest.mark.parametrize("spec", [SPEC, WHOLE], ids=["pieces", "whole"])
def test_damaged_codes_are_named_and_encoded_anew(tmp_path, caplog, damage, spec):
    sources = open_sources(write_dataset(tmp_path / "data", [3.0]))
    recordings = sources[0].recordings
    cache = cache_in(tmp_path / "cache", spec)
    encode_missing(recordings, cache, small_codec)
    path = cache.path(cache.key(recordings[0]))
    good = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        report = encode_missing(recordings, cache, small_codec)
    assert report.encoded == 1
    assert any(str(path) in record.getMessage() for record in caplog.records)
    assert path.read_bytes() == good


def test_codes_that_are_damaged_during_a_run_stop_it(tmp_path):
    sources = open_sources(write_dataset(tmp_path / "data", [3.0]))
    cache = cache_in(tmp_path / "cache")
    encode_missing(sources[0].recordings, cache, small_codec)
    dataset = PieceDataset(sources, cache)
    path = cache.path(cache.key(sources[0].recordings[0]))
    _flip_a_bit(path)
    with pytest.raises(DataError, match=path.name):
        [dataset[index] for index in range(len(dataset))]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    cache = cache_in(tmp_path / "cache")
    codes = torch.zeros(1, SPEC.rows, SPEC.frames, dtype=torch.int32)
    cache.write("aa", codes)
    before = cache.path("aa").read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DataError, match=r"data\.cache_dir: .*disk full"):
        cache.write("aa", codes + 1)
    assert [entry.name for entry in (tmp_path / "cache" / "aa").iterdir()] == ["aa.safetensors"]
    assert cache.path("aa").read_bytes() == before


def test_whole_recordings_lie_beside_pieces(tmp_path):
    sources = open_sources(write_dataset(tmp_path / "data", [5.0, 0.01]))
    for spec in (SPEC, WHOLE):
        report = encode_missing(
            sources[0].recordings, cache_in(tmp_path / "cache", spec), small_codec
        )
        assert report.encoded == 2
    for spec in (SPEC, WHOLE):
        again = encode_missing(
            sources[0].recordings, cache_in(tmp_path / "cache", spec), small_codec
        )
        assert again.encoded == 0
    assert len(PieceDataset(sources, cache_in(tmp_path / "cache"))) == 4
    whole = RecordingDataset(sources, cache_in(tmp_path / "cache", WHOLE), 25)
    assert [whole.frames_of(n) for n in range(2)] == [63, 1]
    assert whole.codes(0).shape == (17, 63)
    with pytest.raises(ValueError, match="duration_sec: found None"):
        PieceDataset(sources, cache_in(tmp_path / "cache", WHOLE))
    with pytest.raises(ValueError, match=r"duration_sec: found 2\.0, allowed is None"):
        RecordingDataset(sources, cache_in(tmp_path / "cache"), 25)
    path = cache_in(tmp_path, WHOLE).path("aa")
    cache_in(tmp_path).write("aa", torch.zeros(2, SPEC.rows, SPEC.frames, dtype=torch.int32))
    assert path.is_file()
    assert cache_in(tmp_path, WHOLE).find("aa") is None, "two pieces are no whole recording"


def test_codes_of_another_shape_or_type_are_not_written(tmp_path):
    cache = cache_in(tmp_path / "cache")
    for codes in (
        torch.zeros(1, SPEC.rows, SPEC.frames),
        torch.zeros(1, 9, SPEC.frames, dtype=torch.int32),
        torch.zeros(SPEC.rows, SPEC.frames, dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match="allowed is int32"):
            cache.write("aa", codes)


def test_ranks_that_write_the_same_codes_at_once_do_no_harm(tmp_path):
    sources = open_sources(write_dataset(tmp_path / "data", [1.0] * 4))
    errors = []

    def run():
        try:
            encode_missing(sources[0].recordings, cache_in(tmp_path / "cache"), small_codec)
        except (DataError, OSError) as error:
            errors.append(error)

    small_codec()
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(PieceDataset(sources, cache_in(tmp_path / "cache"))) == 4
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_data_folder_may_be_read_only(tmp_path):
    (source,) = open_sources(write_dataset(tmp_path / "data", [1.0]))
    before = sorted((tmp_path / "data").rglob("*"))
    (tmp_path / "data").chmod(0o555)
    try:
        encode_missing(source.recordings, cache_in(tmp_path / "cache"), small_codec)
        assert sorted((tmp_path / "data").rglob("*")) == before
    finally:
        (tmp_path / "data").chmod(0o755)


def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path):
    (source,) = open_sources(write_dataset(tmp_path / "data", [1.0]))
    (tmp_path / "cache").write_text("a file stands in the folder's place")
    with pytest.raises(DataError, match=r"data\.cache_dir: cannot write codes into"):
        encode_missing(source.recordings, cache_in(tmp_path / "cache"), small_codec)
