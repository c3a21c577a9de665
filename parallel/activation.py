"""Activation checkpointing of whole layers."""

from __future__ import annotations

from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers


def checkpoint_layers(model: TTTMoshi) -> int:
    """Recompute every transformer and Depformer layer in the backward; returns their number.

    Inside a TTT layer the scan has checkpoints of its own (`checkpoint_group_size`).
    """
    layers = transformer_layers(model) + depformer_layers(model)
    for layer in layers:
        layer.checkpoint_activations = True
    return len(layers)
