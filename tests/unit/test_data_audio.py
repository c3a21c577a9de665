"""From stereo audio to codes, against what moshi-finetune's reader gives."""

import copy
import dataclasses
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
from ttt_dist.data.audio import (
    FRAME_SAMPLES,
    StereoFile,
    encode_blocks,
    encode_pieces,
    valid_frames,
)
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


@pytest.mark.parametrize("seek", [True, False])
@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_blocks_are_the_file_resampled_at_once(tmp_path, monkeypatch, rate, seek):
    if not seek:
        monkeypatch.setattr(audio, "_EXACT_SEEK", set())
    path = tmp_path / "a.wav"
    write_wav(path, stereo(23.3, rate=rate), rate)
    blocks = list(StereoFile(path).blocks())
    assert [block.shape[1] for block in blocks] == [240_000, 240_000, round(3.3 * 24_000)]
    whole = sphn.read(str(path))[0]
    if rate != 24_000:
        whole = sphn.resample(whole, rate, 24_000)[:, : round(23.3 * 24_000)]
    # The resampler's transforms round in float32, to 1e-7 of samples of up to 1; a block that is
    # off by one sample, or resampled without its neighbours, differs by 1e-2 and more.
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("seconds", [10, 20])
def test_a_file_of_whole_blocks_has_no_other(tmp_path, seconds):
    path = tmp_path / "a.wav"
    write_wav(path, stereo(seconds))
    assert [block.shape[1] for block in StereoFile(path).blocks()] == [240_000] * (seconds // 10)


def test_damaged_audio_is_named_by_blocks_too(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, stereo(24.0))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.wav"):
        list(StereoFile(path).blocks())


@pytest.mark.parametrize("samples", [1, 1919, 240_000, 240_001, 37 * 24_000 + 777])
def test_mimi_in_blocks_is_mimi_in_one_call(samples):
    """Also where its attention window (10 s) reaches back into the block before."""
    mimi = copy.deepcopy(small_mimi()).double()
    recording = stereo(samples / 24_000).astype(np.float64)
    blocks = [recording[:, first : first + 240_000] for first in range(0, samples, 240_000)]
    codes = encode_blocks(mimi, blocks)
    with torch.no_grad():
        once = mimi.encode(torch.from_numpy(recording)[:, None])  # [2, 8, F]
    assert codes.dtype == torch.int32
    assert codes.shape == (16, math.ceil(samples / FRAME_SAMPLES))
    # In float64 no code is as close to a tie as rounding, so all are equal; in float32 one of 7,400
    # was another.
    assert torch.equal(codes, once.flatten(0, 1).int())
    assert not mimi.is_streaming
    assert encode_blocks(mimi, []).shape == (16, 0)


def test_a_recording_may_stay_whole(tmp_path):
    manifest = write_dataset(tmp_path, [25.3])
    recording = open_sources(manifest)[0].recordings[0]
    words = parse_alignments(recording.alignments_path.read_bytes(), recording.alignments_path)
    spec = dataclasses.replace(SPEC, duration_sec=None)
    codes = encode_recording(recording, words, small_codec(), spec)
    assert codes.dtype == torch.int32
    assert codes.shape == (1, 17, 317)  # 25.3 s are 316.25 frames
    samples = sphn.read(str(recording.path))[0]
    with torch.no_grad():
        once = small_mimi().encode(torch.from_numpy(samples)[:, None]).flatten(0, 1)
    # See `test_a_whole_recording`: latents differ by rounding, and a code close to a tie may flip.
    assert (codes[0, 1:] == once).float().mean() >= 0.99
    text = text_stream(
        piece_words(words, 0.0, 25.3),
        317,
        lambda word: tokenize_word(small_tokenizer(), word),
        TextIds(),
    )
    assert codes[0, 0].tolist() == text
    pieces = encode_recording(recording, words, small_codec(), SPEC)
    assert not torch.equal(codes[0, 0, :300], pieces[:12, 0].flatten()), "words cross borders"
    # A piece starts without the past, so but for the first its codes are others'.
    assert (codes[0, 1:, :25] == pieces[0, 1:]).float().mean() >= 0.99
    assert (codes[0, 1:, 25:300] == pieces[1:12, 1:].permute(1, 0, 2).flatten(1)).float().mean() < 1
