"""Finding a release: every mistake in it gives one clear message, and no pickle is read."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import reset_sessions
from moshi.models.loaders import MIMI_NAME, TEXT_TOKENIZER_NAME
from safetensors.torch import save_file

from tests.distributed.tiny import LM_CONFIG, save_release_weights
from tests.unit.moshi_cases import split_release
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.tensor_files import TensorFiles

NAMES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "text.model",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Real Moshi weights; of Mimi one tensor, and an empty tokenizer, which isn't opened."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LM_CONFIG | NAMES | {"model_type": "moshi"}))
    save_release_weights(folder / NAMES["moshi_name"])
    save_file({"codebook": torch.zeros(3)}, folder / NAMES["mimi_name"])
    (folder / NAMES["mimi_config_name"]).write_text('{"sample_rate": 24000}')
    (folder / NAMES["tokenizer_name"]).touch()
    return folder


@pytest.fixture
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub's settings are read when it is imported, and its sessions keep what they were."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    reset_sessions()
    yield
    reset_sessions()


@pytest.fixture
def no_hub(empty_hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1 and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message_of(*args: str | None, **kwargs: str) -> str:
    with pytest.raises(ReleaseError) as caught:
        open_release(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_complete_folder_opens(folder):
    info = open_release(str(folder))
    assert info.lm_config == LM_CONFIG
    assert info.mimi_config == {"sample_rate": 24000}
    assert info.moshi_weights == folder / "model.safetensors"
    assert info.mimi_weights == folder / "mimi.safetensors"
    assert info.tokenizer == folder / "text.model"


def test_files_are_named_as_in_kyutais_release_by_default(folder):
    """Moshi's own names stand where config.json gives none."""
    config = {k: v for k, v in LM_CONFIG.items() if k not in NAMES}
    (folder / "config.json").write_text(json.dumps(config))
    message = message_of(str(folder))
    assert "tokenizer-e351c8d8-checkpoint125.safetensors" in message
    assert "tokenizer_spm_32k_3.model" in message
    assert "model.safetensors, " not in message.replace("checkpoint125.safetensors, ", "")


def test_a_folder_in_the_home_directory_opens(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_release("~/release").moshi_weights == folder / "model.safetensors"


def test_single_files_replace_the_folders_own(folder, tmp_path):
    other = tmp_path / "other.safetensors"
    save_release_weights(other)
    info = open_release(str(folder), moshi_path=str(other))
    assert info.moshi_weights == other
    assert info.mimi_weights == folder / "mimi.safetensors"


def test_single_files_alone_need_no_hub(folder, no_hub):
    """Mimi's configuration, for which there is no setting, lies beside config.json."""
    info = open_release(
        None,
        moshi_path=str(folder / "model.safetensors"),
        mimi_path=str(folder / "mimi.safetensors"),
        tokenizer_path=str(folder / "text.model"),
        config_path=str(folder / "config.json"),
    )
    assert info.mimi_config == {"sample_rate": 24000}
    assert info.lm_config == LM_CONFIG


@pytest.mark.parametrize("where", ["no/such/folder", "./missing", "/missing/folder", "kyutai"])
def test_a_missing_folder_is_no_hub_id(where):
    message = message_of(where)
    assert f"moshi_paths.hf_repo_id: found {where!r}" in message
    assert "neither an existing folder nor a hub id" in message


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert f"the folder {folder} holds no config.json" in message_of(str(folder))


def test_all_missing_files_are_listed(folder):
    for name in NAMES.values():
        (folder / name).unlink()
    message = message_of(str(folder))
    assert all(str(folder / name) in message for name in NAMES.values())


def test_missing_overrides_name_their_key(folder):
    message = message_of(str(folder), mimi_path="nowhere.safetensors")
    assert "moshi_paths.mimi_path: found 'nowhere.safetensors'" in message
    message = message_of(None, moshi_path=str(folder / "model.safetensors"))
    assert "hf_repo_id: found nothing" in message
    assert all(name in message for name in ("mimi_weights", "tokenizer", "config_path"))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".th", ".ckpt"])
