"""The one place that states the order in which a model is laid over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.activation import Recompute, checkpoint_layers
from parallel.compilation import compile_layers
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
        recompute: what the backward computes again instead of keeping it.
        compile: compile every layer.
        reshard_after_forward: free gathered weights between forward and backward.
        prefetch_layers: layers gathered early, before the one ahead of them computes.
    """

    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype = torch.float32
    recompute: Recompute = "layer"
    compile: bool = False
    reshard_after_forward: bool = True
    prefetch_layers: int = 1


def parallelize(model: TTTMoshi, mesh: Mesh, plan: ParallelPlan) -> None:
    """Lay `model` (on the meta device or materialised, the same on all ranks) over `mesh`.

    Tensor parallelism first, for it defines the tensors that everything else sees. Activation
    checkpointing inside FSDP2's units, so that recomputation finds the weights gathered, and
    around compiled code: checkpoints inside a graph that also holds DTensors fail in torch 2.13
    (AOTAutograd takes the saved mesh for a tensor). FSDP2, whose hooks stay eager, last.
    """
    if mesh.tp is not None:
        apply_tensor_parallel(model, mesh.tp)
        model.frames = SharedFrames(mesh.tp)
    if plan.compile:
        compile_layers(model)
    checkpoint_layers(model, plan.recompute)
    apply_fsdp(
        model,
        mesh,
        compute_dtype=plan.compute_dtype,
        reduce_dtype=plan.reduce_dtype,
        reshard_after_forward=plan.reshard_after_forward,
        prefetch_layers=plan.prefetch_layers,
    )
