"""LoRA-adapted releases: adapters are merged or go on training; moshi's own loader is the judge."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.tiny import random_codes, stock_model
from tests.unit.moshi_cases import make_release
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.lora import LoRASettings, is_adapter_parameter
from ttt_dist.moshi.release import names_elsewhere, open_release
from ttt_dist.moshi.released_lora import (
    ReleasedAdapters,
    adapter_differences,
    released_adapters,
)
from ttt_dist.moshi.weights import init_adapters, load_base_weights

RANK, SCALING = 5, 1.5
LORA = LoRASettings(RANK, SCALING)
# As moshi-finetune writes them.
KEYS = {"lora": True, "lora_rank": RANK, "lora_scaling": SCALING}


def adapters_of_moshi(*, embeddings: bool = False) -> dict[str, Tensor]:
    """Random adapters under moshi's names; with `embeddings` these too, as lora.ft_embed trains."""
    stock = stock_model()
    replace_all_linear_with_lora(stock, RANK, SCALING)
    generator = torch.Generator().manual_seed(4)
    return {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in stock.state_dict().items()
        if is_adapter_parameter(name) or (embeddings and "emb" in name)
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Adapters and embeddings in a file that config.json doesn't name."""
    folder = make_release(tmp_path / "release", **KEYS)
    save_file(adapters_of_moshi(embeddings=True), folder / "lora.safetensors")
    return folder


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def loaded(folder: Path, lora: LoRASettings | None) -> TTTMoshi:
    release = open_release(str(folder))
    model = build_model(release.lm_config, None, lora, device="cpu")
    names = load_base_weights(model, release.moshi_weights, released_adapters(release))
    adapters = {name for name, _ in model.named_parameters() if is_adapter_parameter(name)}
    assert names == adapters
    assert init_adapters(model, 0, names) == 0
    return model.eval()


def stock(folder: Path, *, fuse: bool) -> LMModel:
    return open_release(str(folder)).get_moshi(dtype=torch.float32, fuse_lora=fuse)


def logits(model: LMModel) -> list[Tensor]:
    with torch.no_grad():
        output = model(random_codes(2, 13))
    return [output.text_logits.nan_to_num(), output.logits.nan_to_num()]


def test_adapters_go_on_bit_for_bit(folder):
    expected = logits(stock(folder, fuse=False))
    assert all(map(torch.equal, logits(loaded(folder, LORA)), expected))
    (folder / "lora.safetensors").rename(folder / "other.safetensors")
    change_config(folder, lora_name="other.safetensors")
    assert all(map(torch.equal, logits(loaded(folder, LORA)), expected))
    bare = json.loads((folder / "config.json").read_text()) | {"lora": False, "lora_name": None}
    (folder / "config.json").write_text(json.dumps(bare))
    assert not any(map(torch.equal, logits(loaded(folder, None)), expected))


def test_adapters_are_merged_into_a_model_without(folder):
    model = loaded(folder, None)
    expected = stock(folder, fuse=True)
    for name, value in expected.state_dict().items():
        # The same product and sum, whole or a part of the Depformer's steps at a time.
        found = model.get_parameter(name).view(value.shape)
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7, msg=name)
    for found, value in zip(logits(model), logits(expected), strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5)  # of the order of 1


def test_merging_rounds_once(folder):
    """Adapters in bfloat16, as they are released: the sum is float32's, moshi's is bfloat16's."""
    tensors = adapters_of_moshi(embeddings=True)
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "lora.safetensors")
    base = load_file(folder / "model.safetensors")["text_linear.weight"]
    down, up = (tensors[f"text_linear.lora_{x}.weight"].bfloat16().double() for x in "AB")
    exact = base.double() + SCALING * (up @ down)
    found = loaded(folder, None).text_linear.weight
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)  # float32's rounding


