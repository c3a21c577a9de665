"""All cases of one world size in one job; rank 0 writes what it measured as JSON.

    torchrun --nproc_per_node N worker.py RESULTS.json WORK_FOLDER

Each layout trains the tiny model beside the unsharded one (plain tensors, plain AdamW, all samples
in one batch) and measures the differences; the tests judge them.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import tiny
import torch
import torch.distributed as dist
from faults import FAULTS, Fault
from measure import relative_errors, whole, worst
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.optimizer import OptimizersContainer
from tp_cases import layer_traffic, placement_words

from launch.optim import build_optimizers, build_schedule
from launch.schema import OptimConfig
from launch.step import StepLoss, accumulate_gradients
from parallel.checkpoint import load_checkpoint, save_checkpoint
from parallel.mesh import (
    Layout,
    Mesh,
    build_mesh,
    close_process_group,
    init_process_group,
    leave_job,
)
from parallel.parallelize import ParallelPlan, parallelize
from parallel.reduce import clip_gradients
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model, is_ttt_parameter
from ttt_dist.moshi.context import read_attention_contexts, set_attention_contexts
from ttt_dist.moshi.loss import LossConfig
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

LAYOUTS: dict[int, dict[str, Layout]] = {
    2: {"fsdp 2": Layout(tp=1), "tp 2": Layout(tp=2), "replicate 2": Layout(dp_replicate=2)},
    4: {
        "tp 2 x fsdp 2": Layout(tp=2),
        "tp 4": Layout(tp=4),
        "replicate 2 x tp 2": Layout(dp_replicate=2, tp=2),
    },
}
FLOAT32 = ("fsdp 2", "tp 2", "tp 2 x fsdp 2")
SAMPLES, STEPS = 4, 3
OPTIM = OptimConfig(lr=1e-3, ttt_lr=3e-3, pct_start=0.0, final_lr_fraction=1.0)


class OneRank:
    """The data axis of the unsharded run."""

    dp_size = 1
    dp_group = None


def make_model(
    weights: Path, dtype: torch.dtype, mesh: Mesh | None, inner_model: str, frozen: bool
) -> TTTMoshi:
    model = build_model(tiny.LM_CONFIG, tiny.ttt_placement(inner_model), dtype=dtype)
    set_attention_contexts(model, ttt_context=tiny.TTT_CONTEXT, other_context=tiny.OTHER_CONTEXT)
    if frozen:
        for name, value in model.named_parameters():
            value.requires_grad_(is_ttt_parameter(name))
    if mesh is not None:
        plan = ParallelPlan(compute_dtype=dtype, reduce_dtype=dtype)
        parallelize(model, mesh, plan)
    model.to_empty(device="cpu")
    load_base_weights(model, weights)
    init_ttt_weights(model, seed=0)
    return model


def step_losses(loss: StepLoss) -> list[float]:
    return [loss.total.item(), loss.text.item(), loss.audio.item()]


def exact_gradients(weights: Path, inner_model: str, frozen: bool) -> dict[str, Tensor]:
    """The unsharded first-step gradients in float64, what float32 runs are off from."""
    model = make_model(weights, torch.float64, None, inner_model, frozen)
    config = LossConfig.of_model(
        model, text_padding_weight=0.5, first_codebook_weight_multiplier=3.0
    )
    accumulate_gradients(model, [tiny.random_codes(SAMPLES, tiny.FRAMES)], config, OneRank())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare_training(
    weights: Path, mesh: Mesh, dtype: torch.dtype, inner_model: str = "mlp", frozen: bool = False
) -> dict[str, Any]:
    """Train both models alike; differences of first-step gradients and of final parameters."""
    plain = make_model(weights, dtype, None, inner_model, frozen)
    model = make_model(weights, dtype, mesh, inner_model, frozen)
    names = [name for name, _ in plain.named_parameters()]
    same_names = names == [name for name, _ in model.named_parameters()]
    references = dict(plain.named_parameters())
    parameters = dict(model.named_parameters())
    start = relative_errors({n: (parameters[n].detach(), references[n].detach()) for n in names})
    config = LossConfig.of_model(
        plain, text_padding_weight=0.5, first_codebook_weight_multiplier=3.0
    )
    plain_optimizer = torch.optim.AdamW(
        [
            {"params": [value], "lr": group["lr"], "weight_decay": group["weight_decay"]}
            for group in build_optimizers(plain, OPTIM, fused=False).optimizers[0].param_groups
            for value in group["params"]
        ],
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        foreach=False,
    )
    optimizers = build_optimizers(model, OPTIM, fused=False)
    result: dict[str, Any] = {"same_names": same_names, "start": worst(start), "losses": []}
    result["contexts"] = read_attention_contexts(model)
    # In float32 the first step alone is judged.
    for step in range(STEPS if dtype == torch.float64 else 1):
        codes = tiny.random_codes(SAMPLES, tiny.FRAMES, seed=step)
        own = list(codes.chunk(mesh.dp_size)[mesh.dp_rank].split(1))
        plain_optimizer.zero_grad()
        optimizers.zero_grad()
        expected = accumulate_gradients(plain, [codes], config, OneRank())
        found = accumulate_gradients(model, own, config, mesh)
        result["losses"].append([step_losses(found), step_losses(expected)])
        if step == 0:
            trained = [n for n in names if references[n].grad is not None]
            result["trained"] = trained == [n for n in names if parameters[n].grad is not None]
            result["untrained"] = [n for n in names if n not in trained]
            result["gradients"] = worst(
                relative_errors({n: (parameters[n].grad, references[n].grad) for n in trained})
            )
            if dtype == torch.float32:
                exact = exact_gradients(weights, inner_model, frozen)
                pairs = {n: (references[n].grad.double(), exact[n]) for n in trained}
                result["plain rounding"] = relative_errors(pairs)
                pairs = {n: (parameters[n].grad, references[n].grad) for n in trained}
                result["all gradients"] = relative_errors(pairs)
            result["finite"] = all(whole(parameters[n].grad).isfinite().all() for n in trained)
            result["norms"] = [
                clip_gradients(model.parameters(), 0.5).item(),
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item(),
            ]
        else:
            clip_gradients(model.parameters(), 0.5)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizers.step()
        plain_optimizer.step()
    final = {n: (parameters[n].detach(), references[n].detach()) for n in names}
    result["parameters"] = worst(relative_errors(final))
    result["elements"] = elements_held(model, optimizers, mesh)
    return result


def elements_held(model: TTTMoshi, optimizers: OptimizersContainer, mesh: Mesh) -> dict[str, float]:
    """Elements of parameters, gradients and moments: this rank's, and what it may hold at most."""

    def own(tensor: Tensor) -> int:
        return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()

    held = total = whole_on_tp = 0
    for parameter in model.parameters():
        tensors = [parameter, parameter.grad]
        state = optimizers.optimizers[0].state[parameter]
        tensors += [state.get("exp_avg"), state.get("exp_avg_sq")]
        present = [t for t in tensors if t is not None]
        held += sum(own(t) for t in present)
        total += len(present) * parameter.numel()
        axes = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
        over_tp = [p for a, p in zip(axes, parameter.placements) if "tp" in a]
        if not any(isinstance(p, Shard) for p in over_tp):
            whole_on_tp += len(present) * parameter.numel()
    shards = mesh.shape["dp_shard"] * mesh.shape["tp"]
    extra = whole_on_tp * (1 - 1 / mesh.shape["tp"]) / mesh.shape["dp_shard"]
    return {"held": held, "allowed": 1.05 * total / shards + extra, "extra": extra, "total": total}


