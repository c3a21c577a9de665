"""The device mesh `dp_replicate x dp_shard x tp` and its process groups."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import ParallelDims

from parallel.device import device_type, local_device

_LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has; `dp_shard=-1` means the ranks that the others leave."""

    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1


@dataclass(frozen=True)
class Mesh:
    """The meshes that the model is laid over, and this rank's place in them.

    Attributes:
        tp: one axis, or None where tp is 1.
        fsdp: FSDP2's mesh for layers that tp splits: (`dp_replicate`,) `dp_shard`.
        fsdp_tp: FSDP2's mesh for what all tp ranks compute alike: (`dp_replicate`,)
            `dp_shard x tp` as one axis. Sharding over tp too saves memory, and the average of
            gradients over it keeps the tp ranks' copies equal for good.
        lanes: (`dp_replicate`,) `dp_shard` (, `tp`): what belongs to a lane of data, and to a head.
        dp_rank, dp_size: which share of a step's samples this rank reads; ranks of one tp group
            read the same.
        dp_group: ranks that hold different samples, for sums over a step's data.
    """

    tp: DeviceMesh | None
    fsdp: DeviceMesh
    fsdp_tp: DeviceMesh
    lanes: DeviceMesh
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup | None
    shape: dict[str, int]

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group that the model's collectives and a step's sums go over."""
        meshes = [mesh for mesh in (self.tp, self.fsdp, self.fsdp_tp) if mesh is not None]
        groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        return groups if self.dp_group is None else [*groups, self.dp_group]


def init_process_group(timeout: timedelta, *, on_cpu: bool = False) -> None:
    """Join the job's process group: torchrun's, or one of this process alone without torchrun.

    NCCL on GPUs, gloo on CPUs. GPU jobs get gloo for CPU tensors too: checkpoints are planned over
    it. A rank that crashes inside a library says from then on where its threads were.

    Args:
        timeout: of joining, and of the group's collectives.
        on_cpu: ranks only talk to each other: gloo alone, whatever device they compute on.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable()
    device = torch.device("cpu") if on_cpu else local_device()
    settings: dict[str, Any] = {"timeout": timeout}
    if "RANK" not in os.environ:
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif _ranks_keep_the_store() and os.environ["MASTER_ADDR"] in _LOOPBACK:
        settings |= _store_on_loopback(timeout)
    if device.type == "cuda":
        # NCCL's flight recorder: what the last collectives of each rank were, written to a file
        # where one of them doesn't end.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        torch.cuda.set_device(device)
        dist.init_process_group("cuda:nccl,cpu:gloo", device_id=device, **settings)
    else:
        dist.init_process_group("gloo", **settings)


def _ranks_keep_the_store() -> bool:
    """Whether rank 0, and not torchrun, has the store through which ranks find each other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _store_on_loopback(timeout: timedelta) -> dict[str, Any]:
    """The job's store, reachable from this machine alone.

    torch's own rank 0 would listen on all interfaces, and whoever reaches the store can send
    pickles to the ranks.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = None
    if rank == 0:
        listening = socket.create_server((address, port), backlog=2048).detach()
    store = dist.TCPStore(
        *(address, port, world_size),
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listening,
    )
    return {"store": store, "rank": rank, "world_size": world_size}


def close_process_group() -> None:
    """Leave the job's process group together: no rank closes what another still uses."""
    dist.barrier()
    dist.destroy_process_group()


def leave_job(exit_code: int) -> NoReturn:
    """End this process at once, from any thread, without tearing the interpreter down.

    For a process that is stuck, or whose work is done: meshes keep gloo's process groups alive
    beyond `destroy_process_group`, and a thread of theirs that still runs when the interpreter
    destroys them aborts the process ("terminate called without an active exception": seen in 1 of
    27 exits of two ranks on busy cores). A finished run must not end as a failed job for that.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # even where nobody reads them any more
        os._exit(exit_code)


def from_first_rank(value: str) -> str:
    """Rank 0's `value`, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def build_mesh(layout: Layout, timeout: timedelta | None = None) -> Mesh:
    """Build and check the mesh with torchtitan's `ParallelDims`; all ranks call it together.

    Args:
        timeout: of the meshes' collectives. They don't inherit `init_process_group`'s: torch gives
            new groups 10 minutes with NCCL, 30 with gloo, and None leaves it at that.

    Raises:
        ValueError: the product of the axes is not the number of ranks.
    """
    world_size = dist.get_world_size()
    fixed = layout.dp_replicate * layout.tp
    dp_shard = world_size // fixed if layout.dp_shard == -1 else layout.dp_shard
    if fixed * dp_shard != world_size:
        raise ValueError(
            f"parallel: dp_replicate={layout.dp_replicate} x dp_shard={layout.dp_shard} x "
            f"tp={layout.tp} does not make the {world_size} ranks of this job"
        )
    dims = ParallelDims(
        dp_replicate=layout.dp_replicate,
        dp_shard=dp_shard,
        cp=1,
        tp=layout.tp,
        pp=1,
        ep=1,
        world_size=world_size,
        spmd_backend="partial_dtensor",
    )
    dims.build_mesh()
    batch = dims.get_optional_mesh("batch")
    mesh = Mesh(
        tp=dims.get_optional_mesh("tp"),
        fsdp=_fsdp_mesh(dims),
        fsdp_tp=_fsdp_tp_mesh(dims),
        lanes=dims.get_mesh(
            [
                *(["dp_replicate"] if dims.dp_replicate_enabled else []),
                "fsdp",
                *(["tp"] if dims.tp_enabled else []),
            ]
        ),
        dp_rank=0 if batch is None else batch.get_local_rank(),
        dp_size=layout.dp_replicate * dp_shard,
        dp_group=None if batch is None else batch.get_group(),
        shape={"dp_replicate": layout.dp_replicate, "dp_shard": dp_shard, "tp": layout.tp},
    )
    if timeout is not None:
        for group in mesh.groups:
            group.set_timeout(timeout)
    return mesh


def _fsdp_mesh(dims: ParallelDims) -> DeviceMesh:
    """(`dp_replicate`,) `fsdp`; at size 1 too: FSDP2 also sets the compute dtype."""
    return dims.get_mesh(["dp_replicate", "fsdp"] if dims.dp_replicate_enabled else "fsdp")


def _fsdp_tp_mesh(dims: ParallelDims) -> DeviceMesh:
    """(`dp_replicate`,) `fsdp x tp` as one axis."""
    if not dims.tp_enabled:
        return _fsdp_mesh(dims)
    # Flattened from ParallelDims' own mesh: DTensor then finds it and sums over both axes at once.
    flat = dims.get_mesh(["fsdp", "tp"])._flatten("fsdp_tp")
    if not dims.dp_replicate_enabled:
        return flat
    # A flattened axis cannot be sliced together with another; the same ranks in the same order can.
    ranks = torch.arange(dims.world_size).view(dims.dp_replicate, flat.size())
    return DeviceMesh(device_type(), ranks, mesh_dim_names=("dp_replicate", "fsdp_tp"))
