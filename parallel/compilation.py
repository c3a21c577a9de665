"""Compilation of layers."""

from __future__ import annotations

from functools import partial

import torch

from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers


def compile_layers(model: TTTMoshi) -> int:
    """Compile every transformer and Depformer layer by itself; returns their number.

    A graph break is an error, not a silent return to eager execution. Layers of one kind share
    their compiled code; the scan stays one operator in it.
    """
    layers = transformer_layers(model) + depformer_layers(model)
    for layer in layers:
        compiled = partial(torch.compile, fullgraph=True, dynamic=False)
        layer.wrap_parts(backbone=compiled, ttt=compiled)
    return len(layers)
