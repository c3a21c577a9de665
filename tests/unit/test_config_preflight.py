"""What is refused before process groups and weights, all of it in one list."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import REPO_ROOT, TrainConfig, load_config, read_config
from launch.configuration.model_checks import configured_ttt
from launch.configuration.preflight import (
    check_run,
    check_start,
    resolve_mesh,
    run_warnings,
)
from launch.errors import UserError

TINY = {"dim": 128, "num_heads": 8, "num_layers": 4, "gating": "silu", "hidden_scale": 4.125}
TINY |= {"positional_embedding": "rope", "n_q": 16, "dep_q": 8, "delays": [0] * 17}
DEMO = REPO_ROOT / "configs" / "demo.yaml"


def demo(tmp_path: Path, *overrides: str) -> TrainConfig:
    return load_config(DEMO, [f"run_dir={tmp_path}/run", "device=cpu", *overrides])


def check(config: TrainConfig, world_size: int = 2) -> list[str]:
    return check_run(config, world_size=world_size, lm_config=TINY)


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (8, 2)])
def test_demo_may_start_on_any_layout(tmp_path: Path, world_size: int, tp: int) -> None:
    assert check(demo(tmp_path, f"parallel.tp={tp}"), world_size) == []


@pytest.mark.parametrize("name", ["moshi_7b_ttt", "moshi_7b_full"])
def test_7b_configs_lack_nothing_but_data(tmp_path: Path, name: str) -> None:
    path = REPO_ROOT / "configs" / f"{name}.yaml"
    config = load_config(path, [f"run_dir={tmp_path}/run", "device=cpu"])
    problems = check_run(config, world_size=8, lm_config=None)
    assert [problem.split(":")[0] for problem in problems] == ["data.train_data"]
    data = f"data.train_data={REPO_ROOT}/configs/demo/train.jsonl"
    config = load_config(path, [f"run_dir={tmp_path}/run", "device=cpu", data])
    assert check_run(config, world_size=8, lm_config=None) == []
    assert run_warnings(config) == ["eval_freq: has no effect, since do_eval is false"]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("overwrite_run_dir=true", "nothing is ever deleted"),
    ],
)
def test_unbuilt_features_load_and_are_refused_at_start(
    tmp_path: Path, override: str, part: str
) -> None:
    (problem,) = check(demo(tmp_path, override))
    assert problem.startswith(override.split("=")[0])
    assert part in problem


def test_plots_of_inner_losses_need_held_out_data_and_a_folder(tmp_path: Path) -> None:
    plots = "ttt.save_inner_loop_plots=true"
    assert check(demo(tmp_path, plots)) == []
    (problem,) = read_config(None, [plots, f"run_dir={tmp_path}", "ttt.enable=true"]).problems
    assert problem.startswith("ttt.save_inner_loop_plots: found true with do_eval: false")
    (tmp_path / "file").touch()
    where = f"ttt.inner_loop_plot_dir={tmp_path}/file/plots"
    (problem,) = check(demo(tmp_path, plots, where))
    assert problem.startswith("ttt.inner_loop_plot_dir: ")
    without = [plots, "ttt.enable=false", "ttt.log_inner_loop_losses=true"]
    told = run_warnings(demo(tmp_path, *without))
    assert [line.split(":")[0] for line in told if "no TTT layers" in line] == [
        "ttt.log_inner_loop_losses",
        "ttt.save_inner_loop_plots",
    ]


def test_compiled_layers_are_kept_or_recomputed_whole(tmp_path: Path) -> None:
    selective = ["compile=true", "parallel.recompute=selective"]
    (problem,) = check(demo(tmp_path, *selective))
    assert problem.startswith("parallel.recompute: found selective")
    assert check(demo(tmp_path, *selective, "gradient_checkpointing=false")) == []
    assert check(demo(tmp_path, "compile=true")) == []


def test_depth_of_the_inner_mlp_says_nothing_about_ttt_linear(tmp_path: Path) -> None:
    config = demo(tmp_path, "ttt.inner_model=linear", "ttt.ttt_mlp_layers=3")
    assert check(config) == []
    assert configured_ttt(config.ttt, TINY).inner_widths == (16, 16)


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_depth_of_the_inner_mlp_reaches_the_layer(tmp_path: Path, layers: int) -> None:
    config = demo(tmp_path, f"ttt.ttt_mlp_layers={layers}")
    assert check(config) == []
    assert configured_ttt(config.ttt, TINY).mlp_layers == layers


@pytest.mark.parametrize(
    ("overrides", "world_size", "mesh"),
    [
        ([], 8, (1, 8, 1)),
        (["parallel.tp=2"], 8, (1, 4, 2)),
        (["parallel.tp=2", "parallel.dp_replicate=2"], 8, (2, 2, 2)),
        (["parallel.dp_shard=2", "parallel.tp=4"], 8, (1, 2, 4)),
    ],
)
def test_mesh(
    tmp_path: Path, overrides: list[str], world_size: int, mesh: tuple[int, int, int]
) -> None:
    assert resolve_mesh(demo(tmp_path, *overrides), world_size) == mesh


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (["parallel.tp=4"], 2, ["2 ranks", "tp 4 = 4", "start 4 ranks"]),
        (["parallel.tp=2"], 1, ["1 rank,", "start 2 ranks"]),
        (["parallel.dp_shard=2"], 8, ["dp_shard 2", "= 2", "start 2 ranks", "dp_shard=-1"]),
    ],
)
def test_mesh_product_is_not_the_world(
    tmp_path: Path, overrides: list[str], world_size: int, parts: list[str]
) -> None:
    (problem,) = check(demo(tmp_path, *overrides), world_size)
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    ("override", "world_size", "parts"),
    [
        ("parallel.tp=3", 3, ["parallel.tp", "found 3", "8 heads", "1, 2, 4, 8"]),
        ("ttt.layers=1,9", 2, ["ttt.layers", "9", "0 to 3"]),
        ("ttt.layers=1,1", 2, ["ttt.layers", "twice", "0 to 3"]),
        ("ttt.layers=lower", 2, ["ttt.layers", "'lower'", "0 to 3"]),
        ("global_batch_size=9", 2, ["global_batch_size", "found 9", "8 or 10"]),
        ("data.train_data=/nowhere/t.jsonl", 2, ["data.train_data", "/nowhere/t.jsonl"]),
        ("data.train_data=", 2, ["data.train_data", "is empty"]),
        ("data.eval_data=", 2, ["data.eval_data", "do_eval"]),
    ],
)
def test_one_mistake_one_line(
    tmp_path: Path, override: str, world_size: int, parts: list[str]
) -> None:
    (problem,) = check(demo(tmp_path, override), world_size)
    for part in parts:
        assert part in problem


def test_odd_head_dim_is_refused(tmp_path: Path) -> None:
    lm_config = {**TINY, "dim": 8 * 15}
    (problem,) = check_run(demo(tmp_path), world_size=2, lm_config=lm_config)
    assert problem.startswith("ttt:")
    assert "15" in problem


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kv_repeat": 2}, "kv_repeat = 2"),
        ({"gating": "none"}, "no gating"),
        # 128 * 4.2 is 537, and two thirds of it 358: an even width, but no multiple of 4.
        ({"hidden_scale": 4.2}, "358 features"),
    ],
)
def test_a_model_that_tp_cannot_split_is_refused(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    lm_config = {**TINY, **changes}
    (problem,) = check_run(demo(tmp_path, "parallel.tp=4"), world_size=4, lm_config=lm_config)
    assert problem.startswith("parallel.tp: found 4")
    assert part in problem
    assert check_run(demo(tmp_path), world_size=4, lm_config=lm_config) == []


def test_nothing_is_concluded_from_wrong_keys(tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path}/run"
    reading = read_config(DEMO, [run_dir, "parallel.tp=two", "data.train_data=${x}", "device=cpu"])
    problems = check_run(reading.config, world_size=3, lm_config=TINY, bad_keys=reading.bad_keys)
    assert problems == []


def test_bad_audio_and_alignments_are_all_told(tmp_path: Path) -> None:
    manifest = tmp_path / "t.jsonl"
    rows = [{"path": "none.wav", "duration": 3}, {"path": "text.wav", "duration": 3}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "text.json").write_text('{"alignments": []}')
    problems = check(demo(tmp_path, f"data.train_data={manifest}"))
    assert len(problems) == 2
    assert "none.wav" in problems[0]
    assert "text.wav" in problems[1]


def test_everything_wrong_comes_in_one_message(tmp_path: Path) -> None:
    arguments = [
        str(DEMO),
        f"run_dir={tmp_path}",
        "optim.learnin_rate=1",
        "batch_size=none",
        "lora.enable=true",
        "parallel.tp=4",
        "data.eval_data=/nowhere.jsonl",
        "moshi_paths.hf_repo_id=/nowhere",
        "device=cpu",
    ]
    (tmp_path / "x").touch()
    with pytest.raises(UserError) as caught:
        check_start(arguments, world_size=2, rank=0, local_world_size=2)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "optim.learnin_rate",
        "batch_size",
        "lora.enable",
        "run_dir",
        "parallel",
        "data.eval_data",
        "moshi_paths.hf_repo_id",
    ]
    assert not (tmp_path / "runs").exists()


def test_warnings(tmp_path: Path) -> None:
    config = demo(tmp_path, "duration_sec=1", "do_eval=false", "optim.ttt_lr=1")
    keys = [warning.split(":")[0] for warning in run_warnings(config)]
    assert keys == ["duration_sec", "ttt.mini_batch_size", "eval_freq"]
    lora = ["full_finetuning=false", "save_adapters=false", "lora.ft_embed=true"]
    assert [w.split(":")[0] for w in run_warnings(demo(tmp_path, *lora))] == ["lora.ft_embed"]
    lora.append("lora.enable=true")
    assert [w.split(":")[0] for w in run_warnings(demo(tmp_path, *lora))] == ["save_adapters"]
    ahead = [w.split(":")[0] for w in run_warnings(demo(tmp_path, "ttt.causal=false"))]
    assert ahead == ["ttt.causal"]
    assert check(demo(tmp_path, "ttt.causal=false")) == []
    assert run_warnings(demo(tmp_path)) == []
    along = ["ttt.persistent_states=true", "duration_sec=1.5", "ttt.causal=false"]
    rounded, ahead = run_warnings(demo(tmp_path, *along))
    assert "1.5 s are 19 frames; pieces have 16, whole mini-batches of 16" in rounded
    assert ahead.startswith("ttt.causal: false lets a frame see later frames")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["num_lanes=4", "ttt.tbptt_pieces=2"], ["num_lanes", "ttt.tbptt_pieces"]),
        (["ttt.inner_model=linear", "ttt.ttt_mlp_layers=3"], ["ttt.ttt_mlp_layers"]),
        (
            ["ttt.inner_model=linear", "ttt.ttt_mlp_expansion_factor=2"],
            ["ttt.ttt_mlp_expansion_factor"],
        ),
        (["parallel.recompute=selective", "gradient_checkpointing=false"], ["parallel.recompute"]),
        (["ttt.enable=false"], ["ttt.ttt_layer_context", "ttt.non_ttt_layer_context"]),
        (
            # The defaults, and null: the release's windows, which stay.
            ["ttt.enable=false", "ttt.ttt_layer_context=50", "ttt.non_ttt_layer_context=null"],
            [],
        ),
    ],
)
def test_settings_without_effect_are_told(
    tmp_path: Path, overrides: list[str], keys: list[str]
) -> None:
    told = run_warnings(demo(tmp_path, *overrides))
    assert [line.split(": has no effect, since ")[0] for line in told] == keys


def test_settings_of_carried_states_have_an_effect_with_ttt_alone(tmp_path: Path) -> None:
    carried = ["ttt.persistent_states=true", "num_lanes=4", "ttt.tbptt_pieces=2"]
    assert not any("no effect" in line for line in run_warnings(demo(tmp_path, *carried)))
    windows = ["ttt.ttt_layer_context=null", "ttt.non_ttt_layer_context=null"]
    assert run_warnings(demo(tmp_path, *carried, *windows, "ttt.enable=false")) == [
        "num_lanes: has no effect, since ttt.enable is false",
        "ttt.persistent_states: has no effect, since ttt.enable is false: pieces are trained on "
        "one by one",
        "ttt.tbptt_pieces: has no effect, since ttt.enable is false",
    ]


def test_states_are_not_carried_behind_windows_without_end(tmp_path: Path) -> None:
    config = demo(tmp_path, "ttt.persistent_states=true", "ttt.non_ttt_layer_context=null")
    (problem,) = check(config)  # the release has none
    assert problem.startswith("ttt.non_ttt_layer_context: found null")
    assert check_run(config, world_size=2, lm_config=TINY | {"context": 300}) == []


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"positional_embedding": "sin"}, "positional_embedding = sin"),
        ({"kv_repeat": 2}, "kv_repeat = 2"),
    ],
)
def test_attention_that_cannot_go_on_is_refused(
    tmp_path: Path, settings: dict[str, object], part: str
) -> None:
    config = demo(tmp_path, "ttt.persistent_states=true")
    (problem,) = check_run(config, world_size=1, lm_config=TINY | settings)
    assert problem.startswith("ttt.persistent_states: found true")
    assert part in problem


def test_ttt_section_reaches_the_layer_config(tmp_path: Path) -> None:
    config = demo(
        tmp_path,
        "ttt.inner_model=linear",
        "ttt.mini_batch_size=8",
        "ttt.base_lr=0.5",
        "ttt.ttt_mlp_expansion_factor=2",
        "ttt.inner_eps=1e-8",
        "ttt.checkpoint_group_size=0",
    )
    built = configured_ttt(config.ttt, TINY)
    assert (built.model_dim, built.num_heads, built.inner_model) == (128, 8, "linear")
    assert (built.mini_batch_size, built.base_lr, built.expansion) == (8, 0.5, 2)
    assert (built.inner_eps, built.checkpoint_group_size, built.causal) == (1e-8, 0, True)
