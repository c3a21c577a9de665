"""What a run leaves on disk, and what a resumed one may change."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from launch.config import TrainConfig, load_config
from launch.errors import UserError
from launch.run_checkpoints import other_data_problems
from launch.run_folder import (
    adopt_saved,
    create_run_folder,
    git_facts,
    host_facts,
    run_dir_problems,
)


def sources(*each: tuple[str, int, float]) -> list[dict]:
    return [
        {"path": path, "pieces": size, "weight": weight, "recordings": "first"}
        for path, size, weight in each
    ]


def test_sources_of_a_resumed_run_may_move_but_not_change():
    saved = sources(("a.jsonl", 5, 1.0), ("b.jsonl", 7, 2.0))
    moved = sources(("x/a.jsonl", 5, 1.0), ("x/b.jsonl", 7, 2.0))
    assert other_data_problems(saved, moved) == []
    changed = sources(("a.jsonl", 5, 1.0), ("b.jsonl", 8, 2.0))
    problem, way_on = other_data_problems(saved, changed)
    assert "b.jsonl: found 8 pieces and weight 2, but" in problem
    assert "with 7 and 2 (b.jsonl)" in problem
    assert "launch/export.py" in way_on
    weighed = sources(("a.jsonl", 5, 3.0), ("b.jsonl", 7, 2.0))
    assert "found 5 pieces and weight 3" in other_data_problems(saved, weighed)[0]
    assert "1 sources, but" in other_data_problems(saved, saved[:1])[0]


def test_other_recordings_are_found_by_their_order_and_pieces():
    """Not by their folders; and checkpoints of earlier versions have no digest."""
    (first,) = sources(("a.jsonl", 5, 1.0))
    second = first | {"recordings": "second"}
    assert "or stand in another order" in other_data_problems([first], [second])[0]
    earlier = {key: value for key, value in first.items() if key != "recordings"}
    assert other_data_problems([earlier], [first]) == []


def config_for(run_dir: Path, *overrides: str) -> TrainConfig:
    return load_config(None, [f"run_dir={run_dir}", "full_finetuning=true", *overrides])


def create(config: TrainConfig) -> Path:
    hosts = [host_facts(0, torch.device("cpu"))]
    return create_run_folder(config, world_size=1, hosts=hosts).path


def test_a_new_folder_holds_configuration_and_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "topsecretvalue")
    config = config_for(tmp_path / "a" / "run", "global_batch_size=8")
    path = create(config)
    assert load_config(path / "config.yaml") == config
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["world_size"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["ranks"][0]["device"].startswith("cpu")
    assert set(manifest) == {"started", "command", "git", "versions", "world_size", "ranks"}
    for file in path.iterdir():
        assert "topsecretvalue" not in file.read_text()


def test_existing_folder_is_refused_unless_resumed(tmp_path: Path) -> None:
    path = create(config_for(tmp_path / "run", "global_batch_size=8"))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(UserError, match="resume=true"):
        create(config_for(path))
    resumed = config_for(path, "resume=true", "global_batch_size=8", "parallel.tp=2")
    create(resumed)
    after = {file.name: file.read_bytes() for file in path.iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 4  # a second configuration and manifest beside the first


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert create(config_for(tmp_path)) == tmp_path


def test_resume_keeps_the_global_batch_size(tmp_path: Path) -> None:
    path = create(config_for(tmp_path / "run", "global_batch_size=8"))
    assert adopt_saved(config_for(path, "resume=true")).global_batch_size == 8
    with pytest.raises(UserError, match="began with 8"):
        adopt_saved(config_for(path, "resume=true", "global_batch_size=4"))


def test_lanes_count_for_a_resumed_run_only_where_it_has_some(tmp_path: Path) -> None:
    alone = create(config_for(tmp_path / "alone").model_copy(update={"num_lanes": None}))
    adopt_saved(config_for(alone, "resume=true", "num_lanes=8"))
    along = ["ttt.enable=true", "ttt.persistent_states=true"]
    lanes = create(config_for(tmp_path / "lanes", *along, "num_lanes=4"))
    assert adopt_saved(config_for(lanes, *along, "resume=true")).num_lanes == 4
    with pytest.raises(UserError, match=r"num_lanes: found 8, but .* began with 4"):
        adopt_saved(config_for(lanes, *along, "resume=true", "num_lanes=8"))


def test_resume_tells_everything_that_it_may_not_change(tmp_path: Path) -> None:
    path = create(config_for(tmp_path / "run", "global_batch_size=8"))
    changed = config_for(path, "resume=true", "seed=1", "ttt.enable=true", "max_steps=900")
    with pytest.raises(UserError) as caught:
        adopt_saved(changed)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["seed", "ttt.enable"]


def test_where_a_run_may_not_go(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    cases = {
        "": [],
        str(file): [],
        str(full): [],
        str(tmp_path / "none"): ["resume=true"],
        str(tmp_path / "r-${time}"): ["resume=true"],
        f"{full}/": ["resume=true"],
    }
    said = [
        run_dir_problems(load_config(None, [f"run_dir={path}", "full_finetuning=true", *more]))
        for path, more in cases.items()
    ]
    expected = ["is empty", "is a file", "isn't empty", "doesn't exist", "${time}", "config.yaml"]
    for problems, part in zip(said, expected, strict=True):
        assert len(problems) == 1
        assert part in problems[0]
    assert run_dir_problems(config_for(tmp_path / "r-${time}")) == []
    assert not (tmp_path / "none").exists()


def test_git_facts_speak_of_this_checkout_alone(tmp_path: Path) -> None:
    assert git_facts(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "f").write_text("1")
    (tmp_path / "inner").mkdir()
    subprocess.run(["git", "-C", str(tmp_path), "add", "f"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-qm", "x"], check=True)
    facts = git_facts(tmp_path)
    assert facts is not None
    assert len(facts["revision"]) == 40
    assert facts["dirty"] is False
    (tmp_path / "f").write_text("2")
    assert git_facts(tmp_path)["dirty"] is True  # type: ignore[index]
    assert git_facts(tmp_path / "inner") is None
