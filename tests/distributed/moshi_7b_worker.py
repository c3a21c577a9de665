"""What ranks of a Moshi 7B job hold and compute, found without their memory and without the others.

    python -m tests.distributed.moshi_7b_worker memory|work RESULTS.json

The model lies on the meta device, and the process group is torch's "fake" backend: this process is
any one rank of a job of any size, and collectives do nothing. Configuration, mesh, layout and
optimizer are made by training's own code. The tests judge what is written here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from launch.config import REPO_ROOT, TrainConfig, load_config
from launch.optim import build_optimizers
from launch.setup import lay_out_model, model_dtypes
from parallel.frame_sharing import SharedFrames
from parallel.fsdp import whole_gradient_bytes
from parallel.mesh import Layout, Mesh, build_mesh
from parallel.tensor_parallel import apply_tensor_parallel
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.flops import flops_per_frame

CONFIGS = ("moshi_7b_ttt", "moshi_7b_full")
LAYOUTS = {"dp 8": (8, 1), "dp 4 x tp 2": (8, 2), "dp 8 x tp 8": (64, 8)}  # world size, tp
KINDS = ("parameters", "gradients", "optimizer")
FRAMES = 100
TTT_LAYER = 30  # of the layers that moshi_7b_ttt.yaml names
# The placement table of parallel/tensor_parallel.py leaves these whole on the tp axis.
WHOLE_ON_TP = re.compile(
    r"transformer\.layers\.\d+\.(norm[12]\.alpha|ttt\.alpha|ttt\.layer\.wo\.bias)$"
)

# Of one parameter, where a rank's part starts and how large it is.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def read_layout(config_name: str, tp: int, *overrides: str) -> TrainConfig:
    path = REPO_ROOT / "configs" / f"{config_name}.yaml"
    return load_config(path, [f"parallel.tp={tp}", *overrides])


@contextmanager
def fake_job(config: TrainConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """This process as one rank of a job, with the mesh of its configuration."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        axes = config.parallel
        yield build_mesh(Layout(axes.dp_replicate, axes.dp_shard, axes.tp))
    finally:
        dist.destroy_process_group()


def own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind this rank's parts: FSDP2's padding counts too."""
    return sum(own_part(tensor).untyped_storage().nbytes() for tensor in tensors)


def boxes_by_rule(parameter: nn.Parameter, world_size: int, tp: int) -> list[Box]:
    """What every rank of the job holds of a parameter, from its placements alone."""
    if not isinstance(parameter, DTensor):
        return [((0,) * parameter.ndim, tuple(parameter.shape))] * world_size
    mesh = parameter.device_mesh
    boxes = []
    for rank in range(world_size):
        # The ranks of a tp group are neighbours; a mesh without tp is the same for each of them.
        place = {"fsdp": rank // tp, "tp": rank % tp, "fsdp_tp": rank}
        coordinate = [place[axis] for axis in mesh.mesh_dim_names]
        shape, offset = _compute_local_shape_and_global_offset(
            parameter.shape, mesh.shape, coordinate, parameter.placements
        )
        boxes.append((tuple(offset), tuple(shape)))
    return boxes


def tile_exactly(boxes: Iterable[Box], whole: Iterable[int]) -> bool:
    """Whether the distinct boxes make a grid that covers every element of `whole` once."""
    distinct = {box for box in boxes if prod(box[1])}
    cuts = 1
    for dim, size in enumerate(whole):
        intervals = sorted({(offset[dim], shape[dim]) for offset, shape in distinct})
        cuts *= len(intervals)
        end = 0
        for start, length in intervals:
            if start != end:
                return False
            end += length
        if end != size:
            return False
    return len(distinct) == cuts


def hold_everything(model: TTTMoshi, config: TrainConfig) -> dict[str, int]:
    """Bytes by kind that this rank holds after a step of AdamW, from the tensors' own storages."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizers = build_optimizers(model, config.optim, fused=False)
    (adamw,) = optimizers.optimizers
    for group in adamw.param_groups:
        # The same state, one tensor at a time: DTensor plans a step over a list of n tensors in n²
        # work (15 s here).
        group["foreach"] = False
    optimizers.step()
    return {
        "parameters": stored_bytes(model.parameters()),
        "gradients": stored_bytes(p.grad for p in trained if p.grad is not None),
        "optimizer": stored_bytes(value for p in trained for value in adamw.state[p].values()),
    }


