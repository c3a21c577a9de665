"""Loss: moshi-finetune's golden, targets that follow from the codes alone, NaN logits."""

from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMModel, LMOutput
from safetensors import safe_open
from safetensors.torch import load_file

from tests.distributed.tiny import LM_CONFIG, random_codes, ttt_placement
from tests.unit.moshi_cases import DEP_Q, by_frame, hybrid_model, total_loss
from ttt_dist.moshi.loss import (
    LossConfig,
    loss_weights,
    step_weights,
    token_losses,
    weighted_mean,
)

GOLDEN = Path(__file__).parents[1] / "assets" / "goldens" / "loss.safetensors"


def read_golden() -> tuple[dict[str, torch.Tensor], LMOutput, torch.Tensor, LossConfig]:
    """Tensors, model output, codes that lack a target where the golden's masks say so, weights."""
    with safe_open(GOLDEN, framework="pt") as file:
        metadata = file.metadata()
    golden = load_file(GOLDEN)
    output = LMOutput(
        golden["audio_logits"], golden["audio_mask"], golden["text_logits"], golden["text_mask"]
    )
    dep_q = golden["audio_mask"].shape[1]
    codes = golden["codes"].clone()
    # Its masks are random; the zero token is how codes say "no target here".
    codes[:, :1].masked_fill_(~golden["text_mask"], -1)
    codes[:, 1 : 1 + dep_q].masked_fill_(~golden["audio_mask"], -1)
    config = LossConfig(
        text_padding_weight=float(metadata["text_padding_weight"]),
        first_codebook_weight_multiplier=float(metadata["first_codebook_weight_multiplier"]),
        text_padding_ids=tuple(int(i) for i in metadata["text_padding_ids"].split(",")),
        zero_token_id=-1,
        delays=(0,) * codes.shape[1],
        dep_q=dep_q,
        text_card=output.text_logits.shape[-1],
        audio_card=output.logits.shape[-1],
    )
    return golden, output, codes, config


def test_golden_text_and_audio_loss():
    """1e-6: float32 cross-entropies of about 4, summed in another order."""
    golden, output, codes, config = read_golden()
    assert output.logits.isnan().any()
    assert output.text_logits.isnan().any()
    losses, weights = token_losses(output, codes), loss_weights(codes, config)
    for loss, weight, expected in zip(losses, weights, (golden["text_loss"], golden["audio_loss"])):
        found = weighted_mean((loss * weight).sum(), weight.sum())
        assert abs(found.item() - expected.item()) < 1e-6 * expected.item()


def test_weighted_sums_add_up_over_microbatches():
    """What makes the loss independent of the layout: sums and weights of parts add to the whole."""
    golden, output, codes, config = read_golden()
    whole = [loss.double() for loss in token_losses(output, codes)]
    for kind, weight in enumerate(loss_weights(codes, config)):
        parts = []
        for i in range(2):
            part = LMOutput(
                *(golden[name][i : i + 1] for name in ("audio_logits", "audio_mask")),
                *(golden[name][i : i + 1] for name in ("text_logits", "text_mask")),
            )
            own_weight = loss_weights(codes[i : i + 1], config)[kind]
            own_loss = token_losses(part, codes[i : i + 1])[kind].double()
            parts.append(((own_loss * own_weight).sum(), own_weight.sum()))
        assert sum(p[1] for p in parts) == weight.sum()
        # 1e-12: float64 sums of the same float32 numbers.
        expected = (whole[kind] * weight).sum()
        assert abs(sum(p[0] for p in parts) - expected) < 1e-12 * expected


