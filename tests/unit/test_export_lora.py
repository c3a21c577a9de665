"""Exports of a run with adapters: merged into the weights they adapt, or by themselves."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from safetensors.torch import load_file, save_file

from launch.config import DEFAULT_CONFIG, dump_yaml, load_config
from launch.export import main
from launch.setup import lay_out_model
from parallel.checkpoint import Progress
from parallel.checkpoint_manifest import hash_file, write_manifest
from tests.distributed.tiny import LM_CONFIG
from tests.unit.moshi_cases import make_release
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model, is_ttt_parameter
from ttt_dist.moshi.lora import (
    LoRASettings,
    is_adapter_parameter,
    merge_adapters,
    released_name,
)
from ttt_dist.moshi.packed import stock_state_dict

FILE = "lora.safetensors"


@pytest.fixture
def base(tmp_path) -> Path:
    return make_release(tmp_path / "base")


@pytest.fixture
def trained(base, tmp_path) -> tuple[Path, TTTMoshi]:
    return save_run(base, tmp_path / "run")


def save_run(base: Path, run: Path, *settings: str) -> tuple[Path, TTTMoshi]:
    """A run folder with a checkpoint of random weights, none of them zero, and the model."""
    checkpoint = run / "checkpoints" / "step-000002"
    config = load_config(
        DEFAULT_CONFIG,
        [
            *(f"moshi_paths.hf_repo_id={base}", f"run_dir={run}", "device=cpu"),
            *("full_finetuning=false", "lora.enable=true", "lora.rank=5", "lora.scaling=1.5"),
            *settings,
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
    write_manifest(checkpoint, {path.name: hash_file(path) for path in checkpoint.iterdir()})
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


def from_moshi_server(folder: Path) -> CheckpointInfo:
    """As `moshi.server --config-path FOLDER/config.json --lora-weight FOLDER/lora.safetensors`."""
    return CheckpointInfo.from_hf_repo(
        "none/at-all",
        lora_weights=str(folder / "lora.safetensors"),
        config_path=str(folder / "config.json"),
    )


def test_adapters_by_themselves(trained, base, tmp_path):
    """What trained, under moshi's names; the base's files are named where they are."""
    run, model = trained
    out = tmp_path / "out"
    main([str(run), "--adapters-only", "--dtype", "float32", "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {"config.json", "lora.safetensors"}
    found = load_file(out / "lora.safetensors")
    state = stock_state_dict(model)
    assert found.keys() == {n for n in state if is_adapter_parameter(n) or is_ttt_parameter(n)}
    assert [name for name, value in found.items() if not torch.equal(state[name], value)] == []
    config = json.loads((out / "config.json").read_text())
    base_config = json.loads((base / "config.json").read_text())
    assert config.pop("ttt")["layers"] == [1, 2]
    names = {
        "moshi_name": f"file://{base}/model.safetensors",
        "mimi_name": f"file://{base}/mimi.safetensors",
        "tokenizer_name": f"file://{base}/tokenizer.model",
    }
    lora = {"lora": True, "lora_rank": 5, "lora_scaling": 1.5, "lora_name": "lora.safetensors"}
    assert config == base_config | names | lora
    # Stock moshi refuses the section; and the tensors, where only the file is given to it.
    with pytest.raises(TypeError, match="unexpected keyword argument 'ttt'"):
        from_moshi_server(out).get_moshi()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"unexpected_keys in the lora weights: .*\.ttt\."):
        from_moshi_server(out).get_moshi()


def test_moshi_takes_adapters_without_ttt(trained, base, tmp_path):
    run, model = trained
    out = tmp_path / "out"
    main([str(run), "--adapters-only", "--base-only", "--dtype", "float32", "--out", str(out)])
    stock = from_moshi_server(out).get_moshi(dtype=torch.float32, fuse_lora=False)
    expected = stock_state_dict(model)
    weights = load_file(base / "model.safetensors")
    for name, value in stock.state_dict().items():
        if is_adapter_parameter(name):
            assert torch.equal(value, expected[name]), name
        elif released_name(name) in weights:
            assert torch.equal(value, weights[released_name(name)]), name
    assert "ttt" not in json.loads((out / "config.json").read_text())


def test_a_run_on_adapters_keeps_what_their_file_replaced(base, tmp_path):
    """Embeddings that an earlier run trained aren't in Moshi's file, and frozen in this run."""
    config = json.loads((base / "config.json").read_text())
    config |= {"lora": True, "lora_rank": 5, "lora_scaling": 1.5}
    (base / "config.json").write_text(json.dumps(config))
    settings = LoRASettings(5, 1.5)
    first = build_model(LM_CONFIG, None, settings, device="cpu")
    kept = {
        n: v for n, v in stock_state_dict(first).items() if ".lora_" in n or n == "emb.3.weight"
    }
    save_file(kept, base / "lora.safetensors")
    run, model = save_run(base, tmp_path / "run")
    out = tmp_path / "out"
    main([str(run), "--adapters-only", "--dtype", "float32", "--out", str(out)])
    found = load_file(out / "lora.safetensors")
    assert torch.equal(found["emb.3.weight"], model.get_parameter("emb.3.weight"))
    assert "emb.2.weight" not in found
    config = json.loads((out / "config.json").read_text())
    assert config["moshi_name"] == f"file://{base}/model.safetensors"


def message_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_what_becomes_of_adapters_is_asked_for(trained, tmp_path, capsys):
    run, _ = trained
    for arguments, part in (
        ([], "trained LoRA adapters (lora.enable: true); add --merge-lora"),
        (["--adapters-only", "--merge-lora"], "--merge-lora and --adapters-only: allowed is one"),
    ):
        found = message_of(capsys, str(run), "--out", str(tmp_path / "out"), *arguments)
        assert part in found
    assert not (tmp_path / "out").exists()


def test_adapters_without_ttt_need_a_base_without(trained, tmp_path, capsys):
    run, _ = trained
    whole = tmp_path / "whole"
    main([str(run), "--merge-lora", "--out", str(whole)])
    later, _ = save_run(whole, tmp_path / "later")
    found = message_of(capsys, str(later), "--adapters-only", "--base-only")
    assert f"--base-only: the run's base, {whole}/model.safetensors, holds TTT layers" in found
    main([str(later), "--adapters-only"])
    assert any(map(is_ttt_parameter, load_file(later / "export-adapters-step-000002" / FILE)))


def test_a_run_without_ttt_layers_keeps_the_window_that_it_trained_with(base, tmp_path):
    """`ttt.layers: none` cuts attention in all layers; the release says something else."""
    run, _ = save_run(base, tmp_path / "run", "ttt.enable=true", "ttt.layers=none")
    out = tmp_path / "out"
    main([str(run), "--merge-lora", "--out", str(out)])
    released = json.loads((base / "config.json").read_text())["context"]
    config = json.loads((out / "config.json").read_text())
    assert "ttt" not in config
    assert config["context"] == load_config(run / "config.yaml").ttt.non_ttt_layer_context
    assert config["context"] != released
