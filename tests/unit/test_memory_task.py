"""The memory benchmark: its sequences, attention's reach, and what its thresholds say."""

import json
import math

import pytest
import torch

from launch.config import load_config
from launch.errors import UserError
from launch.make_memory_data import (
    CONFIG,
    attention_reach,
    gaps_of,
    lm_config,
    make_memory_data,
    read_sequences,
    write_sequences,
)
from launch.memory_report import Curve, MemoryResult, Point, write_result
from launch.memory_task import (
    ASKING,
    CARD,
    CODEBOOKS,
    COUNTING,
    MOSHI,
    NEW,
    NOTHING,
    RETURNING,
    ROWS,
    SILENCE,
    MemoryTask,
)
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.interleave import TextIds
from ttt_dist.data.ready import open_ready
from ttt_dist.moshi.build import build_model
from ttt_dist.moshi.context import read_attention_contexts, set_attention_contexts

TASK = MemoryTask(frames=40, phrase_frames=5, symbols=64)
GAPS = torch.tensor([0, 1, 7, 30, 30, 12] * 20)


def draw(task: MemoryTask = TASK) -> tuple[torch.Tensor, torch.Tensor]:
    return task.draw(GAPS, torch.Generator().manual_seed(0))


def test_the_phrase_comes_back_after_its_gap():
    codes, kinds = draw()
    assert codes.shape == (len(GAPS), ROWS, 40)
    assert codes.dtype == kinds.dtype == torch.int32
    numbers = list(range(1, 6))
    for sequence, kind, gap in zip(codes, kinds, GAPS.tolist(), strict=True):
        new, back = ((kind == what).nonzero()[:, 0] for what in (NEW, RETURNING))
        assert (back - new).tolist() == [5 + gap] * 5
        assert new.diff().tolist() == [1] * 4
        phrase = sequence[MOSHI, new]
        assert torch.equal(sequence[MOSHI, back], phrase)
        assert phrase.min() >= 0
        assert phrase.max() < 64
        assert (sequence[MOSHI, kind == NOTHING] == -1).all()
        assert sequence[COUNTING, new].tolist() == sequence[ASKING, back - 1].tolist() == numbers
        assert (sequence[ASKING] >= 0).sum() == 5
        chatter = sequence[COUNTING, new[-1] + 1 : back[0] - 1]
        assert ((chatter > 5) & (chatter < CARD)).all()
        silent = torch.ones(40, dtype=torch.bool)
        silent[new[0] : back[-1]] = False
        assert (sequence[COUNTING, silent] == SILENCE).all()
        assert (sequence[COUNTING:] >= 0).any(dim=0).all()
        others = [row for row in range(ROWS) if row not in (MOSHI, COUNTING, ASKING)]
        assert (sequence[others] == -1).all()
    begins = {int((kind == NEW).nonzero()[0]) for kind in kinds[GAPS == 7]}
    assert len(begins) > 10


def test_nothing_but_the_phrase_tells_of_it():
    """The same draws with other symbols: everything but Moshi's phrases stays as it is."""
    (codes, kinds), (others, same_kinds) = draw(), draw(MemoryTask(40, 5, symbols=63))
    rest = [row for row in range(ROWS) if row != MOSHI]
    assert torch.equal(codes[:, rest], others[:, rest])
    assert torch.equal(kinds, same_kinds)
    assert not torch.equal(codes[:, MOSHI], others[:, MOSHI])
    frequency = torch.bincount(codes[:, MOSHI][kinds == NEW].flatten(), minlength=64)
    assert (frequency > 0).sum() > 60


def test_gaps_and_sizes_out_of_range_are_refused():
    for gap in (-1, 31):
        with pytest.raises(ValueError, match="allowed are 0 to 30"):
            TASK.draw(torch.tensor([gap]), torch.Generator())
    for sizes in ((9, 5, 64), (40, 5, 1), (40, 0, 64), (40, 5, CARD + 1)):
        with pytest.raises(ValueError, match="allowed are"):
            MemoryTask(*sizes)


