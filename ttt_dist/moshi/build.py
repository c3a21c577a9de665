"""Building Moshi with TTT layers from a release's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs as MOSHI_7B_LM_CONFIG

from ttt_dist.config import TTTConfig
from ttt_dist.moshi.block import HybridStreamingTransformerLayer, TTTBlock, TTTMoshi
from ttt_dist.moshi.float32_norm import replace_float32_norms
from ttt_dist.moshi.lm_config import NOT_BUILT, lm_config_problems
from ttt_dist.moshi.lora import LoRASettings, add_adapters, is_adapter_parameter


@dataclass(frozen=True)
class TTTPlacement:
    """Which layers carry TTT, and what is put into them.

    Args:
        layer: the TTT layer's hyperparameters.
        layers: indices of Moshi's layers that get one (see `select_layers`).
        initial_alpha: initial value of every element of the gate `alpha`.
    """

    layer: TTTConfig
    layers: tuple[int, ...]
    initial_alpha: float


def select_layers(spec: str | Iterable[int], num_layers: int) -> tuple[int, ...]:
    """Layer indices that a `ttt.layers` value names, in increasing order.

    Args:
        spec: `"none"`, `"all"`, `"middle"` (the middle half), indices as `"29,30,31"`, or a list.
        num_layers: layers of the model.

    Raises:
        ValueError: no layer matched (but for `"none"`), an index is out of range or named twice,
            or the text is none of the above; the message lists the valid range.
    """
    valid = f"allowed are 'none', 'all', 'middle' or indices from 0 to {num_layers - 1}, each once"
    if isinstance(spec, str):
        word = spec.strip().lower()
        if word == "none":
            return ()
        if word == "all":
            return tuple(range(num_layers))
        if word == "middle":
            quarter = num_layers // 4
            return tuple(range(quarter, num_layers - quarter))
        try:
            indices = [int(part) for part in word.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"found {spec!r}; {valid}") from None
    else:
        indices = list(spec)
    if not indices:
        raise ValueError(f"found {spec!r}, which names no layer; {valid}")
    outside = [index for index in indices if not 0 <= index < num_layers]
    if outside:
        raise ValueError(f"found {spec!r}: {outside} lie outside the model; {valid}")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise ValueError(f"found {spec!r}: {twice} stand there twice; {valid}")
    return tuple(sorted(indices))


def lm_settings(lm_config: dict[str, Any] | None) -> dict[str, Any]:
    """A release's configuration of the language model; None means Moshi 7B's, as in moshi."""
    return dict(MOSHI_7B_LM_CONFIG if lm_config is None else lm_config)


def build_model(
    lm_config: dict[str, Any] | None,
    ttt: TTTPlacement | None,
    lora: LoRASettings | None = None,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> TTTMoshi:
    """Moshi's language model of hybrid layers, with TTT where `ttt` says.

    Args:
        lm_config: the release's `lm_config`; None means Moshi 7B's, as in moshi.
        ttt: None leaves Moshi as it is.
        lora: adapters of all linear layers of Moshi's; None for none.
        device: "meta" allocates nothing; fill with `weights.load_base_weights`,
            `weights.init_ttt_weights` and `weights.init_adapters`.
        dtype: of all parameters (the master weights).

    Raises:
        ValueError: the configuration holds something that is not supported (`lm_config.py`).
    """
    config = lm_settings(lm_config)
    problems = lm_config_problems(config)
    if problems:
        raise ValueError("; ".join(problems))
    kwargs = {key: value for key, value in config.items() if key not in NOT_BUILT}
    with torch.device(device):  # moshi leaves some of its layers to the default device
        model = TTTMoshi(
            device=device,
            dtype=dtype,
            layer_class=HybridStreamingTransformerLayer,
            depformer_layer_class=HybridStreamingTransformerLayer,
            **kwargs,
        )
    replace_float32_norms(model)
    if lora is not None:
        add_adapters(model, lora, dtype)
    if ttt is not None:
        layers = transformer_layers(model)
        for index in ttt.layers:
            layers[index].add_ttt(
                TTTBlock(ttt.layer, ttt.initial_alpha, device=device, dtype=dtype)
            )
    return model


def transformer_layers(model: LMModel) -> list[HybridStreamingTransformerLayer]:
    """The layers of the main transformer, first to last."""
    return cast("list[HybridStreamingTransformerLayer]", list(model.transformer.layers))


def depformer_layers(model: LMModel) -> list[HybridStreamingTransformerLayer]:
    """The Depformer's layers, first to last; none for a model without Depformer."""
    if model.depformer is None:
        return []
    return cast("list[HybridStreamingTransformerLayer]", list(model.depformer.layers))


def freeze_base(model: TTTMoshi, dtype: torch.dtype, *, train_embeddings: bool = False) -> None:
    """Train TTT and adapters alone: Moshi's own parameters get no gradient, kept in `dtype`.

    Call it on the meta device, before the model is sharded.

    Args:
        train_embeddings: train the parameters with "emb" in their names too, as moshi-finetune
            chooses them (`lora.ft_embed`).
    """
    for name, parameter in model.named_parameters():
        added = is_ttt_parameter(name) or is_adapter_parameter(name)
        if not (added or (train_embeddings and "emb" in name)):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)


@contextmanager
def without_ttt(model: LMModel) -> Iterator[None]:
    """Inside, TTT blocks pass their input on, which is what a gate of α = 0 does.

    Streams that begin inside stay without TTT until they end.

    Raises:
        RuntimeError: the model is streaming: steps may be recorded, and replay what they did.
    """
    layers = [layer for layer in transformer_layers(model) if layer.ttt is not None]
    if any(layer.is_streaming for layer in layers):
        raise RuntimeError("the model is streaming; enter without_ttt before the stream begins")
    for layer in layers:
        layer.skip_ttt = True
    try:
        yield
    finally:
        for layer in layers:
            layer.skip_ttt = False


def is_ttt_parameter(name: str) -> bool:
    """Whether a parameter's full name belongs to a TTT block (and not to Moshi)."""
    return ".ttt." in name
