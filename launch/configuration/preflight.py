"""Everything that can be known to be wrong before process groups and weights, in one list."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo
from moshi.models.loaders import _lm_kwargs as MOSHI_7B_LM_CONFIG

from launch.config import (
    TrainConfig,
    has_ttt,
    parse_command_line,
    read_config,
)
from launch.configuration.model_checks import lora_settings, model_problems, ttt_section
from launch.configuration.schema import TTTSection
from launch.configuration.unbuilt import refuse_unbuilt
from launch.errors import UserError
from launch.feeding.batch_plan import (
    carries_states,
    length_stages,
    resolve_global_batch_size,
    resolve_lanes,
)
from launch.run_checkpoints import resume_problems
from launch.run_folder import adopt_saved, run_dir_problems, unwritable_problems
from ttt_dist.data.encode import mimi_config_problems
from ttt_dist.data.interleave import num_frames
from ttt_dist.data.manifest import DataError, read_sources
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.release import open_release, released_ttt
from ttt_dist.moshi.released_lora import adapter_differences, released_adapters
from ttt_dist.moshi.released_ttt import ttt_differences

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_mesh(config: TrainConfig, world_size: int) -> tuple[int, int, int]:
    """`(dp_replicate, dp_shard, tp)`, the -1 of `dp_shard` filled in; their product is the world.

    Raises:
        UserError: the product can't be `world_size`.
    """
    replicate, shard, tp = (
        config.parallel.dp_replicate,
        config.parallel.dp_shard,
        config.parallel.tp,
    )
    others = replicate * tp
    if shard == -1 and world_size % others == 0:
        return replicate, world_size // others, tp
    if replicate * shard * tp == world_size:
        return replicate, shard, tp
    if shard == -1:
        wanted = f"dp_replicate {replicate} * tp {tp} = {others} doesn't divide them"
        count = math.ceil(world_size / others) * others
    else:
        count = replicate * shard * tp
        wanted = f"dp_replicate {replicate} * dp_shard {shard} * tp {tp} = {count}"
    fix = f"start {count} ranks (torchrun --nproc_per_node), change parallel.dp_replicate or tp"
    if shard != -1 and world_size % others == 0:
        fix += ", or set parallel.dp_shard=-1 (the rest)"
    ranks = f"there are {world_size} ranks" if world_size > 1 else "there is 1 rank"
    raise UserError(f"parallel: {ranks}, but {wanted}; {fix}")


def _collect(check: Callable[[], object]) -> list[str]:
    """The problems that `check` raises; none if it passes."""
    try:
        check()
    except (UserError, DataError) as error:
        return list(error.problems)
    return []


def _data_problems(
    config: TrainConfig, bad_keys: frozenset[str], *, check_files: bool
) -> list[str]:
    used = [("data.train_data", config.data.train_data)]
    if config.do_eval:
        used.append(("data.eval_data", config.data.eval_data))
    problems = []
    for key, spec in used:
        if key in bad_keys:
            continue
        if not spec:
            why = "" if key == "data.train_data" else " (or do_eval: false)"
            problems.append(f"{key}: is empty; allowed: a .jsonl manifest or a folder of them{why}")
            continue
        problems += _collect(partial(read_sources, spec, field=key, check_files=check_files))
    return problems


def _device_problems(config: TrainConfig, local_world_size: int) -> list[str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return []
    if gpus == 0:
        return [
            "device: found cuda, but no GPU is visible; allowed here: auto or cpu; "
            "otherwise check the driver and CUDA_VISIBLE_DEVICES"
        ]
    problems = []
    if local_world_size > gpus:
        problems.append(
            f"device: {local_world_size} ranks on this node, but only {gpus} GPUs are visible; "
            f"start at most {gpus} (torchrun --nproc_per_node), or use device=cpu"
        )
    if config.param_dtype == "float64" and config.device == "auto":
        problems.append(
            "param_dtype: found float64 on a GPU; it is for proofs on a CPU: add device=cpu"
        )
    return problems


def _layout_problems(config: TrainConfig, layout: dict[str, int]) -> list[str]:
    """What doesn't fit the ranks: the step's size, and the checkpoint of a resumed run."""
    problems = []
    if config.resume and not run_dir_problems(config):
        problems += resume_problems(config)
        config = adopt_saved(config)
    dp = layout["dp_replicate"] * layout["dp_shard"]
    sizes = _collect(partial(resolve_global_batch_size, config, dp))
    return problems + (sizes or _collect(partial(resolve_lanes, config, dp)))


def _run_problems(
    config: TrainConfig,
    *,
    world_size: int,
    bad_keys: frozenset[str],
    local_world_size: int,
    check_files: bool,
) -> list[str]:
    """What is wrong without regard to the model."""
    problems = refuse_unbuilt(config)
    if bad_keys.isdisjoint(("device", "param_dtype")):
        problems += _device_problems(config, local_world_size)
    if bad_keys.isdisjoint(("run_dir", "resume")):
        problems += run_dir_problems(config)
    if config.ttt.save_inner_loop_plots and config.ttt.inner_loop_plot_dir:
        plots = Path(config.ttt.inner_loop_plot_dir)
        problems += unwritable_problems("ttt.inner_loop_plot_dir", plots)
    layout = ("parallel", "parallel.dp_replicate", "parallel.dp_shard", "parallel.tp")
    batch = ("batch_size", "num_microbatches", "global_batch_size", "resume", "run_dir")
    if bad_keys.isdisjoint(layout) and config.parallel.dp_shard != 0:
        try:
            sizes = resolve_mesh(config, world_size)
        except UserError as error:
            problems += error.problems
        else:
            if bad_keys.isdisjoint(batch):
                axes = dict(zip(("dp_replicate", "dp_shard", "tp"), sizes, strict=True))
                problems += _layout_problems(config, axes)
    return problems + _data_problems(config, bad_keys, check_files=check_files)


def check_run(
    config: TrainConfig,
    *,
    world_size: int,
    lm_config: Mapping[str, Any] | None,
    release_problem: str | None = None,
    bad_keys: frozenset[str] = frozenset(),
    local_world_size: int = 1,
    check_files: bool = True,
) -> list[str]:
    """Every reason why this run can't start; reads files, writes none, needs no process group.

    Args:
        config: as `launch.config.read_config` gives it.
        world_size: ranks of the job.
        lm_config: the release's; None means Moshi 7B's, as in moshi.
        release_problem: why the release couldn't be opened; then nothing is said about the model.
        bad_keys: keys that hold a default in place of a mistake told already; nothing is concluded
            from them.
        local_world_size: ranks on this node.
        check_files: look at every audio header and alignment file; one rank is enough.
    """
    problems = _run_problems(
        config,
        world_size=world_size,
        bad_keys=bad_keys,
        local_world_size=local_world_size,
        check_files=check_files,
    )
    if release_problem is not None:
        return [*problems, release_problem]
    return problems + model_problems(config, lm_config or MOSHI_7B_LM_CONFIG, bad_keys)


def run_warnings(config: TrainConfig) -> list[str]:
    """What is allowed, but rarely meant."""
    warnings = []
    lengths = length_stages(config).values()
    shortest, size = min(lengths), config.ttt.mini_batch_size
    frames, window = num_frames(shortest), config.ttt.ttt_layer_context
    if carries_states(config):
        warnings += [
            f"duration_sec: {seconds:g} s are {num_frames(seconds)} frames; pieces have "
            f"{num_frames(seconds) // size * size}, whole mini-batches of {size}"
            for seconds in lengths
            if num_frames(seconds) % size
        ]
    elif config.ttt.enable and window is not None and frames <= window:
        warnings.append(
            f"duration_sec: {shortest:g} s are {frames} frames, which the attention "
            f"window of TTT layers ({window}) covers: TTT has nothing to carry"
        )
    if config.ttt.enable and not carries_states(config) and frames <= size:
        warnings.append(
            f"ttt.mini_batch_size: {size} is no less than the {frames} frames of a piece: the "
            "inner weights are never updated within one"
        )
    if config.ttt.enable and not config.ttt.causal:
        warnings.append(
            "ttt.causal: false lets a frame see later frames of its mini-batch, which an "
            "autoregressive model has to predict: losses look better than the model is, and it "
            "can't generate"
        )
    if config.lora.enable and not config.save_adapters:
        warnings.append(
            "save_adapters: false has no effect: a checkpoint holds base weights and adapters, "
            "each under its own names"
        )
    return warnings + _without_effect(config)


def _without_effect(config: TrainConfig) -> list[str]:
    """Settings that this run doesn't look at, and why."""
    ttt, default = config.ttt, TTTSection()
    no_ttt = "ttt.enable is false"
    alone = "ttt.persistent_states is false" if ttt.enable else no_ttt
    found = [
        ("eval_freq", config.eval_freq > 0 and not config.do_eval, "do_eval is false"),
        ("num_lanes", config.num_lanes is not None and not carries_states(config), alone),
        ("lora.ft_embed", config.lora.ft_embed and not config.lora.enable, "lora.enable is false"),
        ("optim.ttt_lr", config.optim.ttt_lr is not None and not ttt.enable, no_ttt),
        (
            "ttt.persistent_states",
            ttt.persistent_states and not ttt.enable,
            f"{no_ttt}: pieces are trained on one by one",
        ),
        ("ttt.tbptt_pieces", ttt.tbptt_pieces > 1 and not carries_states(config), alone),
        (
            "parallel.recompute",
            config.parallel.recompute == "selective" and not config.gradient_checkpointing,
            "gradient_checkpointing is false",
        ),
    ]
    for name in ("log_inner_loop_losses", "save_inner_loop_plots"):
        asked = getattr(ttt, name) and not has_ttt(config)
        found.append((f"ttt.{name}", asked, "the model has no TTT layers"))
    for name in ("ttt_layer_context", "non_ttt_layer_context"):
        window = getattr(ttt, name)
        # null asks for the release's window, and the default for nothing.
        asked = not ttt.enable and window not in (None, getattr(default, name))
        found.append((f"ttt.{name}", asked, f"{no_ttt}: the release's window stays"))
    for name in ("ttt_mlp_layers", "ttt_mlp_expansion_factor"):
        asked = ttt.inner_model == "linear" and getattr(ttt, name) != getattr(default, name)
        found.append((f"ttt.{name}", asked, "ttt.inner_model is linear"))
    return [f"{key}: has no effect, since {why}" for key, asked, why in found if asked]


