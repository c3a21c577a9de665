"""Attention windows: set, then read back from the modules that compute with them."""

from __future__ import annotations

from collections import Counter

from moshi.models.lm import LMModel

from ttt_dist.moshi.build import transformer_layers


def set_attention_contexts(
    model: LMModel, *, ttt_context: int | None, other_context: int | None
) -> None:
    """Set how many frames attention sees (itself included), by kind of layer.

    Args:
        ttt_context: for layers with TTT; None keeps the release's.
        other_context: for the other layers of the main transformer; None keeps the release's.
            The Depformer attends within one frame and is left alone.
    """
    for layer in transformer_layers(model):
        context = other_context if layer.ttt is None else ttt_context
        if context is not None:
            layer.self_attn.context = context


def read_attention_contexts(model: LMModel) -> list[tuple[bool, int | None]]:
    """`(has TTT, frames that attention sees)` of each layer, as the modules have it."""
    return [(layer.ttt is not None, layer.self_attn.context) for layer in transformer_layers(model)]


def describe_attention_contexts(contexts: list[tuple[bool, int | None]]) -> str:
    """One line, e.g. `TTT layers=50 (3 layers), other layers=100 (29 layers)`."""
    parts = []
    for kind, has_ttt in (("TTT layers", True), ("other layers", False)):
        counts = Counter(context for ttt, context in contexts if ttt is has_ttt)
        parts += [
            f"{kind}={'unlimited' if context is None else context} "
            f"({number} layer{'' if number == 1 else 's'})"
            for context, number in counts.items()
        ]
    return ", ".join(parts)


def check_attention_contexts(
    contexts: list[tuple[bool, int | None]],
    *,
    ttt_layers: tuple[int, ...],
    ttt_context: int | None,
    other_context: int | None,
) -> None:
    """Raise RuntimeError where the model's windows or TTT layers aren't the configured ones."""
    problems = []
    found = tuple(index for index, (has_ttt, _) in enumerate(contexts) if has_ttt)
    if found != tuple(ttt_layers):
        problems.append(f"TTT was configured for layers {ttt_layers}, the model has it in {found}")
    for index, (has_ttt, context) in enumerate(contexts):
        wanted = ttt_context if has_ttt else other_context
        if wanted is not None and context != wanted:
            problems.append(f"layer {index}: attention context is {context}, configured {wanted}")
    if problems:
        raise RuntimeError("the model isn't what the configuration says: " + "; ".join(problems))
