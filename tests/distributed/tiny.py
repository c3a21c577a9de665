"""A Moshi of every structural feature and few features wide, for tests over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from safetensors.torch import save_file

from ttt_dist.config import TTTConfig
from ttt_dist.moshi.build import TTTPlacement

LM_CONFIG = {
    "dim": 32,
    "text_card": 40,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": 24,
    "num_heads": 4,
    "num_layers": 4,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 3000,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 24,
    "depformer_dim_feedforward": 99,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}
# Over ranks: as many heads as tp 4 x fsdp 2 has ranks.
WIDE_LM_CONFIG = LM_CONFIG | {"dim": 64, "num_heads": 8}
TTT_LAYERS = (1, 2)
TTT_CONTEXT, OTHER_CONTEXT = 5, 7
FRAMES = 29  # three mini-batches of 8 and a remainder of 5; no multiple of 2 or 4 ranks


def ttt_placement(
    inner_model: str = "mlp",
    alpha: float = 0.3,
    lm_config: dict[str, Any] = LM_CONFIG,
    mlp_layers: int = 2,
) -> TTTPlacement:
    """TTT in the two middle layers; mini-batches of 8, groups of 2 so that checkpoints matter."""
    layer = TTTConfig(
        model_dim=lm_config["dim"],
        num_heads=lm_config["num_heads"],
        inner_model=inner_model,
        mlp_layers=mlp_layers,
        mini_batch_size=8,
        base_lr=2.0,
        checkpoint_group_size=2,
    )
    return TTTPlacement(layer=layer, layers=TTT_LAYERS, initial_alpha=alpha)


def stock_model(
    dtype: torch.dtype = torch.float32, lm_config: dict[str, Any] = LM_CONFIG
) -> LMModel:
    """moshi's own model with fixed random weights (and norms that aren't all one)."""
    torch.manual_seed(1)
    model = LMModel(device="cpu", dtype=torch.float32, **lm_config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.2 * torch.randn_like(value))
    return model.to(dtype)


def save_release_weights(
    path: Path, lm_config: dict[str, Any] = LM_CONFIG, stock: LMModel | None = None
) -> None:
    """`model.safetensors` as a release has it: attention packed over the Depformer's steps.

    Args:
        stock: whose weights; None for those of `stock_model(lm_config)`.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, list[torch.Tensor]] = {}
    for name, value in (stock or stock_model(lm_config=lm_config)).state_dict().items():
        if ".in_projs." in name:
            packed.setdefault(name.split(".in_projs.")[0] + ".in_proj_weight", []).append(value)
        elif ".out_projs." in name:
            packed.setdefault(name.split(".out_projs.")[0] + ".out_proj.weight", []).append(value)
        else:
            tensors[name] = value
    tensors |= {name: torch.cat(values) for name, values in packed.items()}
    save_file(tensors, path)


def random_codes(samples: int, frames: int, seed: int = 0) -> torch.Tensor:
    """int64 `[samples, 17, frames]`; text mostly padding, the last sample ends in padded frames."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, LM_CONFIG["card"], (samples, 17, frames), generator=generator)
    text = torch.randint(0, LM_CONFIG["text_card"], (samples, frames), generator=generator)
    silent = torch.rand(samples, frames, generator=generator) < 0.6
    codes[:, 0] = torch.where(silent, 3, text)
    codes[-1, :, -frames // 4 :] = -1
    return codes
