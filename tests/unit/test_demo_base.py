"""The demo's base checkpoint: Kyutai's layout and structure, read by moshi's own loaders."""

import json
import threading
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, _lm_kwargs
from moshi.utils.compile import no_compile

from launch import make_demo_base as base
from launch.demo_codec import kmeans
from ttt_dist.data.audio import StereoFile
from ttt_dist.moshi.release import open_release


@pytest.fixture(scope="module")
def release(demo_base: Path) -> CheckpointInfo:
    return open_release(str(demo_base))


@pytest.fixture(scope="module")
def moshi(release: CheckpointInfo) -> LMModel:
    return release.get_moshi("cpu", torch.float32)


@pytest.fixture(scope="module")
def codes(release: CheckpointInfo) -> dict[str, torch.Tensor]:
    """Codes `[2, 8, T]` of every recording of the demo, training and held out, by name."""
    mimi = release.get_mimi("cpu")
    encoded = {}
    with torch.no_grad(), no_compile():
        for path in sorted((base.DEMO_DATA / "audio").glob("*.flac")):
            file = StereoFile(path)
            samples = torch.from_numpy(file.read(0.0, file.duration))
            encoded[path.stem] = mimi.encode(samples[:, None])
    return encoded


def test_folder_holds_no_pickle(demo_base: Path) -> None:
    files = {path.name for path in demo_base.iterdir()}
    assert files == {"config.json", *base.FILES.values()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".model"}
    assert [path.name for path in demo_base.parent.iterdir()] == [demo_base.name]


def test_structure_is_that_of_moshi_7b(release: CheckpointInfo, moshi: LMModel) -> None:
    config = release.lm_config
    assert config is not None
    assert set(config) == set(_lm_kwargs)
    kept = {
        key
        for key in _lm_kwargs
        if not key.startswith("depformer") and key not in {"dim", "num_heads", "num_layers"}
    } - {"card", "text_card"}
    kept |= {"depformer_multi_linear", "depformer_weights_per_step", "depformer_gating"}
    kept |= {"depformer_pos_emb", "depformer_context"}
    assert {key: config[key] for key in kept} == {key: _lm_kwargs[key] for key in kept}
    assert config["num_layers"] >= 4
    assert config["num_heads"] == 8
    assert config["dim"] // config["num_heads"] >= 16
    assert moshi.num_codebooks == 17
    assert moshi.delays == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert sum(parameter.numel() for parameter in moshi.parameters()) < 5_000_000


def test_moshi_is_finite_and_float32(moshi: LMModel) -> None:
    state = moshi.state_dict()  # loaded strictly by moshi's loader, on top of the meta device
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert torch.equal(moshi.out_norm.alpha, torch.ones(1, 1, moshi.dim))
    # ScaledEmbedding: truncated normal of deviation 1/sqrt(dim); 3 % is 4 standard errors.
    assert float(moshi.emb[0].weight.detach().std()) * moshi.dim**0.5 == pytest.approx(
        0.9866, rel=0.03
    )


def test_every_codebook_is_used(codes: dict[str, torch.Tensor]) -> None:
    frames = torch.cat([code.transpose(0, 1).flatten(1) for code in codes.values()], 1)  # [8, N]
    distinct = [len(level.unique()) for level in frames]
    assert len(distinct) == 8
    assert min(distinct) >= 32, distinct
    assert int(frames.min()) >= 0
    assert int(frames.max()) < base.lm_config()["card"]


def test_codes_have_one_column_a_frame(codes: dict[str, torch.Tensor]) -> None:
    for line in (base.DEMO_DATA / "train.jsonl").read_text().splitlines():
        entry = json.loads(line)
        code = codes[Path(entry["path"]).stem]
        assert code.shape == (2, 8, int(np.ceil(entry["duration"] * 12.5)))


def test_silence_has_one_code(release: CheckpointInfo, codes: dict[str, torch.Tensor]) -> None:
    mimi = release.get_mimi("cpu")
    with torch.no_grad(), no_compile():
        silent = mimi.encode(torch.zeros(1, 1, 24_000 * 2))[0]  # [8, 25]
    assert (silent == silent[:, :1]).all()
    for code in codes.values():  # about half of each channel is silence
        share = (code == silent[:, 0, None]).all(1).float().mean(1)  # [2]
        assert ((share > 0.2) & (share < 0.8)).all()


