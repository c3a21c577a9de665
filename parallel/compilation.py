"""Compilation of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers


def compile_layers(model: TTTMoshi) -> int:
    """Compile every transformer and Depformer layer by itself; returns their number.

    A graph break is an error, not a silent return to eager execution. Layers of one kind share
    their compiled code; the scan stays one operator in it. A TTT layer whose inner MLP has three
    layers or more stays eager: its scan is a Python loop over all mini-batches, which a compiler
    would unroll. In all others the scan's own elementwise code is compiled too.
    """
    layers = transformer_layers(model) + depformer_layers(model)
    for layer in layers:
        compiled = partial(torch.compile, fullgraph=True, dynamic=False)
        if layer.ttt is None:
            layer.wrap_parts(backbone=compiled, ttt=compiled)
            continue
        compilable = layer.ttt.layer.config.scan_is_operator
        layer.wrap_parts(backbone=compiled, ttt=compiled if compilable else _eager)
        layer.ttt.layer.compiled = compilable
    return len(layers)


def _eager(part: Callable[..., Any]) -> Callable[..., Any]:
    return part
