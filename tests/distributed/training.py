"""A few steps of the tiny model on ranks beside the same steps on one process, and what differs.

The unsharded run is written out here with plain tensors, plain AdamW and all samples of a step in
one batch; the sharded run goes through the functions that `launch/train.py` calls.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from launch.configuration.schema import OptimConfig
from launch.optim import build_optimizers
from launch.step import SeparatePieces, StepLoss, accumulate_gradients
from launch.verification.report import TrafficCounter
from parallel.fsdp import reduce_gradients_after, whole_gradient_bytes
from parallel.mesh import Mesh
from parallel.parallelize import ParallelPlan, parallelize
from parallel.reduce import clip_gradients
from tests.distributed import tiny
from tests.distributed.cases import ACCUMULATION, CASES, MAX_NORM, SAMPLES, Case, Trained
from tests.distributed.faults import Fault
from tests.distributed.measure import largest_of_ranks, relative_errors, whole, worst
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model, freeze_base, is_ttt_parameter
from ttt_dist.moshi.context import read_attention_contexts, set_attention_contexts
from ttt_dist.moshi.lora import LoRASettings
from ttt_dist.moshi.loss import LossConfig
from ttt_dist.moshi.weights import (
    fill_own,
    init_adapters,
    init_ttt_weights,
    load_base_weights,
    seeded_generator,
)
from ttt_dist.placement import shard_slices

if TYPE_CHECKING:  # torchtitan may not be imported before parallel.device
    from torchtitan.components.optimizer import OptimizersContainer

OPTIM = OptimConfig(lr=1e-3, ttt_lr=3e-3, pct_start=0.0, final_lr_fraction=1.0)


class OneRank:
    """The data axis of the unsharded run."""

    dp_size = 1
    tp = None
    shape = {"tp": 1}  # noqa: RUF012
    dp_group = None


def make_model(
    weights: Path, trained: Trained, mesh: Mesh | None, plan: dict[str, Any]
) -> TTTMoshi:
    """The tiny model, laid over `mesh` or not, with the values that every run starts from."""
    model = build_model(
        tiny.WIDE_LM_CONFIG,
        tiny.ttt_placement(
            trained.inner_model, lm_config=tiny.WIDE_LM_CONFIG, mlp_layers=trained.mlp_layers
        ),
        LoRASettings(trained.lora_rank, scaling=2.0) if trained.lora_rank else None,
        dtype=trained.dtype,
    )
    set_attention_contexts(model, ttt_context=tiny.TTT_CONTEXT, other_context=tiny.OTHER_CONTEXT)
    if trained.frozen:
        for name, value in model.named_parameters():
            value.requires_grad_(is_ttt_parameter(name))
    if trained.lora_rank:
        freeze_base(model, trained.dtype, train_embeddings=trained.ft_embed)
    if mesh is not None:
        settings = {"compute_dtype": trained.dtype, "reduce_dtype": trained.dtype} | plan
        parallelize(model, mesh, ParallelPlan(**settings))
    model.to_empty(device="cpu")
    load_base_weights(model, weights)
    init_ttt_weights(model, seed=0)
    init_adapters(model, seed=0)
    for name, value in model.named_parameters():
        if ".lora_B." in name:  # at its initial 0, lora_A would have no gradient
            noise = torch.randn(value.shape, generator=seeded_generator(1, name))
            fill_own(value, 0.1 * noise[shard_slices(value)])
    return model


def loss_config(model: TTTMoshi) -> LossConfig:
    return LossConfig.of_model(model, text_padding_weight=0.5, first_codebook_weight_multiplier=3.0)


def own_microbatches(step: int, mesh: Mesh) -> list[Tensor]:
    """This rank's share of a step's samples, in `ACCUMULATION` equal microbatches."""
    codes = tiny.random_codes(SAMPLES, tiny.FRAMES, seed=step)
    return list(codes.chunk(mesh.dp_size)[mesh.dp_rank].chunk(ACCUMULATION))


def step_losses(loss: StepLoss) -> list[float]:
    return [loss.total.item(), loss.text.item(), loss.audio.item()]


def values(model: TTTMoshi) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def gradients(model: TTTMoshi) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class PlainRun:
    """The steps of one process, on one batch each.

    Attributes:
        start: parameters.
        gradients: of the first step.
        losses: a step's total, text and audio loss.
        norms: of a step's gradients, before they are clipped.
        parameters: number of steps -> parameters after them, for all numbers that are judged.
    """

    start: dict[str, Tensor]
    gradients: dict[str, Tensor]
    losses: list[list[float]]
    norms: list[float]
    parameters: dict[int, dict[str, Tensor]]


def train_plain(weights: Path, trained: Trained) -> PlainRun:
    """As many steps as any case of `trained` takes, on plain tensors and with torch's own AdamW."""
    model = make_model(weights, trained, None, {})
    config = loss_config(model)
    groups = build_optimizers(model, OPTIM, fused=False).optimizers[0].param_groups
    optimizer = torch.optim.AdamW(
        [
            {"params": [value], "lr": group["lr"], "weight_decay": group["weight_decay"]}
            for group in groups
            for value in group["params"]
        ],
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        foreach=False,
    )
    judged = {case.steps for case in CASES.values() if case.trained == trained}
    run = PlainRun(copies(values(model)), {}, [], [], {})
    for step in range(max(judged)):
        codes = tiny.random_codes(SAMPLES, tiny.FRAMES, seed=step)
        whole_step = SeparatePieces(model, [codes])
        run.losses.append(step_losses(accumulate_gradients(model, whole_step, config, OneRank())))
        if step == 0:
            run.gradients.update(copies(gradients(model)))
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in judged:
            run.parameters[step + 1] = copies(values(model))
    return run


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


