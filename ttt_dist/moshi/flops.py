"""Arithmetic of one training frame, for model FLOPs utilisation."""

from __future__ import annotations

from moshi.models.lm import LMModel
from torch import nn

from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.packed import packed_parameters

# State-sized products of a frame's inner step, forward: K W, Q W and the update of every inner
# layer, and the gradient through all but the first: 3 for TTT-Linear, 7 for two layers (TTT.md).
_PRODUCTS, _FIRST_PRODUCTS = 4, 3


def flops_per_frame(model: LMModel, frames: int) -> float:
    """Floating-point operations of forward and backward for one frame of one sample.

    Twice the weights of every matrix that a frame meets, attention over its window, and the inner
    steps; the backward counts twice the forward. Recomputation is not counted, as usual for MFU.

    Args:
        model: on any device, sharded or not.
        frames: `T` of a sample.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    packed = packed_parameters(model)
    weights = sum(
        value.numel()
        for name, value in model.named_parameters()
        if (value.ndim == 2 or name in packed)
        and id(value) not in embeddings
        and "ttt_norm" not in name
    )
    operations = 2.0 * weights
    for layer in transformer_layers(model):
        seen = _frames_seen(frames, layer.self_attn.context)
        operations += 4 * model.dim * seen  # scores and values
        if layer.ttt is not None:
            first, *others = layer.ttt.layer.inner_parameters()[::2]
            operations += 2 * _FIRST_PRODUCTS * first.numel()
            operations += 2 * _PRODUCTS * sum(W.numel() for W in others)
    return 3 * operations


def _frames_seen(frames: int, context: int | None) -> float:
    """Frames that attention sees on average: frame t sees `min(t, context)`, itself included."""
    window = frames if context is None else min(frames, context)
    return window - window * (window - 1) / (2 * frames)
