"""Manifests that name codes in the place of audio: taken as they are, and never trusted blindly."""

import dataclasses
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.data_cases import SPEC, cache_in, open_sources, small_codec, write_dataset
from ttt_dist.data.cache import BrokenPieceError
from ttt_dist.data.check import check_contents
from ttt_dist.data.dataset import GlobalOrder, PieceDataset, open_pieces
from ttt_dist.data.encode import encode_missing, missing_seconds
from ttt_dist.data.lanes import LaneBatches
from ttt_dist.data.manifest import DataError, scan_sources
from ttt_dist.data.recordings import RecordingDataset, open_recordings

SPEC = dataclasses.replace(SPEC, card=24, text_card=40)
WHOLE = dataclasses.replace(SPEC, duration_sec=None)
FRAMES = [60, 25, 7]


def random_codes(frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 24, (17, frames), generator=generator)
    codes[0] = torch.randint(24, 40, (frames,), generator=generator)  # more than any audio code
    codes[0, :2] = -1
    return codes


def write_codes(folder, codes, name="codes"):
    """One file for each of `codes`, in turn int64 and int32, and a manifest, which is returned."""
    folder.mkdir(exist_ok=True)
    lines = []
    for index, each in enumerate(codes):
        path = folder / f"{name}{index}.safetensors"
        tensors = {"codes": each.to(torch.int32) if index % 2 else each, "other": torch.zeros(3)}
        save_file(tensors, path)
        lines.append(json.dumps({"path": path.name, "duration": each.shape[1] / 12.5}))
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def no_codec():
    raise AssertionError("a codec was loaded although all codes are there")


def open_all(opener, splits, cache, **more):
    return opener(
        splits,
        cache,
        no_codec,
        rank=0,
        world_size=1,
        agree=lambda problems: problems,
        max_encode_sec=0.0,
        **more,
    )


def test_codes_are_taken_whole_and_in_pieces(tmp_path):
    codes = [random_codes(frames, seed) for seed, frames in enumerate(FRAMES)]
    sources = open_sources(write_codes(tmp_path / "data", codes))
    whole = open_all(
        open_recordings, {"train": sources}, cache_in(tmp_path / "cache", WHOLE), piece_frames=16
    )["train"]
    assert [whole.frames_of(n) for n in range(3)] == FRAMES
    for index, each in enumerate(codes):
        assert torch.equal(whole.codes(index), each)
    pieces = open_all(open_pieces, {"train": sources}, cache_in(tmp_path / "cache", SPEC))["train"]
    assert (len(pieces), pieces.source_sizes) == (5, [5])
    expected = []
    for each in codes:
        padded = torch.nn.functional.pad(each, (0, -each.shape[1] % 25), value=-1)
        expected += padded.split(25, dim=1)
    for index, each in enumerate(expected):
        assert pieces[index].dtype == torch.int64
        assert torch.equal(pieces[index], each)
    assert not (tmp_path / "cache").exists()


def test_codes_stand_beside_audio(tmp_path):
    codes = random_codes(30)
    manifest = write_codes(tmp_path / "data", [codes])
    audio = write_dataset(tmp_path / "data", [2.0, 1.0]).read_text().splitlines()
    manifest.write_text("\n".join([audio[0], manifest.read_text().strip(), audio[1]]) + "\n")
    sources = open_sources(manifest)
    cache = cache_in(tmp_path / "cache", WHOLE)
    assert missing_seconds(sources[0].recordings, cache) == pytest.approx(3.0)
    seen = []
    report = encode_missing(
        sources[0].recordings,
        cache,
        small_codec,
        progress=lambda recording, encoded: seen.append((recording.path.name, encoded)),
    )
    assert (report.recordings, report.encoded, report.cached, report.pieces) == (3, 2, 1, 3)
    assert sorted(seen) == [
        ("codes0.safetensors", False),
        ("train0.wav", True),
        ("train1.wav", True),
    ]
    dataset = RecordingDataset(sources, cache, 10)
    assert [dataset.frames_of(n) for n in range(3)] == [25, 30, 13]
    assert torch.equal(dataset.codes(1), codes)
    assert dataset.describe(3).endswith("codes0.safetensors, piece 0")
    assert [index for index in range(len(dataset)) if dataset.comes_ready(index)] == [3, 4, 5]


def _other_rows(path):
    save_file({"codes": random_codes(25)[:9].contiguous()}, path)


def _too_large(path):
    codes = random_codes(25)
    codes[3, 7] = 24
    save_file({"codes": codes}, path)


def _too_small(path):
    codes = random_codes(25)
    codes[16, 24] = -2
    save_file({"codes": codes}, path)