@pytest.mark.parametrize("which", ["moshi", "mimi"])
def test_pickles_are_refused(folder, which, suffix):
    pickled = folder / f"weights{suffix}"
    pickled.write_bytes(b"\x80\x04N.")
    as_override = message_of(str(folder), **{f"{which}_path": str(pickled)})
    change_config(folder, **{f"{which}_name": pickled.name})
    for message in (as_override, message_of(str(folder))):
        assert f"{which} weights: found {pickled}" in message
        assert "allowed are .safetensors files only" in message


@pytest.mark.parametrize("name", ["config.json", "mimi_config.json"])
@pytest.mark.parametrize(
    ("text", "why"), [("{", "JSON"), ("[1]", "list, allowed is an object"), ("\xff", "JSON")]
)
def test_broken_json_names_the_file(folder, name, text, why):
    (folder / name).write_bytes(text.encode("latin-1"))
    message = message_of(str(folder))
    assert str(folder / name) in message
    assert why in message


def test_a_broken_configuration_override_names_the_file(tmp_path, no_hub):
    """Before anything is fetched."""
    path = tmp_path / "mine.json"
    path.write_text("{'dim': 32}")
    message = message_of("kyutai/moshiko-pytorch-bf16", config_path=str(path))
    assert f"{path}: cannot be read as JSON" in message


@pytest.mark.filterwarnings("error")  # moshi would tell of a "legacy repository"
def test_a_hub_id_without_network_is_told_at_once(no_hub):
    start = time.monotonic()
    message = message_of("kyutai/moshiko-pytorch-bf16")
    assert time.monotonic() - start < 5
    assert "moshi_paths.hf_repo_id: cannot fetch 'kyutai/moshiko-pytorch-bf16'" in message
    assert "give a local folder" in message


def fill_cache(folder: Path, cache: Path, absent: Iterable[str]) -> Path:
    """A hub cache with all files of `folder`, as the hub's own client leaves it; its snapshot."""
    commit, repository = "c0ffee" * 6 + "beef", cache / "models--owner--name"
    for place in ("blobs", "refs", f"snapshots/{commit}", f".no_exist/{commit}"):
        (repository / place).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    for path in folder.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    for name in absent:
        (repository / ".no_exist" / commit / name).touch()
    return snapshot


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("absent", [[INDEX], []], ids=["noted as absent", "not noted"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_full_cache_needs_no_hub(folder, tmp_path, no_hub, absent, elsewhere):
    """Of its files an index alone is asked for that isn't there."""
    if elsewhere:
        change_config(folder, moshi_name="hf://owner/name/model.safetensors")
    snapshot = fill_cache(folder, tmp_path / "cache", absent)
    opened = [open_release("owner/name")]
    if elsewhere:
        opened.append(open_release(str(folder)))
    for info in opened:
        assert info.moshi_weights == snapshot / "model.safetensors"
        assert info.lm_config == LM_CONFIG


def test_a_full_cache_of_several_files_needs_no_hub(folder, tmp_path, no_hub):
    split_release(folder / "model.safetensors")
    snapshot = fill_cache(folder, tmp_path / "cache", ["model.safetensors"])
    assert open_release("owner/name").moshi_weights == snapshot / INDEX


def test_a_cache_that_knows_of_no_config_needs_no_hub(folder, tmp_path, no_hub):
    """As kept from a repository of Moshi 7B's own sizes."""
    for name, key in ((MIMI_NAME, "mimi_name"), (TEXT_TOKENIZER_NAME, "tokenizer_name")):
        (folder / NAMES[key]).rename(folder / name)
    (folder / "config.json").unlink()
    fill_cache(folder, tmp_path / "cache", ["config.json", INDEX])
    with pytest.warns(UserWarning, match="contains no config.json"):
        info = open_release("owner/name")
    assert info.lm_config is None


@pytest.mark.parametrize(
    ("lost", "noted"),
    [("config.json", []), ("model.safetensors", []), ("mimi.safetensors", [INDEX])],
)
def test_a_cache_that_is_not_full_is_told(folder, tmp_path, no_hub, lost, noted):
    """A file that isn't cached may exist, unless the cache says no."""
    (folder / lost).unlink()
    fill_cache(folder, tmp_path / "cache", noted)
    assert "cannot fetch 'owner/name'" in message_of("owner/name")


@pytest.mark.parametrize("name", ["bad name/with spaces", "owner/-name"])
def test_an_impossible_hub_id_is_told(no_hub, name):
    """Found impossible by the hub's own rules, before any request."""
    assert f"cannot fetch {name!r}" in message_of(name)


def test_an_index_stands_for_the_file_that_config_names(folder):
    index = split_release(folder / "model.safetensors")
    assert open_release(str(folder)).moshi_weights == index
    assert open_release(str(folder), moshi_path=str(index)).moshi_weights == index


def bomb(path: Path) -> None:
    """A million empty tensors in a sound file: the library alone needs 16 s to open it."""
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % i for i in range(1_000_000)) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "its header tells of"),
    "empty": (lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "a pickle": (lambda path: torch.save({"a": torch.zeros(9)}, path), "another kind of file"),
    "a text": (lambda path: path.write_text("version https://git-lfs\n" * 9), "another kind"),
    "header bomb": (bomb, "allowed are 2,097,152"),
    "no JSON": (lambda path: path.write_bytes(bytes([9] + [0] * 7) + b"{" * 9), "cannot be read"),
}


