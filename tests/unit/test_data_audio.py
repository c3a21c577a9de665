"""From stereo audio to codes, against what moshi-finetune's reader gives."""

import json
import math

import numpy as np
import pytest
import sphn
import torch

from tests.unit.data_cases import (
    SPEC,
    alignments,
    open_sources,
    small_codec,
    small_mimi,
    small_tokenizer,
    stereo,
    write_dataset,
)
from tests.wav import write_wav
from ttt_dist.data import audio
from ttt_dist.data.audio import FRAME_SAMPLES, StereoFile, encode_pieces, valid_frames
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.encode import encode_recording
from ttt_dist.data.interleave import (
    TextIds,
    parse_alignments,
    piece_words,
    text_stream,
    tokenize_word,
)
from ttt_dist.data.manifest import DataError


@pytest.mark.parametrize("duration_sec", [2.0, 1.7])
@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100, 48_000])
def test_pieces_are_the_samples_that_moshi_finetune_reads(tmp_path, rate, duration_sec):
    path = tmp_path / "a.wav"
    write_wav(path, stereo(5.3, rate=rate), rate)
    manifest = tmp_path / "a.jsonl"
    manifest.write_text(json.dumps({"path": "a.wav", "duration": 5.3}) + "\n")
    reader = sphn.dataset_jsonl(
        str(manifest),
        duration_sec=duration_sec,
        num_threads=1,
        sample_rate=24_000,
        pad_last_segment=True,
    )
    expected = [
        (sample["start_time_sec"], sample["data"][..., : sample["unpadded_len"]])
        for sample in reader.seq()
    ]
    found = list(StereoFile(path).pieces(duration_sec))
    assert [start for start, _ in found] == [start for start, _ in expected]
    assert len(found) == math.ceil(5.3 / duration_sec)
    for (_, samples), (_, theirs) in zip(found, expected, strict=True):
        # Where it resamples, their reader leaves the last block's padding on whole pieces; frames
        # past the piece's end are cut off after encoding.
        assert np.array_equal(samples, theirs[:, : samples.shape[1]])
    assert found[-1][1].shape == expected[-1][1].shape
    frames = math.ceil(duration_sec * 12.5)
    rest = {2.0: 17, 1.7: 3}[duration_sec]  # 1.3 s: 16.25 frames; 0.2 s: 2.5 frames
    assert [valid_frames(samples, frames) for _, samples in found] == [
        *[frames] * (len(found) - 1),
        rest,
    ]


def test_formats_without_exact_seek_are_cut_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_wav(path, stereo(5.3, rate=16_000), 16_000)
    by_seek = list(StereoFile(path).pieces(2.0))
    monkeypatch.setattr(audio, "_EXACT_SEEK", set())
    in_memory = list(StereoFile(path).pieces(2.0))
    assert len(by_seek) == len(in_memory) == 3
    for (start, samples), (same_start, same_samples) in zip(by_seek, in_memory, strict=True):
        assert start == same_start
        assert np.array_equal(samples, same_samples)


def test_a_whole_recording(tmp_path):
    """Rows, pieces and text of a recording, each by moshi-finetune's steps one at a time."""
    manifest = write_dataset(tmp_path, [5.3])
    recording = open_sources(manifest)[0].recordings[0]
    words = parse_alignments(recording.alignments_path.read_bytes(), recording.alignments_path)
    assert len(words) == len(alignments(5.3))
    codes = encode_recording(recording, words, small_codec(), SPEC)
    assert codes.dtype == torch.int32
    assert codes.shape == (3, 17, 25)

    samples = sphn.read(str(recording.path))[0]
    agreeing = total = 0
    for index, codes_of_piece in enumerate(codes):
        part = samples[:, index * 48_000 : (index + 1) * 48_000]
        valid = math.ceil(part.shape[1] / 1920)
        with torch.no_grad():
            alone = small_mimi().encode(torch.tensor(part)[:, None])  # [2, 8, frames]
        assert alone.shape[-1] == valid
        agreeing += int((codes_of_piece[1:, :valid] == alone.flatten(0, 1)).sum())
        total += 16 * valid
        assert (codes_of_piece[:, valid:] == -1).all()
        assert (codes_of_piece[:, :valid] >= 0).all()
        text = text_stream(
            piece_words(words, 2.0 * index, 2.0),
            valid,
            lambda word: tokenize_word(small_tokenizer(), word),
            TextIds(),
        )
        assert codes_of_piece[0, :valid].tolist() == text
    # Another batch size rounds latents differently (1e-7), and a code close to a tie may flip; a
    # wrong sample, channel or frame changes most of them.
    assert agreeing >= 0.99 * total
    for row in codes[:, 1:].permute(1, 0, 2).flatten(1):
        assert len(row.unique()) > 8, "codes hardly vary: the comparison would prove nothing"


def test_the_left_channel_comes_first():
    samples = stereo(2.0)
    codes = encode_pieces(small_mimi(), [samples, samples[::-1].copy()], 25)
    assert torch.equal(codes[0, :8], codes[1, 8:])
    assert torch.equal(codes[0, 8:], codes[1, :8])
    assert not torch.equal(codes[0, :8], codes[0, 8:])


def test_frames_before_the_end_do_not_depend_on_what_fills_the_batch():
    samples = stereo(4.0)
    short = samples[:, : 10 * FRAME_SAMPLES + 1]
    long, cut = encode_pieces(small_mimi(), [samples, short], 50)
    assert torch.equal(cut[:, :10], long[:, :10])
    assert (cut[:, 10] >= 0).all(), "a frame with one sample of audio counts"
    assert (cut[:, 11:] == -1).all()


def test_a_piece_may_end_inside_a_frame(tmp_path):
    manifest = write_dataset(tmp_path, [4.2])
    recording = open_sources(manifest)[0].recordings[0]
    spec = CodesSpec(2.01, 8, TextIds(), "m", "t")
    codes = encode_recording(recording, [], small_codec(), spec)
    assert codes.shape == (3, 17, 26)  # 2.01 s are 25.125 frames
    assert (codes[:2] >= 0).all()
    assert (codes[2, :, 3:] == -1).all()  # 0.18 s are left: 2.25 frames
    assert (codes[2, :, :3] >= 0).all()


def test_damaged_audio_is_named(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, stereo(4.0))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.wav"):
        list(StereoFile(path).pieces(1.0))
    path.write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"a\.wav: cannot be read as audio"):
        StereoFile(path)
    write_wav(path, stereo(1.0)[:1])
    with pytest.raises(DataError, match="1 channel"):
        StereoFile(path)
