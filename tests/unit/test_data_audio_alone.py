"""Mono files and files without alignments: an evaluation hears them, training refuses them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.unit.data_cases import (
    SPEC,
    cache_in,
    open_sources,
    small_codec,
    stereo,
    write_dataset,
)
from tests.wav import write_wav
from ttt_dist.data.audio_alone import scan_audio_sources
from ttt_dist.data.dataset import default_cache_folder
from ttt_dist.data.manifest import DataError, all_recordings
from ttt_dist.data.recordings import open_recordings

WHOLE = dataclasses.replace(SPEC, duration_sec=None)
PADDING = SPEC.text_ids.padding


def heard(spec, **more):
    sources, problems = scan_audio_sources(str(spec), field="--data", **more)
    assert problems == []
    return sources


def open_whole(sources, cache):
    return open_recordings(
        {"eval": sources},
        cache_in(cache, WHOLE),
        small_codec,
        piece_frames=8,
        rank=0,
        world_size=1,
        agree=lambda problems: problems,
        max_encode_sec=60.0,
    )["eval"]


def test_a_folder_of_mono_files_is_moshis_channel_beside_silence(tmp_path):
    audio = stereo(12.3)  # more than a block of 10 s
    audio[1] = 0.0
    folder = tmp_path / "mono"
    (folder / "book").mkdir(parents=True)
    write_wav(folder / "book" / "chapter.wav", audio[:1])
    write_wav(folder / "short.WAV", stereo(1.0)[:1, ::3], rate=8_000)
    (folder / "notes.txt").write_text("no audio")
    (source,) = sources = heard(folder)
    assert [each.path.name for each in source.recordings] == ["chapter.wav", "short.WAV"]
    assert [each.duration for each in source.recordings] == [12.3, 1.0]
    assert default_cache_folder(sources) == folder / ".cache" / "codes"
    write_wav(tmp_path / "both.wav", audio)
    (tmp_path / "both.jsonl").write_text(json.dumps({"path": "both.wav", "duration": 12.3}) + "\n")

    dataset = open_whole(sources, tmp_path / "cache")
    same = open_whole(heard(tmp_path / "both.jsonl"), tmp_path / "cache")
    assert [dataset.has_text(n) for n in range(2)] == [False, False]
    assert [dataset.frames_of(n) for n in range(2)] == [154, 13]
    assert torch.equal(dataset.codes(0), same.codes(0))
    assert (dataset.codes(0)[0] == PADDING).all()
    assert len(dataset.codes(0)[1].unique()) > 5


def test_alignments_are_taken_where_they_are(tmp_path):
    """Codes with text and codes without are two things in one cache."""
    manifest = write_dataset(tmp_path / "data", [2.0, 2.0])
    cache = tmp_path / "cache"
    with_text = open_whole(open_sources(manifest), cache)
    (tmp_path / "data" / "train1.json").unlink()
    some = open_whole(heard(manifest), cache)
    assert [some.has_text(n) for n in range(2)] == [True, False]
    assert torch.equal(some.codes(0), with_text.codes(0))
    assert torch.equal(some.codes(1)[1:], with_text.codes(1)[1:])
    assert (some.codes(1)[0] == PADDING).all()
    assert (with_text.codes(1)[0] != PADDING).any()


def test_training_refuses_both_as_before(tmp_path):
    manifest = write_dataset(tmp_path, [1.0, 1.0])
    write_wav(tmp_path / "train0.wav", stereo(1.0)[:1])
    (tmp_path / "train1.json").unlink()
    heard(manifest)
    with pytest.raises(DataError) as raised:
        open_sources(manifest)
    mono, without = raised.value.problems
    assert "has 1 channel, allowed is stereo" in mono
    assert "there is no alignment file" in without
    recordings = all_recordings(open_sources(write_dataset(tmp_path / "good", [1.0])))
    assert [(each.may_be_mono, each.has_text) for each in recordings] == [(False, True)]


def test_what_cannot_be_heard_is_told(tmp_path):
    (tmp_path / "noise.wav").write_text("This is not audio.\n")
    write_wav(tmp_path / "three.wav", np.zeros((3, 24_000)))
    write_wav(tmp_path / "good.wav", np.zeros((1, 24_000)))
    _, (noise, three) = scan_audio_sources(str(tmp_path), field="--data")
    assert noise.startswith("--data: the audio header of")
    assert three == f"--data: {tmp_path / 'three.wav'} has 3 channels, allowed is mono or stereo"
    (tmp_path / "all.jsonl").write_text(json.dumps({"path": "three.wav", "duration": 1.0}) + "\n")
    _, (told,) = scan_audio_sources(str(tmp_path), field="--data")  # a manifest counts alone
    assert told.startswith(f"{tmp_path / 'all.jsonl'}:1: ")
    assert "has 3 channels, allowed is stereo or mono" in told
    assert scan_audio_sources(str(tmp_path), field="--data", check_files=False)[1] == []
    empty = tmp_path / "empty"
    empty.mkdir()
    _, (told,) = scan_audio_sources(str(empty), field="--data")
    assert "holds no .jsonl manifest" in told