@pytest.mark.parametrize("which", ["moshi", "mimi", "lora"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_within_a_second(folder, which, damage):
    names = {**NAMES, "lora_name": "lora.safetensors"}
    if which == "lora":
        change_config(folder, lora=True, lora_name=names["lora_name"])
        save_file({"text_linear.lora_A.weight": torch.zeros(3)}, folder / names["lora_name"])
    path = folder / names[f"{which}_name"]
    spoil, why = DAMAGES[damage]
    spoil(path)
    start = time.monotonic()
    message = message_of(str(folder))
    assert time.monotonic() - start < 1
    assert str(path) in message
    assert why in message


def change_index(index: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_an_index_names_files_beside_it_that_are_there(folder, tmp_path):
    index = split_release(folder / "model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "model.bin"):
        change_index(index, lambda files, name=name: files.update(x=name))
        assert f"{index}: weight_map: found {name}; allowed are names" in message_of(str(folder))
    change_index(index, lambda files: files.update(x="model-00009-of-00009.safetensors"))
    assert "model-00009-of-00009.safetensors (1 tensors)" in message_of(str(folder))
    index.write_text('{"metadata": {}}')
    assert f"{index}: found no weight_map" in message_of(str(folder))


def test_an_index_and_its_files_tell_of_the_same_tensors(folder):
    index = split_release(folder / "model.safetensors")
    first = json.loads(index.read_text())["weight_map"]["text_linear.weight"]
    change_index(index, lambda files: (files.pop("emb.0.weight"), files.update(ghost=first)))
    with pytest.raises(ReleaseError) as caught:
        TensorFiles(index)
    message = str(caught.value)
    assert "1 listed, but in none of its files: ghost" in message
    assert "1 in its files, but not listed: emb.0.weight" in message


def test_a_repository_in_several_files_is_fetched_whole(folder, tmp_path, monkeypatch):
    """The hub itself is out of reach; its download function is replaced by copies of files."""
    split_release(folder / "model.safetensors")
    fetched = []

    def download(repo_id: str, filename: str, **_: object) -> str:
        fetched.append(filename)
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        shutil.copy(folder / filename, tmp_path / filename)
        return str(tmp_path / filename)

    for module in ("ttt_dist.moshi.release", "moshi.models.loaders"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    info = open_release("owner/name")
    assert info.moshi_weights == tmp_path / "model.safetensors.index.json"
    assert {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)} <= set(fetched)
    assert "model.safetensors" not in fetched