def test_files_elsewhere_are_found_by_moshis_names(folder, tmp_path, monkeypatch):
    """`file://` on this machine, `hf://` on the hub, whose download function is replaced."""
    expected = logits(loaded(folder, LORA))
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "lora.safetensors").rename(alone / "lora.safetensors")
    config = json.loads((folder / "config.json").read_text())
    names = ("moshi_name", "mimi_name", "tokenizer_name")
    files = dict(zip(names, ("model.safetensors", "mimi.safetensors", "tokenizer.model")))
    on_disk = {key: f"file://{folder}/{name}" for key, name in files.items()}
    (alone / "config.json").write_text(json.dumps(config | on_disk))
    assert all(map(torch.equal, logits(loaded(alone, LORA)), expected))
    assert all(map(torch.equal, logits(stock_from(alone)), expected))

    def download(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "owner/name"
        if not (folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    for module in ("ttt_dist.moshi.release", "moshi.models.loaders"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    on_hub = {key: f"hf://owner/name/{name}" for key, name in files.items()}
    (alone / "config.json").write_text(json.dumps(config | on_hub))
    assert all(map(torch.equal, logits(loaded(alone, LORA)), expected))
    # moshi-finetune's way: the base from the hub, and config.json from the folder of its adapters.
    (alone / "config.json").write_text(json.dumps(config))
    info = open_release("owner/name", config_path=str(alone / "config.json"))
    assert info.lora_weights == alone / "lora.safetensors"
    assert info.moshi_weights == folder / "model.safetensors"
    (alone / "lora.safetensors").rename(folder / "lora.safetensors")
    assert open_release("owner/name").lora_weights == folder / "lora.safetensors"


def stock_from(folder: Path) -> LMModel:
    """With moshi's own resolution of names."""
    from moshi.models.loaders import CheckpointInfo

    info = CheckpointInfo.from_hf_repo(
        "none/at-all",
        lora_weights=str(folder / "lora.safetensors"),
        config_path=folder / "config.json",
    )
    return info.get_moshi(dtype=torch.float32, fuse_lora=False)


def test_a_releases_files_have_names_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    info = open_release("release")
    on_disk = {
        "moshi_name": f"file://{folder}/model.safetensors",
        "mimi_name": f"file://{folder}/mimi.safetensors",
        "tokenizer_name": f"file://{folder}/tokenizer.model",
    }
    assert names_elsewhere(info, "release") == on_disk
    config_path = str(folder / "config.json")
    assert names_elsewhere(info, None, config_path=config_path) == on_disk
    info.raw_config |= {"mimi_config_name": "mimi.json", "mimi_name": "hf://other/place/mimi.st"}
    assert names_elsewhere(info, "owner/name", tokenizer_path="release/tokenizer.model") == {
        "moshi_name": "hf://owner/name/model.safetensors",
        "mimi_name": "hf://other/place/mimi.st",
        "tokenizer_name": on_disk["tokenizer_name"],
        "mimi_config_name": "hf://owner/name/mimi.json",
    }
    info.raw_config = None  # a repository without config.json, which moshi takes for a Moshi 7B
    assert names_elsewhere(info, "owner/name")["moshi_name"] == "hf://owner/name/model.safetensors"


def message_of(folder: Path) -> str:
    with pytest.raises(ReleaseError) as caught:
        open_release(str(folder))
    return str(caught.value)


def test_adapters_and_their_keys_come_together(folder):
    change_config(folder, lora=False, lora_name="lora.safetensors")
    assert "lora: found False, but lora_name gives adapters" in message_of(folder)
    change_config(folder, lora=True, lora_name="gone.safetensors")
    assert f"names files that are not there: {folder / 'gone.safetensors'}" in message_of(folder)
    change_config(folder, lora_name="lora.safetensors", lora_rank="5")
    assert "lora_rank: found '5', allowed are whole numbers" in message_of(folder)
    change_config(folder, lora_rank=RANK, lora_scaling=None)
    assert "lora_scaling: found None, allowed are numbers" in message_of(folder)
    (folder / "lora.safetensors").rename(folder / "lora.pt")
    change_config(folder, lora_scaling=SCALING, lora_name="lora.pt")
    assert "adapters' weights: found" in message_of(folder)
    change_config(folder, lora_name=None)
    assert "lora: found true, but no adapters: neither lora_name nor" in message_of(folder)


@pytest.mark.parametrize("lora", [None, LORA])
def test_every_adapter_is_accounted_for(folder, lora):
    path = folder / "lora.safetensors"
    tensors = adapters_of_moshi(embeddings=True)
    del tensors["text_linear.lora_A.weight"]
    tensors["linears.9.lora_A.weight"] = torch.zeros(RANK, 24)
    tensors["linears.1.lora_B.weight"] = torch.zeros(24, RANK + 1)
    tensors["linears.2.lora_B.weight"] = tensors["linears.2.lora_B.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(ReleaseError) as caught:
        loaded(folder, lora)
    message = str(caught.value)
    assert f"{folder / 'model.safetensors'} with {path} does not fit" in message
    assert "1 missing: text_linear.lora_A.weight" in message
    assert "1 unexpected: linears.9.lora_A.weight" in message
    assert "1 of another shape: linears.1.lora_B.weight: found [24, 6] in linears.1.lo" in message
    assert "1 of another dtype: linears.2.lora_B.weight: found I8" in message


def test_a_run_goes_on_with_the_releases_rank_and_scaling():
    released = ReleasedAdapters(Path("lora.safetensors"), LORA)
    assert adapter_differences(None, LORA) == []
    assert adapter_differences(released, None) == []
    assert adapter_differences(released, LORA) == []
    rank, scaling = adapter_differences(released, LoRASettings(8, 2.0))
    assert rank.startswith("lora.rank: found 8, but the release has adapters with 5")
    assert scaling.startswith("lora.scaling: found 2.0, but the release has adapters with 1.5")
    assert "lora.enable=false" in rank
