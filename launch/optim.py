"""Optimizer and learning-rate schedule, of torchtitan's containers."""

from __future__ import annotations

import re

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

from launch.configuration.schema import OptimConfig

# First match wins. Biases, norms and gates are not decayed; TTT has a learning rate of its own.
_GROUPS: tuple[tuple[str, bool, bool], ...] = (  # (pattern of names, is TTT, decays)
    (r"\.ttt\.(alpha$|.*bias$|.*norm|layer\.b\d$)", True, False),
    (r"\.ttt\.", True, True),
    (r"norm|bias$", False, False),
    (r".", False, True),
)


def build_optimizers(model: nn.Module, config: OptimConfig, *, fused: bool) -> OptimizersContainer:
    """AdamW over the trainable parameters, in up to four groups.

    Args:
        model: sharded; its trainable parameters are what `requires_grad` says.
        fused: the fused CUDA kernel instead of foreach.
    """
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    groups = []
    taken: set[str] = set()
    for pattern, is_ttt, decays in _GROUPS:
        matched = {name for name in trainable if re.search(pattern, name)} - taken
        taken |= matched
        if not matched:
            continue
        lr = config.ttt_lr if is_ttt and config.ttt_lr is not None else config.lr
        groups.append(
            ParamGroupConfig(
                pattern=pattern,
                optimizer_name="AdamW",
                optimizer_kwargs={
                    "lr": lr,
                    "betas": tuple(config.betas),
                    "eps": config.eps,
                    "weight_decay": config.weight_decay if decays else 0.0,
                },
            )
        )
    settings = OptimizersContainer.Config(
        param_groups=groups, implementation="fused" if fused else "foreach"
    )
    return OptimizersContainer(settings, model_parts=[model])


def build_schedule(
    optimizers: OptimizersContainer, config: OptimConfig, max_steps: int
) -> LRSchedulersContainer:
    """Linear warm-up over `pct_start` of the steps, then a cosine to `final_lr_fraction`."""
    settings = LRSchedulersContainer.Config(
        warmup_steps=round(config.pct_start * max_steps),
        decay_type="cosine",
        min_lr_factor=config.final_lr_fraction,
    )
    return settings.build(optimizers=optimizers, training_steps=max_steps)
