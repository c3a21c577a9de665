"""The 7B configurations: valid, and the model they describe built on the meta device."""

import re
import shlex

import pytest

from launch.config import REPO_ROOT, load_config, parse_command_line, read_config
from launch.configuration.preflight import check_run, resolve_mesh
from launch.feeding.batch_plan import backwards_per_step, resolve_global_batch_size
from launch.setup import ttt_placement
from ttt_dist.moshi.build import build_model, freeze_base, is_ttt_parameter
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
    set_attention_contexts,
)

MOSHI_7B = 7_687_729_152
TTT_LAYER = 71_491_616  # TTT-MLP of the default sizes, gate included
GPUS_PER_NODE = 8
CONFIGS = sorted((REPO_ROOT / "configs").glob("moshi_7b_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_7b_config_builds_on_meta(path):
    config = load_config(path)
    # All that can be wrong on a user's 8 GPUs, but for the data that they have to name.
    problems = check_run(config, world_size=8, lm_config=None)
    assert all(problem.startswith("data.") for problem in problems), problems
    placement = ttt_placement(config, None)
    model = build_model(None, placement)
    assert placement is not None
    assert sum(p.numel() for p in model.parameters()) == MOSHI_7B + TTT_LAYER * len(
        placement.layers
    )
    windows = {
        "ttt_context": config.ttt.ttt_layer_context,
        "other_context": config.ttt.non_ttt_layer_context,
    }
    set_attention_contexts(model, **windows)
    contexts = read_attention_contexts(model)
    check_attention_contexts(contexts, ttt_layers=placement.layers, **windows)
    assert "TTT layers=50" in describe_attention_contexts(contexts)
    if not config.full_finetuning:
        freeze_base(model, model.text_linear.weight.dtype)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(is_ttt_parameter(name) for name in trained)


def test_no_gradients_of_the_whole_7b_wait_for_a_second_microbatch():
    """On the 8 GPUs that it is for, they would be 35 GB of each."""
    config = load_config(REPO_ROOT / "configs" / "moshi_7b_full.yaml")
    assert backwards_per_step(config, dp=8) == 2
    assert config.parallel.reduce_every_microbatch


def test_there_are_7b_configs():
    assert len(CONFIGS) >= 2


def documented_commands() -> list[str]:
    """What README, the SLURM script and the configurations tell a person to train with."""
    files = [REPO_ROOT / "README.md", REPO_ROOT / "launch" / "slurm" / "train.sbatch", *CONFIGS]
    lines = [line.lstrip("# ") for file in files for line in file.read_text().splitlines()]
    start = re.compile(r"(sbatch|\./torchrun\.sh|torchrun) .*launch/\S*train\S* +configs/moshi_7b_")
    return [line for line in lines if start.match(line)]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_fit_their_nodes(command):
    words = shlex.split(command, comments=True)
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    nodes = [word.removeprefix("--nodes=") for word in words[:script] if "--nodes=" in word]
    ranks = GPUS_PER_NODE * int(nodes[0] if nodes else 1)
    path, overrides = parse_command_line(words[script + 1 :])
    reading = read_config(REPO_ROOT / path, overrides)
    assert not reading.problems
    replicate, shard, _ = resolve_mesh(reading.config, ranks)
    assert resolve_global_batch_size(reading.config, replicate * shard)[0] >= ranks


def test_commands_for_several_nodes_are_documented():
    assert sum("--nodes=" in command for command in documented_commands()) == 2
