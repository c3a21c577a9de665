"""Arithmetic of one training frame, for model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from moshi.models.lm import LMModel
from moshi.models.lm_utils import ScaledEmbedding
from moshi.modules.gating import ActivationGating
from torch import nn

from ttt_dist.moshi.block import HybridStreamingTransformerLayer, TTTBlock
from ttt_dist.moshi.build import depformer_layers, transformer_layers
from ttt_dist.moshi.packed import packed_parameters

# State-sized products of a frame's inner step, forward: K W, Q W and the update of every inner
# layer, and the gradient through all but the first: 3 for TTT-Linear, 7 for two layers (TTT.md).
_PRODUCTS, _FIRST_PRODUCTS = 4, 3


def flops_per_frame(model: LMModel, frames: int) -> float:
    """Floating-point operations of forward and backward for one frame of one sample.

    Forward: twice the weights of every matrix that a frame meets, attention over its window, and
    the inner steps. The backward counts as much again for the gradient of a product's input, where
    something before it is trained, and for that of its weight, where it is trained: twice the
    forward where everything is. Recomputation is not counted, as usual for MFU.

    Args:
        model: on any device, sharded or not.
        frames: `T` of a sample.
    """
    count = _Count(model)
    count.embed([*model.emb, model.text_emb])
    for layer in transformer_layers(model):
        seen = _frames_seen(frames, layer.self_attn.context)
        count.layer(layer, attention=4 * model.dim * seen)  # scores and values
    count.multiply(model.out_norm)
    reached = count.reached
    count.multiply(model.text_linear)
    if model.depformer is not None:
        count.reached = reached
        count.multiply(*model.depformer_in)
        count.embed([*model.depformer_emb, model.depformer_text_emb])
        for layer in depformer_layers(model):
            count.layer(layer, attention=0.0)
        count.multiply(*model.depformer_norms)
        count.multiply(*model.linears)
    return count.operations


class _Count:
    """Operations of a frame, added up in the order of the forward.

    Attributes:
        operations: so far, those of the backward included.
        reached: whether gradients reach what was computed last: something up to it is trained.
    """

    def __init__(self, model: LMModel) -> None:
        self.operations = 0.0
        self.reached = False
        embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
        packed = packed_parameters(model)
        self._matrices = {
            id(value)
            for name, value in model.named_parameters()
            if (value.ndim == 2 or name in packed)
            and id(value) not in embeddings
            and "ttt_norm" not in name
        }

    def multiply(self, *modules: nn.Module) -> None:
        """Modules side by side, on what was computed last; each a matrix, adapted or not, or less
        (norms, scales)."""
        named = [pair for module in modules for pair in module.named_parameters()]
        self._meet(value for name, value in named if "lora_B" not in name)
        self._meet(value for name, value in named if "lora_B" in name)

    def embed(self, embeddings: Sequence[ScaledEmbedding]) -> None:
        """Embeddings, added to what was computed last."""
        before, self.reached = self.reached, False
        low_rank = [each.low_rank for each in embeddings if each.low_rank is not None]
        self._meet(each.weight for each in embeddings)
        self.multiply(*(each.norm for each in embeddings if each.norm is not None))
        self.multiply(*low_rank)
        self.reached |= before

    def layer(self, layer: HybridStreamingTransformerLayer, attention: float) -> None:
        """A layer whose forward takes `attention` operations for scores and values."""
        self.multiply(layer.norm1)
        self.multiply(*layer.self_attn.in_projs)
        self._combine(attention)
        self.multiply(*layer.self_attn.out_projs)
        self.multiply(layer.layer_scale_1)
        if layer.ttt is not None:
            self._read(layer.ttt)
        self.multiply(layer.norm2)
        for side_by_side in _feed_forward(layer):
            self.multiply(*side_by_side)
        self.multiply(layer.layer_scale_2)

    def _read(self, block: TTTBlock) -> None:
        after = ("post_norm.", "wo.")
        named = block.layer.named_parameters()
        self._meet(value for name, value in named if not name.startswith(after))
        first, *others = block.layer.inner_parameters()[::2]
        products = _FIRST_PRODUCTS * first.numel() + _PRODUCTS * sum(W.numel() for W in others)
        self._combine(2 * products)
        self.multiply(block.layer.post_norm)
        self.multiply(block.layer.wo)
        self._meet([block.alpha])

    def _meet(self, parameters: Iterable[nn.Parameter]) -> None:
        """Parameters side by side, each met by what was computed last."""
        trained = self.reached
        for value in parameters:
            if id(value) in self._matrices:
                self.operations += 2.0 * value.numel() * (1 + self.reached + value.requires_grad)
            trained |= value.requires_grad
        self.reached = trained

    def _combine(self, forward: float) -> None:
        """Products of two things that were computed."""
        self.operations += forward * (3 if self.reached else 1)


def _feed_forward(layer: HybridStreamingTransformerLayer) -> list[list[nn.Module]]:
    """The matrices on the way in, and those on the way out."""
    if layer.gating is None:
        return [[cast(nn.Module, layer.linear1)], [cast(nn.Module, layer.linear2)]]
    by_step = layer.gating if isinstance(layer.gating, nn.ModuleList) else [layer.gating]
    gatings = [cast(ActivationGating, gating) for gating in by_step]
    return [[each.linear_in for each in gatings], [each.linear_out for each in gatings]]


def _frames_seen(frames: int, context: int | None) -> float:
    """Frames that attention sees on average: frame t sees `min(t, context)`, itself included."""
    window = frames if context is None else min(frames, context)
    return window - window * (window - 1) / (2 * frames)
