"""Low-rank adapters on Moshi's linear layers (LoRA, https://arxiv.org/abs/2106.09685).

Layers and names are moshi's own: `X.weight` becomes `X.frozen_W.weight`, and beside it stand
`X.lora_A.weight [rank, inputs]` and `X.lora_B.weight [outputs, rank]`; the output is
`W x + scaling * B (A x)`. Where a projection is kept in a shape that tensor parallelism can cut
(`packed.py`), so is its adapter: `lora_B` of packed projections is `[parts, rows, rank]`, cut by
rows; `lora_A` of those whose inputs are split is cut by input. The other matrix is whole on every
rank, each of which gives a part of its gradient. Adapters enter and leave the shards together with
the frozen weight, so activations travel no more than without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_dist.moshi.packed import OutputLinear, PackedLinear, PackedProjection, own_rows
from ttt_dist.placement import BY_INPUT, REPLICATED, enter_shards, sum_shards, to_local


@dataclass(frozen=True)
class LoRASettings:
    """Adapters of every linear layer.

    Args:
        rank: of the product that is added to each weight. It may exceed the layer's own dims.
        scaling: factor of that product.
    """

    rank: int
    scaling: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: found {self.rank}, allowed are whole numbers from 1 on")


class PackedLoRA(LoRALinear):
    """The adapter of a `PackedLinear` or `PackedProjection`; `lora_B` is `[parts, rows, rank]`."""

    def __init__(
        self, base: PackedLinear | PackedProjection, lora: LoRASettings, dtype: torch.dtype
    ) -> None:
        parts, rows, inputs = base.weight.shape
        device = base.weight.device
        super().__init__(inputs, parts * rows, lora.rank, lora.scaling, device=device, dtype=dtype)
        self.frozen_W = cast(nn.Linear, base)
        up = nn.Linear(lora.rank, parts * rows, bias=False, device=device, dtype=dtype)
        self.lora_B = cast(nn.Linear, PackedLinear(up, parts))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to this rank's rows of every part."""
        frozen = self.frozen_W.weight
        x = enter_shards(x, like=frozen)
        lora = F.linear(F.linear(x, _shared(self.lora_A.weight)), own_rows(self.lora_B.weight))
        return F.linear(x, own_rows(frozen)) + lora * self.scaling


class PlainLoRA(LoRALinear):
    """moshi's adapter, put on a linear layer that is there already."""

    def __init__(self, base: nn.Linear, lora: LoRASettings, dtype: torch.dtype) -> None:
        sizes = (base.in_features, base.out_features, lora.rank)
        super().__init__(*sizes, lora.scaling, device=base.weight.device, dtype=dtype)
        self.frozen_W = base


class OutputLoRA(PlainLoRA):
    """The adapter of an `OutputLinear`: inputs may be split over ranks, the output is summed."""

    def forward(self, x: Tensor) -> Tensor:
        """This rank's inputs to all outputs."""
        frozen = self.frozen_W.weight
        down = F.linear(x, to_local(self.lora_A.weight, grad_placements=BY_INPUT))
        lora = F.linear(down, _shared(self.lora_B.weight))
        own = F.linear(x, to_local(frozen, grad_placements=BY_INPUT)) + lora * self.scaling
        return sum_shards(own, like=frozen)


def add_adapters(module: nn.Module, lora: LoRASettings, dtype: torch.dtype) -> None:
    """Put an adapter on every linear layer inside `module`, as moshi's own function does.

    Call it before TTT's blocks are added: their projections get none.

    Args:
        dtype: of the adapters; the layers they are put on keep theirs.
    """
    for name, child in module.named_children():
        if isinstance(child, (PackedLinear, PackedProjection)):
            setattr(module, name, PackedLoRA(child, lora, dtype))
        elif isinstance(child, OutputLinear):
            setattr(module, name, OutputLoRA(child, lora, dtype))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PlainLoRA(child, lora, dtype))
        else:
            add_adapters(child, lora, dtype)


def adapter_shapes(model: nn.Module, rank: int) -> dict[str, list[int]]:
    """Name to shape in a release of the adapters that `model`, which has none, could be given."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, PackedLinear)) and ".ttt." not in name:
            *outputs, inputs = module.weight.shape
            shapes[f"{name}.lora_A.weight"] = [rank, inputs]
            shapes[f"{name}.lora_B.weight"] = [math.prod(outputs), rank]
    return shapes


def merge_adapters(module: nn.Module) -> None:
    """Replace every adapted layer inside `module` by its base with `merged_weight`, in place.

    For a model on one device. The layers' types and shapes are then those of a model without
    adapters.
    """
    for name, child in module.named_children():
        if isinstance(child, LoRALinear):
            child.frozen_W.weight.data = merged_weight(child)
            setattr(module, name, child.frozen_W)
        else:
            merge_adapters(child)


@torch.no_grad()
def merged_weight(layer: LoRALinear) -> Tensor:
    """`W + scaling * B A`, of `frozen_W`'s shape and dtype."""
    frozen = layer.frozen_W.weight
    total = add_product(frozen, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    return total.to(frozen.dtype)


def add_product(frozen: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """`W + scaling * B A` of a whole weight, or of some of its rows and inputs.

    Args:
        frozen: W, `[..., inputs]`.
        down: A, `[rank, inputs]`.
        up: B, `[..., rank]`.

    Returns:
        `[..., inputs]`, in the widest dtype of all, float32 at least.
    """
    wide = torch.promote_types(torch.promote_types(frozen.dtype, down.dtype), torch.float32)
    return (up.to(wide) @ down.to(wide)).mul_(scaling).add_(frozen)


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter's full name belongs to an adapter (and to no release without LoRA)."""
    return ".lora_A." in name or ".lora_B." in name


def released_name(name: str) -> str:
    """The name that a release without adapters has for a parameter that is none of an adapter's."""
    return name.replace(".frozen_W.", ".")


def _shared(weight: Tensor) -> Tensor:
    """A matrix that is whole on every rank, each of which uses it with its own shard of others.

    Its gradient is summed over ranks by the same rule as an activation's, in float32 at least:
    FSDP2 would sum what it finds partial in the dtype of computation.
    """
    return enter_shards(to_local(weight, grad_placements=REPLICATED), like=weight)
