"""A release folder with TTT, as `launch/export.py` writes them, without a run before it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ttt_dist.config import TTTConfig
from ttt_dist.moshi.build import TTTPlacement, build_model, is_ttt_parameter
from ttt_dist.moshi.packed import stock_state_dict
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.released_ttt import SECTION, describe_ttt
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

LAYERS = (1, 2)
WINDOWS = {"ttt_context": 10, "other_context": 12}


def write_ttt_release(base: Path, out: Path) -> Path:
    """`base` with TTT in its middle layers: mini-batches of 8, open gates, weights that matter."""
    release = open_release(str(base))
    layer = TTTConfig(model_dim=128, num_heads=8, mini_batch_size=8, base_lr=2.0)
    model = build_model(release.lm_config, TTTPlacement(layer, LAYERS, 0.3), device="cpu")
    load_base_weights(model, Path(release.moshi_weights))
    init_ttt_weights(model, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ttt.layer." in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
            elif not is_ttt_parameter(name) and "norm" not in name:
                value.mul_(2.0)  # as released, its likeliest tokens hardly depend on what it hears
    out.mkdir()
    for path in base.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            shutil.copyfile(path, out / path.name)
    tensors = {name: value.contiguous() for name, value in stock_state_dict(model).items()}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config[SECTION] = describe_ttt(layer, LAYERS, **WINDOWS)
    (out / "config.json").write_text(json.dumps(config))
    return out
