"""From a checked configuration to a model and the state of an earlier start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moshi.models.loaders import CheckpointInfo
from torch import Tensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

from launch.config import TrainConfig, utc_timestamp
from launch.configuration.model_checks import configured_ttt, lora_settings
from launch.errors import UserError
from launch.feeding.batch_plan import backwards_per_step
from launch.reporting.parameter_table import parameter_table
from launch.run_checkpoints import other_data_problems
from launch.run_folder import RunFolder
from parallel.checkpoint import Progress, list_checkpoints, load_checkpoint
from parallel.checkpoint_manifest import content_problems
from parallel.checkpoint_metadata import CheckpointError
from parallel.fsdp import whole_gradient_bytes
from parallel.mesh import Mesh
from parallel.parallelize import ParallelPlan, parallelize
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import (
    TTTPlacement,
    build_model,
    freeze_base,
    is_ttt_parameter,
    lm_settings,
    select_layers,
)
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
    set_attention_contexts,
)
from ttt_dist.moshi.released_lora import released_adapters
from ttt_dist.moshi.weights import init_adapters, init_ttt_weights, load_base_weights
from ttt_dist.ops import describe_scan

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def say(line: str) -> None:
    """Print a line of the start or the end of a run, once."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def make_model(
    config: TrainConfig, release: CheckpointInfo, mesh: Mesh, device: torch.device
) -> TTTMoshi:
    """Build on the meta device, lay over the ranks, fill shard by shard; then report what is."""
    master, compute = model_dtypes(config, device)
    model = lay_out_model(config, release.lm_config, mesh, compute)
    model.to_empty(device=device)
    adapters = released_adapters(release)
    loaded = load_base_weights(model, Path(release.moshi_weights), adapters)
    initialised = init_ttt_weights(model, config.seed, loaded)
    adapted = init_adapters(model, config.seed, loaded)
    model.train()

    contexts = read_attention_contexts(model)
    placement = ttt_placement(config, release.lm_config)
    layers = placement.layers if placement is not None else ()
    check_attention_contexts(contexts, ttt_layers=layers, **attention_windows(config))
    say(f"attention context: {describe_attention_contexts(contexts)}")
    several = backwards_per_step(config, mesh.dp_size) > 1
    wait = several and not config.parallel.reduce_every_microbatch
    say("\n".join(parameter_table(model, whole_gradient_bytes(model, master) if wait else 0)))
    loaded_ttt = {name for name in loaded if is_ttt_parameter(name)}
    if loaded_ttt:
        say(f"TTT weights: {len(loaded_ttt)} tensors from the release")
    if placement is not None:
        depth = len(placement.layer.inner_widths) - 1
        say(f"scan: {describe_scan(depth, device, compute)}")
    if layers and initialised == 0 and not loaded_ttt:
        raise RuntimeError("TTT is enabled, but no TTT parameter was initialised or loaded")
    if adapters is not None:
        done = "go on training" if config.lora.enable else "merged into the weights"
        say(f"adapters of the release, {adapters.path}: {done}")
    if config.lora.enable and adapted == 0 and loaded == loaded_ttt:
        raise RuntimeError("LoRA is enabled, but no adapter was initialised or loaded")
    say(f"compute in {str(compute).removeprefix('torch.')}, master weights in {str(master)[6:]}")
    return model


def lay_out_model(
    config: TrainConfig,
    lm_config: dict[str, Any] | None,
    mesh: Mesh | None,
    compute: torch.dtype,
) -> TTTMoshi:
    """The configured model on the meta device, laid over `mesh`; None leaves it whole."""
    master = torch.promote_types(compute, torch.float32)
    model = build_model(
        lm_config, ttt_placement(config, lm_config), lora_settings(config), dtype=master
    )
    set_attention_contexts(model, **attention_windows(config))
    if not config.full_finetuning:
        train_embeddings = config.lora.enable and config.lora.ft_embed
        freeze_base(model, compute, train_embeddings=train_embeddings)
    if mesh is not None:
        plan = ParallelPlan(
            compute_dtype=compute,
            reduce_dtype=master,
            recompute=config.parallel.recompute if config.gradient_checkpointing else "none",
            compile=config.compile,
            reshard_after_forward=config.parallel.reshard_after_forward,
            prefetch_layers=config.parallel.prefetch_layers,
        )
        parallelize(model, mesh, plan)
    return model


