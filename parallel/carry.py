"""What lanes carry from piece to piece, over ranks: allocated on each, saved as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.mesh import Mesh
from ttt_dist.moshi.attention import AttentionWindow
from ttt_dist.moshi.block import HybridStreamingTransformerLayer, TTTMoshi
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.carry import Carry, LayerCarry

_PREFIX = "carry."


def empty_carry(
    model: TTTMoshi, lanes: int, mesh: Mesh, *, dtype: torch.dtype, device: torch.device
) -> Carry:
    """Zeros for lanes whose recordings all begin, of this rank's own heads.

    Args:
        lanes: of this rank.
        dtype: of computation, which keys and values have; inner weights have the master's.

    Raises:
        ValueError: a layer's attention reaches back without end.
    """

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(lanes, *shape, dtype=dtype, device=device)

    def layer_carry(layer: HybridStreamingTransformerLayer) -> LayerCarry:
        # tp has left this rank's own heads to the module.
        window = AttentionWindow.empty(layer.self_attn, lanes, device=device, dtype=dtype)
        if layer.ttt is None:
            return LayerCarry(window, None)
        config = layer.ttt.layer.config
        heads = config.num_heads // mesh.shape["tp"]
        inner_dtype = torch.promote_types(dtype, torch.float32)
        inner = []
        for rows, columns in pairwise(config.inner_widths):
            inner.append(zeros(heads, rows, columns, dtype=inner_dtype))
            inner.append(zeros(heads, 1, columns, dtype=inner_dtype))
        return LayerCarry(window, tuple(inner))

    return Carry(tuple(layer_carry(layer) for layer in transformer_layers(model)))


def carry_tensors(carry: Carry, mesh: Mesh) -> dict[str, Tensor]:
    """All lanes of the run by name, from each rank's own: lanes over dp, heads over tp.

    The DTensors are views: what is loaded into them is in `carry`.
    """
    return {f"{_PREFIX}{name}": lane_tensor(t, mesh) for name, t in carry.tensors().items()}


def own_carry(tensors: Mapping[str, Tensor], like: Carry) -> Carry:
    """This rank's lanes and heads of what `carry_tensors` gave, shaped as `like`."""
    named = {name.removeprefix(_PREFIX): own_lanes(value) for name, value in tensors.items()}
    return like.with_tensors(named)


def own_lanes(value: Tensor) -> Tensor:
    """This rank's part of a `lane_tensor`."""
    assert isinstance(value, DTensor)
    return value.to_local()


def lane_tensor(value: Tensor, mesh: Mesh) -> DTensor:
    """All lanes of the run, from own `[lanes, heads, …]`, or `[lanes]` that tp ranks have alike."""
    by_lane: list[Placement] = [Shard(0)] * mesh.lanes.ndim
    if mesh.tp is not None:
        by_lane[-1] = Shard(1) if value.ndim > 1 else Replicate()
    return DTensor.from_local(value, mesh.lanes, by_lane, run_check=False)
