"""FSDP2 over Moshi: which module is a unit, on which mesh, in which dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from parallel.mesh import Mesh
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers


def apply_fsdp(
    model: TTTMoshi,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    prefetch_layers: int,
) -> None:
    """Shard every parameter: each layer a unit, the rest (embeddings, heads) the root's.

    | unit | mesh | computes in |
    |---|---|---|
    | TTT layer | dp_shard, heads being split over tp | its master dtype |
    | Moshi's layers, with α | dp_shard, heads and features being split over tp | `compute_dtype` |
    | Depformer's layers; root: embeddings, last norms, heads | dp_shard × tp | `compute_dtype` |

    TTT layers keep their master dtype when gathered: the inner weights, norms and learning rate
    start a float32 recurrence, and the layer itself casts its projections to the input's dtype. A
    layer's norms and α are the same on all tp ranks, which compute the same gradients for them.

    Args:
        compute_dtype: dtype of Moshi's gathered weights and activations.
        reduce_dtype: dtype in which gradients are summed over ranks.
        reshard_after_forward: free gathered weights between forward and backward.
        prefetch_layers: layers whose gathering starts before the layer ahead of them computes;
            0 leaves it to FSDP2, which then gathers one ahead, as late as the host allows.
    """
    backbone = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=True
    )
    ttt = MixedPrecisionPolicy(
        param_dtype=None, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for layer in transformer_layers(model):
        if layer.ttt is not None:
            _shard(layer.ttt.layer, mesh.fsdp, ttt, reshard_after_forward)
        _shard(layer, mesh.fsdp, backbone, reshard_after_forward)
    for layer in depformer_layers(model):
        _shard(layer, mesh.fsdp_tp, backbone, reshard_after_forward)
    # The root's weights are needed last in the forward and first in the backward.
    _shard(model, mesh.fsdp_tp, backbone, False)
    # Training enters here; FSDP2 gathers the root's weights for `forward` unless told.
    register_fsdp_forward_method(model, "step_losses")
    _prefetch(model, prefetch_layers)


def _prefetch(model: TTTMoshi, ahead: int) -> None:
    """Let each layer gather the next `ahead` ones early, in the backward those before it.

    TTT layers are left to FSDP2: a comparison without them (`build.without_ttt`) skips their
    forward, and weights gathered for a forward that never comes would lie around.
    """
    if ahead == 0:
        return
    layers = [_unit(layer) for layer in transformer_layers(model) + depformer_layers(model)]
    _unit(model).set_modules_to_forward_prefetch(layers[:ahead])
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(index - ahead, 0) : index][::-1])


def reduce_gradients_after(model: nn.Module, *, last: bool, every_microbatch: bool) -> None:
    """Say what the next backward does with its gradients, where FSDP2 shards `model`.

    Gradients of a step's earlier microbatches stay whole on each rank (in the reduction's dtype)
    and are reduced once, with the last one's. `every_microbatch` reduces them to shards each time:
    as much traffic more, and no whole gradients between microbatches; only the sum over
    `dp_replicate`, of shards, still waits for the last.

    Args:
        model: a plain model takes part without any of this.
        last: the step's last microbatch comes next.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(last or every_microbatch)
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)


def whole_gradient_bytes(model: nn.Module, reduce_dtype: torch.dtype) -> int:
    """Bytes of a rank's gradients while they wait for a step's last microbatch, as
    `reduce_gradients_after` has it: cut by tp alone.

    Args:
        reduce_dtype: in which they are kept.
    """
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return reduce_dtype.itemsize * sum(p.numel() // _parts_on_tp(p) for p in trained)


def _parts_on_tp(parameter: nn.Parameter) -> int:
    """How many parts tensor parallelism has cut a parameter into; tp divides what it cuts."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    axes = zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True)
    return math.prod(n for axis, n, where in axes if axis == "tp" and isinstance(where, Shard))


def _unit(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)  # `fully_shard` has changed its class
    return module


def _shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool
) -> None:
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=reshard,
        shard_placement_fn=_shard_dim(mesh.size(mesh.ndim - 1)),
    )


def _shard_dim(ranks: int) -> Callable[[nn.Parameter], Shard]:
    """Choose the dim that FSDP2 cuts: one that divides evenly and isn't tp's, the largest such.

    Cutting tp's dim again makes a strided shard, and FSDP2's default, dim 0, leaves ranks with
    nothing where it is short: `alpha [1, 1, D]` of Moshi's norms would lie whole on rank 0.
    """

    def choose(parameter: nn.Parameter) -> Shard:
        taken: set[int] = set()
        if isinstance(parameter, DTensor):
            taken = {p.dim for p in parameter.placements if isinstance(p, Shard)}
        even = [dim for dim, size in enumerate(parameter.shape) if size % ranks == 0]
        free = [dim for dim in even if dim not in taken]
        if not free:
            # Only dim 0 may be cut unevenly; by-head vectors have no other dim than tp's.
            return Shard(0)
        return Shard(max(free, key=lambda dim: (parameter.shape[dim], -dim)))

    return choose
