"""Compilation of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers

# Compiled versions of one part of a layer: for each length of pieces, with and without gradients,
# of the parameters or of what comes in, in the transformer and in the Depformer. torch gives up
# at 8, in the middle of a run. Guards of as many are checked in microseconds.
_VERSIONS = 128

# Activation checkpointing keeps the scan's results without the compiler's knowing: it must write
# nothing else into their memory once it has no more use for them itself.
_LEAVE_RESULTS_ALONE = {"inplace_buffers": False, "allow_buffer_reuse": False}


def compile_layers(model: TTTMoshi) -> int:
    """Compile every transformer and Depformer layer by itself; returns their number.

    A graph break is an error, not a silent return to eager execution. Layers of one kind share
    their compiled code; the scan stays one operator in it. A TTT layer whose inner MLP has three
    layers or more stays eager: its scan is a Python loop over all mini-batches, which a compiler
    would unroll. In all others the scan's own elementwise code is compiled too.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    layers = transformer_layers(model) + depformer_layers(model)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    for layer in layers:
        if layer.ttt is None:
            layer.wrap_parts(backbone=compiled, ttt=_eager)
            continue
        compilable = layer.ttt.layer.config.scan_is_operator
        with_scan = partial(compiled, options=_LEAVE_RESULTS_ALONE) if compilable else _eager
        layer.wrap_parts(backbone=compiled, ttt=with_scan)
        layer.ttt.layer.compiled = compilable
    return len(layers)


def _eager(part: Callable[..., Any]) -> Callable[..., Any]:
    return part
