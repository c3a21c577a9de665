"""How TTT does while a model trains: what its inner loops learn, move and let through, by layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.step import Microbatches
from parallel.mesh import Mesh
from parallel.reduce import sum_over_data_ranks, sum_over_tp_ranks
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.probe import probing
from ttt_dist.reading import Reading

NAMES = (
    "ttt_inner_loss_w0",
    "ttt_inner_loss_before",
    "ttt_inner_loss_after",
    "ttt_inner_lr",
    "ttt_state_change",
    "ttt_gate_mean",
    "ttt_gate_max",
)


@torch.no_grad()
def ttt_health(model: TTTMoshi, microbatches: Microbatches, mesh: Mesh) -> dict[str, float]:
    """Figures of the step's first microbatch, over all ranks, which call it together.

    The microbatch is read aside, before the step, from where it starts; nothing goes on by it.

    Returns:
        `<name>_layer_<i>` for each of `NAMES`: mean inner losses at W0, before and after a token's
        step (`ops.token_losses`), the mean inner learning rate (all its factors applied),
        ‖W_t - W0‖ / ‖W0‖ of a lane's inner weights at the end of what was read, and the mean and
        the largest |tanh α|.
    """
    read = model.read_frames(microbatches.steps[0])  # [B, T]
    lanes = read.any(dim=1).double()
    sums: dict[int, Tensor] = {}  # losses and learning rate
    changes: dict[int, Tensor] = {}  # [2, B]
    heads = 0

    def look(layer: int, given: Reading) -> None:
        nonlocal heads
        heads = given.config.num_heads
        losses, changes[layer] = (each.double() for each in given.learned(read))
        frames = torch.cat([losses, given.eta[None].double()])  # [4, B, H, T]
        sums[layer] = torch.where(read, frames.sum(dim=2), 0.0).sum(dim=(1, 2))

    with probing(model, look):
        microbatches.aside(model, 0)

    group = mesh.dp_group
    counts = sum_over_data_ranks(torch.stack([read.sum().double(), lanes.sum()]), group)
    own = sum_over_tp_ranks(torch.stack([*sums.values()]), mesh)
    means = sum_over_data_ranks(own, group) / (counts[0] * heads)  # [layers, 4]
    changed, initial = sum_over_tp_ranks(torch.stack([*changes.values()]), mesh).unbind(dim=1)
    change = torch.where(lanes > 0, (changed / initial).sqrt(), 0.0).sum(dim=1)
    change = sum_over_data_ranks(change, group) / counts[1]  # [layers]

    figures: dict[str, float] = {}
    layers = transformer_layers(model)
    for index, mean, moved in zip(sums, means.tolist(), change.tolist(), strict=True):
        block = layers[index].ttt
        assert block is not None  # it was read
        alpha = block.alpha.detach()
        gate = (alpha.full_tensor() if isinstance(alpha, DTensor) else alpha).tanh().abs()
        values = (*mean, moved, gate.mean().item(), gate.max().item())
        figures |= {f"{n}_layer_{index}": v for n, v in zip(NAMES, values, strict=True)}
    return figures
