"""Tensor parallelism: which parameter of a hybrid layer lies how on the tp axis.

Heads and feed-forward features are split over the axis. Activations between the blocks are plain
tensors, the same on all its ranks: attention, TTT and feed-forward each enter their shards
(`placement.enter_shards`: one all-reduce of gradients) and sum what these give
(`placement.sum_shards`: one all-reduce in the forward).
"""

from __future__ import annotations

from moshi.modules.lora import LoRALinear
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor

from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.block import HybridStreamingTransformerLayer, TTTMoshi
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.lora import PackedLoRA
from ttt_dist.ops import MLP_LAYERS, weight_names
from ttt_dist.placement import BY_BLOCK_ROW, BY_HEAD, BY_INPUT, REPLICATED

# Of the deepest inner network; a layer has those that its depth asks for.
_INNER_WEIGHTS = weight_names(MLP_LAYERS[-1])

# Parameter of TTTLayer -> placement on the tp axis.
TTT_PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "wq.weight": BY_HEAD,
    "wq.bias": BY_HEAD,
    "wk.weight": BY_HEAD,
    "wk.bias": BY_HEAD,
    "wv.weight": BY_HEAD,
    "wv.bias": BY_HEAD,
    "learnable_ttt_lr_weight": BY_HEAD,
    "learnable_ttt_lr_bias": BY_HEAD,
    "ttt_norm_weight": BY_HEAD,
    "ttt_norm_bias": BY_HEAD,
    **dict.fromkeys(_INNER_WEIGHTS, BY_HEAD),
    "post_norm.weight": BY_HEAD,
    "post_norm.bias": BY_HEAD,
    "wo.weight": BY_INPUT,
    "wo.bias": REPLICATED,
}


# Parameter of one of Moshi's layers -> placement on the tp axis; its other parameters, the norms
# and the gate α, are whole on every rank.
LAYER_PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "self_attn.in_projs.0.weight": BY_BLOCK_ROW,  # [3, D, D]: q, k, v, each by head
    "self_attn.out_projs.0.weight": BY_INPUT,
    "gating.linear_in.weight": BY_BLOCK_ROW,  # [2, F, D]: both halves, by feature
    "gating.linear_out.weight": BY_INPUT,
}


def apply_tensor_parallel(model: TTTMoshi, mesh: DeviceMesh) -> None:
    """Split attention, feed-forward and TTT of every main layer over `mesh` (one axis, tp).

    Raises:
        ValueError: the axis does not divide heads or features, or a layer's weights are packed in a
            way that cannot be split.
    """
    for index, layer in enumerate(transformer_layers(model)):
        try:
            split_layer(layer, mesh)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def split_layer(layer: HybridStreamingTransformerLayer, mesh: DeviceMesh) -> None:
    """Split one hybrid layer; its forward then gives the same output on all ranks of the axis."""
    if not layer.splittable:
        raise ValueError(
            "parallel.tp: its attention (kv_repeat, cross-attention) or its feed-forward (no "
            "gating) cannot be split over ranks yet; allowed: tp = 1"
        )
    _distribute(layer, _layer_placements(layer), mesh)
    # What is left to a rank is attention over fewer heads.
    layer.self_attn.num_heads //= mesh.size()
    layer.self_attn.embed_dim //= mesh.size()
    if layer.ttt is not None:
        split_heads(layer.ttt.layer, mesh)


def _layer_placements(layer: HybridStreamingTransformerLayer) -> dict[str, tuple[Placement, ...]]:
    """`LAYER_PLACEMENTS`, with adapters where the layer has them.

    Of an adapter's two matrices the one next to the cut is cut alike, the other is whole.
    """
    placements = {}
    for name, placement in LAYER_PLACEMENTS.items():
        linear = name.removesuffix(".weight")
        adapted = layer.get_submodule(linear)
        if isinstance(adapted, LoRALinear):
            packed = isinstance(adapted, PackedLoRA)
            placements[f"{linear}.frozen_W.weight"] = placement
            placements[f"{linear}.lora_A.weight"] = REPLICATED if packed else placement
            placements[f"{linear}.lora_B.weight"] = placement if packed else REPLICATED
        else:
            placements[name] = placement
    return placements


def split_heads(layer: TTTLayer, mesh: DeviceMesh) -> None:
    """Split the heads of one TTT layer."""
    _distribute(layer, TTT_PLACEMENTS, mesh)


def _distribute(
    module: nn.Module, placements: dict[str, tuple[Placement, ...]], mesh: DeviceMesh
) -> None:
    parameters = {name: module.get_parameter(name) for name in placements if _has(module, name)}
    for name, parameter in parameters.items():
        for placement in placements[name]:
            if isinstance(placement, Shard) and parameter.shape[placement.dim] % mesh.size():
                raise ValueError(
                    f"parallel.tp: found {mesh.size()}, allowed are divisors of the "
                    f"{parameter.shape[placement.dim]} rows (dim {placement.dim}) of {name}"
                )
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        # src_data_rank=None: every rank cuts its part from its own full copy (or from the meta
        # device); initial values do not depend on the rank.
        placed = distribute_tensor(parameter, mesh, placements[name], src_data_rank=None)
        setattr(
            module.get_submodule(owner),
            leaf,
            nn.Parameter(placed, requires_grad=parameter.requires_grad),
        )


def _has(module: nn.Module, name: str) -> bool:
    """Inner networks are of many depths; every other name of a table must be there."""
    return name not in _INNER_WEIGHTS or name in dict(module.named_parameters(recurse=False))