def attention_windows(config: TrainConfig) -> dict[str, int | None]:
    """Arguments of `set_attention_contexts`; without TTT the release's windows stay."""
    if not config.ttt.enable:
        return {"ttt_context": None, "other_context": None}
    return {
        "ttt_context": config.ttt.ttt_layer_context,
        "other_context": config.ttt.non_ttt_layer_context,
    }


def ttt_placement(config: TrainConfig, lm_config: dict[str, Any] | None) -> TTTPlacement | None:
    """Where the configuration puts TTT in a release's model; None where it is off."""
    if not config.ttt.enable:
        return None
    settings = lm_settings(lm_config)
    return TTTPlacement(
        layer=configured_ttt(config.ttt, settings),
        layers=select_layers(config.ttt.layers, settings["num_layers"]),
        initial_alpha=config.ttt.initial_gating_alpha,
    )


def device_warnings(config: TrainConfig, device: torch.device) -> list[str]:
    """A CPU where a GPU may be meant."""
    if config.device != "auto" or device.type != "cpu" or torch.version.cuda is None:
        return []
    return [
        "device: auto is the CPU here: no GPU is visible, though torch is built for CUDA "
        f"{torch.version.cuda}; check the driver and CUDA_VISIBLE_DEVICES, or set device=cpu"
    ]


def model_dtypes(config: TrainConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of master weights (at least float32) and of computation."""
    name = config.param_dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    compute = DTYPES[name]
    return torch.promote_types(compute, torch.float32), compute


def resume(
    folder: RunFolder,
    model: TTTMoshi,
    optimizers: OptimizersContainer,
    schedule: LRSchedulersContainer,
    sources: list[dict[str, Any]],
    carried: Mapping[str, Tensor],
) -> Progress | None:
    """Load the newest good checkpoint of the run; newer ones, which are damaged, are set aside.

    All ranks call it together; `carried` is filled as `load_checkpoint` fills it.

    Args:
        sources: `order_facts` of this start's training data.

    Returns:
        Where the run stands; None where it ended before its first checkpoint.

    Raises:
        CheckpointError: none is good, or it does not fit the model.
        UserError: it was made with other training data.
    """
    checkpoints = list_checkpoints(folder.checkpoints)
    if not checkpoints:
        say(f"{folder.checkpoints} holds no checkpoint yet: this run starts from step 0")
        return None
    damaged: dict[Path, list[str]] = {}
    for path in reversed(checkpoints):
        problems = content_problems(path)
        if not problems:
            break
        damaged[path] = problems
    else:
        found = " | ".join(f"{path.name}: {'; '.join(why)}" for path, why in damaged.items())
        raise CheckpointError(
            f"resume: none of the checkpoints in {folder.checkpoints} is good ({found}); nothing "
            "starts anew over them: restore one, or start a new run in another run_dir"
        )
    saved = load_checkpoint(path, model, optimizers, schedule, carried)
    if not saved.sources:
        say(f"warning: {path} doesn't say what data it was made with, so that isn't checked")
    elif problems := other_data_problems(saved.sources, sources):
        raise UserError(problems)
    for bad, problems in damaged.items():
        # Its name is wanted again, when this run comes to that step.
        aside = bad.with_name(f"damaged-{bad.name}-{utc_timestamp()}")
        say(f"warning: {bad} is damaged ({'; '.join(problems)}); it is now {aside.name}")
        if dist.get_rank() == 0:
            bad.rename(aside)
    for pattern, why in ((".saving-*", "never finished"), (".removing-*", "being removed")):
        for left in sorted(folder.checkpoints.glob(pattern)):
            say(f"warning: {left} was {why}, and isn't used; you may delete it")
    say(f"resumed after step {saved.step} from {path}")
    return saved
