"""Which models of the Moshi family can be built and trained, told from a release's `config.json`.

moshi's own classes check little of it, and what they pass over shows late: a word where a number
belongs, as an error inside the first step; targets that no head can predict, not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer

# Models that this project doesn't train: (keys of which any holds something, what they are, why).
_REFUSED = (
    (("conditioners", "fuser"), "conditioned models", "no condition is read from training data"),
    (("quantize",), "quantised releases", "rounded weights can't be trained"),
    (("cross_attention",), "models with cross-attention", "nothing is read to attend to"),
    (
        ("demux_second_stream", "demux_second_text_stream"),
        "models of two text streams",
        "one is read from training data",
    ),
    (("extra_heads_num_heads",), "models with extra heads", "no loss here trains these"),
)
# Keys of a release's configuration that say nothing about the model that `build_model` builds:
# adapters are its own argument (`released_lora.py`).
NOT_BUILT = {"depformer_causal", "gradient_checkpointing", "lora", "lora_rank", "lora_scaling"} | {
    key for keys, _, _ in _REFUSED for key in keys
}
_FUSED_BY = ("sum", "cross", "prepend")

# Arguments of moshi's classes that moshi or this project computes: a release that names one would
# give it twice.
_NOT_SETTINGS = {"self", "args", "kwargs", "device", "dtype", "layer_class", "d_model", "rope"} | {
    "dim_feedforward",
    "checkpointing",
    "activation",
    "condition_provider",
}
_GATINGS = (
    *("none", "silu", "gelu", "relu", "leaky_relu", "elu", "mish", "softsign", "sigmoid", "tanh"),
    "identity",
)
_NORMS = ("layer_norm", "layer_norm_f32", "rms_norm", "rms_norm_f32")
_POSITIONS = ("none", "sin", "rope", "sin_rope", "rope_concat")


def _is_whole(least: int, *, optional: bool = False) -> Callable[[object], bool]:
    return lambda value: (
        (optional and value is None)
        or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _is_numbers(least: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(_is_whole(least), value))


# Allowed values of a setting, in words and as a check; those that aren't here moshi checks itself.
_KINDS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    (
        "whole numbers from 1 on",
        _is_whole(1),
        "dim num_heads num_layers n_q dep_q card text_card kv_repeat depformer_dim "
        "depformer_num_heads depformer_num_layers depformer_kv_repeat",
    ),
    (
        "whole numbers from 1 on, and null",
        _is_whole(1, optional=True),
        "context depformer_context text_card_out depformer_low_rank_embeddings",
    ),
    (
        "whole numbers from 0 on",
        _is_whole(0),
        "existing_text_padding_id existing_text_end_padding_id extra_heads_num_heads",
    ),
    ("numbers above 0", _is_number, "hidden_scale max_period depformer_max_period"),
    (
        "numbers above 0, and null",
        lambda value: value is None or _is_number(value),
        "layer_scale depformer_layer_scale",
    ),
    (
        "true and false",
        lambda value: isinstance(value, bool),
        "causal norm_emb bias_proj depformer_multi_linear depformer_weights_per_step",
    ),
    ("lists of whole numbers from 0 on", _is_numbers(0), "delays"),
    (
        "lists of whole numbers from 0 on, and null",
        lambda value: value is None or _is_numbers(0)(value),
        "depformer_weights_per_step_schedule",
    ),
    (
        "whole numbers from 1 on, lists of them, and null",
        lambda value: _is_whole(1, optional=True)(value) or _is_numbers(1)(value),
        "depformer_dim_feedforward",
    ),
    (", ".join(_GATINGS), lambda value: value in _GATINGS, "gating depformer_gating"),
    (", ".join(_NORMS), lambda value: value in _NORMS, "norm"),
    (
        "layer_norm, layer_norm_f32, null",  # the others can't take what training gives them
        lambda value: value in ("layer_norm", "layer_norm_f32", None),
        "depformer_norm",
    ),
    (
        ", ".join(_POSITIONS),
        lambda value: value in _POSITIONS,
        "positional_embedding depformer_pos_emb",
    ),
)


def lm_config_problems(lm_config: Mapping[str, Any]) -> list[str]:
    """Everything in a release's configuration that this project cannot build, a line each."""
    problems = [
        f"config.json: {', '.join(found)}: {what} are not supported yet: {why}; use a release "
        "without"
        for keys, what, why in _REFUSED
        if (found := [key for key in keys if _holds_something(key, lm_config.get(key))])
    ]
    known = _known_keys() | NOT_BUILT
    problems += [
        f"config.json: {key}: not a setting of moshi's language model"
        for key in sorted(set(lm_config) - known)
    ]
    wrong = wrong_values(lm_config)
    return problems + (wrong or [f"config.json: {line}" for line in _contradictions(lm_config)])