def _beyond_int32(path):
    codes = random_codes(25)
    codes[0, 0] = 2**32 + 5
    save_file({"codes": codes}, path)


VALUES = [
    (_other_rows, "found 9 rows of codes; the model has 17: text, and twice 8 codebooks"),
    (_too_large, "row 3 holds codes from"),
    (_too_small, "row 16 holds codes from -2"),
    (_beyond_int32, "4294967301; allowed are those of the model, 0 to 39, and -1"),
]


@pytest.mark.parametrize("spec", [SPEC, WHOLE], ids=["pieces", "whole"])
@pytest.mark.parametrize(("damage", "told"), VALUES)
def test_codes_that_do_not_fit_the_model_are_told_before_training(tmp_path, damage, told, spec):
    manifest = write_codes(tmp_path / "data", [random_codes(25)] * 2)
    damage(tmp_path / "data" / "codes1.safetensors")
    sources = open_sources(manifest)  # its header is in order
    with pytest.raises(DataError) as raised:
        encode_missing(sources[0].recordings, cache_in(tmp_path / "cache", spec), no_codec)
    (problem,) = raised.value.problems
    assert problem.startswith(f"{manifest}:2: {tmp_path / 'data' / 'codes1.safetensors'}: ")
    assert told in problem


def _floats(path):
    save_file({"codes": random_codes(25).float()}, path)


def _flat(path):
    save_file({"codes": random_codes(25).flatten()}, path)


def _empty(path):
    save_file({"codes": torch.zeros(17, 0, dtype=torch.int64)}, path)


def _under_another_name(path):
    save_file({"tokens": random_codes(25)}, path)


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:-20])


def _junk(path):
    path.write_bytes(b"RIFF")


def _huge_header(path):
    path.write_bytes(struct.pack("<Q", 60 << 20) + b"{" + path.read_bytes())


def _nested_header(path):
    header = b"[" * 16_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def _longer(path):
    save_file({"codes": random_codes(60)}, path)


def _gone(path):
    path.unlink()


HEADERS = [
    (_floats, "no tensor 'codes' of type I32 or I64"),
    (_flat, "its codes have shape [425], expected are [rows, frames]"),
    (_empty, "its codes have shape [17, 0]"),
    (_under_another_name, "no tensor 'codes'"),
    (_cut_off, "doesn't fit in its place"),
    (_junk, "it has 4 bytes"),
    (_huge_header, "its header claims 62914560 bytes"),
    (_nested_header, "its header is no JSON"),
    (_longer, "duration: found 2 s, but"),
    (_gone, "there is no file of codes"),
]


@pytest.mark.parametrize(("damage", "told"), HEADERS)
def test_files_that_hold_no_codes_are_told_with_all_others(tmp_path, damage, told):
    manifest = write_codes(tmp_path / "data", [random_codes(25)] * 2)
    path = tmp_path / "data" / "codes0.safetensors"
    save_file({"codes": random_codes(25)}, path)
    damage(path)
    with pytest.raises(DataError) as raised:
        open_sources(manifest)
    (problem,) = raised.value.problems
    assert problem.startswith(f"{manifest}:1: ")
    assert told in problem
    reports = check_contents(scan_sources(str(manifest), field="data.train_data")[0][0].recordings)
    assert [report.problems for report in reports] == [(problem,), ()]
    assert [report.pieces(0.5) for report in reports] == [0, 4]


@pytest.mark.parametrize("damage", [_too_large, _cut_off, _gone])
def test_codes_that_are_damaged_during_a_run_are_named(tmp_path, damage):
    sources = open_sources(write_codes(tmp_path / "data", [random_codes(25)] * 2))
    whole = RecordingDataset(sources, cache_in(tmp_path / "cache", WHOLE), 16)
    pieces = PieceDataset(sources, cache_in(tmp_path / "cache", SPEC))
    path = tmp_path / "data" / "codes0.safetensors"
    if damage is _cut_off:
        save_file({"codes": random_codes(25)}, path)
    damage(path)
    with pytest.raises(BrokenPieceError, match=r"codes0\.safetensors"):
        pieces[0]
    order = GlobalOrder(whole.source_sizes, whole.weights, seed=0, shuffle=False)
    with LaneBatches(
        whole,
        order,
        num_lanes=1,
        batch_size=1,
        pieces_per_step=4,
        delays=[0] * 17,
        initial=[0] * 17,
        dp_rank=0,
        dp_size=1,
    ) as lanes:
        step = next(lanes)
    assert step.samples == [[0], [1], [2], [3]]
    assert list(step.broken) == [0, 1]
    assert [bool((x == -1).all()) for x in step.steps[0]] == [True, True, False, False]
