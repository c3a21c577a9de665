"""Tiny Moshi models with and without TTT, filled through the code that fills the 7B."""

import json
import tempfile
from pathlib import Path

import torch
from moshi.models.lm import LMModel, LMOutput
from moshi.models.lm_utils import _undelay_sequence
from safetensors.torch import load_file, save_file

from tests.distributed.tiny import LM_CONFIG, random_codes, save_release_weights, ttt_placement
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import TTTPlacement, build_model
from ttt_dist.moshi.context import set_attention_contexts
from ttt_dist.moshi.loss import LossConfig, loss_weights, token_losses, weighted_mean
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

DELAYS = LM_CONFIG["delays"]
DEP_Q = LM_CONFIG["dep_q"]


def hybrid_model(
    ttt: TTTPlacement | None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TTTMoshi:
    """The tiny hybrid model with `tiny.stock_model`'s weights, read from a packed release file."""
    model = build_model(LM_CONFIG, ttt, device="cpu", dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_release_weights(path)
        load_base_weights(model, path)
    init_ttt_weights(model, seed)
    return model


def active_hybrid_model(
    inner_model: str = "mlp", dtype: torch.dtype = torch.float32, mlp_layers: int = 2
) -> TTTMoshi:
    """Gate 0.3, inner networks and their gates away from the initial values: TTT matters."""
    model = hybrid_model(ttt_placement(inner_model, alpha=0.3, mlp_layers=mlp_layers), dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ttt.layer." in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def make_release(folder: Path, **settings: object) -> Path:
    """A release of the tiny model with more keys in its config.json.

    Moshi's weights are real; of Mimi there is one tensor, and an empty tokenizer: they are copied.
    """
    folder.mkdir(parents=True)
    names = {"mimi_name": "mimi.safetensors", "tokenizer_name": "tokenizer.model"}
    (folder / "config.json").write_text(json.dumps(LM_CONFIG | names | settings))
    save_release_weights(folder / "model.safetensors")
    save_file({"codebook": torch.zeros(3)}, folder / "mimi.safetensors")
    (folder / "tokenizer.model").touch()
    return folder


def split_release(path: Path, files: int = 3) -> Path:
    """`path` as several files with an index, which is returned; `path` itself is removed."""
    tensors = load_file(path)
    path.unlink()
    weight_map = {}
    for part in range(files):
        name = f"model-{part + 1:05d}-of-{files:05d}.safetensors"
        own = dict(list(tensors.items())[part::files])
        save_file(own, path.with_name(name))
        weight_map |= dict.fromkeys(own, name)
    index = path.with_name(path.name + ".index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def set_windows(model: TTTMoshi, ttt_context: int = 5, other_context: int = 7) -> TTTMoshi:
    set_attention_contexts(model, ttt_context=ttt_context, other_context=other_context)
    return model


def clean_codes(samples: int, frames: int) -> torch.Tensor:
    """`[samples, 17, frames]` without padded frames."""
    return random_codes(samples + 1, frames)[:samples]


def total_loss(
    output: LMOutput,
    codes: torch.Tensor,
    model: LMModel,
    text_padding_weight: float = 0.5,
    first_codebook_weight_multiplier: float = 100.0,
) -> torch.Tensor:
    """Text plus audio loss of one batch, as a training step forms it."""
    config = LossConfig.of_model(
        model,
        text_padding_weight=text_padding_weight,
        first_codebook_weight_multiplier=first_codebook_weight_multiplier,
    )
    means = [
        weighted_mean((loss * weight).sum(), weight.sum())
        for loss, weight in zip(
            token_losses(output, codes), loss_weights(codes, config), strict=True
        )
    ]
    return means[0] + means[1]


def by_frame(by_step: torch.Tensor, model: LMModel, first: int) -> torch.Tensor:
    """`[B, k, T]` of the codebooks from `first` on, brought from steps to the codes' frames."""
    rows = slice(first, first + by_step.shape[1])
    values, known = _undelay_sequence(model.delays[rows], by_step, fill_value=0.0)
    return torch.where(known, values, torch.zeros_like(values))


def logits_in_steps(output: LMOutput) -> torch.Tensor:
    """All logits `[B, 1 + dep_q, S, card]` by the step at which the model computes them.

    Row 0 is text (cut or filled with NaN to the audio's card), row k codebook k. Moshi aligns
    logits with frames: those of frame t stem from step t + delay; NaN where there are none.
    """
    B, K, T, card = output.logits.shape
    steps = torch.full((B, 1 + K, T, max(card, output.text_logits.shape[-1])), float("nan"))
    steps[:, 0, :, : output.text_logits.shape[-1]] = output.text_logits[:, 0]
    for k in range(1, 1 + K):
        steps[:, k, DELAYS[k] :, :card] = output.logits[:, k - 1, : T - DELAYS[k]]
    return steps


def largest_change(first: LMOutput, second: LMOutput) -> torch.Tensor:
    """`[B, 1 + dep_q, S]`: the largest change of a logit, NaN where the model predicts nothing."""
    change = (logits_in_steps(first) - logits_in_steps(second)).abs()
    amount = change.nan_to_num(nan=-1.0).amax(dim=-1)
    return torch.where(amount < 0, torch.full_like(amount, float("nan")), amount)