def absent_settings(lm_config: Mapping[str, Any]) -> list[str]:
    """In one line, the settings without which there is no telling what Moshi it is; or nothing."""
    absent = [key for key in ("dim", "num_heads", "num_layers") if key not in lm_config]
    if not absent:
        return []
    return [
        f"config.json: {', '.join(absent)}: not there, so it doesn't describe Moshi's language "
        "model; check moshi_paths.config_path, or use the release's own"
    ]


def wrong_values(lm_config: Mapping[str, Any]) -> list[str]:
    """Settings of another kind than theirs, a line each; with any, nothing else can be told."""
    return [
        f"config.json: {key}: found {lm_config[key]!r:.60}; allowed are {allowed}"
        for allowed, check, keys in _KINDS
        for key in keys.split()
        if key in lm_config and not check(lm_config[key])
    ]


def _holds_something(key: str, value: Any) -> bool:
    """Whether a release has a feature; a fuser that fuses nothing is none."""
    if key == "fuser" and isinstance(value, dict):
        return any(value.get(way) for way in _FUSED_BY)
    return bool(value)


def _contradictions(lm_config: Mapping[str, Any]) -> Iterable[str]:
    """Settings, each of them allowed, that don't go together or with the training data."""
    defaults = inspect.signature(LMModel.__init__).parameters

    def setting(key: str) -> Any:
        return lm_config.get(key, defaults[key].default)

    n_q, dep_q = setting("n_q"), setting("dep_q")
    if n_q != 2 * dep_q:
        yield (
            f"n_q, dep_q: found {n_q} and {dep_q}; allowed are n_q = 2 * dep_q: a recording's two "
            "channels give as many codebooks to hear as to speak"
        )
    if len(setting("delays")) != 1 + n_q:
        yield (
            f"delays: found {len(setting('delays'))} of them; allowed are {1 + n_q}, one for text "
            f"and one for each of n_q = {n_q} codebooks"
        )
    if not setting("causal"):
        yield "causal: found false; a model that sees later frames can't be trained to predict them"
    if setting("text_card_out") not in (None, setting("text_card")):
        yield (
            f"text_card_out: found {setting('text_card_out')}; allowed is text_card, "
            f"{setting('text_card')}: the text that is read has these tokens to predict"
        )
    schedule = setting("depformer_weights_per_step_schedule")
    if schedule is not None and (
        len(schedule) != dep_q or set(schedule) != set(range(max(schedule) + 1))
    ):
        yield (
            f"depformer_weights_per_step_schedule: found {schedule}; allowed are dep_q = {dep_q} "
            "numbers, from 0 to their largest without a gap"
        )
    sizes = setting("depformer_dim_feedforward")
    weights = max(schedule) + 1 if schedule else dep_q
    if isinstance(sizes, list) and len(sizes) != weights:
        yield (
            f"depformer_dim_feedforward: found {len(sizes)} sizes; allowed are {weights}, one for "
            "each of the Depformer's sets of weights, or one number for all"
        )
    heads = setting("num_heads")
    depformer_heads = lm_config.get("depformer_num_heads", heads)
    pairs = (("dim", "num_heads", heads), ("depformer_dim", "depformer_num_heads", depformer_heads))
    for size, name, number in pairs:
        if setting(size) % number:
            yield f"{size}: found {setting(size)}, which {name} = {number} doesn't divide"
    for name, number in (("kv_repeat", heads), ("depformer_kv_repeat", depformer_heads)):
        repeat = lm_config.get(name, lm_config.get("kv_repeat", 1))
        if number % repeat:
            yield f"{name}: found {repeat}, which doesn't divide {number} heads"


def _known_keys() -> set[str]:
    """Keyword arguments of a release that moshi's language model takes or hands on to layers."""
    layers: set[str] = set()
    for cls in (StreamingTransformer, StreamingTransformerLayer):
        layers |= set(inspect.signature(cls.__init__).parameters)
    layers -= _NOT_SETTINGS
    model = set(inspect.signature(LMModel.__init__).parameters) - _NOT_SETTINGS
    return model | layers | {f"depformer_{name}" for name in layers - {"causal", "quantize"}}
