"""The small twin of a configuration that `verify` trains: settings, weights and codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn

from launch.config import TrainConfig, parse_command_line, read_config
from launch.configuration.preflight import HUB_ID, check_run, resolve_mesh
from launch.errors import UserError
from launch.feeding.batch_plan import length_stages, resolve_global_batch_size
from launch.make_demo_base import DEFAULT_OUT
from launch.make_demo_base import lm_config as demo_lm_config
from launch.setup import lay_out_model
from parallel.mesh import Mesh
from ttt_dist.data.interleave import num_frames
from ttt_dist.layer import initial_value
from ttt_dist.moshi.block import TTTBlock, TTTMoshi
from ttt_dist.moshi.build import (
    is_ttt_parameter,
    lm_settings,
    select_layers,
)
from ttt_dist.moshi.errors import ReleaseError, read_json_object
from ttt_dist.moshi.loss import LossConfig
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.weights import fill_own, seeded_generator
from ttt_dist.placement import shard_slices

LAYERS, HEADS, HEAD_DIM = 4, 8, 8
FRAMES = 37  # odd, and no multiple of the mini-batch: four of 8 and 5 frames more
MINI_BATCH, GROUP = 8, 2  # at most; groups of two mini-batches, so that there are several
RANK = 6  # of LoRA, at most: well below the widths
LORA_SHARE = 0.2  # of the adapters in a layer's output, the frozen weights giving 1
LEAST_ALPHA = 0.3  # TTT's gate; nearly closed, it would hide TTT's gradients in rounding
_BATCH_KEYS = ("batch_size", "num_microbatches", "global_batch_size")
LR = 1e-3  # large enough for a wrong update to stand out after few steps


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        config: the configuration with its small numbers.
        lm_config: Moshi's settings, shrunk.
        samples: of a step, over all ranks.
    """

    config: TrainConfig
    lm_config: dict[str, Any]
    samples: int

    def codes(self, step: int) -> Tensor:
        """int64 `[samples, K, FRAMES]`: text mostly padding, odd samples end in padded frames."""
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + step)
        settings, size = self.lm_config, (self.samples, FRAMES)
        rows = [torch.randint(0, settings["text_card"], size, generator=generator)]
        for _ in range(settings["n_q"]):
            rows.append(torch.randint(0, settings["card"], size, generator=generator))
        silent = torch.rand(size, generator=generator) < 0.6
        rows[0] = rows[0].masked_fill(silent, settings["existing_text_padding_id"])
        codes = torch.stack(rows, dim=1)
        for index in range(1, self.samples, 2):
            codes[index, :, FRAMES - 2 - index % (FRAMES // 2) :] = -1
        return codes


def read_case(arguments: Sequence[str], *, world_size: int, local_world_size: int) -> Case:
    """Check the command line as train.py does, but for data and run folder, and shrink it.

    Raises:
        UserError: with every problem found.
    """
    reading = read_config(*parse_command_line(arguments))
    # What a run would write, and an earlier run's checkpoints, are no matter here.
    config = reading.config.model_copy(update={"resume": False, "do_eval": False})
    problems = [text for text in reading.problems if not text.startswith("run_dir:")]
    not_needed = {"run_dir", "data.train_data", "data.eval_data"}
    lm_config, release_problem = None, None
    try:
        lm_config = read_lm_config(config)
    except ReleaseError as error:
        release_problem = str(error)
    problems += check_run(
        config,
        world_size=world_size,
        lm_config=lm_config,
        release_problem=release_problem,
        bad_keys=reading.bad_keys | not_needed,
        local_world_size=local_world_size,
        check_files=False,
    )
    dp_size = 1
    if reading.bad_keys.isdisjoint(_BATCH_KEYS) and not any(
        problem.startswith("parallel") for problem in problems
    ):
        replicate, shard, _ = resolve_mesh(config, world_size)
        dp_size = replicate * shard
        try:
            resolve_global_batch_size(config, dp_size)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems, title="Can't verify this configuration")
    return shrink(config, lm_settings(lm_config), dp_size)


def read_lm_config(config: TrainConfig) -> dict[str, Any] | None:
    """The release's `lm_config`, without fetching weights; None means Moshi 7B's.

    Raises:
        ReleaseError: a local release is incomplete, or the hub can't be reached.
    """
    paths = config.moshi_paths
    name = paths.hf_repo_id or ""
    if paths.config_path is not None:
        config_path = Path(paths.config_path).expanduser()
    elif Path(name) == DEFAULT_OUT:
        return demo_lm_config()  # the demo's base may not have been made yet
    elif HUB_ID.fullmatch(name) is None or Path(name).is_dir():
        return open_release(**paths.model_dump()).lm_config
    else:
        try:
            config_path = Path(hf_hub_download(name, "config.json"))
        except LocalEntryNotFoundError as error:
            raise ReleaseError(_unreachable(name, error)) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise ReleaseError(_unreachable(name, error)) from error
    read_json_object(config_path)
    # moshi's own parsing. It would fetch the files that the configuration names, so each is given
    # one that is there; none is opened but Mimi's configuration, which has to be JSON.
    files = ("moshi_weights", "mimi_weights", "tokenizer", "lora_weights", "mimi_config_path")
    given = dict.fromkeys(files, config_path)
    return CheckpointInfo.from_hf_repo(name, config_path=config_path, **given).lm_config


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"moshi_paths.hf_repo_id: cannot fetch config.json of {name!r}: "
        f"{(str(error).strip() or repr(error)).splitlines()[0]}; check the name and the network, "
        "or give a local folder in the release layout"
    )


