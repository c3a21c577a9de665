"""Mistakes in a configuration: all in one message, each naming key, value and way out."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.config import REPO_ROOT, load_config, read_config
from launch.errors import UserError
from launch.feeding.batch_plan import resolve_global_batch_size

VALID = ["run_dir=r", "full_finetuning=true"]


def problems_of(path: Path | None, overrides: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return list(caught.value.problems)


def the_problem(overrides: list[str]) -> str:
    problems = problems_of(None, [*VALID, *overrides])
    assert len(problems) == 1
    return problems[0]


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        """
seed: 1
seed: 2
optim: {lr: fast, betas: [1, 2, 3], weight_decays: 0.1}
ttt: {enable: true, inner_model: cnn, layer: "1,2"}
lr: 3
profile: {enable: true, start_step: 100, num_steps: 3}
wandb: {key: SECRET}
data: {train_data: "${home}/a.jsonl"}
"""
    )
    overrides = ["batch_size=1.5", "--parallel.tp=2", "duration_sec=[", "parallel.tpp=2"]
    problems = problems_of(path, overrides)
    starts = [problem.split(":")[0] for problem in problems]
    assert sorted(starts) == sorted(
        [
            "seed",
            "override '--parallel.tp'",
            "duration_sec",
            "data.train_data",
            "run_dir",
            "optim.lr",
            "optim.betas",
            "optim.weight_decays",
            "ttt.inner_model",
            "ttt.layer",
            "parallel.tpp",
            "batch_size",
            "lr",
            "wandb.key",
            "profile",
        ]
    )
    assert "SECRET" not in "\n".join(problems)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lr=fast", ["optim.lr", "'fast'", "a number > 0", "0.0001", "command line"]),
        ("optim.lr=-1", ["found -1", "a number > 0"]),
        ("optim.lr=.nan", ["optim.lr", "a number > 0"]),
        ("ttt.ttt_mlp_layers=1", ["ttt.ttt_mlp_layers", "found 1", "≥ 2 and ≤ 5", "inner MLP"]),
        ("ttt.ttt_mlp_layers=6", ["ttt.ttt_mlp_layers", "found 6", "≥ 2 and ≤ 5", "inner MLP"]),
        ("param_dtype=fp16", ["'fp16'", "auto, bfloat16, float32, float64"]),
        ("seed=true", ["seed", "found True", "a whole number"]),
        ("ttt.enable=maybe", ["'maybe'", "true or false"]),
        ("ttt.layers=[1, a]", ["ttt.layers", "[1, 'a']", "middle"]),
        ("parallel.dp_shard=0", ["parallel.dp_shard", "found 0", "-1"]),
        ("optim.learning_rate=1", ["optim.learning_rate", "unknown key", "optim.lr"]),
        ("lr=1", ["lr: unknown key", "optim.lr"]),
        ("optim.dp_replicate=1", ["unknown key", "parallel.dp_replicate"]),
        ("paralel.tp=1", ["paralel", "unknown key", "parallel"]),
        ("ttt.mini_batch=4", ["ttt.mini_batch", "ttt.mini_batch_size"]),
        ("optim=5", ["optim: found a int", "section"]),
        ("wandb.project=${user}", ["wandb.project", "${user}", "${repo}"]),
        ("data.cache_dir=/x/${time}", ["data.cache_dir", "${time}", "run_dir"]),
        ("full_finetuning=false", ["full_finetuning", "lora.enable", "ttt.enable"]),
        ("lora.enable=true", ["lora.enable", "frozen", "set full_finetuning: false"]),
        ("lora.rank=0", ["lora.rank", "found 0", "≥ 1"]),
        ("optim.lr", ["key.path=value"]),
    ],
)
def test_message_names_key_value_and_way_out(override: str, parts: list[str]) -> None:
    problem = the_problem([override])
    for part in parts:
        assert part in problem


def test_ttt_without_layers_trains_nothing() -> None:
    problem = the_problem(["full_finetuning=false", "ttt.enable=true", "ttt.layers=none"])
    assert "nothing to train" in problem


def test_adapters_that_could_not_learn_are_refused() -> None:
    (problem,) = problems_of(None, ["run_dir=r", "lora.enable=true", "lora.scaling=0"])
    assert problem.startswith("lora.scaling: found 0")
    assert load_config(None, ["run_dir=r", "lora.enable=true"]).lora.scaling == 2.0


def test_rules_ask_nothing_of_wrong_keys() -> None:
    """ttt.enable is mistyped: "nothing to train" would be drawn from its default."""
    problems = problems_of(None, ["run_dir=r", "ttt.enable=ture"])
    assert [problem.split(":")[0] for problem in problems] == ["ttt.enable"]


def test_duplicate_keys_are_told_with_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("run_dir: a\nfull_finetuning: true\noptim:\n  lr: 1\n  lr: 2\n")
    (problem,) = problems_of(path, [])
    assert problem.startswith("optim.lr: written twice, in lines 4 and 5")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "a: 2024-13-45", "just text", "? [1]\n: 2"])
def test_unreadable_file_is_the_one_problem(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    (problem,) = problems_of(path, [])
    assert str(path) in problem


def test_missing_file_and_bad_override_come_together(tmp_path: Path) -> None:
    problems = problems_of(tmp_path / "none.yaml", ["optim"])
    assert len(problems) == 2
    assert "not found" in problems[0]


def test_aliases_that_nest_in_themselves_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "alias.yaml"
    path.write_text("run_dir: r\nfull_finetuning: true\noptim: &o\n  lr: *o\n")
    (problem,) = problems_of(path, [])
    assert problem.startswith("optim.lr")


def test_python_tags_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "tag.yaml"
    marker = tmp_path / "ran"
    path.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{marker}']\n")
    (problem,) = problems_of(path, [])
    assert "isn't valid YAML" in problem
    assert not marker.exists()


def test_reading_replaces_wrong_keys_by_defaults() -> None:
    reading = read_config(None, [*VALID, "parallel.tp=two", "seed=7"])
    assert reading.bad_keys == {"parallel.tp"}
    assert reading.config.parallel.tp == 1
    assert reading.config.seed == 7


@pytest.mark.parametrize(
    ("overrides", "dp", "expected"),
    [
        ([], 4, (4, 1)),
        (["batch_size=2", "num_microbatches=3"], 4, (24, 3)),
        (["global_batch_size=8"], 2, (8, 4)),
        (["global_batch_size=8", "batch_size=2"], 4, (8, 1)),
        (["global_batch_size=8", "num_microbatches=4"], 2, (8, 4)),
        # A resumed run may have another layout: accumulation follows from it.
        (["global_batch_size=8", "num_microbatches=4", "resume=true"], 1, (8, 8)),
    ],
)
def test_global_batch_size(overrides: list[str], dp: int, expected: tuple[int, int]) -> None:
    config = load_config(None, [*VALID, *overrides])
    assert resolve_global_batch_size(config, dp) == expected


@pytest.mark.parametrize(
    ("overrides", "dp", "parts"),
    [
        (["global_batch_size=10"], 4, ["found 10", "1 * 4 = 4", "8 or 12"]),
        (["global_batch_size=2"], 4, ["nearest allowed: 4"]),
        (["global_batch_size=8", "num_microbatches=3"], 2, ["num_microbatches", "found 3", "4"]),
    ],
)
def test_indivisible_global_batch_size(overrides: list[str], dp: int, parts: list[str]) -> None:
    config = load_config(None, [*VALID, *overrides])
    with pytest.raises(UserError) as caught:
        resolve_global_batch_size(config, dp)
    for part in parts:
        assert part in str(caught.value)


EXIT = """
from launch.errors import UserError, exit_with
exit_with(UserError(["a: wrong", "b: wrong"]), grace_seconds={grace})
"""


def start(rank: int, grace: float, **extra: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), **extra}
    return subprocess.Popen(
        [sys.executable, "-c", EXIT.format(grace=grace)],
        cwd=REPO_ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_rank_zero_tells_at_once_with_code_2() -> None:
    process = start(0, grace=60.0)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == "This run can't start: 2 problems.\n  - a: wrong\n  - b: wrong\n"
    assert out == ""


def test_other_ranks_wait_then_tell_only_what_rank_zero_did_not() -> None:
    began = time.monotonic()
    same_node = start(3, grace=0.5, GROUP_RANK="0")
    other_first = start(8, grace=0.5, GROUP_RANK="1", LOCAL_RANK="0")
    other_second = start(9, grace=0.5, GROUP_RANK="1", LOCAL_RANK="1")
    errors = [p.communicate(timeout=20)[1] for p in (same_node, other_first, other_second)]
    assert time.monotonic() - began >= 0.5
    assert [p.returncode for p in (same_node, other_first, other_second)] == [2, 2, 2]
    assert "rank 3]" in errors[0]
    assert "rank 8]" in errors[1]
    assert errors[2] == ""