@dataclass(frozen=True)
class Start:
    """A run that may start: its configuration (`${time}` still open) and its base checkpoint."""

    config: TrainConfig
    release: CheckpointInfo


def check_start(
    arguments: Sequence[str], *, world_size: int, rank: int, local_world_size: int
) -> Start:
    """Read the command line and everything it names, and check all of it.

    A release on the hub is fetched only where nothing else is wrong: a typing error shouldn't wait
    for gigabytes.

    Raises:
        UserError: with every problem found.
    """
    path, overrides = parse_command_line(arguments)
    reading = read_config(path, overrides)
    config, problems = reading.config, list(reading.problems)
    problems += _run_problems(
        config,
        world_size=world_size,
        bad_keys=reading.bad_keys,
        local_world_size=local_world_size,
        check_files=rank == 0,
    )
    paths = config.moshi_paths
    name = paths.hf_repo_id or ""
    is_on_hub = HUB_ID.fullmatch(name) is not None and not Path(name).is_dir()
    release: CheckpointInfo | None = None
    if not (is_on_hub and problems):
        try:
            release = open_release(**paths.model_dump())
        except ReleaseError as error:
            problems.append(str(error))
        else:
            lm_config = release.lm_config or MOSHI_7B_LM_CONFIG
            found = model_problems(config, lm_config, reading.bad_keys)
            found = found or mimi_config_problems(release)
            if not found and not any(key.startswith("ttt") for key in reading.bad_keys):
                found = ttt_differences(released_ttt(release), ttt_section(config, lm_config))
            if not any(key.startswith("lora") for key in reading.bad_keys):
                found += adapter_differences(released_adapters(release), lora_settings(config))
            problems += found
    if problems or release is None:
        raise UserError(problems)
    if config.resume:
        config = adopt_saved(config)
    return Start(config, release)
