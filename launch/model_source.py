"""Which model a person means, and that model: found, loaded on one device or over ranks, described.

What a person names is a run folder of `launch/train.py`, one of its checkpoints (saved on any
number of ranks), or a release folder: what `launch/export.py` writes, or a release without TTT.
Every setting comes from that folder's own configuration and is read back from the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models.loaders import CheckpointInfo

from launch.config import TrainConfig, load_config
from launch.configuration.model_checks import lora_settings
from launch.configuration.release_settings import read_ttt_section
from launch.configuration.unbuilt import refuse_unbuilt
from launch.errors import UserError
from launch.run_checkpoints import choose_checkpoint, undamaged
from launch.setup import attention_windows, model_dtypes, ttt_placement
from parallel.checkpoint import list_checkpoints, load_weights
from parallel.mesh import Mesh
from parallel.parallelize import ParallelPlan, parallelize
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import (
    TTTPlacement,
    build_model,
    is_ttt_parameter,
    lm_settings,
    transformer_layers,
)
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
    set_attention_contexts,
)
from ttt_dist.moshi.lm_config import absent_settings, lm_config_problems, wrong_values
from ttt_dist.moshi.lora import LoRASettings
from ttt_dist.moshi.release import open_release, released_ttt
from ttt_dist.moshi.released_lora import ReleasedAdapters, released_adapters
from ttt_dist.moshi.weights import load_base_weights

CHECKPOINT_HELP = "a run folder, one of its checkpoints, or a release folder (launch/export.py)"


@dataclass(frozen=True)
class ModelSource:
    """What a model is built and filled from.

    Attributes:
        release: Moshi's configuration, Mimi and the tokenizer.
        checkpoint: of a run, with all weights; None where the release's own are taken.
        merged: adapters of the release, merged when its weights are loaded.
        ttt: where TTT is; None for a model without.
        windows: arguments of `set_attention_contexts`.
        lora: the run's adapters, which stay beside the weights that they adapt.
        compute: dtype of all parameters but the TTT layers' own, which are float32 at least.
        device: that the model talks on.
    """

    release: CheckpointInfo
    checkpoint: Path | None
    merged: ReleasedAdapters | None
    ttt: TTTPlacement | None
    windows: Mapping[str, int | None]
    lora: LoRASettings | None
    compute: torch.dtype
    device: torch.device


def find_checkpoint(
    folder: Path, step: int | None, *, read: bool = True
) -> tuple[Path, Path | None]:
    """The run folder and its checkpoint, or a release folder and None, that a person names.

    Args:
        read: as `run_checkpoints.undamaged` has it.

    Raises:
        UserError: `folder` is none of these, or has no such step.
    """
    if not folder.is_dir():
        raise UserError(f"CHECKPOINT: {folder} is no folder; allowed: {CHECKPOINT_HELP}")
    run, chosen = folder, None
    if not (run / "config.yaml").is_file() and folder in list_checkpoints(folder.parent):
        run, chosen = folder.parents[1], folder
    if not (run / "config.yaml").is_file():
        if (run / "config.json").is_file():
            if step is not None:
                raise UserError(f"--step: found {step}, but CHECKPOINT is a release folder: {run}")
            return run, None
        raise UserError(
            f"CHECKPOINT: {run} holds no config.yaml and no config.json; allowed: {CHECKPOINT_HELP}"
        )
    if chosen is not None:
        if step is not None:
            raise UserError(f"--step: found {step}, but CHECKPOINT names {chosen.name} already")
        return run, undamaged(chosen, named="CHECKPOINT", read=read)
    return run, choose_checkpoint(run, step, named="CHECKPOINT", read=read)


def open_source(folder: Path, checkpoint: Path | None, device: torch.device) -> ModelSource:
    """What `find_checkpoint` has found, its configuration read and checked; no weight is read.

    Raises:
        UserError, ReleaseError: what a person has to mend.
    """
    if checkpoint is None:
        return release_source(open_release(str(folder)), device)
    config = run_config(folder)
    release = open_release(**config.moshi_paths.model_dump())
    problems = refuse_unbuilt(config) + _talking_problems(release)
    if config.ttt.enable and not config.ttt.causal:
        problems.append(
            f"{folder / 'config.yaml'}: ttt.causal: found false; a model that looks ahead "
            "can't stream; allowed: true"
        )
    if problems:
        raise UserError(problems)
    ttt, windows = ttt_placement(config, release.lm_config), attention_windows(config)
    compute = model_dtypes(config, device)[1]
    adapters = lora_settings(config)
    return ModelSource(release, checkpoint, None, ttt, windows, adapters, compute, device)


def release_source(release: CheckpointInfo, device: torch.device) -> ModelSource:
    """What a release says of itself; UserError where it can't be built, or can't talk."""
    problems = _talking_problems(release)
    if problems:
        raise UserError(problems)
    ttt, windows = read_ttt_section(released_ttt(release), lm_settings(release.lm_config))
    merged = released_adapters(release)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    return ModelSource(release, None, merged, ttt, windows, None, compute, device)


def load_model(source: ModelSource, mesh: Mesh | None = None) -> TTTMoshi:
    """The model in eval mode, in the dtypes that training computes in.

    Args:
        mesh: lay it over these ranks, which call it together; None: it is whole on its device.

    Raises:
        CheckpointError, ReleaseError: the weights are damaged or aren't this model's.
    """
    master = torch.promote_types(source.compute, torch.float32)
    model = build_model(source.release.lm_config, source.ttt, source.lora, dtype=master)
    model.eval().requires_grad_(False)
    set_attention_contexts(model, **source.windows)
    for name, parameter in model.named_parameters():
        # As FSDP2 gathers them: TTT layers in their master dtype, all else for computing.
        if ".ttt.layer." not in name:
            parameter.data = parameter.data.to(source.compute)
    if mesh is not None:
        plan = ParallelPlan(source.compute, reduce_dtype=master, recompute="none")
        parallelize(model, mesh, plan)
    model.to_empty(device=source.device)
    if source.checkpoint is not None:
        load_weights(source.checkpoint, model, alone=mesh is None)
    else:
        loaded = load_base_weights(model, Path(source.release.moshi_weights), source.merged)
        wanted = {name for name, _ in model.named_parameters() if is_ttt_parameter(name)}
        if not wanted <= loaded:
            raise RuntimeError(f"never loaded: {', '.join(sorted(wanted - loaded))}")
    return model


def describe_model(source: ModelSource, model: TTTMoshi) -> list[str]:
    """Windows and TTT settings as the modules have them, in training's words, a line each.

    Raises:
        RuntimeError: they aren't those of the configuration.
    """
    contexts = read_attention_contexts(model)
    layers = () if source.ttt is None else source.ttt.layers
    check_attention_contexts(contexts, ttt_layers=layers, **source.windows)
    lines = [f"attention context: {describe_attention_contexts(contexts)}"]
    for index, layer in enumerate(transformer_layers(model)):
        if layer.ttt is None:
            continue
        inner = layer.ttt.layer
        found = inner.config
        if source.ttt is None or found != source.ttt.layer:
            raise RuntimeError(f"layer {index}: TTT is {found}, configured {source.ttt}")
        shapes = ", ".join(
            f"{name} {list(value.shape)}"
            for name, value in inner.named_parameters()
            if name[0] in "Wb" and name[1:].isdigit()
        )
        gate = layer.ttt.alpha.float().tanh().abs().mean().item()
        lines.append(
            f"layer {index}: TTT-{found.inner_model}, {shapes}; mini-batches of "
            f"{found.mini_batch_size}, base_lr {found.base_lr:g}, inner_eps {found.inner_eps:g}; "
            f"mean gate {gate:.4f}"
        )
    if len(lines) == 1:
        lines.append("no TTT layers: stock Moshi")
    return lines


def run_config(folder: Path) -> TrainConfig:
    """The configuration that a run wrote; UserError names its file."""
    path = folder / "config.yaml"
    try:
        return load_config(path)
    except UserError as error:
        raise UserError([f"{path}: {problem}" for problem in error.problems]) from error


def _talking_problems(release: CheckpointInfo) -> list[str]:
    """Why a release's model can't be built, or can't hold a conversation, a line each."""
    settings = lm_settings(release.lm_config)
    problems = lm_config_problems(settings)
    if wrong_values(settings):
        return problems
    problems += absent_settings(settings)
    if settings.get("context") is None:
        problems.append(
            "config.json: context: found none; streaming needs a number of frames that attention "
            "sees"
        )
    delay = max(settings["delays"])
    if delay > 1:
        problems.append(
            f"config.json: delays: found up to {delay} frames; a conversation here is made for 0 "
            "and 1, Moshi's own, and would lose its last frames"
        )
    return problems
