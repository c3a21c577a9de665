"""TTT's part of a release's `config.json`, read back: the inverse of `describe_ttt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.errors import UserError
from ttt_dist.moshi.build import TTTPlacement, select_layers
from ttt_dist.moshi.released_ttt import SECTION, build_ttt_config, describe_ttt

_Window = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    """Types of the keys; their ranges are `TTTConfig`'s to check."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    layers: list[int]
    inner_model: Literal["mlp", "linear"]
    ttt_mlp_layers: int = 2
    ttt_mlp_expansion_factor: int = 4
    mini_batch_size: int
    base_lr: float
    inner_eps: float
    causal: bool
    rope_base: float
    ttt_layer_context: _Window
    non_ttt_layer_context: _Window


def read_ttt_section(
    section: object, lm_config: Mapping[str, Any]
) -> tuple[TTTPlacement | None, dict[str, int | None]]:
    """Where a release has TTT, and the arguments of `set_attention_contexts`.

    Args:
        section: `ttt` of `config.json`; None where it has none.
        lm_config: the release's settings of the language model.

    Raises:
        UserError: what of it isn't what `launch/export.py` writes, a line each.
    """
    if section is None:
        return None, {"ttt_context": None, "other_context": None}
    try:
        read = _Section.model_validate(section)
    except ValidationError as failure:
        raise UserError(
            [
                f"config.json: {'.'.join(map(str, (SECTION, *error['loc'])))}: found "
                f"{error['input']!r:.80}: {error['msg']}"
                for error in failure.errors(include_url=False)
            ]
        ) from failure
    windows = {"ttt_context": read.ttt_layer_context, "other_context": read.non_ttt_layer_context}
    try:
        layers = select_layers(read.layers, lm_config["num_layers"])
        config = build_ttt_config(read.model_dump(), lm_config, rope_base=read.rope_base)
    except ValueError as error:
        raise UserError(f"config.json: {SECTION}: {error}") from error
    problems = []
    if not config.causal:
        problems.append(
            f"config.json: {SECTION}.causal: found False; a model that looks ahead can't stream; "
            "allowed: true"
        )
    # Whatever would be passed over shows here: the section has to be the whole truth.
    found = read.model_dump(exclude_unset=True)
    allowed = describe_ttt(config, layers, **windows)
    problems += [
        f"config.json: {SECTION}.{key}: found {found.get(key, 'nothing')}, "
        f"allowed: {allowed.get(key, 'nothing')}"
        for key in sorted(found.keys() | allowed.keys())
        if found.get(key) != allowed.get(key)
    ]
    if problems:
        raise UserError(problems)
    # The gates are loaded, their initial value is of no account.
    return TTTPlacement(config, layers, initial_alpha=0.0), dict(windows)
