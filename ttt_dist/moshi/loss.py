"""Moshi's training loss: weighted cross-entropy of text and audio, as sums and weights.

A step's loss is (sum over all ranks and microbatches) / (weight over all ranks and microbatches),
for text and audio each, so it does not depend on how samples are laid over ranks. The weights
follow from the codes alone and are known before the first forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torch.nn import functional as F

# Below every weight that a position can have; keeps a batch without any target finite.
_LEAST_WEIGHT = 1e-20


@dataclass(frozen=True)
class LossConfig:
    """How positions are weighted (moshi-finetune's two settings) and which ids mean what."""

    text_padding_weight: float
    first_codebook_weight_multiplier: float
    text_padding_ids: tuple[int, ...]
    zero_token_id: int
    delays: tuple[int, ...]
    dep_q: int
    text_card: int
    audio_card: int

    @classmethod
    def of_model(
        cls,
        model: LMModel,
        *,
        text_padding_weight: float,
        first_codebook_weight_multiplier: float,
    ) -> LossConfig:
        """The ids, delays and predicted codebooks are the model's own."""
        return cls(
            text_padding_weight=text_padding_weight,
            first_codebook_weight_multiplier=first_codebook_weight_multiplier,
            text_padding_ids=(model.text_padding_token_id, model.end_of_text_padding_id),
            zero_token_id=model.zero_token_id,
            delays=tuple(model.delays),
            dep_q=model.dep_q,
            text_card=model.text_card,
            audio_card=model.card,
        )


def loss_weights(codes: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Weight of every target; 0 where there is none.

    Args:
        codes: int `[B, K, T]`, text first; -1 (`zero_token_id`) has no target.

    Returns:
        text `[B, 1, T]` and audio `[B, dep_q, T]`, float32. A codebook delayed by `n` steps has
        no prediction for the last `n` frames (moshi's `_undelay_sequence`).
    """
    frames = codes.shape[2]

    def predicted(part: Tensor, delays: Sequence[int]) -> Tensor:
        last = torch.tensor([frames - delay for delay in delays], device=codes.device)
        before_last = torch.arange(frames, device=codes.device) < last[:, None]  # [k, T]
        return (part != config.zero_token_id) & before_last

    text, audio = codes[:, :1], codes[:, 1 : 1 + config.dep_q]
    valid_text = predicted(text, config.delays[:1])
    valid_audio = predicted(audio, config.delays[1 : 1 + config.dep_q])
    return _weights(text, valid_text, valid_audio, config)


def step_weights(targets: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """As `loss_weights`, for the delayed sequence: by step instead of by frame.

    Args:
        targets: int `[B, K, T]`, text first; -1 and initial tokens are no target.

    Returns:
        text `[B, 1, T]` and audio `[B, dep_q, T]`, float32.
    """
    text, audio = targets[:, :1], targets[:, 1 : 1 + config.dep_q]
    valid_text = (text >= 0) & (text < config.text_card)
    return _weights(text, valid_text, (audio >= 0) & (audio < config.audio_card), config)


def _weights(
    text: Tensor, valid_text: Tensor, valid_audio: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    padding = torch.tensor(config.text_padding_ids, device=text.device)
    text_weight = valid_text.float()
    text_weight = torch.where(
        torch.isin(text, padding), text_weight * config.text_padding_weight, text_weight
    )
    first = torch.ones(config.dep_q, 1, device=text.device)
    first[0] = config.first_codebook_weight_multiplier
    return text_weight, valid_audio.float() * first


def token_losses(output: LMOutput, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target, 0 where the model's mask says there is none.

    Training takes `TTTMoshi.step_losses`, the same by step, without keeping all logits.

    Returns:
        text `[B, 1, T]` and audio `[B, dep_q, T]`, float32 (float64 for float64 logits).
    """
    dep_q = output.logits.shape[1]
    text = masked_cross_entropy(output.text_logits, output.text_mask, codes[:, :1])
    audio = masked_cross_entropy(output.logits, output.mask, codes[:, 1 : 1 + dep_q])
    return text, audio


def weighted_mean(loss_sum: Tensor, weight: Tensor) -> Tensor:
    """`loss_sum / weight`, finite (and 0) where nothing was to be predicted."""
    return loss_sum / weight.clamp(min=_LEAST_WEIGHT)


def masked_cross_entropy(logits: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy by position, 0 where `mask` is False; there logits and targets may be anything.

    Args:
        logits: `[B, k, T, card]`; computed in float32 (float64 where they are).
        mask, targets: bool and int `[B, k, T]`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Masked positions hold NaN logits: they must go before the cross-entropy, for the gradient of
    # a product with zero would still be NaN.
    logits = torch.where(
        mask[..., None], logits, torch.zeros((), dtype=logits.dtype, device=logits.device)
    )
    targets = torch.where(mask, targets, torch.zeros_like(targets))
    loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return torch.where(mask, loss.view(mask.shape), torch.zeros_like(loss.view(mask.shape)))
