"""What stands beside an export's tensors: its `config.json`, and the files that are copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moshi.models.loaders import CheckpointInfo

from ttt_dist.moshi.build import lm_settings
from ttt_dist.moshi.lora import LoRASettings
from ttt_dist.moshi.released_lora import ADAPTER_KEYS, describe_adapters
from ttt_dist.moshi.released_ttt import SECTION

MOSHI_FILE, MIMI_FILE = "model.safetensors", "mimi.safetensors"
MIMI_CONFIG_FILE = "mimi_config.json"


def copied_files(release: CheckpointInfo) -> dict[str, Path]:
    """Name in the folder to file: Mimi's weights and the tokenizer."""
    return {_mimi_name(release): release.mimi_weights, release.tokenizer.name: release.tokenizer}


def names_inside(release: CheckpointInfo) -> dict[str, str]:
    """Keys of `config.json` for the files of a folder that holds all of them."""
    names = {
        "moshi_name": MOSHI_FILE,
        "mimi_name": _mimi_name(release),
        "tokenizer_name": release.tokenizer.name,
    }
    if release.mimi_config is not None:
        names["mimi_config_name"] = MIMI_CONFIG_FILE
    return names


def release_config(
    release: CheckpointInfo,
    names: dict[str, str],
    *,
    section: dict[str, Any] | None,
    adapters: LoRASettings | None,
) -> dict[str, Any]:
    """The release's own `config.json` with other files.

    Args:
        names: keys of files (`names_inside`, or `release.names_elsewhere`).
        section: TTT's (`released_ttt.describe_ttt`); None without.
        adapters: those in the folder's `lora.safetensors`; None without.
    """
    raw = dict(lm_settings(None) if release.raw_config is None else release.raw_config)
    # Of the weights that this run began with.
    for key in ("model_id", "mimi_config_name", SECTION, *ADAPTER_KEYS):
        raw.pop(key, None)
    raw |= names
    if adapters is not None:
        raw |= describe_adapters(adapters)
    if section is not None:
        raw[SECTION] = section
    return raw


def _mimi_name(release: CheckpointInfo) -> str:
    name = release.mimi_weights.name
    return name if name != MOSHI_FILE else MIMI_FILE
