"""Activation checkpointing: what a layer's backward computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers
from ttt_dist.ops import SAVED_OPS

Recompute = Literal["none", "layer", "selective"]

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def checkpoint_layers(model: TTTMoshi, recompute: Recompute) -> int:
    """Set what every transformer and Depformer layer computes again; returns how many do.

    | | kept of a layer |
    |---|---|
    | `none` | all that autograd keeps |
    | `layer` | its input; with TTT also the TTT layer's input, output and, of its scan, outputs \
and states at group borders |
    | `selective` | also what attention gives and every second matrix product |

    The scan of one or two inner layers is never run again as a whole: its operator keeps what its
    own backward starts from (`ttt_dist.ops.SAVED_OPS`), which computes each group of mini-batches
    once more. So in every mode a step computes the scan's forward twice; that of deeper inner MLPs,
    which run by autograd, three times where a layer is recomputed.
    """
    if recompute == "none":
        return 0
    layers = transformer_layers(model) + depformer_layers(model)
    for layer in layers:
        selective = partial(_recomputed, context_fn=partial(_contexts, recompute))
        layer.wrap_parts(
            backbone=selective if recompute == "selective" else _recomputed, ttt=selective
        )
    return len(layers)


def _recomputed(part: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`part`, whose backward computes it again; `settings` are `checkpoint`'s."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return part(*args, **kwargs)
        # The layers draw no random numbers, so none need to be kept and replayed.
        return checkpoint(
            part,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            **settings,
            **kwargs,
        )

    return run


def _contexts(recompute: Recompute) -> Any:
    """Contexts of one part's forward and of its recomputation."""
    return create_selective_checkpoint_contexts(_Policy(recompute == "selective"))


class _Policy:
    """Which operators' results are kept; counts matrix products, so one object a forward.

    Older versions of torch (2.11) ask again while recomputing, and want the same answers.
    """

    def __init__(self, selective: bool) -> None:
        self._selective = selective
        self._products = {False: 0, True: 0}  # in the forward, in the recomputation

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        keep = op in SAVED_OPS
        if self._selective and op in _MATRIX_PRODUCTS:
            self._products[context.is_recompute] += 1
            keep = self._products[context.is_recompute] % 2 == 1
        elif self._selective and op in _ATTENTION:
            keep = True
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
