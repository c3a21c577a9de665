"""What trains: parameters by part of the model, and this rank's bytes, read back from the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.tensor import DTensor

from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.lora import is_adapter_parameter

PARTS = ("TTT layers", "LoRA adapters", "transformer", "Depformer", "embeddings, heads")
MOMENTS = 2  # AdamW keeps two, in the parameter's dtype


def part_of(name: str) -> str:
    """The part of the model that a parameter's full name belongs to."""
    if is_ttt_parameter(name):
        return PARTS[0]
    if is_adapter_parameter(name):
        return PARTS[1]
    if name.startswith("transformer."):
        return PARTS[2]
    return PARTS[3] if name.startswith("depformer") else PARTS[4]


def parameter_table(model: nn.Module, whole_gradients: int = 0) -> list[str]:
    """Lines of a table: parameters, trained ones, and what a rank keeps for them.

    Args:
        model: materialised and laid over ranks; bytes are those of this rank's shards.
        whole_gradients: bytes of gradients that wait for a step's last microbatch
            (`parallel.fsdp.whole_gradient_bytes`); 0: none do.
    """
    rows = {part: [0] * 5 for part in PARTS}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held = local.numel() * local.element_size()
        trained = parameter.requires_grad
        row = rows[part_of(name)]
        row[0] += parameter.numel()
        row[1] += parameter.numel() * trained
        row[2] += held
        row[3] += held * trained
        row[4] += MOMENTS * held * trained
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    head = ["", "parameters", "trained", "weights", "gradients", "moments"]
    cells = [[part, *(f"{n:,}" for n in row)] for part, row in rows.items() if row[0]]
    table = ["on a rank, in bytes:".rjust(_width([head, *cells])), *_columns([head, *cells])]
    if whole_gradients > rows["all"][3]:
        table.append(
            f"until a step's last microbatch gradients are kept whole: {whole_gradients:,} bytes "
            "on a rank (parallel.reduce_every_microbatch: true keeps shards)"
        )
    return table


def _widths(table: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _width(table: list[list[str]]) -> int:
    return sum(_widths(table)) + 2 * (len(table[0]) - 1)


def _columns(table: Iterable[list[str]]) -> list[str]:
    rows = list(table)
    widths = _widths(rows)
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
