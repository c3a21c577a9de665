"""Looking on while a model reads: what its TTT layers' inner loops are given and make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers
from ttt_dist.reading import Reading

Probe = Callable[[int, Reading], None]


@contextmanager
def probing(model: TTTMoshi, probe: Probe) -> Iterator[None]:
    """Inside, every call of a TTT layer calls `probe(layer's index, reading)` as well.

    For forwards without gradients: activation checkpointing would call it again in the backward.
    Layers run without compilation inside. A layer's probe is called while its parameters are
    gathered, on all ranks in the same order, so it may use collectives.

    Raises:
        RuntimeError: gradients are on, or the model is probed already.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("probing is for forwards without gradients; use torch.no_grad()")
    with ExitStack() as stack:
        for layer in depformer_layers(model):
            stack.enter_context(layer.unwrapped())
        for index, layer in enumerate(transformer_layers(model)):
            stack.enter_context(layer.unwrapped())
            if layer.ttt is not None:
                stack.enter_context(_probed(layer.ttt.layer, partial(probe, index)))
        yield


@contextmanager
def _probed(layer: TTTLayer, probe: Callable[[Reading], None]) -> Iterator[None]:
    if layer.probe is not None:
        raise RuntimeError("the model is probed already")
    layer.probe = probe
    try:
        yield
    finally:
        layer.probe = None
