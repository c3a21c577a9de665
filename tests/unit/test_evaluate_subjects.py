"""Which models an evaluation compares, and what they must have in common."""

from dataclasses import replace

import pytest
import torch

from launch.configuration.schema import TrainConfig
from launch.errors import UserError
from launch.evaluation.subjects import (
    common_piece,
    common_spec,
    common_weight,
    find_subjects,
    unfit_models,
)
from tests.distributed.tiny import ttt_placement
from tests.unit.moshi_cases import make_release

KEY = "text_padding_weight"


def found(*folders, base=False):
    return find_subjects(list(folders), base=base, device=torch.device("cpu"))


@pytest.fixture
def stock(tmp_path):
    (subject,), problems = found(make_release(tmp_path / "stock"))
    assert problems == []
    assert (subject.label, subject.modes, subject.mini_batch_size) == ("stock", ("none",), 1)
    return subject


def with_ttt(subject, mini_batch_size, weight=0.5):
    """As a run's, trained so."""
    placement = ttt_placement("mlp")
    layer = replace(placement.layer, mini_batch_size=mini_batch_size)
    source = replace(subject.source, ttt=replace(placement, layer=layer))
    config = TrainConfig.model_validate(
        {"run_dir": "/runs/one", "data": {"train_data": "a"}, KEY: weight}
    )
    return replace(subject, label=f"C = {mini_batch_size}", source=source, config=config)


def test_releases_of_one_name_are_told_apart(tmp_path):
    first, second = make_release(tmp_path / "a" / "base"), make_release(tmp_path / "b" / "base")
    subjects, problems = found(first, second)
    assert problems == []
    assert [each.label for each in subjects] == [
        str(each / "model.safetensors") for each in (first, second)
    ]


def test_mistakes_are_collected(tmp_path, stock):
    folder = stock.path.parent
    assert found(folder, folder)[1] == [
        "CHECKPOINT: name each once; found one that stands there twice"
    ]
    (problem,) = found(folder, base=True)[1]
    assert problem.startswith("--base: no CHECKPOINT is a run")
    unlimited = make_release(tmp_path / "unlimited", context=None)
    _, (first, second) = found(tmp_path / "none", unlimited, base=True)
    assert first.startswith(f"{tmp_path / 'none'}: CHECKPOINT: ")
    assert second.startswith(f"{unlimited}: config.json: context: found none")


def test_pieces_are_whole_mini_batches_of_all_models(stock):
    models = [stock, with_ttt(stock, 16), with_ttt(stock, 24)]
    assert models[1].modes == ("on", "off", "reset")
    assert common_piece(models, 80.0) == 960  # 1000 // 48 * 48
    assert common_piece(models[:2], 80.0) == 992
    assert common_piece(models[:1], 80.0) == 1000
    with pytest.raises(UserError, match=r"of 1 and of 16 and of 24 frames: allowed are 3\.84 s"):
        common_piece(models, 3.8)


def test_losses_are_weighted_as_in_training(stock):
    runs = [with_ttt(stock, 8, weight=0.25), with_ttt(stock, 16, weight=0.25), stock]
    assert common_weight(runs, KEY, None) == 0.25
    assert common_weight(runs, KEY, 0.0) == 0.0
    assert common_weight([stock], KEY, None) == TrainConfig.model_fields[KEY].default
    runs[1] = with_ttt(stock, 16, weight=1.0)
    with pytest.raises(UserError, match=r"0\.25 in C = 8, 1 in C = 16; say with --text-padding"):
        common_weight(runs, KEY, None)
    assert common_weight(runs, KEY, 0.5) == 0.5


def test_models_that_read_other_codes_are_named(tmp_path, stock):
    other = make_release(tmp_path / "other")
    (other / "tokenizer.model").write_text("another one")
    (same, different), problems = found(make_release(tmp_path / "same"), other)
    assert problems == []
    common_spec([stock, same])
    with pytest.raises(UserError, match="other has another Mimi, tokenizer or codebooks than"):
        common_spec([stock, same, different])


def test_models_that_do_not_fit_are_named(tmp_path):
    release = make_release(tmp_path / "sines", positional_embedding="sin")
    (subject,), problems = found(release)
    assert problems == []
    piecewise, split = unfit_models([subject], tp=3)
    assert piecewise.startswith("sines: the release has positional_embedding = sin")
    assert split.startswith("sines: --tp: found 3, which doesn't divide the model's")
