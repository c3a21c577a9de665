"""Losses by minute of their recordings, summed while recordings stream through a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from launch.reporting.inner_loop import InnerLossCurves
from parallel.carry import empty_carry
from parallel.mesh import Mesh
from parallel.reduce import sum_over_data_ranks
from ttt_dist.data.interleave import FRAME_RATE
from ttt_dist.data.lanes import RecordingBatch, recording_batches
from ttt_dist.data.recordings import RecordingDataset
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.loss import LossConfig, step_weights

MINUTE_FRAMES = round(60 * FRAME_RATE)  # 750

# One minute's figures by name; None where there was nothing to predict.
Figures = dict[str, float | None]
TTTMode = Literal["on", "off", "reset", "none"]


class MinuteSums:
    """Sums and weights of losses, float64, one row a minute of the recordings.

    Losses come by step. What is predicted there of a codebook with delay n belongs to the frame n
    steps earlier: every figure is counted in the minute of its own audio.

    Args:
        config: weights of text padding and of the first codebook, as in training.
        minutes: of the longest recording, rounded up.
    """

    def __init__(self, config: LossConfig, minutes: int, device: torch.device) -> None:
        self._config = config
        self._names = [
            *("padding_share", "text_loss", "text_loss_without_padding", "audio_loss"),
            *(f"audio_loss_{k}" for k in range(1, config.dep_q + 1)),
        ]
        shape = (2, len(self._names), minutes)  # sums, weights
        self.totals = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(
        self,
        steps: Tensor,
        losses: tuple[Tensor, Tensor],
        offsets: Tensor,
        has_text: Tensor,
    ) -> None:
        """Count a piece of every lane.

        Args:
            steps: int `[B, K, T + 1]`, as the model has read them.
            losses: of them, text `[B, 1, T]` and audio `[B, dep_q, T]`.
            offsets: int `[B]`, frames of the recording before the piece.
            has_text: bool `[B]`; the text of other lanes is no target.
        """
        config, targets = self._config, steps[:, :, 1:]
        text, audio = targets[:, 0], targets[:, 1 : 1 + config.dep_q]
        is_text = (text >= 0) & (text < config.text_card) & has_text[:, None]  # [B, T]
        is_code = (audio >= 0) & (audio < config.audio_card)  # [B, dep_q, T]
        is_padding = torch.isin(text, torch.tensor(config.text_padding_ids, device=text.device))
        text_weight, audio_weight = step_weights(targets, config)
        text_ce, audio_ce = losses[0][:, 0], losses[1]

        place = offsets[:, None] + torch.arange(text.shape[1], device=text.device)  # [B, T]
        self._count(0, place, config.delays[0], is_padding, is_text)
        self._count(1, place, config.delays[0], text_ce, text_weight[:, 0] * is_text)
        self._count(2, place, config.delays[0], text_ce, is_text & ~is_padding)
        for k in range(config.dep_q):
            delay = config.delays[1 + k]
            self._count(3, place, delay, audio_ce[:, k], audio_weight[:, k])
            self._count(4 + k, place, delay, audio_ce[:, k], is_code[:, k])

    def sum_over_ranks(self, group: dist.ProcessGroup | None) -> None:
        """Count what the other data-parallel ranks have counted too; once, at the end."""
        self.totals = sum_over_data_ranks(self.totals, group)

    def by_minute(self) -> list[Figures]:
        """Figures of every minute, the first being minute 0."""
        sums, weights = self.totals.cpu().unbind(0)
        return [
            {"minute": minute, **self._figures(sums[:, minute], weights[:, minute])}
            for minute in range(sums.shape[1])
        ]

    def overall(self) -> Figures:
        """Figures of all minutes together."""
        sums, weights = self.totals.cpu().sum(dim=2).unbind(0)
        return self._figures(sums, weights)

    def _count(self, row: int, place: Tensor, delay: int, value: Tensor, weight: Tensor) -> None:
        # Steps before a codebook's first frame and after the recording's end weigh nothing.
        minute = ((place - delay) // MINUTE_FRAMES).clamp(0, self.totals.shape[2] - 1).flatten()
        weight = weight.double().flatten()
        self.totals[0, row].index_add_(0, minute, value.double().flatten() * weight)
        self.totals[1, row].index_add_(0, minute, weight)

    def _figures(self, sums: Tensor, weights: Tensor) -> Figures:
        means: Figures = {
            name: total / weight if weight > 0 else None
            for name, total, weight in zip(
                self._names, sums.tolist(), weights.tolist(), strict=True
            )
        }
        text, audio = means["text_loss"], means["audio_loss"]
        codes = weights[4:].sum().item()
        every_code = sums[4:].sum().item() / codes if codes > 0 else None
        return {
            "frames": int(weights[4].item()),
            "loss": None if text is None or audio is None else text + audio,
            **means,
            "text_perplexity": _perplexity(means["text_loss_without_padding"]),
            "audio_perplexity": _perplexity(every_code),
        }


@torch.no_grad()
def stream_recordings(
    model: TTTMoshi,
    dataset: RecordingDataset,
    sums: MinuteSums,
    *,
    reset: bool,
    batch_size: int,
    mesh: Mesh,
    dtype: torch.dtype,
    device: torch.device,
    broken: dict[int, str],
    inner: InnerLossCurves | None = None,
    progress: Callable[[RecordingBatch], None] | None = None,
) -> None:
    """Pass every recording through the model, piece after piece, and count this rank's share.

    Args:
        sums: of this model; complete once it is summed over ranks.
        reset: TTT layers begin each piece with their learned weights; attention goes on.
        batch_size: recordings side by side on a rank.
        dtype: of computation.
        broken: as `recording_batches` has it.
        inner: what adds up inner losses on the way.
        progress: called after each batch.
    """
    carry = empty_carry(model, batch_size, mesh, dtype=dtype, device=device)
    for batch in recording_batches(
        dataset,
        batch_size=batch_size,
        delays=list(model.delays),
        initial=model.initial_tokens(),
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        broken=broken,
    ):
        steps, begins = batch.steps.to(device), batch.begins.to(device)
        inner_begins = torch.ones_like(begins) if reset else None
        with (
            nullcontext() if inner is None else inner.reading(steps, batch.offsets),
            model.passing(carry, begins, inner_begins) as passage,
        ):
            losses = model.step_losses(steps)
        carry = passage.carry
        has_text = [n >= 0 and dataset.has_text(n) for n in batch.recordings]
        sums.add(
            steps,
            losses,
            torch.tensor(batch.offsets, device=device),
            torch.tensor(has_text, device=device),
        )
        if progress is not None:
            progress(batch)


def _perplexity(loss: float | None) -> float | None:
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf
