"""`launch/prepare.py`: data into the cache, and a person's mistakes in one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moshi.models.compression import MimiModel
from safetensors.torch import save_file

from launch.config import load_config
from launch.prepare import codes_specs, open_cache, prepare, read_splits
from tests.unit.data_cases import small_mimi, small_mimi_config, small_tokenizer, write_dataset
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.dataset import PieceDataset
from ttt_dist.data.manifest import DataError
from ttt_dist.data.recordings import RecordingDataset
from ttt_dist.moshi.release import open_release

PREPARE = Path(__file__).parents[2] / "launch" / "prepare.py"
CPU = torch.device("cpu")


@pytest.fixture
def arguments(tmp_path):
    """Overrides for a small release and data set: 4 recordings to train on, 1 held out."""
    release = tmp_path / "release"
    release.mkdir()
    names = {"mimi_name": "mimi.safetensors", "mimi_config_name": "mimi.json"}
    names |= {"tokenizer_name": "text.model", "moshi_name": "model.safetensors"}
    model = {"n_q": 16, "dep_q": 8, "card": 64, "text_card": 40, "dim": 16, "num_heads": 2}
    (release / "config.json").write_text(json.dumps(model | names))
    (release / "mimi.json").write_text(json.dumps(small_mimi_config()))
    save_file(small_mimi().state_dict(), release / "mimi.safetensors")
    save_file({"unread": torch.zeros(1)}, release / "model.safetensors")
    (release / "text.model").write_bytes(small_tokenizer().serialized_model_proto())
    train = write_dataset(tmp_path / "data", [5.0, 3.0, 2.0, 1.0])
    held_out = write_dataset(tmp_path / "data", [2.5], name="eval", seed=7)
    return [
        f"run_dir={tmp_path / 'run'}",
        f"data.train_data={train}",
        f"data.eval_data={held_out}",
        "do_eval=true",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"moshi_paths.hf_repo_id={release}",
        "duration_sec=2.0",
        "full_finetuning=true",
    ]


def test_ranks_prepare_their_shares_and_a_second_run_nothing(arguments, monkeypatch):
    config = load_config(None, arguments)
    lines = [prepare(config, rank=rank, world_size=2, device=CPU) for rank in range(2)]
    # Longest first, in turn: 5 + 2.5 + 1 s and 3 + 2 s.
    assert lines[0].startswith("rank 0 of 2: 3 recordings, 6 pieces, 8 s of audio; encoded now: 3")
    assert lines[1].startswith("rank 1 of 2: 2 recordings, 3 pieces, 5 s of audio; encoded now: 2")

    monkeypatch.setattr(MimiModel, "encode", None)
    line = prepare(config, rank=0, world_size=1, device=CPU)
    assert line.startswith("5 recordings, 9 pieces, 14 s of audio; encoded now: 0 (0 s), already")
    assert line.endswith(f"cache: {config.data.cache_dir}")

    splits = read_splits(config, check_files=True)
    spec = CodesSpec.from_release(open_release(**config.moshi_paths.model_dump()), duration_sec=2.0)
    cache = open_cache(config, splits, spec)
    train, held_out = (PieceDataset(splits[name], cache) for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (7, 2)
    assert train[0].shape == (17, 25)


def test_recordings_stay_whole_where_states_are_carried(arguments):
    pieces = load_config(None, arguments)
    whole = load_config(None, [*arguments, "ttt.enable=true", "ttt.persistent_states=true"])
    lines = [prepare(config, rank=0, world_size=1, device=CPU) for config in (whole, pieces, whole)]
    assert lines[0].startswith("5 recordings, whole, 14 s of audio; encoded now: 5 (14 s), already")
    assert lines[1].startswith("5 recordings, 9 pieces, 14 s of audio; encoded now: 5 (14 s), alr")
    assert lines[2].startswith("5 recordings, whole, 14 s of audio; encoded now: 0 (0 s), already")
    splits = read_splits(whole, check_files=False)
    (spec,) = codes_specs(whole, open_release(**whole.moshi_paths.model_dump())).values()
    recordings = RecordingDataset(splits["train"], open_cache(whole, splits, spec), 16)
    assert [recordings.frames_of(n) for n in range(4)] == [63, 38, 25, 13]


def test_held_out_data_that_nothing_is_evaluated_on_may_be_gone(arguments, tmp_path):
    """Neither training nor preparing reads them; preflight doesn't look at them either."""
    config = load_config(
        None, [*arguments, "do_eval=false", f"data.eval_data={tmp_path}/gone.jsonl"]
    )
    assert list(read_splits(config, check_files=True)) == ["train"]
    line = prepare(config, rank=0, world_size=1, device=CPU)
    assert line.startswith("4 recordings, 7 pieces, 11 s of audio; encoded now: 4")


def test_the_cut_and_the_weights_of_a_release_belong_to_the_key(arguments):
    config = load_config(None, arguments)
    release = Path(config.moshi_paths.hf_repo_id)

    def fingerprint(duration_sec=2.0):
        return CodesSpec.from_release(
            open_release(str(release)), duration_sec=duration_sec
        ).fingerprint

    seen = [fingerprint(), fingerprint(2.5), fingerprint(None)]
    state = small_mimi().state_dict()
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_file(state | {name: state[name] + 1e-3}, release / "mimi.safetensors")
    seen.append(fingerprint())
    (release / "mimi.json").write_text(json.dumps(small_mimi_config() | {"note": 1}))
    seen.append(fingerprint())
    (release / "text.model").write_bytes((release / "text.model").read_bytes() + b"\0")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_the_command_tells_mistakes_once_and_exits_with_2(arguments, tmp_path):
    (tmp_path / "data" / "train2.wav").unlink()
    (tmp_path / "data" / "eval0.wav").write_bytes(b"noise")
    finished = subprocess.run(
        [sys.executable, str(PREPARE), *_with_empty_config(tmp_path), *arguments],
        cwd=tmp_path,  # from any folder
        env=os.environ | {"NO_TORCH_COMPILE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "Can't prepare the data: 2 problems." in finished.stderr
    assert finished.stderr.count("train2.wav") == 1
    assert finished.stderr.count(f"the audio header of {tmp_path / 'data' / 'eval0.wav'}") == 1


def test_what_another_rank_cannot_read_stops_this_one_before_it_encodes(arguments, tmp_path):
    told = []
    with pytest.raises(DataError, match="the disk of rank 0"):
        prepare(
            load_config(None, arguments),
            rank=1,
            world_size=2,
            device=CPU,
            agree=lambda problems: (told.append(problems), ["the disk of rank 0"])[1],
        )
    assert told == [[]]
    assert not (tmp_path / "cache").exists()


def _with_empty_config(folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text("seed: 0\n")
    return [str(path)]


def test_pieces_of_every_length_are_prepared(arguments):
    config = load_config(None, [*arguments, "duration_sec={0: 2, 5: 4, 9: 2}", "max_steps=10"])
    lines = prepare(config, rank=0, world_size=1, device=CPU).splitlines()
    assert [line.split(",")[1] for line in lines] == [" 9 pieces", " 6 pieces"]
    specs = codes_specs(config, open_release(**config.moshi_paths.model_dump()))
    assert {step: spec.duration_sec for step, spec in specs.items()} == {0: 2.0, 5: 4.0, 9: 2.0}
