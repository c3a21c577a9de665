"""Adapters of a release: the keys of its `config.json` that tell of them, moshi's own.

A release is LoRA-adapted where `lora` is true: `lora.safetensors`, or the file that `lora_name`
names, holds adapters of every linear layer, beside other tensors that stand in place of the base's
(embeddings that were trained too, TTT layers). moshi-finetune leaves such a file beside such a
`config.json`, and `launch/export.py --adapters-only` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi.models.loaders import CheckpointInfo

from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.lora import LoRASettings

ADAPTERS_FILE = "lora.safetensors"
ADAPTER_KEYS = ("lora", "lora_rank", "lora_scaling", "lora_name")
# What moshi's loader takes where config.json doesn't say.
_RANK, _SCALING = 128, 2.0


@dataclass(frozen=True)
class ReleasedAdapters:
    """Adapters that a release holds beside its base.

    Args:
        path: of their `.safetensors` file.
        settings: rank and scaling that they were trained with.
    """

    path: Path
    settings: LoRASettings


def describe_adapters(settings: LoRASettings) -> dict[str, Any]:
    """The keys of a `config.json` beside which `lora.safetensors` stands."""
    values = (True, settings.rank, settings.scaling, ADAPTERS_FILE)
    return dict(zip(ADAPTER_KEYS, values, strict=True))


def released_adapters(release: CheckpointInfo) -> ReleasedAdapters | None:
    """The adapters of a release that `open_release` opened; None where it has none.

    Raises:
        ReleaseError: `config.json` tells of adapters that aren't there, or the other way round, or
            its rank or scaling is no such number.
    """
    config = release.raw_config or {}
    if not config.get("lora"):
        if release.lora_weights is not None:
            raise ReleaseError(
                f"config.json: lora: found {config.get('lora')!r}, but lora_name gives adapters, "
                f"{release.lora_weights}; set lora to true, or leave lora_name out"
            )
        return None
    if release.lora_weights is None:
        raise ReleaseError(
            f"config.json: lora: found true, but no adapters: neither lora_name nor a file "
            f"{ADAPTERS_FILE} beside config.json; add them, or, where they are merged into the "
            "weights, set lora to false"
        )
    rank, scaling = config.get("lora_rank", _RANK), config.get("lora_scaling", _SCALING)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ReleaseError(f"config.json: lora_rank: found {rank!r}, allowed are whole numbers > 0")
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        raise ReleaseError(f"config.json: lora_scaling: found {scaling!r}, allowed are numbers")
    return ReleasedAdapters(Path(release.lora_weights), LoRASettings(rank, float(scaling)))


def adapter_differences(
    released: ReleasedAdapters | None, configured: LoRASettings | None
) -> list[str]:
    """Where a run's adapters aren't those that it would go on from, a line each.

    Args:
        released: the release's; without any, all is free.
        configured: the run's; without any, the release's are merged into the weights.
    """
    if released is None or configured is None:
        return []
    return [
        f"lora.{key}: found {found!r}, but the release has adapters with {wanted!r}, which a run "
        f"with lora.enable goes on training; allowed: lora.{key}={wanted!r}, or "
        "lora.enable=false, which merges them into the weights"
        for key, found, wanted in (
            ("rank", configured.rank, released.settings.rank),
            ("scaling", configured.scaling, released.settings.scaling),
        )
        if found != wanted
    ]
