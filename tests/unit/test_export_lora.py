"""Exports of a run with adapters: merged into the weights they adapt, where that is asked for."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from moshi.models.loaders import get_moshi_lm
from safetensors.torch import load_file

from launch.config import DEFAULT_CONFIG, dump_yaml, load_config
from launch.export import main
from launch.setup import lay_out_model
from parallel.checkpoint import Progress
from tests.distributed.tiny import LM_CONFIG
from tests.unit.moshi_cases import make_release
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.lora import is_adapter_parameter, merge_adapters
from ttt_dist.moshi.packed import stock_state_dict


@pytest.fixture
def base(tmp_path) -> Path:
    return make_release(tmp_path / "base")


@pytest.fixture
def trained(base, tmp_path) -> tuple[Path, TTTMoshi]:
    """A run folder with a checkpoint of random weights, none of them zero, and the model."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000002"
    config = load_config(
        DEFAULT_CONFIG,
        [
            *(f"moshi_paths.hf_repo_id={base}", f"run_dir={run}", "device=cpu"),
            *("full_finetuning=false", "lora.enable=true", "lora.rank=5", "lora.scaling=1.5"),
        ],
    )
    model = lay_out_model(config, LM_CONFIG, None, torch.float32)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(generator=generator)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant here
        dcp.save(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    progress = Progress(step=2, global_batch_size=1, scheduler_steps=2, layout={"tp": 1})
    (checkpoint / "progress.json").write_text(json.dumps(asdict(progress)))
    (run / "config.yaml").write_text(dump_yaml(config))
    return run, model


def test_adapters_are_added_to_the_weights_they_adapt(trained, tmp_path):
    run, model = trained
    before = stock_state_dict(model)
    adapted = {n.split(".lora_A.")[0] + ".weight" for n in before if ".lora_A." in n}
    out, alone = tmp_path / "out", tmp_path / "alone"
    main([str(run), "--merge-lora", "--dtype", "float32", "--out", str(out)])
    main([str(run), "--merge-lora", "--base-only", "--dtype", "float32", "--out", str(alone)])
    found = load_file(out / "model.safetensors")
    merge_adapters(model)
    expected = stock_state_dict(model)
    assert found.keys() == expected.keys()
    assert not any(map(is_adapter_parameter, found))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert adapted <= found.keys()
    for name in adapted:
        frozen = before[name.replace(".weight", ".frozen_W.weight")].view(found[name].shape)
        assert not torch.equal(found[name], frozen), name
    stock = get_moshi_lm(alone / "model.safetensors", LM_CONFIG, dtype=torch.float32)
    assert all(torch.equal(value, found[name]) for name, value in stock.state_dict().items())
    assert any(map(is_ttt_parameter, found))
    assert json.loads((out / "config.json").read_text())["ttt"]["layers"] == [1, 2]


def test_adapters_are_never_merged_unasked(trained, tmp_path, capsys):
    run, _ = trained
    for arguments, part in (
        ([], "trained LoRA adapters (lora.enable: true); add --merge-lora"),
        (["--adapters-only"], "--adapters-only: writing adapters by themselves isn't built yet"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(run), "--out", str(tmp_path / "out"), *arguments])
        assert caught.value.code == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