class PlainRuns:
    """Unsharded runs by what they train; each is computed once, whatever the layouts and jobs.

    Args:
        weights: of the base.
        folder: keeps the runs, for later jobs too.
    """

    def __init__(self, weights: Path, folder: Path) -> None:
        self.weights = weights
        self._folder = folder
        self._read: dict[Trained, PlainRun] = {}

    def compute(self, wanted: list[Trained]) -> None:
        """Run those that no job has run yet, shared out over the ranks; all call it together."""
        missing = [trained for trained in wanted if not self._file(trained).exists()]
        dist.barrier()  # nobody writes before everybody has looked
        for trained in missing[dist.get_rank() :: dist.get_world_size()]:
            part = self._file(trained).with_suffix(".part")  # a killed job leaves no torn run
            torch.save(vars(train_plain(self.weights, trained)), part)
            part.rename(self._file(trained))
        dist.barrier()

    def of(self, trained: Trained) -> PlainRun:
        if trained not in self._read:
            self._read[trained] = PlainRun(**torch.load(self._file(trained), weights_only=True))
        return self._read[trained]

    def _file(self, trained: Trained) -> Path:
        return self._folder / ("-".join(map(str, astuple(trained))) + ".pt")


def compare_training(plain_runs: PlainRuns, mesh: Mesh, case: Case) -> dict[str, Any]:
    """Train on `mesh` as one process does; differences of first gradients and final parameters.

    Losses, norms and parameters of `case.steps` steps.
    """
    trained = case.trained
    plain = plain_runs.of(trained)
    model = make_model(plain_runs.weights, trained, mesh, case.plan)
    config = loss_config(model)
    optimizers = build_optimizers(model, OPTIM, fused=False)
    names = list(plain.start)
    result: dict[str, Any] = {
        "same_names": names == list(values(model)),
        "start": worst(errors_on_ranks(values(model), plain.start)),
        "contexts": read_attention_contexts(model),
        "losses": [],
        "norms": [],
    }
    traffic = TrafficCounter(mesh.shape)
    for step in range(case.steps):
        optimizers.zero_grad()
        with traffic if step == 0 else nullcontext():
            loss = accumulate_gradients(
                model,
                SeparatePieces(model, own_microbatches(step, mesh)),
                config,
                mesh,
                reduce_every_microbatch=case.reduce_every_microbatch,
            )
        result["losses"].append([step_losses(loss), plain.losses[step]])
        if step == 0:
            found = gradients(model)
            result["trained"] = list(found) == list(plain.gradients)
            result["untrained"] = [n for n in names if n not in plain.gradients]
            errors = errors_on_ranks(found, plain.gradients)
            result["gradients"] = worst(errors)
            result["finite"] = all(bool(whole(g).isfinite().all()) for g in found.values())
            if trained.dtype == torch.float32:
                result["all gradients"] = errors
                exact = plain_runs.of(replace(trained, dtype=torch.float64)).gradients
                pairs = {n: (g.double(), exact[n]) for n, g in plain.gradients.items()}
                result["plain rounding"] = relative_errors(pairs)
        norm = clip_gradients(model.parameters(), MAX_NORM).item()
        result["norms"].append([norm, plain.norms[step]])
        optimizers.step()
    result["elements"] = elements_held(model, optimizers, mesh)
    result["traffic"] = {" ".join(key[:2]): n for key, n in traffic.calls.items()}
    if case.steps > 1:
        result["parameters"] = worst(errors_on_ranks(values(model), plain.parameters[case.steps]))
    return result


def errors_on_ranks(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    pairs = {name: (found[name], tensor) for name, tensor in expected.items() if name in found}
    return largest_of_ranks(relative_errors(pairs))


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


def gradients_that_wait(plain_runs: PlainRuns, mesh: Mesh, trained: Trained) -> dict[str, Any]:
    """After the backward of an earlier microbatch, bytes of whole gradients: FSDP2's, and told."""
    model = make_model(plain_runs.weights, trained, mesh, {"compute_dtype": torch.bfloat16})
    first, *_ = SeparatePieces(model, own_microbatches(0, mesh)).steps
    found = {"told": whole_gradient_bytes(model, trained.dtype)}
    for name, every_microbatch in (("reduced every microbatch", True), ("kept", False)):
        reduce_gradients_after(model, last=False, every_microbatch=every_microbatch)
        text, audio = model.step_losses(first)
        (text.sum() + audio.sum()).backward()
        found[name] = sum(
            grad.untyped_storage().nbytes()
            for module in model.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups
            for parameter in group.fsdp_params
            for grad in waiting_gradients(parameter)
        )
    return found


def waiting_gradients(parameter: Any) -> list[Tensor]:
    """Of an `FSDPParam`: as cast to the dtype of the reduction, or in it from the start."""
    found = [parameter.unsharded_accumulated_grad, parameter._unsharded_param.grad]
    return [g.to_local() if isinstance(g, DTensor) else g for g in found if g is not None]


def planted_fault(
    plain_runs: PlainRuns, mesh: Mesh, fault: Fault, trained: Trained
) -> dict[str, Any]:
    """What the comparison of one step shows where a mistake is planted in the sharded model."""
    plain = plain_runs.of(trained)
    with fault():
        model = make_model(plain_runs.weights, trained, mesh, {})
        pieces = SeparatePieces(model, own_microbatches(0, mesh))
        accumulate_gradients(model, pieces, loss_config(model), mesh)
    return {"gradients": worst(errors_on_ranks(gradients(model), plain.gradients))}
