"""What is trained over ranks: layouts, and the table of cases that worker.py runs and tests judge.

A new case is one line of `CASES`; `plan` overrides fields of `ParallelPlan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.mesh import Layout

STEPS = 5
SAMPLES = 8  # a step, over all ranks
ACCUMULATION = 2  # microbatches a rank and step
MAX_NORM = 0.5  # the gradients' norm is 1.2 to 11: clipping acts in every step

# name -> (ranks, layout)
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "fsdp 2": (2, Layout()),
    "tp 2": (2, Layout(tp=2)),
    "replicate 2": (2, Layout(dp_replicate=2)),
    "tp 2 x fsdp 2": (4, Layout(tp=2)),
    "tp 4": (4, Layout(tp=4)),
    "replicate 2 x tp 2": (4, Layout(dp_replicate=2, tp=2)),
    "hsdp 2 x 2": (4, Layout(dp_replicate=2, dp_shard=2)),
    "hsdp 2 x 2 x tp 2": (8, Layout(dp_replicate=2, dp_shard=2, tp=2)),
    "tp 4 x fsdp 2": (8, Layout(dp_shard=2, tp=4)),
}


@dataclass(frozen=True)
class Trained:
    """A model and what of it is trained, whatever the layout.

    Args:
        dtype: of weights, computation and gradient sums.
        inner_model: TTT's, `mlp` or `linear`.
        mlp_layers: of TTT's inner MLP.
        frozen: train TTT alone.
        lora_rank: train adapters of this rank beside TTT, everything else being frozen; 0 for none.
        ft_embed: with adapters, train the embeddings too.
    """

    dtype: torch.dtype = torch.float64
    inner_model: str = "mlp"
    mlp_layers: int = 2
    frozen: bool = False
    lora_rank: int = 0
    ft_embed: bool = False


@dataclass(frozen=True)
class Case:
    """One comparison with the model on one process.

    Args:
        layout: a name of `LAYOUTS`.
        trained: what is laid over the ranks.
        reduce_every_microbatch: of `accumulate_gradients`.
        plan: fields of `ParallelPlan` beside the dtypes.
    """

    layout: str
    trained: Trained = Trained()
    reduce_every_microbatch: bool = False
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def steps(self) -> int:
        """AdamW steps that are judged.

        All of them on a layout as it stands. Variants differ in how a step's gradients come about,
        and two steps show that, and what a step leaves to the next; adapters, which are made and
        frozen in code of their own, take a third. One in float32 and in compiled code, which
        rounds Moshi's float32 norms otherwise than eager code, in a float64 model too: Adam's
        steps amplify that where gradients are near zero (to 6e-6).
        """
        if self.trained.dtype != torch.float64 or self.job != "eager":
            return 1
        if self == Case(self.layout):
            return STEPS
        return 3 if self.trained.lora_rank else 2

    @property
    def job(self) -> str:
        """Compiled cases run in a job of their own: they are slow on busy cores."""
        return "compiled" if self.plan.get("compile") else "eager"


FLOAT32 = Trained(torch.float32)
LINEAR = Trained(inner_model="linear")
FROZEN = Trained(frozen=True)
LORA = Trained(lora_rank=6)

CASES: dict[str, Case] = {
    **{f"{layout}, float64": Case(layout) for layout in LAYOUTS},
    "fsdp 2, float32": Case("fsdp 2", FLOAT32),
    "tp 2, float32": Case("tp 2", FLOAT32),
    "tp 2 x fsdp 2, float32": Case("tp 2 x fsdp 2", FLOAT32),
    "tp 2, linear": Case("tp 2", LINEAR),
    "tp 2 x fsdp 2, linear": Case("tp 2 x fsdp 2", LINEAR),
    "tp 2, three inner layers": Case("tp 2", Trained(mlp_layers=3)),
    "tp 2, frozen": Case("tp 2", FROZEN),
    "tp 2 x fsdp 2, frozen": Case("tp 2 x fsdp 2", FROZEN),
    "tp 2, LoRA": Case("tp 2", LORA),
    "tp 2 x fsdp 2, LoRA of odd rank and embeddings": Case(
        "tp 2 x fsdp 2", Trained(lora_rank=5, ft_embed=True)
    ),
    "fsdp 2, reduced every microbatch": Case("fsdp 2", reduce_every_microbatch=True),
    "hsdp 2 x 2, reduced every microbatch": Case("hsdp 2 x 2", reduce_every_microbatch=True),
    "fsdp 2, no recomputation": Case("fsdp 2", plan={"recompute": "none", "prefetch_layers": 0}),
    "tp 2, no recomputation": Case("tp 2", plan={"recompute": "none"}),
    "tp 2, selective": Case("tp 2", plan={"recompute": "selective"}),
    "tp 2 x fsdp 2, selective": Case("tp 2 x fsdp 2", plan={"recompute": "selective"}),
    "tp 2, compiled": Case("tp 2", plan={"compile": True}),
}

# A checkpoint of the first layout is loaded into the second; with LoRA of this rank, if not 0.
RESHARDS: dict[str, tuple[str, str, int]] = {
    "fsdp 2 to tp 2": ("fsdp 2", "tp 2", 0),
    "tp 2 to fsdp 2": ("tp 2", "fsdp 2", 0),
    "tp 2 x fsdp 2 to tp 4": ("tp 2 x fsdp 2", "tp 4", 0),
    "tp 2 x fsdp 2 to tp 4, LoRA": ("tp 2 x fsdp 2", "tp 4", 5),
}

# Trained along recordings on the first layout, resumed on the second; with so many pieces that
# gradients go back through.
ALONG: dict[str, tuple[str, str, int]] = {
    "fsdp 2 to tp 2": ("fsdp 2", "tp 2", 1),
    "tp 2 to fsdp 2": ("tp 2", "fsdp 2", 2),
    "tp 2 x fsdp 2 to hsdp 2 x 2": ("tp 2 x fsdp 2", "hsdp 2 x 2", 2),
}

# Of what gradients are looked at while they wait for a step's last microbatch.
WAITING: dict[str, tuple[str, Trained]] = {
    "fsdp 2": ("fsdp 2", FLOAT32),
    "tp 2 x fsdp 2": ("tp 2 x fsdp 2", FLOAT32),
    "tp 2 x fsdp 2, LoRA": ("tp 2 x fsdp 2", Trained(torch.float32, lora_rank=6)),
    "hsdp 2 x 2": ("hsdp 2 x 2", FLOAT32),
}

# Where one layer and the words of DTensor are looked at on the tp axis alone.
TP_LAYOUTS = tuple(
    name for name, (ranks, layout) in LAYOUTS.items() if layout.tp > 1 and ranks <= 4
)