def shrink(config: TrainConfig, settings: dict[str, Any], dp_size: int) -> Case:
    """The small twin: every flag stays, widths, layers, vocabularies and lengths don't."""
    frames = num_frames(max(length_stages(config).values()))
    scaled = partial(_scaled_window, frames=frames)
    section = config.ttt
    ttt = section.model_copy(
        update={
            "layers": ",".join(map(str, _small_layers(config, settings["num_layers"]))) or "none",
            "mini_batch_size": min(section.mini_batch_size, MINI_BATCH),
            "checkpoint_group_size": min(section.checkpoint_group_size or GROUP, GROUP),
            "ttt_layer_context": scaled(section.ttt_layer_context, least=3),
            "non_ttt_layer_context": scaled(section.non_ttt_layer_context, least=4),
            "initial_gating_alpha": math.copysign(
                max(abs(section.initial_gating_alpha), LEAST_ALPHA), section.initial_gating_alpha
            ),
        }
    )
    ratio = 1.0 if config.optim.ttt_lr is None else config.optim.ttt_lr / config.optim.lr
    optim = config.optim.model_copy(
        update={"lr": LR, "ttt_lr": LR * min(max(ratio, 0.1), 10.0) if ratio != 1.0 else None}
    )
    batch_size = min(config.batch_size, 2)
    samples = 2 * batch_size * dp_size  # two microbatches, so that gradients are accumulated
    small = config.model_copy(
        update={
            "ttt": ttt,
            "lora": config.lora.model_copy(update={"rank": min(config.lora.rank, RANK)}),
            "optim": optim,
            "batch_size": batch_size,
            "num_microbatches": 2,
            "global_batch_size": samples,
        }
    )
    lm_config = small_lm_config(settings, config.parallel.tp)
    lm_config["context"] = scaled(lm_config.get("context"), least=4)
    return Case(small, lm_config, samples)


