"""Sums by minute against loops over the frames of recordings."""

import itertools
import math

import pytest
import torch

from launch.evaluation import minutes as minutes_module
from launch.evaluation.minutes import MinuteSums
from ttt_dist.data.steps import delayed_steps, piece_of_steps
from ttt_dist.moshi.loss import LossConfig

MINUTE = 10  # frames, here
PADDING = (3, 0)
CONFIG = LossConfig(
    text_padding_weight=0.25,
    first_codebook_weight_multiplier=3.0,
    text_padding_ids=PADDING,
    zero_token_id=-1,
    delays=(0, 0, 2, 0, 2),  # text, two codebooks of Moshi, two of the user
    dep_q=2,
    text_card=8,
    audio_card=5,
)
INITIAL = [8, 5, 5, 5, 5]
FRAMES = [33, 10, 3]
HAS_TEXT = [True, False, True]
# Sums of some 30 float64 numbers in another order.
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def short_minutes(monkeypatch):
    monkeypatch.setattr(minutes_module, "MINUTE_FRAMES", MINUTE)


@pytest.fixture(scope="module")
def recordings():
    """Codes `[5, F]`, one of them missing, and a loss for each of the first three rows' codes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for frames in FRAMES:
        text = torch.randint(0, 8, (1, frames), generator=generator)
        text[0, ::2] = 3
        codes = torch.cat([text, torch.randint(0, 5, (4, frames), generator=generator)])
        codes[1, 2] = -1
        made.append((codes, torch.rand(3, frames, generator=generator, dtype=torch.float64)))
    return made


def sums_over(recordings, numbers, piece):
    """Pass pieces of these recordings, side by side, as a rank does."""
    sums = MinuteSums(CONFIG, math.ceil(max(FRAMES) / MINUTE), torch.device("cpu"))
    whole = {}
    for number in numbers:
        codes, losses = recordings[number]
        late = torch.full((3, losses.shape[1]), 100.0, dtype=torch.float64)
        for row in range(3):  # by step
            delay = CONFIG.delays[row]
            late[row, delay:] = losses[row, : losses.shape[1] - delay]
        whole[number] = delayed_steps(codes, CONFIG.delays, INITIAL), late
    for place in range(math.ceil(max(FRAMES) / piece)):
        steps = torch.stack([piece_of_steps(whole[n][0], place, piece) for n in numbers])
        losses = torch.full((len(numbers), 3, piece), 100.0, dtype=torch.float64)
        for lane, number in enumerate(numbers):
            part = whole[number][1][:, place * piece : (place + 1) * piece]
            losses[lane, :, : part.shape[1]] = part
        has_text = torch.tensor([HAS_TEXT[n] for n in numbers])
        offsets = torch.full((len(numbers),), place * piece)
        sums.add(steps, (losses[:, :1], losses[:, 1:]), offsets, has_text)
    return sums


def expected(recordings, minutes):
    """Figures of some minutes, frame by frame."""
    found = {name: [] for name in ("text", "words", "padding", 1, 2)}
    for (codes, losses), frames, has_text in zip(recordings, FRAMES, HAS_TEXT, strict=True):
        for frame in range(frames):
            if frame // MINUTE not in minutes:
                continue
            if has_text:
                is_padding = codes[0, frame].item() in PADDING
                loss = losses[0, frame].item()
                found["padding"].append((float(is_padding), 1.0))
                found["text"].append((loss, 0.25 if is_padding else 1.0))
                if not is_padding:
                    found["words"].append((loss, 1.0))
            for row in (1, 2):
                # A row's last codes come after the recording's last step.
                if codes[row, frame] >= 0 and frame < frames - CONFIG.delays[row]:
                    found[row].append((losses[row, frame].item(), 1.0))

    def mean(pairs):
        return sum(v * w for v, w in pairs) / sum(w for _, w in pairs) if pairs else None

    audio = mean([(v, 3.0) for v, _ in found[1]] + found[2])
    text, words = mean(found["text"]), mean(found["words"])
    return {
        "frames": len(found[1]),
        "loss": None if text is None else text + audio,
        "padding_share": mean(found["padding"]),
        "text_loss": text,
        "text_loss_without_padding": words,
        "audio_loss": audio,
        "audio_loss_1": mean(found[1]),
        "audio_loss_2": mean(found[2]),
        "text_perplexity": None if words is None else math.exp(words),
        "audio_perplexity": math.exp(mean(found[1] + found[2])),
    }


@pytest.mark.parametrize("piece", [4, 7, 10, 60])  # 60: over the last minute's end
def test_every_loss_is_counted_in_the_minute_of_its_own_frame(recordings, piece):
    sums = sums_over(recordings, [0, 1, 2], piece)
    found = sums.by_minute()
    assert [row.pop("minute") for row in found] == [0, 1, 2, 3]
    for minute, row in enumerate(found):
        assert row == pytest.approx(expected(recordings, {minute}), rel=TOLERANCE)
    assert sums.overall() == pytest.approx(expected(recordings, {0, 1, 2, 3}), rel=TOLERANCE)
    # Losses of steps without a target are 100: none was counted.
    assert max(row["audio_loss"] for row in found) < 1


def test_sums_of_ranks_add_up(recordings):
    together = sums_over(recordings, [0, 1, 2], 7)
    for numbers in itertools.permutations(range(3)):
        first, second = sums_over(recordings, numbers[:2], 7), sums_over(recordings, numbers[2:], 7)
        torch.testing.assert_close(
            first.totals + second.totals, together.totals, rtol=TOLERANCE, atol=0
        )


def test_without_text_there_are_no_text_losses(recordings):
    sums = sums_over(recordings, [1], 10)
    figures = sums.overall()
    none = ("loss", "padding_share", "text_loss", "text_loss_without_padding", "text_perplexity")
    assert [figures[name] for name in none] == [None] * 5
    assert figures["frames"] == 9
    assert figures["audio_loss"] is not None
    # The recording ends with minute 0.
    later = {k: v for k, v in sums.by_minute()[1].items() if k not in ("minute", "frames")}
    assert set(later.values()) == {None}
