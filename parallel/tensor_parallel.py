"""Tensor parallelism: which parameter of a TTT layer lies how on the tp axis.

Heads are split over the axis. A TTT layer then gets its input as a replicated DTensor, computes on
its own heads, and gives a plain output that is the same on all ranks of the axis (`layer.py` says
where it communicates).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.placement import BY_HEAD, BY_INPUT, REPLICATED

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
    "W1": BY_HEAD,
    "b1": BY_HEAD,
    "W2": BY_HEAD,
    "b2": BY_HEAD,
    "post_norm.weight": BY_HEAD,
    "post_norm.bias": BY_HEAD,
    "wo.weight": BY_INPUT,
    "wo.bias": REPLICATED,
}


def apply_tensor_parallel(model: TTTMoshi, mesh: DeviceMesh) -> int:
    """Split the heads of every TTT layer over `mesh` (one axis, named tp).

    Returns:
        The number of layers split.

    Raises:
        ValueError: the axis does not divide the heads.
    """
    layers = [layer.ttt.layer for layer in transformer_layers(model) if layer.ttt is not None]
    for layer in layers:
        split_heads(layer, mesh)
    return len(layers)


def split_heads(layer: TTTLayer, mesh: DeviceMesh) -> None:
    """Make `layer`'s parameters DTensors on `mesh` and its input a replicated one."""
    heads = layer.config.num_heads
    if heads % mesh.size():
        raise ValueError(
            f"parallel.tp: found {mesh.size()}, allowed are divisors of the {heads} TTT heads"
        )
    for name, parameter in list(layer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        # src_data_rank=None: every rank cuts its part from its own full copy (or from the meta
        # device); initial values do not depend on the rank.
        placed = distribute_tensor(parameter, mesh, TTT_PLACEMENTS[name], src_data_rank=None)
        setattr(
            layer.get_submodule(owner),
            leaf,
            nn.Parameter(placed, requires_grad=parameter.requires_grad),
        )

    def replicate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return (DTensor.from_local(x, mesh, REPLICATED, run_check=False), *args[1:])

    layer.register_forward_pre_hook(replicate_input)
