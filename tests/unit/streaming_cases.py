"""The tiny hybrid model, streamed: steps, their logits, and the TTT state between them."""

import torch
from moshi.models.lm import LMGen, LMModel, LMOutput
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from torch import Tensor

from tests.distributed.tiny import TTT_LAYERS
from tests.unit.moshi_cases import active_hybrid_model, logits_in_steps, set_windows
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.streaming import TTTLayerState


def ready(inner: str = "mlp") -> TTTMoshi:
    """Inner networks: "linear", "mlp", or "deep", an MLP of three layers."""
    inner_model = "linear" if inner == "linear" else "mlp"
    model = active_hybrid_model(inner_model, mlp_layers=3 if inner == "deep" else 2)
    return set_windows(model).eval()


def in_steps(model: LMModel, codes: Tensor) -> Tensor:
    """Codes `[B, K, T]` as the model reads them, `[B, K, T + 1]`: delayed, initial tokens first."""
    initial = model._get_initial_token().expand(codes.shape[0], -1, -1)
    return torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)


def step(model: LMModel, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One streaming step on `[B, K, 1]`: text logits `[B, 1, 1, card]`, audio `[B, 8, 1, card]`.

    The Depformer runs as in LMGen, codebook after codebook, with the true ones given.
    """
    out, text = model.forward_text(tokens)
    with model.depformer.streaming(tokens.shape[0]):
        audio = [model.forward_depformer(k, targets[:, k : k + 1], out) for k in range(model.dep_q)]
    return text, torch.cat(audio, dim=1)


def joined(model: LMModel, steps: list[tuple[Tensor, Tensor]], like: LMOutput) -> LMOutput:
    """Logits of all steps, aligned with the codes as the training forward aligns its own."""
    text, audio = (torch.cat(part, dim=2) for part in zip(*steps, strict=True))
    audio, _ = _undelay_sequence(model.delays[1 : 1 + model.dep_q], audio, fill_value=torch.nan)
    text, _ = _undelay_sequence(model.delays[:1], text, fill_value=torch.nan)
    return LMOutput(audio, like.mask, text, like.text_mask)


def largest_difference(found: LMOutput, expected: LMOutput) -> float:
    a, b = logits_in_steps(found), logits_in_steps(expected)
    assert torch.equal(a.isnan(), b.isnan())
    return (a - b).abs().nan_to_num().max().item()


def states(model: LMModel) -> list[TTTLayerState]:
    found = [transformer_layers(model)[index]._streaming_state for index in TTT_LAYERS]
    assert all(isinstance(state, TTTLayerState) for state in found)
    return found


def copies(state: TTTLayerState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.inner.tensors().items()}


def generate(model: LMModel, user: Tensor, **kwargs: bool) -> Tensor:
    """Tokens `[1 + dep_q, steps]` of Moshi's own generator at temperature 0."""
    generator = LMGen(model, use_sampling=False, check=True, **kwargs)
    with generator.streaming(user.shape[0]):
        steps = [generator.step(user[:, :, t : t + 1]) for t in range(user.shape[2])]
    return torch.cat([tokens for tokens in steps if tokens is not None], dim=2)
