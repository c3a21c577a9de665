"""The `ttt` section of a release's `config.json`: what stock moshi lacks to build the same model.

Its keys are those of the run's YAML section `ttt` where that has one. Stock moshi hands keys that
it doesn't know to its layers, which refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt_dist.config import TTTConfig

SECTION = "ttt"
# Keys of a `ttt` section, in a run's YAML and here alike, and what they set in `TTTConfig`.
_MLP_FIELDS = {"ttt_mlp_layers": "mlp_layers", "ttt_mlp_expansion_factor": "expansion"}
_FIELDS = {
    "inner_model": "inner_model",
    **_MLP_FIELDS,
    "mini_batch_size": "mini_batch_size",
    "base_lr": "base_lr",
    "inner_eps": "inner_eps",
    "causal": "causal",
}


def build_ttt_config(
    section: Mapping[str, Any], lm_config: Mapping[str, Any], **others: Any
) -> TTTConfig:
    """The TTT layer that a section describes, for a model with `lm_config`'s dim and heads.

    Args:
        section: with all keys of `_FIELDS`; others are not looked at.
        others: fields of `TTTConfig` that a section doesn't have under a name of its own.

    Raises:
        ValueError: they don't fit, for example an odd head dimension.
    """
    fields = {field: section[key] for key, field in _FIELDS.items()}
    return TTTConfig(
        model_dim=lm_config["dim"], num_heads=lm_config["num_heads"], **fields, **others
    )


def describe_ttt(
    layer: TTTConfig,
    layers: tuple[int, ...],
    *,
    ttt_context: int | None,
    other_context: int | None,
) -> dict[str, Any]:
    """The section of a model with TTT.

    Args:
        layer: the TTT layers' configuration.
        layers: indices of Moshi's layers that carry one.
        ttt_context, other_context: frames that attention sees in those layers and in the others of
            the main transformer; None is unlimited.
    """
    unused = () if layer.inner_model == "mlp" else _MLP_FIELDS
    return {
        "layers": list(layers),
        **{key: getattr(layer, field) for key, field in _FIELDS.items() if key not in unused},
        "rope_base": layer.rope_base,
        "ttt_layer_context": ttt_context,
        "non_ttt_layer_context": other_context,
    }


def ttt_differences(released: object, configured: Mapping[str, Any] | None) -> list[str]:
    """Where a run's TTT isn't that of the release that it starts from, a line each.

    Args:
        released: the `ttt` section of the release; None where it has none, so that all is free.
        configured: what the run's own configuration gives (`describe_ttt`); None without TTT.
    """
    if released is None:
        return []
    if not isinstance(released, dict):
        return [f"config.json: ttt: found {released!r:.80}; allowed is an object"]
    if configured is None:
        return [
            "ttt.enable: the release has TTT layers and this run leaves them out; allowed: "
            f"ttt.enable=true with ttt.layers={_layers(released.get('layers'))!r}, or a release "
            "without TTT (launch/export.py --base-only)"
        ]
    problems = []
    for key in [*configured, *sorted(set(released) - set(configured))]:
        if key in released and key in configured and released[key] == configured[key]:
            continue
        found, wanted = (
            (_layers(section[key]) if key == "layers" else section[key])
            if key in section
            else "nothing"
            for section in (configured, released)
        )
        problems.append(
            f"ttt.{key}: found {found!r}, but the release was trained with {wanted!r}; "
            "a run that starts from it keeps that"
        )
    return problems


def _layers(value: object) -> object:
    """As a person writes them in YAML: `1,2`."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
