"""Exports of the 7B configurations, without their values: names and shapes are stock moshi's."""

from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs as MOSHI_7B
from moshi.modules.lora import replace_all_linear_with_lora

from launch.config import REPO_ROOT, load_config
from launch.exporting.tensors import tensor_specs
from launch.setup import lay_out_model
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.tensor_files import HEADER_LIMIT
from ttt_dist.moshi.tensor_writer import TensorWriter

# TTT layers, and tensors of each.
CONFIGS = {"moshi_7b_ttt.yaml": (3, 19), "moshi_7b_full.yaml": (16, 19)}


@pytest.fixture(scope="module")
def stock() -> dict[str, tuple[int, ...]]:
    model = LMModel(device="meta", dtype=torch.bfloat16, **MOSHI_7B)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_of_an_exported_7b(stock, tmp_path: Path, name):
    config = load_config(REPO_ROOT / "configs" / name)
    model = lay_out_model(config, None, None, torch.float32)
    alone = tensor_specs(model, base_only=True, dtype=torch.bfloat16)
    assert {name: spec.shape for name, spec in alone.items()} == stock
    assert sum(spec.bytes for spec in alone.values()) == 2 * 7_687_729_152
    whole = tensor_specs(model, base_only=False, dtype=torch.bfloat16)
    ttt = {name for name in whole if is_ttt_parameter(name)}
    layers, tensors = CONFIGS[name]
    assert len(ttt) == layers * tensors
    assert whole.keys() - ttt == alone.keys()
    assert {whole[name].dtype for name in ttt} == {torch.float32}
    path = tmp_path / "header"
    with (
        pytest.raises(ValueError, match="never written"),
        TensorWriter(path, whole, {"format": "pt"}),
    ):
        pass
    assert path.stat().st_size < HEADER_LIMIT / 10


def test_adapters_of_an_exported_7b():
    """Of rank 128, moshi-finetune's: names and shapes are those of moshi's own LoRA layers."""
    overrides = ["lora.enable=true", "lora.rank=128", "full_finetuning=false"]
    config = load_config(REPO_ROOT / "configs" / "moshi_7b_ttt.yaml", overrides)
    model = lay_out_model(config, None, None, torch.bfloat16)
    found = tensor_specs(model, base_only=True, dtype=torch.bfloat16, adapters_for=set())
    with torch.device("meta"):
        stock = LMModel(device="meta", **MOSHI_7B)
    replace_all_linear_with_lora(stock, 128, 2.0)
    adapters = {n: tuple(v.shape) for n, v in stock.state_dict().items() if ".lora_" in n}
    assert {name: spec.shape for name, spec in found.items()} == adapters
    whole = tensor_specs(model, base_only=False, dtype=torch.bfloat16, adapters_for=set())
    assert whole.keys() - adapters.keys() == {name for name in whole if is_ttt_parameter(name)}