def test_attention_reaches_as_far_as_is_said():
    """A frame changes what comes up to 8 frames later, and, without TTT, nothing after that."""
    torch.manual_seed(0)
    model = build_model(lm_config(), None, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    set_attention_contexts(model, ttt_context=5, other_context=5)
    reach = attention_reach([window for _, window in read_attention_contexts(model)])
    assert reach == 8
    codes = draw()[0][:1].long()
    changed = codes.clone()
    changed[0, COUNTING, 10] = 63 - codes[0, COUNTING, 10]
    with torch.no_grad():
        before, after = (model.forward_text(given)[0] for given in (codes, changed))
    moved = (before != after).any(dim=-1)[0].nonzero()[:, 0].tolist()
    assert moved == list(range(10, 10 + reach + 1))
    with pytest.raises(ValueError, match="unlimited"):
        attention_reach([5, None])
    assert gaps_of(8) == [0, 4, 8, 12, 16, 24, 32, 48, 64, 80]


def result(with_ttt: float, without: float, new: float, leaked: float) -> MemoryResult:
    """Losses as shares of chance, at gaps of twice and four times the reach."""
    chance = math.log(64)

    def curve(run: str, returning: float, new: float) -> Curve:
        points = [Point(gap, returning * chance, new * chance) for gap in (16, 32)]
        return Curve(run, 1.0, tuple(points))

    curves = (
        curve("with TTT", with_ttt, new),
        curve("looks ahead", with_ttt, leaked),
        curve("without TTT", without, new),
    )
    return MemoryResult(8, 64, 5, 96, steps=10, overrides=(), curves=curves)


@pytest.mark.parametrize(
    ("shares", "missed"),
    [
        ((0.24, 0.96, 1.0, 0.5), []),
        ((0.26, 0.96, 1.0, 0.5), ["with TTT, returning"] * 2),
        ((0.24, 0.94, 1.0, 0.5), ["without TTT, returning"] * 2),
        ((0.24, 0.96, 0.9, 0.5), ["without TTT, new", "with TTT, new"]),
        ((0.24, 0.96, 1.0, 1.0), ["looks ahead, new"]),
        ((math.nan, 0.96, 1.0, 0.5), ["with TTT, returning"] * 2),
    ],
)
def test_thresholds(shares, missed, tmp_path):
    found = result(*shares)
    failed = [check.what for check in found.checks() if not check.passed]
    assert len(failed) == len(missed)
    assert all(what.startswith(start) for what, start in zip(failed, missed, strict=True))
    paths = write_result(found, tmp_path, total_seconds=1.0)
    assert [path.name for path in paths] == ["memory.json", "memory.csv", "memory.png"]
    saved = json.loads(paths[0].read_text())
    assert [check["what"] for check in saved["checks"] if not check["passed"]] == failed
    rows = paths[1].read_text().splitlines()
    assert rows[0] == "run,gap_frames,gap_in_reaches,returning_loss,new_loss"
    assert len(rows) == 1 + 3 * 2
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_pieces_of_training_are_the_sequences(tmp_path):
    path = tmp_path / "train.safetensors"
    write_sequences(path, TASK, GAPS, seed=3)
    codes, kinds = TASK.draw(GAPS, torch.Generator().manual_seed(3))
    found, found_kinds = read_sequences(path, 40)
    assert torch.equal(found, codes.long())
    assert torch.equal(found_kinds, kinds)
    ids = TextIds.from_lm_config(lm_config())
    spec = CodesSpec(40 / 12.5, CODEBOOKS, ids, "mimi", "tokenizer", CARD, text_card=8)
    pieces = open_ready(path, spec)
    assert pieces.num_pieces == len(GAPS)
    assert all(torch.equal(pieces.read(number), codes[number]) for number in range(len(GAPS)))


def test_what_does_not_suit_the_benchmark_is_refused(tmp_path):
    data = tmp_path / "data"
    places = [f"data.train_data={data}/train.jsonl", f"data.eval_data={data}/eval.jsonl"]
    places += [f"moshi_paths.hf_repo_id={data}/base", f"run_dir={tmp_path}/run"]

    def problems(*overrides: str) -> list[str]:
        with pytest.raises(UserError) as refused:
            make_memory_data(load_config(CONFIG, [*places, *overrides]), tmp_path / "no-base")
        assert not (data / "train.jsonl").exists()
        return [problem.split(":")[0] for problem in refused.value.problems]

    base = f"moshi_paths.hf_repo_id={tmp_path}"
    assert problems("duration_sec=7", base) == ["moshi_paths.hf_repo_id", "duration_sec"]
    assert problems("duration_sec={0: 4, 9: 8}") == ["duration_sec"]
    windows = ["ttt.ttt_layer_context, ttt.non_ttt_layer_context"]
    assert problems("ttt.non_ttt_layer_context=6") == windows
    data.mkdir()
    assert problems() == [f"{data} exists; nothing is ever overwritten"]
