"""Prove that a layout trains the model that one process trains.

    torchrun --nproc_per_node=8 launch/verify.py [CONFIG] [key.path=value …]

Takes the command line of `launch/train.py`. The configuration's model, with every flag kept but
widths, layers and lengths shrunk, is trained for five steps (`max_steps`, if that is less) over the
ranks, and unsharded on rank 0: plain tensors, plain AdamW, its own loss. Weights and codes are
random with fixed seeds; no data and no released weights are read, nothing is written.

Exit code 0: all within tolerance; 1: something isn't, and is listed; 2: the configuration can't be
used.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    # torchrun puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from launch.errors import UserError, exit_with
from launch.feeding.batch_plan import carries_states
from launch.feeding.lanes import Lanes
from launch.optim import build_optimizers
from launch.setup import model_dtypes, say
from launch.step import Microbatches, SeparatePieces, accumulate_gradients
from launch.verification import report
from launch.verification.case import FRAMES, Case, loss_config, make_model, read_case
from launch.verification.compare import Check, Trained, compare
from launch.verification.report import Memory, TrafficCounter
from parallel.carry import empty_carry
from parallel.device import hide_gpus, local_device
from parallel.mesh import (
    Layout,
    Mesh,
    build_mesh,
    close_process_group,
    from_first_rank,
    init_process_group,
    leave_job,
)
from parallel.reduce import clip_gradients
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.context import (
    describe_attention_contexts,
    read_attention_contexts,
)
from ttt_dist.moshi.loss import LossConfig, loss_weights, token_losses, weighted_mean

STEPS = 5
CHUNK = 16  # samples that the unsharded model takes at once
TIMEOUT = timedelta(minutes=20)  # the other ranks wait in a collective while rank 0 compares
_INNER = {"mlp": "MLP", "linear": "Linear"}


def keep_whole(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Put whole tensors together; all ranks take part.

    Returns:
        Copies of the whole tensors, on rank 0 alone; and how far apart the ranks' are, relative to
        their norm, by three sums over each: what is kept on several ranks must be the same there.
    """
    # DTensor warns that a tensor cut twice along one dim takes two gathers; once a run is fine.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    kept, sums = {}, []
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if dist.get_rank() == 0:
            kept[name] = whole.clone()
        flat = whole.double().flatten()
        wave = torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device).cos()
        sums.append(torch.stack([flat.norm(), flat.sum(), flat @ wave]))
    own = torch.stack(sums)  # [tensors, 3]
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    values = torch.stack(everyone)
    spread = (values.amax(dim=0) - values.amin(dim=0)).amax(dim=1)
    norms = own[:, 0].clamp(min=1e-6 * own[:, 0].max().item())  # gradients that should be zero
    return kept, dict(zip(tensors, (spread / norms).tolist(), strict=True))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def feed(
    case: Case, model: TTTMoshi, codes: list[Tensor], compute: torch.dtype, mesh: Mesh
) -> Microbatches:
    """A rank's samples as training takes them: whole, or as recordings, piece by piece.

    Along recordings one backward goes through all pieces, so the unsharded model, which reads every
    sample whole, has the same gradients.
    """
    if not carries_states(case.config):
        return SeparatePieces(model, codes)
    frames = 2 * case.config.ttt.mini_batch_size
    pieces = -(-codes[0].shape[2] // frames)
    steps, begins = [], []
    for part in codes:
        whole = F.pad(model.steps(part), (0, pieces * frames - part.shape[2]), value=-1)
        steps.append([whole[:, :, n * frames : (n + 1) * frames + 1] for n in range(pieces)])
        first = torch.zeros(pieces, len(part), dtype=torch.bool, device=part.device)
        first[0] = True
        begins.append(list(first))
    lanes = sum(len(part) for part in codes)
    carry = empty_carry(model, lanes, mesh, dtype=compute, device=codes[0].device)
    return Lanes(carry, batch_size=len(codes[0]), tbptt_pieces=pieces).pieces(steps, begins)


def train_sharded(
    case: Case, compute: torch.dtype, steps: int, mesh: Mesh, device: torch.device
) -> tuple[Trained, TrafficCounter, list[Memory]]:
    """The layout's run; the last step is counted, in its collectives and its memory."""
    model = make_model(case, compute, mesh, device)
    settings = loss_config(case, model)
    optimizers = build_optimizers(model, case.config.optim, fused=device.type == "cuda")
    found = Trained(start=keep_whole(dict(model.named_parameters()))[0])
    found.contexts = describe_attention_contexts(read_attention_contexts(model))
    traffic = TrafficCounter(mesh.shape)
    for step in range(steps):
        codes = case.codes(step).chunk(mesh.dp_size)[mesh.dp_rank]
        microbatches = [part.to(device) for part in codes.split(case.config.batch_size)]
        with traffic if step == steps - 1 else nullcontext():
            loss = accumulate_gradients(
                model,
                feed(case, model, microbatches, compute, mesh),
                settings,
                mesh,
                reduce_every_microbatch=case.config.parallel.reduce_every_microbatch,
            )
        found.losses.append(loss.total.item())
        if step == 0:
            found.gradients, found.gradient_spread = keep_whole(gradients_of(model))
            norm = clip_gradients(model.parameters(), math.inf).item()
            found.max_norm = min(case.config.max_norm, norm / 2)  # so that it clips
        with traffic if step == steps - 1 else nullcontext():
            norm = clip_gradients(model.parameters(), found.max_norm).item()
        found.norms.append(norm)
        optimizers.step()
        if step < steps - 1:
            optimizers.zero_grad()
    states = [state for single in optimizers.optimizers for state in single.state.values()]
    memory = report.memory_of(
        {
            "parameters": model.parameters(),
            "gradients": gradients_of(model).values(),
            "optimizer state": [value for state in states for value in state.values()],
        }
    )
    whole = keep_whole(dict(model.named_parameters()))
    found.parameters, found.parameter_spread = whole
    return found, traffic, memory


def train_plain(
    case: Case, compute: torch.dtype, steps: int, max_norm: float, device: torch.device
) -> Trained:
    """The same steps on one device: plain tensors, torch's own AdamW and clipping."""
    model = make_model(case, compute, None, device)
    settings = loss_config(case, model)
    optim = case.config.optim
    groups = build_optimizers(model, optim, fused=False).optimizers[0].param_groups
    optimizer = torch.optim.AdamW(
        [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups],
        betas=optim.betas,
        eps=optim.eps,
        foreach=False,
    )
    found = Trained(start=_copies(dict(model.named_parameters())), max_norm=max_norm)
    for step in range(steps):
        found.losses.append(_plain_loss(model, case.codes(step).to(device), settings))
        if step == 0:
            found.gradients = _copies(gradients_of(model))
        found.norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    found.parameters = _copies(dict(model.named_parameters()))
    return found


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _plain_loss(model: TTTMoshi, codes: Tensor, settings: LossConfig) -> float:
    """A step's loss and gradients, written out: sums over all samples by weights of them all."""
    text_weight, audio_weight = (w.double().sum() for w in loss_weights(codes, settings))
    total = 0.0
    for chunk in codes.split(CHUNK):
        text_w, audio_w = loss_weights(chunk, settings)
        text_ce, audio_ce = token_losses(model(chunk), chunk)
        text = weighted_mean((text_ce * text_w).sum(), text_weight)
        loss = text + weighted_mean((audio_ce * audio_w).sum(), audio_weight)
        loss.backward()
        total += loss.item()
    return total


def verify(case: Case) -> bool:
    """Train, compare, print; whether all is within tolerance, the same on every rank."""
    init_process_group(TIMEOUT)
    config, device = case.config, local_device()
    axes = config.parallel
    mesh = build_mesh(Layout(axes.dp_replicate, axes.dp_shard, axes.tp), TIMEOUT)
    say(
        f"{dist.get_world_size()} ranks, {device.type}, {dist.get_backend()}: "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    own_compute = model_dtypes(config, device)[1]
    dtypes = [torch.float64, torch.float32]
    if device.type == "cuda" or own_compute == torch.bfloat16:
        dtypes.append(torch.bfloat16)
    checks: list[Check] = []
    exact: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for compute in dtypes:
        # In float32 and bfloat16 the first step is judged, and the second one counted: Adam's steps
        # amplify the rounding of gradients near zero. So it is for compiled layers, which round
        # Moshi's float32 norms otherwise than eager code, in a float64 model too; and along
        # recordings for its float32 rope, which counts frames from the piece's window on.
        rounds_alike = not config.compile and not carries_states(config)
        all_steps = compute == torch.float64 and rounds_alike
        steps = min(STEPS, max(config.max_steps, 1)) if all_steps else 2
        sharded, traffic, memory = train_sharded(case, compute, steps, mesh, device)
        if not all_steps:
            del sharded.losses[1:], sharded.norms[1:]
            sharded.parameters.clear()
            steps = 1
        if dist.get_rank() == 0:
            plain = train_plain(case, compute, steps, sharded.max_norm, device)
            if compute == torch.float64:
                exact = plain.gradients
                sizes = {name: value.numel() for name, value in plain.start.items()}
                describe(case, sharded, sizes)
            checks += compare(compute, sharded, plain, exact)
    if dist.get_rank() == 0:
        unit = str(dtypes[-1]).removeprefix("torch.")
        report.print_tables(checks, sizes, traffic, memory, mesh.shape, unit)
    passed = from_first_rank("" if any(check.failed for check in checks) else "yes") == "yes"
    close_process_group()
    return passed


def describe(case: Case, sharded: Trained, sizes: Mapping[str, int]) -> None:
    """What is trained, read back where it can be."""
    config, settings = case.config, case.lm_config
    inner = f"TTT-{_INNER[config.ttt.inner_model]} in layers {config.ttt.layers}"
    trained = sum(sizes[name] for name in sharded.gradients)
    clipped = sum(norm > sharded.max_norm for norm in sharded.norms)
    flags = {
        "full_finetuning": config.full_finetuning,
        "lora": f"of rank {config.lora.rank}" if config.lora.enable else False,
        "ft_embed": config.lora.enable and config.lora.ft_embed,
        "gradient_checkpointing": config.gradient_checkpointing,
        "recompute": config.parallel.recompute,
        "states carried from piece to piece": carries_states(config),
        "compile": config.compile,
        "reshard_after_forward": config.parallel.reshard_after_forward,
        "reduce_every_microbatch": config.parallel.reduce_every_microbatch,
    }
    print(
        f"model: {settings['num_layers']} layers, {settings['num_heads']} heads of "
        f"{settings['dim'] // settings['num_heads']}, "
        f"{inner if config.ttt.enable else 'no TTT'}; {sum(sizes.values()):,} parameters, "
        f"{trained:,} trained\n"
        f"attention context: {sharded.contexts}\n"
        + ", ".join(f"{name} {str(value).lower()}" for name, value in flags.items())
        + f"\na step: {case.samples} samples of {FRAMES} frames, {config.num_microbatches} "
        f"microbatches of {config.batch_size} a rank; {clipped} of {len(sharded.norms)} clipped to "
        f"{sharded.max_norm:.3g}",
        flush=True,
    )


def main(arguments: list[str]) -> int:
    """Check the command line, then verify; the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    # The losses are views of FSDP2's outputs and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        case = read_case(
            arguments,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    except UserError as error:
        exit_with(error)
    if case.config.device == "cpu":
        hide_gpus()
    return 0 if verify(case) else 1


if __name__ == "__main__":
    leave_job(main(sys.argv[1:]))