@pytest.mark.parametrize("frames", [1, 2, 7, 16])
@pytest.mark.parametrize("delays", [LM_CONFIG["delays"], [0, 0, 2, 2, 3, 2, 2, 2, 1] + [0] * 8])
def test_targets_are_those_of_the_models_masks(frames, delays):
    """Weights are known before the forward; they are 0 exactly where the model masks."""
    model = LMModel(device="cpu", **(LM_CONFIG | {"delays": delays}))
    codes = random_codes(3, 16)[:, :, -frames:].contiguous()  # the last sample ends padded
    codes[0, 3, frames // 2] = -1
    codes[1, 0, 0] = -1
    with torch.no_grad():
        output = model(codes)
    config = LossConfig.of_model(
        model, text_padding_weight=0.5, first_codebook_weight_multiplier=100.0
    )
    text, audio = loss_weights(codes, config)
    assert torch.equal(text > 0, output.text_mask)
    assert torch.equal(audio > 0, output.mask)
    if frames > 1:
        assert output.mask.any()
        assert not output.mask.all()


def test_weights_of_padding_and_of_the_first_codebook():
    codes = torch.zeros(1, 17, 5, dtype=torch.long)
    codes[0, 0] = torch.tensor([3, 0, 7, -1, 3])
    config = LossConfig(
        text_padding_weight=0.25,
        first_codebook_weight_multiplier=10.0,
        text_padding_ids=(3, 0),
        zero_token_id=-1,
        delays=tuple(LM_CONFIG["delays"]),
        dep_q=DEP_Q,
        text_card=LM_CONFIG["text_card"],
        audio_card=LM_CONFIG["card"],
    )
    text, audio = loss_weights(codes, config)
    assert text.tolist() == [[[0.25, 0.25, 1.0, 0.0, 0.25]]]
    assert audio[0, 0].tolist() == [10.0] * 5  # the first codebook isn't delayed
    assert audio[0, 1:].tolist() == [[1.0] * 4 + [0.0]] * (DEP_Q - 1)


@pytest.mark.parametrize("text_padding_weight", [0.5, 0.0])
def test_nan_logits_at_masked_positions_leave_loss_and_gradients_finite(text_padding_weight):
    model = hybrid_model(ttt_placement())
    codes = random_codes(2, 21)
    output = model(codes)
    assert output.logits.isnan().any()  # or this test shows nothing
    output.logits.retain_grad()
    loss = total_loss(output, codes, model, text_padding_weight=text_padding_weight)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(output.logits.grad).all()
    assert torch.all(output.logits.grad[~output.mask] == 0)
    for name, value in model.named_parameters():
        assert torch.isfinite(value.grad).all(), name


def test_nothing_to_predict_is_a_loss_of_zero():
    model = hybrid_model(None)
    codes = torch.full((1, 17, 9), -1)
    loss = total_loss(model(codes), codes, model)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.all(p.grad == 0) for p in model.parameters() if p.grad is not None)


def test_bfloat16_logits_are_taken_up_in_float32():
    _, output, codes, _ = read_golden()
    rounded = LMOutput(
        output.logits.bfloat16(), output.mask, output.text_logits.bfloat16(), output.text_mask
    )
    exact = LMOutput(
        rounded.logits.float(), output.mask, rounded.text_logits.float(), output.text_mask
    )
    for found, expected in zip(token_losses(rounded, codes), token_losses(exact, codes)):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("frames", [1, 2, 13])
def test_losses_by_step_are_those_of_the_logits(frames):
    """`TTTMoshi.step_losses` keeps no logits in the codes' frames, and gives the same losses; their
    weights are the same, too."""
    model = hybrid_model(ttt_placement())
    codes = random_codes(3, frames)
    steps = model.steps(codes)
    config = LossConfig.of_model(
        model, text_padding_weight=0.25, first_codebook_weight_multiplier=3.0
    )
    pairs = (
        (model.step_losses(steps), token_losses(model(codes), codes)),
        (step_weights(steps[:, :, 1:], config), loss_weights(codes, config)),
    )
    for found, expected in pairs:
        for first, (own, stock) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(by_frame(own, model, first), stock)
            # Nothing else stands at steps without a frame.
            assert own.sum().item() == pytest.approx(stock.sum().item(), rel=1e-6)
            assert frames == 1 or own.abs().sum() > 0