def test_codes_tell_words_apart(codes: dict[str, torch.Tensor]) -> None:
    """A word that Moshi repeats shares first codes with itself, rarely with other words."""
    said = []
    for name, code in codes.items():
        text = json.loads((base.DEMO_DATA / "audio" / f"{name}.json").read_text())
        for word, (start, end), speaker in text["alignments"]:
            if speaker == "SPEAKER_MAIN" and end - start > 0.2:  # whole frames inside
                inside = code[0, 0, int(start * 12.5) + 1 : int(end * 12.5) + 1]
                said.append((word.strip(".,?!").lower(), set(inside.tolist())))
    overlap: dict[bool, list[float]] = {True: [], False: []}
    for (word, ours), (other_word, others) in combinations(said, 2):
        overlap[word == other_word].append(len(ours & others) / len(ours | others))
    # Measured 0.17 over 446 pairs against 0.023; codes without signal give a ratio of 1.
    assert np.mean(overlap[True]) > 4 * np.mean(overlap[False])


def test_tokenizer_has_kyutais_ids(release: CheckpointInfo, moshi: LMModel) -> None:
    tokenizer = release.get_text_tokenizer()
    assert tokenizer.vocab_size() == moshi.text_card
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert tokenizer.pad_id() == moshi.text_padding_token_id == 3
    assert tokenizer.unk_id() == moshi.end_of_text_padding_id
    words = set()
    for path in (base.DEMO_DATA / "audio").glob("*.json"):
        words |= {word for word, _, _ in json.loads(path.read_text())["alignments"]}
    for word in (*words, "Quiz", "zebra-7"):
        ids = tokenizer.encode(word)
        assert min(ids) > 3, word
        assert tokenizer.decode(ids) == word


def test_two_runs_give_the_same_bytes(demo_base: Path, tmp_path: Path) -> None:
    assert base.make_demo_base(tmp_path / "again") is True
    for path in demo_base.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_complete_folder_is_left_alone(
    demo_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo_base.iterdir()}
    assert base.main([str(demo_base)]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in demo_base.iterdir()} == before


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert base.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "exists and is not a demo base" in message
    assert f"rm -r {tmp_path}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("spoil", "message"), [("remove", r"lacks mimi\.safetensors"), ("age", "another version")]
)
def test_incomplete_and_old_bases_are_refused(
    demo_base: Path, tmp_path: Path, spoil: str, message: str
) -> None:
    for path in demo_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if spoil == "remove":
        (tmp_path / "mimi.safetensors").unlink()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["model_id"]["sig"] = "0" * 64
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(base.DemoBaseError, match=message):
        base.make_demo_base(tmp_path)


def test_missing_speech_is_named(tmp_path: Path) -> None:
    with pytest.raises(base.DemoBaseError, match=r"train\.jsonl") as caught:
        base.make_demo_base(tmp_path / "out", tmp_path)
    assert "git checkout -- configs/demo" in str(caught.value)
    (tmp_path / "train.jsonl").write_text('{"path": "audio/a.flac", "duration": 1.0}\n')
    with pytest.raises(base.DemoBaseError, match=r"a\.flac"):
        base.make_demo_base(tmp_path / "out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(base.DemoBaseError, match="cannot be written"):
        base.make_demo_base(tmp_path / "file" / "out")


@pytest.fixture
def default_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for the base that the demo's configuration names."""
    monkeypatch.setattr(base, "DEFAULT_OUT", tmp_path / "demo-base")
    return tmp_path / "demo-base"


def test_a_run_of_the_default_makes_the_base_once(default_out: Path) -> None:
    base.ensure_demo_base(str(default_out), local_rank=0)
    made = {path: path.stat().st_mtime_ns for path in default_out.iterdir()}
    assert len(made) == 5
    base.ensure_demo_base(str(default_out), local_rank=0)
    assert {path: path.stat().st_mtime_ns for path in default_out.iterdir()} == made


@pytest.mark.parametrize("named", ["kyutai/moshika-pytorch-bf16", "/models/moshi", None])
def test_other_runs_make_no_base(default_out: Path, named: str | None) -> None:
    base.ensure_demo_base(named, local_rank=0)
    assert not default_out.exists()


def test_other_ranks_wait_for_the_base(
    default_out: Path, demo_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_WAIT_SEC", 0.5)
    with pytest.raises(base.DemoBaseError, match="did not appear"):
        base.ensure_demo_base(str(default_out), local_rank=1)
    assert not default_out.exists()
    monkeypatch.setattr(base, "_WAIT_SEC", 60)
    timer = threading.Timer(0.5, lambda: default_out.symlink_to(demo_base))
    timer.start()
    base.ensure_demo_base(str(default_out), local_rank=1)
    assert default_out.exists()
    timer.join()


def test_kmeans_finds_clusters_and_leaves_none_empty() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    found, counts = kmeans(points, 3, generator)
    assert counts.tolist() == [50.0, 50.0, 50.0]
    # A mean of 50 deviates by 0.014; 0.1 is 7 standard errors.
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.1
    many, counts = kmeans(points, 100, generator)
    assert len(many.unique(dim=0)) == 100
    assert float(counts.min()) >= 1
    assert float(counts.sum()) == len(points)
