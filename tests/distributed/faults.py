"""Mistakes that distributed training of this model invites, each planted on purpose.

A fault is a context: the sharded model is built and run inside, the unsharded one outside. The
comparison that passes without it has to fail with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import launch.step
import parallel.fsdp
import ttt_dist.layer
import ttt_dist.moshi.lora
import ttt_dist.moshi.packed
import ttt_dist.moshi.weights
from ttt_dist.layer import TTTLayer
from ttt_dist.norm import ShardedLayerNorm
from ttt_dist.placement import BY_HEAD, REPLICATED, to_local

Fault = Callable[[], AbstractContextManager[Any]]


def place_into_returns_its_second_argument() -> AbstractContextManager[Any]:
    """The prototypes' placeholder: parameters are "filled" with themselves."""
    return patch.object(ttt_dist.moshi.weights, "place_into", lambda local, like: like)


@contextmanager
def no_grad_placements():
    """A replicated input used by each rank for its own heads, with torch's default gradient."""

    def enter_shards(x: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return x
        return DTensor.from_local(x, like.device_mesh, REPLICATED, run_check=False).to_local()

    with (
        patch.object(ttt_dist.layer, "enter_shards", enter_shards),
        patch.object(ttt_dist.moshi.packed, "enter_shards", enter_shards),
    ):
        yield


def plain_cut_of_packed_weights() -> AbstractContextManager[Any]:
    """`Shard(0)` on the stacked q|k|v: a rank's block of rows, whatever projection they are of."""

    real = ttt_dist.moshi.weights._own_values

    def own_values(source: Any, own: Any, rows: int | None, first_row: int = 0) -> Tensor:
        if rows is None:
            return real(source, own, rows, first_row)
        parts, own_rows, inputs = own
        count = own_rows.stop - own_rows.start
        per_rank = count * (parts.stop - parts.start)
        first = own_rows.start // count * per_rank
        return source[first : first + per_rank, inputs].unflatten(0, (-1, count))

    return patch.object(ttt_dist.moshi.weights, "_own_values", own_values)


def adapters_whole_matrices_not_summed() -> AbstractContextManager[Any]:
    """The matrix of an adapter that each rank uses with its own shard, with torch's default."""

    def shared(weight: Tensor) -> Tensor:
        return to_local(weight, grad_placements=REPLICATED)

    return patch.object(ttt_dist.moshi.lora, "_shared", shared)


def norm_over_own_heads_only() -> AbstractContextManager[Any]:
    """`post_norm` with the statistics of one rank's heads."""

    def forward(self: ShardedLayerNorm, x: Tensor) -> Tensor:
        weight = to_local(self.weight, grad_placements=BY_HEAD)
        bias = to_local(self.bias, grad_placements=BY_HEAD)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)

    return patch.object(ShardedLayerNorm, "forward", forward)


def ttt_gradients_not_reduced() -> AbstractContextManager[Any]:
    """TTT parameters left out of FSDP: whole on every rank, their gradients each rank's own."""
    real = parallel.fsdp.fully_shard

    def fully_shard(module: torch.nn.Module, **settings: Any) -> None:
        if isinstance(module, TTTLayer):
            return
        inner = [m for m in module.modules() if isinstance(m, TTTLayer)]
        real(module, ignored_params={p for m in inner for p in m.parameters()}, **settings)

    return patch.object(parallel.fsdp, "fully_shard", fully_shard)


def loss_by_local_weights() -> AbstractContextManager[Any]:
    """Each rank divides by the weights of its own samples."""
    return patch.object(launch.step, "sum_over_data_ranks", lambda values, group: values.clone())


# Faults that a model with adapters shows.
LORA_FAULTS = ("adapters' whole matrices not summed",)
# name -> (layout of cases.py that shows it, fault)
FAULTS: dict[str, tuple[str, Fault]] = {
    "place_into returns its second argument": ("tp 2", place_into_returns_its_second_argument),
    "no grad_placements": ("tp 2", no_grad_placements),
    "plain Shard(0) on packed weights": ("tp 2", plain_cut_of_packed_weights),
    LORA_FAULTS[0]: ("tp 2", adapters_whole_matrices_not_summed),
    "post_norm over own heads": ("tp 2", norm_over_own_heads_only),
    "TTT gradients not reduced over dp": ("fsdp 2", ttt_gradients_not_reduced),
    "loss divided by local weights": ("fsdp 2", loss_by_local_weights),
}
