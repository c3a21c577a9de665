"""The one place that states the order in which a model is laid over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.activation import checkpoint_layers
from parallel.frame_sharing import SharedFrames
from parallel.fsdp import apply_fsdp
from parallel.mesh import Mesh
from parallel.tensor_parallel import apply_tensor_parallel
from ttt_dist.moshi.block import TTTMoshi


@dataclass(frozen=True)
class ParallelPlan:
    """What `parallelize` does beside sharding.

    Args:
        compute_dtype: of Moshi's weights and activations in forward and backward.
        reduce_dtype: of gradient sums; at least float32.
        activation_checkpointing: recompute layers in the backward.
        reshard_after_forward: free gathered weights between forward and backward.
        prefetch_layers: layers gathered early, before the one ahead of them computes.
    """

    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype = torch.float32
    activation_checkpointing: bool = True
    reshard_after_forward: bool = True
    prefetch_layers: int = 1


def parallelize(model: TTTMoshi, mesh: Mesh, plan: ParallelPlan) -> None:
    """Lay `model` (on the meta device or materialised, the same on all ranks) over `mesh`.

    Tensor parallelism first, for it defines the tensors that everything else sees; activation
    checkpointing inside FSDP2's units, so that recomputation finds the weights gathered; FSDP2
    last. (Compilation, once built, goes between the last two.)
    """
    if mesh.tp is not None:
        apply_tensor_parallel(model, mesh.tp)
        model.frames = SharedFrames(mesh.tp)
    if plan.activation_checkpointing:
        checkpoint_layers(model)
    apply_fsdp(
        model,
        mesh,
        compute_dtype=plan.compute_dtype,
        reduce_dtype=plan.reduce_dtype,
        reshard_after_forward=plan.reshard_after_forward,
        prefetch_layers=plan.prefetch_layers,
    )