def small_lm_config(settings: dict[str, Any], tp: int) -> dict[str, Any]:
    """`settings` of Moshi with few layers, heads of HEAD_DIM features and small vocabularies."""
    heads = settings["num_heads"]
    if heads > HEADS:
        unit = tp * settings.get("kv_repeat", 1)
        heads = math.ceil(HEADS / unit) * unit
    padding_ids = (
        settings.get("existing_text_padding_id", 3),
        settings.get("existing_text_end_padding_id", 0),
    )
    depformer_heads = min(settings.get("depformer_num_heads", 4), 4)
    small = settings | {
        "num_layers": LAYERS,
        "num_heads": heads,
        "dim": heads * HEAD_DIM,
        "text_card": max(min(settings.get("text_card", 32000), 95), *(i + 1 for i in padding_ids)),
        "existing_text_padding_id": padding_ids[0],
        "card": min(settings.get("card", 1024), 47),
        "n_q": settings.get("n_q", 8),
        "depformer_dim": depformer_heads * HEAD_DIM,
        "depformer_num_heads": depformer_heads,
        "depformer_num_layers": min(settings.get("depformer_num_layers", 2), 2),
    }
    width = settings.get("depformer_dim_feedforward")
    if width is not None:
        scale = small["depformer_dim"] / settings.get("depformer_dim", 256)
        widths = [round(w * scale) for w in (width if isinstance(width, list) else [width])]
        small["depformer_dim_feedforward"] = widths if isinstance(width, list) else widths[0]
    if settings.get("depformer_low_rank_embeddings"):
        small["depformer_low_rank_embeddings"] = 16
    if settings.get("text_card_out") is not None:
        small["text_card_out"] = small["text_card"]
    return small


def _small_layers(config: TrainConfig, num_layers: int) -> tuple[int, ...]:
    """TTT's layers in the small model: at about the same height, of both kinds if both exist."""
    if not config.ttt.enable:
        return ()
    chosen = select_layers(config.ttt.layers, num_layers)
    small = sorted({index * LAYERS // num_layers for index in chosen})
    if len(small) == LAYERS and len(chosen) < num_layers:
        small = small[1:]
    return tuple(small)


def _scaled_window(window: int | None, *, frames: int, least: int) -> int | None:
    """An attention window of pieces of `frames`, for FRAMES of them, and such that it binds."""
    if window is None:
        return None
    return max(least, min(FRAMES // 2, round(window * FRAMES / frames)))


def make_model(
    case: Case, compute: torch.dtype, mesh: Mesh | None, device: torch.device
) -> TTTMoshi:
    """As `launch.setup.make_model`, but with random weights; plain tensors where `mesh` is None."""
    model = lay_out_model(case.config, case.lm_config, mesh, compute)
    model.to_empty(device=device)
    fill_weights(model, case.config.seed)
    if mesh is None:
        # What FSDP2's mixed precision computes with: Moshi's weights, and TTT's gate.
        for name, parameter in model.named_parameters():
            if not is_ttt_parameter(name) or name.endswith(".ttt.alpha"):
                parameter.data = parameter.data.to(compute)
    model.train()
    return model


def loss_config(case: Case, model: TTTMoshi) -> LossConfig:
    """The configuration's weighting of positions."""
    return LossConfig.of_model(
        model,
        text_padding_weight=case.config.text_padding_weight,
        first_codebook_weight_multiplier=case.config.first_codebook_weight_multiplier,
    )


@torch.no_grad()
def fill_weights(model: nn.Module, seed: int) -> None:
    """Random weights that depend on the seed and a parameter's name alone; none is a plain 0 or 1.

    Each rank draws a whole parameter and keeps its part, so every layout starts alike.
    """
    alphas = {
        f"{name}.alpha": module.initial_alpha
        for name, module in model.named_modules()
        if isinstance(module, TTTBlock)
    }
    scalings = {
        f"{name}.lora_B.weight": module.scaling
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    for name, parameter in model.named_parameters():
        generator = seeded_generator(seed, name)
        noise = torch.randn(parameter.shape, generator=generator)
        if name in alphas:
            value = 0.05 * noise + alphas[name]
        elif is_ttt_parameter(name):
            value = torch.empty(parameter.shape)
            initial_value(name, value, generator)
            value += 0.02 * noise
        elif "norm" in name:
            value = 1.0 + 0.2 * noise if name.endswith(("alpha", "weight")) else 0.2 * noise
        elif parameter.dim() < 2:
            value = 0.2 * noise
        else:
            value = noise * parameter.shape[-1] ** -0.5
            if name in scalings:
                # Not 0, or lora_A had no gradient; and small, as training keeps it: adapters as
                # strong as the weights would make the whole model ill-conditioned.
                value *= LORA_SHARE / scalings[name]
        fill_own(parameter, value[shard_slices(parameter)])