def measure_layout(config_name: str, world_size: int, tp: int) -> dict[str, Any]:
    """Bytes of the first, a middle and the last rank as measured, and of all ranks by rule."""
    config = read_layout(config_name, tp)
    master, compute = model_dtypes(config, torch.device("cuda"))
    measured: dict[int, dict[str, int]] = {}
    boxes: dict[str, list[Box]] = {}
    differ: set[str] = set()
    for rank in (0, world_size // 2 - 1, world_size - 1):
        with fake_job(config, rank, world_size) as mesh:
            model = lay_out_model(config, None, mesh, compute)
            measured[rank] = hold_everything(model, config)
            whole_gradients = whole_gradient_bytes(model, master)
        parameters = dict(model.named_parameters())
        if not boxes:
            boxes = {n: boxes_by_rule(p, world_size, tp) for n, p in parameters.items()}
        for name, parameter in parameters.items():
            if tuple(own_part(parameter).shape) != boxes[name][rank][1]:
                differ.add(name)
    by_rule = [dict.fromkeys(KINDS, 0) for _ in range(world_size)]
    total, whole_on_tp = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    whole_by_rule = 0
    for name, parameter in parameters.items():
        cut = name.startswith("transformer.") and not WHOLE_ON_TP.match(name)
        whole_by_rule += parameter.requires_grad * 4 * parameter.numel() // (tp if cut else 1)
        for kind, copies in zip(KINDS, (1, 1, 2) if parameter.requires_grad else (1, 0, 0)):
            size = copies * parameter.element_size()
            total[kind] += size * parameter.numel()
            if WHOLE_ON_TP.match(name):
                whole_on_tp[kind] += size * parameter.numel()
            for rank, (_, shape) in enumerate(boxes[name]):
                by_rule[rank][kind] += size * prod(shape)
    return {
        "elements": sum(p.numel() for p in parameters.values()),
        "trained tensors": sum(p.requires_grad for p in parameters.values()),
        "not tiled": [n for n, p in parameters.items() if not tile_exactly(boxes[n], p.shape)],
        "unique elements": sum(prod(shape) for held in boxes.values() for _, shape in set(held)),
        "differ from the rule": sorted(differ),
        "measured": measured,
        "by rule": by_rule,
        "total": total,
        "whole on tp": whole_on_tp,
        "whole gradients": whole_gradients,
        "whole gradients by rule": whole_by_rule,
    }


def count_work(tp: int) -> dict[str, float]:
    """FLOPs of matrix products of one rank: forward and backward of one sample.

    FSDP2 is left out: it refuses the meta device, and changes where weights lie, not what is
    computed. Everything is trained, so that every weight has its gradient's product.
    """
    config = read_layout("moshi_7b_ttt", tp, "full_finetuning=true")
    found = {}
    with fake_job(config, rank=0, world_size=tp) as mesh:
        model = lay_out_model(config, None, None, torch.float32)
        estimate = flops_per_frame(model, FRAMES) * FRAMES
        ttt = model.transformer.layers[TTT_LAYER].ttt.layer
        if mesh.tp is not None:
            apply_tensor_parallel(model, mesh.tp)
            model.frames = SharedFrames(mesh.tp)
        codes = torch.zeros(1, model.num_codebooks, FRAMES, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as backbone:
            _, text_logits = model.forward_text(codes)
            text_logits.sum().backward()
        with FlopCounterMode(display=False) as everything:
            text, audio = model.step_losses(model.steps(codes))
            (text.sum() + audio.sum()).backward()
        by_module = backbone.get_flop_counts()
        layer = f"StreamingTransformer.layers.{TTT_LAYER}"
        for part in ("gating", "ttt.layer"):
            found[part] = float(sum(by_module[f"{layer}.{part}"].values()))
        # The rest of the layer; its own module's forward isn't what computes it.
        rest = sum(by_module[layer].values())
        found["self_attn"] = rest - found["gating"] - found["ttt.layer"]
    found["backbone"] = float(backbone.get_total_flops())
    found["with Depformer"] = float(everything.get_total_flops())
    found["estimate"] = estimate
    # Projections and learning rate; then the seven state-sized products of TTT.md.
    weights = 4 * model.dim**2 + ttt.config.num_heads * model.dim
    found["ttt projections"] = 3 * 2.0 * FRAMES * weights
    found["ttt inner steps"] = 3 * 2.0 * FRAMES * 7 * ttt.W1.numel()
    return found


def main(what: str, results: Path) -> None:
    if what == "memory":
        found: dict[str, Any] = {
            f"{config} {name}": measure_layout(config, *layout)
            for config in CONFIGS
            for name, layout in LAYOUTS.items()
        }
    else:
        found = {f"tp {tp}": count_work(tp) for tp in (1, 2)}
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