def planted_fault(weights: Path, mesh: Mesh, fault: Fault) -> dict[str, Any]:
    """What the comparison of one step shows where a mistake is planted in the sharded model."""
    plain = make_model(weights, torch.float64, None, "mlp", frozen=False)
    config = LossConfig.of_model(
        plain, text_padding_weight=0.5, first_codebook_weight_multiplier=3.0
    )
    codes = tiny.random_codes(SAMPLES, tiny.FRAMES)
    accumulate_gradients(plain, [codes], config, OneRank())
    with fault():
        model = make_model(weights, torch.float64, mesh, "mlp", frozen=False)
        own = list(codes.chunk(mesh.dp_size)[mesh.dp_rank].split(1))
        accumulate_gradients(model, own, config, mesh)
    parameters = dict(model.named_parameters())
    pairs = {n: (parameters[n].grad, p.grad) for n, p in plain.named_parameters()}
    return {"gradients": worst(relative_errors(pairs))}


def reshard_checkpoint(weights: Path, folder: Path, meshes: list[Mesh]) -> dict[str, Any]:
    """Save after a step on one layout, load on another: parameters and moments, bit for bit."""
    saved: dict[str, Tensor] = {}
    result: dict[str, Any] = {}
    for index, mesh in enumerate(meshes):
        model = make_model(weights, torch.float32, mesh, "mlp", frozen=False)
        optimizers = build_optimizers(model, OPTIM, fused=False)
        schedule = build_schedule(optimizers, OPTIM, 10)
        if index == 0:
            config = LossConfig.of_model(
                model, text_padding_weight=0.5, first_codebook_weight_multiplier=3.0
            )
            codes = tiny.random_codes(SAMPLES, tiny.FRAMES)
            own = list(codes.chunk(mesh.dp_size)[mesh.dp_rank].split(1))
            accumulate_gradients(model, own, config, mesh)
            optimizers.step()
            schedule.step()
            path = save_checkpoint(
                folder,
                model,
                optimizers,
                schedule,
                step=1,
                global_batch_size=SAMPLES,
                layout=mesh.shape,
                keep=None,
            )
        else:
            progress = load_checkpoint(path, model, optimizers, schedule)
            result["progress"] = [progress.step, progress.global_batch_size]
        state = {f"model.{k}": v for k, v in model.state_dict().items()}
        state |= {k: v for k, v in optimizers.state_dict().items() if k.startswith("state.")}
        full = {name: whole(value).clone() for name, value in state.items()}
        if index == 0:
            saved = full
        else:
            result["same_names"] = sorted(saved) == sorted(full)
            result["different"] = [n for n, v in saved.items() if not torch.equal(v, full[n])]
            result["moments"] = sum(n.endswith("exp_avg_sq") for n in full)
    return result


