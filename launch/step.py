"""One training step and one evaluation, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from launch.reporting.inner_loop import InnerLossCurves
from parallel.fsdp import reduce_gradients_after
from parallel.mesh import Mesh
from parallel.reduce import sum_over_data_ranks
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.loss import LossConfig, step_weights, weighted_mean


class Microbatches(Protocol):
    """This rank's share of a step, in the order in which it is computed."""

    steps: Sequence[Tensor]
    """int `[B, K, T + 1]` each, on the model's device: what `TTTMoshi.step_losses` takes"""

    offsets: Sequence[Sequence[int]] | None
    """of each and of each lane, frames of the same recording that came before; None: not known"""

    def losses(self, model: TTTMoshi, index: int) -> tuple[Tensor, Tensor]:
        """Text `[B, 1, T]` and audio `[B, dep_q, T]` losses of microbatch `index`."""
        ...

    def backward_after(self, index: int) -> bool:
        """Whether a backward follows, over all microbatches since the last one."""
        ...

    def aside(self, model: TTTMoshi, index: int) -> tuple[Tensor, Tensor]:
        """`losses` of a look, without gradients: nothing goes on by it.

        For the first microbatch before all others, or any after all.
        """
        ...


class SeparatePieces:
    """Microbatches of pieces that know nothing of each other.

    Args:
        codes: int `[B, K, T]` each, on the model's device.
    """

    def __init__(self, model: TTTMoshi, codes: Sequence[Tensor]) -> None:
        self.steps: Sequence[Tensor] = [model.steps(each) for each in codes]
        self.offsets: Sequence[Sequence[int]] | None = [[0] * len(each) for each in codes]

    def losses(self, model: TTTMoshi, index: int) -> tuple[Tensor, Tensor]:
        return model.step_losses(self.steps[index])

    def backward_after(self, index: int) -> bool:
        return True

    def aside(self, model: TTTMoshi, index: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.losses(model, index)


@dataclass(frozen=True)
class StepLoss:
    """A step's loss, the mean over every sample of the step on all ranks (scalars on the device).

    `total = text + audio` is what was differentiated. `microbatches` `[M]`: what this rank's own
    add to it, before any sum over ranks.
    """

    total: Tensor
    text: Tensor
    audio: Tensor
    microbatches: Tensor


def accumulate_gradients(
    model: TTTMoshi,
    microbatches: Microbatches,
    config: LossConfig,
    mesh: Mesh,
    *,
    reduce_every_microbatch: bool = False,
) -> StepLoss:
    """Forward and backward of this rank's share of a step; gradients end up complete and sharded.

    Args:
        reduce_every_microbatch: as `parallel.fsdp.reduce_gradients_after` has it.

    The loss is divided by weights summed over all ranks and microbatches, so neither it nor the
    gradients depend on how the samples were spread. FSDP2 averages gradients over data ranks where
    the sum is wanted; the factor `dp_size` makes up for that. (tp ranks repeat Moshi's computation
    and get equal gradients, for which FSDP2's average over them is right.)
    """
    weights = [step_weights(steps[:, :, 1:], config) for steps in microbatches.steps]
    sums_of_weights = [torch.stack([text.sum(), audio.sum()]).double() for text, audio in weights]
    own = torch.stack(sums_of_weights).sum(dim=0)
    text_weight, audio_weight = sum_over_data_ranks(own, mesh.dp_group)
    losses, pending = [], []
    for index, (text_w, audio_w) in enumerate(weights):
        text_ce, audio_ce = microbatches.losses(model, index)
        text = weighted_mean((text_ce * text_w).sum(), text_weight)
        audio = weighted_mean((audio_ce * audio_w).sum(), audio_weight)
        pending.append(text + audio)
        losses.append(torch.stack([text.detach(), audio.detach()]).double())
        if microbatches.backward_after(index):
            last = index == len(weights) - 1
            reduce_gradients_after(model, last=last, every_microbatch=reduce_every_microbatch)
            (torch.stack(pending).sum() * mesh.dp_size).backward()
            pending = []
    by_microbatch = torch.stack(losses)  # [M, 2]
    text, audio = sum_over_data_ranks(by_microbatch.sum(dim=0), mesh.dp_group)
    return StepLoss(text + audio, text, audio, microbatches=by_microbatch.sum(dim=1))


@dataclass(frozen=True)
class EvalLoss:
    """Held-out losses: the training loss and its parts, means over all valid positions."""

    loss: float
    text_loss: float
    audio_loss: float
    text_loss_without_padding: float
    audio_loss_by_codebook: list[float]

    def as_metrics(self) -> dict[str, float]:
        """Flat names for logging, `eval_loss`, `eval_audio_loss_1`, …"""
        metrics = {
            "eval_loss": self.loss,
            "eval_text_loss": self.text_loss,
            "eval_audio_loss": self.audio_loss,
            "eval_text_loss_without_padding": self.text_loss_without_padding,
        }
        by_codebook = enumerate(self.audio_loss_by_codebook, start=1)
        return metrics | {f"eval_audio_loss_{index}": loss for index, loss in by_codebook}


def _added(inner: InnerLossCurves, batch: Microbatches, index: int) -> AbstractContextManager[None]:
    if batch.offsets is None:
        raise ValueError("evaluate: inner losses by position need batches that know their offsets")
    return inner.reading(batch.steps[index], batch.offsets[index])


@torch.no_grad()
def evaluate(
    model: TTTMoshi,
    batches: Iterable[Microbatches],
    config: LossConfig,
    mesh: Mesh,
    device: torch.device,
    inner: InnerLossCurves | None = None,
) -> EvalLoss:
    """Mean losses over this and all other ranks' batches; all ranks give equally many.

    Args:
        batches: samples of -1 alone count for nothing.
        inner: what adds up inner losses on the way; the batches then know their offsets.
    """
    parts = 2 + 1 + config.dep_q  # weighted text and audio, spoken text, every codebook
    totals = torch.zeros(2, parts, dtype=torch.float64, device=device)  # sums, weights
    padding = torch.tensor(config.text_padding_ids, device=device)
    for batch in batches:
        for index, steps in enumerate(batch.steps):
            targets = steps[:, :, 1:]
            text_w, audio_w = (w.double() for w in step_weights(targets, config))
            with nullcontext() if inner is None else _added(inner, batch, index):
                text_ce, audio_ce = (ce.double() for ce in batch.losses(model, index))
            spoken = ((text_w > 0) & ~torch.isin(targets[:, :1], padding)).double()
            predicted = (audio_w > 0).double()
            pairs = [(text_ce, text_w), (audio_ce, audio_w), (text_ce, spoken)]
            pairs += [(audio_ce[:, k], predicted[:, k]) for k in range(config.dep_q)]
            totals[0] += torch.stack([(ce * w).sum() for ce, w in pairs])
            totals[1] += torch.stack([w.sum() for _, w in pairs])
    sums, weights = sum_over_data_ranks(totals, mesh.dp_group)
    text, audio, spoken_text, *codebooks = weighted_mean(sums, weights).tolist()
    return EvalLoss(
        loss=text + audio,
        text_loss=text,
        audio_loss=audio,
        text_loss_without_padding=spoken_text,
        audio_loss_by_codebook=codebooks,
    )
