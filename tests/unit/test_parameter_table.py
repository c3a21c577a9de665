"""The table of what trains adds up to the model."""

import re

import torch

from launch.reporting.parameter_table import parameter_table
from tests.distributed.tiny import LM_CONFIG, ttt_placement
from ttt_dist.moshi.build import build_model, freeze_base, is_ttt_parameter
from ttt_dist.moshi.lora import LoRASettings, is_adapter_parameter


def rows_of(lines: list[str]) -> dict[str, list[int]]:
    rows = (re.match(r"(\S.*?)  +([\d, ]+)$", line) for line in lines[2:])
    return {row[1]: [int(n.replace(",", "")) for n in row[2].split()] for row in rows if row}


def test_counts_and_bytes_are_the_models():
    model = build_model(LM_CONFIG, ttt_placement(), device="cpu")
    rows = rows_of(parameter_table(model))
    total = sum(p.numel() for p in model.parameters())
    ttt = sum(p.numel() for n, p in model.named_parameters() if is_ttt_parameter(n))
    assert rows["TTT layers"] == [ttt, ttt, 4 * ttt, 4 * ttt, 8 * ttt]
    assert rows["all"] == [total, total, 4 * total, 4 * total, 8 * total]
    parts = [row for name, row in rows.items() if name != "all"]
    assert len(parts) == 4
    assert [sum(column) for column in zip(*parts)] == rows["all"]


def test_a_frozen_base_has_weights_alone():
    model = build_model(LM_CONFIG, ttt_placement(), device="cpu")
    freeze_base(model, torch.bfloat16)
    rows = rows_of(parameter_table(model))
    for name in ("transformer", "Depformer", "embeddings, heads"):
        parameters, trained, weights, gradients, moments = rows[name]
        assert (trained, gradients, moments) == (0, 0, 0)
        assert weights == 2 * parameters > 0


def test_adapters_have_a_row_of_their_own():
    model = build_model(LM_CONFIG, None, LoRASettings(4, 2.0), device="cpu")
    freeze_base(model, torch.bfloat16)
    rows = rows_of(parameter_table(model))
    adapters = sum(p.numel() for n, p in model.named_parameters() if is_adapter_parameter(n))
    assert rows["LoRA adapters"] == [adapters, adapters, 4 * adapters, 4 * adapters, 8 * adapters]
    base = sum(p.numel() for p in build_model(LM_CONFIG, None).parameters())
    assert rows["all"] == [base + adapters, adapters, 2 * base + 4 * adapters, *rows["all"][3:]]


def test_gradients_that_wait_whole_have_a_line_where_they_are_more():
    model = build_model(LM_CONFIG, None, device="cpu")
    table, gradients = parameter_table(model), rows_of(parameter_table(model))["all"][3]
    assert parameter_table(model, gradients) == table  # one rank: whole is all that it ever has
    *same, line = parameter_table(model, 8 * gradients)
    assert same == table
    assert f"gradients are kept whole: {8 * gradients:,} bytes" in line
    assert "parallel.reduce_every_microbatch" in line


def test_parts_that_are_not_there_are_left_out():
    assert "TTT layers" not in rows_of(parameter_table(build_model(LM_CONFIG, None, device="cpu")))