def main(results: Path, work: Path) -> None:
    init_process_group(timedelta(seconds=120))
    weights = work / f"tiny-{dist.get_world_size()}.safetensors"
    if dist.get_rank() == 0:
        tiny.save_release_weights(weights)
    dist.barrier()
    layouts = LAYOUTS[dist.get_world_size()]
    meshes = {name: build_mesh(layout) for name, layout in layouts.items()}
    found: dict[str, Any] = {}
    for name, mesh in meshes.items():
        found[f"float64 {name}"] = compare_training(weights, mesh, torch.float64)
        if name in FLOAT32:
            found[f"float32 {name}"] = compare_training(weights, mesh, torch.float32)
        if mesh.tp is not None:
            found[f"placement {name}"] = placement_words(mesh)
            found[f"layer {name}"] = layer_traffic(mesh)
    last_name, last = list(meshes.items())[1 if dist.get_world_size() == 2 else 0]
    found[f"linear {last_name}"] = compare_training(weights, last, torch.float64, "linear")
    found[f"frozen {last_name}"] = compare_training(weights, last, torch.float64, frozen=True)
    if dist.get_world_size() == 2:
        for name, (layout, fault) in FAULTS.items():
            found[f"fault {name}"] = planted_fault(weights, meshes[layout], fault)
    two = list(meshes.values())[:2]
    found["reshard"] = reshard_checkpoint(weights, work / "there", two)
    if dist.get_world_size() == 2:
        found["reshard back"] = reshard_checkpoint(weights, work / "back", two[::-1])
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found, indent=1))
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_job(0)
