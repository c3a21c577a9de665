"""The configured TTT layers and adapters: what is built of them, and why a Moshi may not fit."""

from collections.abc import Mapping
from typing import Any

from launch.config import TrainConfig
from launch.configuration.schema import TTTSection
from ttt_dist.config import TTTConfig
from ttt_dist.moshi.build import select_layers
from ttt_dist.moshi.lm_config import absent_settings, lm_config_problems, wrong_values
from ttt_dist.moshi.lora import LoRASettings
from ttt_dist.moshi.released_ttt import build_ttt_config, describe_ttt


def configured_ttt(section: TTTSection, lm_config: Mapping[str, Any]) -> TTTConfig:
    """The configured TTT layer for a model with `lm_config`; ValueError where the two don't fit."""
    group_size = section.checkpoint_group_size
    return build_ttt_config(section.model_dump(), lm_config, checkpoint_group_size=group_size)


def lora_settings(config: TrainConfig) -> LoRASettings | None:
    """The configured adapters; None where LoRA is off."""
    lora = config.lora
    return LoRASettings(lora.rank, lora.scaling) if lora.enable else None


def ttt_section(config: TrainConfig, lm_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `config.json` says of the configured TTT layers in an export; None where there are none.

    Raises:
        ValueError: the configuration doesn't fit a model with `lm_config`.
    """
    layers = select_layers(config.ttt.layers, lm_config["num_layers"]) if config.ttt.enable else ()
    if not layers:
        return None
    window = lm_config.get("context")  # of layers whose own isn't set
    return describe_ttt(
        configured_ttt(config.ttt, lm_config),
        layers,
        ttt_context=config.ttt.ttt_layer_context or window,
        other_context=config.ttt.non_ttt_layer_context or window,
    )


def model_problems(
    config: TrainConfig, lm_config: Mapping[str, Any], bad_keys: frozenset[str]
) -> list[str]:
    """Why this model, with TTT layers as configured, can't be built or split over tp.

    Args:
        lm_config: the release's settings of Moshi's language model.
        bad_keys: keys that hold a default in place of a mistake told already; nothing is concluded
            from them.
    """
    problems = lm_config_problems(lm_config)
    if wrong_values(lm_config):
        return problems
    if absent := absent_settings(lm_config):
        return problems + absent
    if "parallel.tp" not in bad_keys:
        problems += splitting_problems(lm_config, config.parallel.tp, named="parallel.tp")
    if not config.ttt.enable:
        return problems
    if config.ttt.persistent_states and "ttt.persistent_states" not in bad_keys:
        problems += _carrying_problems(config.ttt, lm_config)
    if "ttt.layers" not in bad_keys:
        try:
            select_layers(config.ttt.layers, lm_config["num_layers"])
        except ValueError as error:
            problems.append(f"ttt.layers: {error}")
    try:
        configured_ttt(config.ttt, lm_config)
    except ValueError as error:
        problems.append(f"ttt: doesn't fit this model: {error}")
    return problems


def _carrying_problems(section: TTTSection, lm_config: Mapping[str, Any]) -> list[str]:
    """Why this model's attention can't go on from one piece to the next."""
    problems = piecewise_problems(lm_config, named="ttt.persistent_states: found true, but")
    if lm_config.get("context") is not None:
        return problems
    windows = {
        "ttt.ttt_layer_context": section.ttt_layer_context,
        "ttt.non_ttt_layer_context": section.non_ttt_layer_context,
    }
    return problems + [
        f"{key}: found null, and the release has no window either; with ttt.persistent_states "
        "allowed are frames from 1 on"
        for key, window in windows.items()
        if window is None
    ]


def piecewise_problems(lm_config: Mapping[str, Any], *, named: str) -> list[str]:
    """Why attention, however long its windows, can't go on from one piece to the next.

    Args:
        named: how messages begin: what asks for it.
    """
    problems = []
    positions = lm_config.get("positional_embedding", "sin")
    if positions not in ("rope", "none"):
        problems.append(
            f"{named} the release has positional_embedding = {positions}, positions that begin "
            "again with each piece; allowed: rope, none"
        )
    if lm_config.get("kv_repeat", 1) != 1:
        problems.append(
            f"{named} the release has kv_repeat = {lm_config['kv_repeat']}, and such attention "
            "keeps no window of earlier pieces yet; allowed: 1"
        )
    return problems


def splitting_problems(lm_config: Mapping[str, Any], tp: int, *, named: str) -> list[str]:
    """Why tp, which a person calls `named`, can't split a model's heads and features."""
    if tp == 1:
        return []
    heads = lm_config["num_heads"]
    if heads % tp != 0:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        return [
            f"{named}: found {tp}, which doesn't divide the model's {heads} heads; "
            f"allowed: {', '.join(map(str, divisors))}"
        ]
    problems = []
    if lm_config.get("kv_repeat", 1) != 1:
        problems.append(
            f"{named}: found {tp}, but the release has kv_repeat = "
            f"{lm_config['kv_repeat']}, and such attention isn't split over ranks yet; allowed: 1"
        )
    if lm_config.get("gating", "none") == "none":
        problems.append(
            f"{named}: found {tp}, but the release's feed-forward has no gating, and such a "
            "one isn't split over ranks yet; allowed: 1"
        )
    width = int(lm_config.get("hidden_scale", 4) * lm_config["dim"])
    # The width that moshi's ActivationGating makes of it.
    features = 21 * lm_config["dim"] // 8 if width == 4 * lm_config["dim"] else 2 * width // 3
    if features % tp:
        problems.append(
            f"{named}: found {tp}, which doesn't divide the {features} features of the model's "
            "feed-forward; allowed are divisors of heads and features"
        )
    return problems
