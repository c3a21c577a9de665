"""Finding a base checkpoint in Kyutai's release layout: a hub repository or a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from moshi.models.loaders import (
    MIMI_NAME,
    MOSHI_NAME,
    TEXT_TOKENIZER_NAME,
    CheckpointInfo,
)

from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.errors import ReleaseError, read_json_object
from ttt_dist.moshi.released_lora import ADAPTERS_FILE, released_adapters
from ttt_dist.moshi.released_ttt import SECTION
from ttt_dist.moshi.tensor_files import (
    INDEX_SUFFIX,
    TensorFiles,
    check_tensor_files,
    is_index,
    names_in_index,
)

# Configuration keys that name a file of the release, and what moshi falls back to.
FILE_KEYS = {
    "moshi_name": MOSHI_NAME,
    "mimi_name": MIMI_NAME,
    "tokenizer_name": TEXT_TOKENIZER_NAME,
}
# A name that begins so is a file elsewhere, as in moshi: on the hub, `hf://owner/name/file`, or of
# this machine, `file:///path`.
ON_HUB, ON_DISK = "hf://", "file://"


def open_release(
    hf_repo_id: str | None,
    *,
    moshi_path: str | None = None,
    mimi_path: str | None = None,
    tokenizer_path: str | None = None,
    config_path: str | None = None,
) -> CheckpointInfo:
    """Locate a release and parse its `config.json` with moshi's own code; no weight is read.

    Args:
        hf_repo_id: a hub repository id (files are fetched once a node into the hub's cache, which
            locks them) or a local folder with the same files.
        moshi_path, mimi_path, tokenizer_path, config_path: single local files that replace the
            release's own, as in moshi-finetune's `moshi_paths`. Moshi's weights may be an index of
            several files (`model.safetensors.index.json`), in a release too. Adapters are looked
            for beside `config.json`.

    Returns:
        moshi's `CheckpointInfo`: paths, `lm_config`, `mimi_config`, and its loaders. A folder that
        `launch/export.py` wrote is a release too; `released_ttt` gives what it says of TTT, and
        `released_lora.released_adapters` what of adapters.

    Raises:
        ReleaseError: the folder or repository lacks a file, the configuration is no JSON object,
            a weight file is no sound `.safetensors` (pickles are never read), or TTT's tensors and
            their section in `config.json`, or adapters and theirs, come without each other.
    """
    overrides = {
        "moshi_weights": _override("moshi_paths.moshi_path", moshi_path),
        "mimi_weights": _override("moshi_paths.mimi_path", mimi_path),
        "tokenizer": _override("moshi_paths.tokenizer_path", tokenizer_path),
        "config_path": _override("moshi_paths.config_path", config_path),
    }
    folder: Path | None = None
    if hf_repo_id is None:
        missing = [name for name, path in overrides.items() if path is None]
        if missing:
            raise ReleaseError(
                "moshi_paths.hf_repo_id: found nothing, and these files are not given either: "
                f"{', '.join(missing)}; set hf_repo_id to a hub id or a local folder"
            )
        hf_repo_id = "local"
        # Mimi's configuration has no setting of its own; it lies beside the one that names it.
        folder = Path(str(overrides["config_path"])).parent
    elif Path(hf_repo_id).expanduser().is_dir():
        folder = Path(hf_repo_id).expanduser()
    elif hf_repo_id.startswith((".", "/", "~")) or hf_repo_id.count("/") != 1:
        raise ReleaseError(
            f"moshi_paths.hf_repo_id: found {hf_repo_id!r}, which is neither an existing folder "
            "nor a hub id 'owner/name'; for the demo's base run `python -m launch.make_demo_base`"
        )
    if overrides["config_path"] is not None:
        read_json_object(overrides["config_path"])
    try:
        if folder is not None:
            overrides = _fill_from_folder(folder, overrides)
        else:
            overrides = _fill_from_hub(hf_repo_id, overrides)
        info = CheckpointInfo.from_hf_repo(hf_repo_id, **overrides)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ReleaseError(
            f"moshi_paths.hf_repo_id: cannot fetch {hf_repo_id!r}: {first_line}; check the name "
            "and the network, or give a local folder in the release layout"
        ) from error
    weights = {"moshi": info.moshi_weights, "mimi": info.mimi_weights}
    if info.lora_weights is not None:
        weights["adapters'"] = info.lora_weights
    for field, path in weights.items():
        if path.suffix != ".safetensors" and not (field == "moshi" and is_index(path)):
            raise ReleaseError(
                f"{field} weights: found {path}, allowed are .safetensors files only (a pickle can "
                "run code when it is loaded); convert the file first"
            )
        check_tensor_files(path)
    _check_added(info)
    return info


def released_ttt(info: CheckpointInfo) -> Any:
    """The `ttt` section of a release's `config.json` (`released_ttt.py`); None where it has none.

    `info.lm_config` leaves it out: Moshi's language model has no such setting.
    """
    return None if info.raw_config is None else info.raw_config.get(SECTION)


def names_elsewhere(
    info: CheckpointInfo,
    hf_repo_id: str | None,
    *,
    moshi_path: str | None = None,
    mimi_path: str | None = None,
    tokenizer_path: str | None = None,
    config_path: str | None = None,
) -> dict[str, str]:
    """Names of an opened release's files for a `config.json` that doesn't stand beside them.

    Args:
        info: what `open_release` gave for the other arguments.

    Returns:
        `moshi_name`, `mimi_name`, `tokenizer_name` and, where the release has one,
        `mimi_config_name`: `hf://owner/name/file` or `file:///path`, which moshi knows too.
    """
    raw = info.raw_config or {}
    given = {"moshi_name": moshi_path, "mimi_name": mimi_path, "tokenizer_name": tokenizer_path}
    folder = Path(str(hf_repo_id or Path(str(config_path)).parent)).expanduser()
    names: dict[str, str | None] = {}
    for key, default in (*FILE_KEYS.items(), ("mimi_config_name", None)):
        name, override = raw.get(key, default), given.get(key)
        if override is not None:
            names[key] = f"{ON_DISK}{Path(override).expanduser().resolve()}"
        elif name is None or str(name).startswith((ON_HUB, ON_DISK)):
            names[key] = name
        elif folder.is_dir():
            names[key] = f"{ON_DISK}{(folder / str(name)).resolve()}"
        else:
            names[key] = f"{ON_HUB}{hf_repo_id}/{name}"
    return {key: name for key, name in names.items() if name is not None}


def _check_added(info: CheckpointInfo) -> None:
    """Take the `ttt` section out of `info.lm_config`; it and TTT's tensors come together."""
    section = released_ttt(info)
    if info.lm_config is not None:
        info.lm_config.pop(SECTION, None)
    adapters = released_adapters(info)
    over = None if adapters is None else adapters.path
    with TensorFiles(info.moshi_weights, over=over) as files:
        has_tensors = any(map(is_ttt_parameter, files.keys()))
    if has_tensors and section is None:
        raise ReleaseError(
            f"{info.moshi_weights}: has tensors of TTT layers, but config.json has no section ttt, "
            "which says what they compute; use the config.json that was exported with them"
        )
    if section is not None and not has_tensors:
        raise ReleaseError(
            f"config.json: its section ttt tells of TTT layers, but {info.moshi_weights} has no "
            "tensors of theirs; use the weights that were exported with it"
        )


def _fill_from_hub(repo_id: str, overrides: dict[str, Path | None]) -> dict[str, Path | None]:
    """Paths of the files of a repository that moshi's own code wouldn't find."""
    filled = dict(overrides)
    given = filled["config_path"]
    if given is None:
        filled["config_path"] = _fetch(repo_id, "config.json")
    config = {} if filled["config_path"] is None else read_json_object(filled["config_path"])
    name = str(config.get("moshi_name", MOSHI_NAME))
    if filled["moshi_weights"] is None and not name.startswith(ON_DISK):
        filled["moshi_weights"] = _fetch_indexed(*_place_on_hub(repo_id, name))
    beside = None if given is None else _adapters_beside(given)
    if beside is not None and beside.is_file():
        filled["lora_weights"] = beside
    elif config.get("lora") and config.get("lora_name") is None:
        filled["lora_weights"] = _fetch(repo_id, ADAPTERS_FILE)
    return filled


def _fetch(repo_id: str, name: str) -> Path | None:
    """A file of a hub repository; None where it has none of that name.

    moshi's own code takes a hub that it can't reach for a repository without `config.json`, and
    that for a Moshi 7B.
    """
    try:
        return Path(hf_hub_download(repo_id, name))
    except LocalEntryNotFoundError:
        # Without the hub its cache may still know that the repository has no such file.
        if try_to_load_from_cache(repo_id, name) is not _CACHED_NO_EXIST:
            raise
        return None
    except EntryNotFoundError:
        return None


def _fetch_indexed(repo_id: str, name: str) -> Path | None:
    """The index of a repository whose Moshi, `name`, comes in several files, all fetched; or None.

    The files stand beside the index, whose names are plain.
    """
    try:
        index = _fetch(repo_id, name + INDEX_SUFFIX)
    except LocalEntryNotFoundError:
        # Not every tool that fills the cache notes there what a repository doesn't have.
        if not isinstance(try_to_load_from_cache(repo_id, name), str):
            raise
        return None
    if index is not None:
        folder = name.rpartition("/")[0]
        for part in names_in_index(index):
            hf_hub_download(repo_id, f"{folder}/{part}" if folder else part)
    return index


def _place_on_hub(repo_id: str, name: str) -> tuple[str, str]:
    """Repository and file that a configuration of the repository `repo_id` calls `name`."""
    if not name.startswith(ON_HUB):
        return repo_id, name
    owner, repository, path = (*name.removeprefix(ON_HUB).split("/", 2), "", "")[:3]
    return f"{owner}/{repository}", path


def _override(field: str, value: str | None) -> Path | None:
    if value is None:
        return None
    path = Path(value).expanduser()
    if not path.is_file():
        raise ReleaseError(f"{field}: found {value!r}, which is no file")
    return path


def _adapters_beside(config_path: Path) -> Path | None:
    """The adapters of a `config.json` on disk; None where it tells of none, or they aren't there.

    moshi-finetune leaves them there without naming them.
    """
    config = read_json_object(config_path)
    name = config.get("lora_name")
    if name is None and config.get("lora"):
        beside = config_path.parent / ADAPTERS_FILE
        return beside if beside.is_file() else None
    return None if name is None else _located(config_path.parent, str(name))


def _located(folder: Path, name: str) -> Path:
    """The file that a configuration in `folder` calls `name`, fetched where it is on the hub."""
    if name.startswith(ON_HUB):
        repo_id, path = _place_on_hub("", name)
        index = _fetch_indexed(repo_id, path) if path.endswith(".safetensors") else None
        return index or Path(hf_hub_download(repo_id, path))
    if name.startswith(ON_DISK):
        return Path(name.removeprefix(ON_DISK))
    return folder / name


def _fill_from_folder(folder: Path, overrides: dict[str, Path | None]) -> dict[str, Path | None]:
    """Explicit paths for every file of a local release, so that moshi asks no hub for any."""
    filled = dict(overrides)
    config_path = filled["config_path"] or folder / "config.json"
    if not config_path.is_file():
        raise ReleaseError(
            f"moshi_paths.hf_repo_id: the folder {folder} holds no config.json; it must be a "
            "release folder (config.json, model.safetensors, Mimi's .safetensors, tokenizer .model)"
        )
    raw = read_json_object(config_path)
    filled["config_path"] = config_path
    targets = {
        "moshi_name": "moshi_weights",
        "mimi_name": "mimi_weights",
        "tokenizer_name": "tokenizer",
    }
    for key, target in targets.items():
        if filled[target] is None:
            filled[target] = _located(folder, str(raw.get(key, FILE_KEYS[key])))
    weights = filled["moshi_weights"]
    if weights is not None and not weights.exists():
        index = weights.with_name(weights.name + INDEX_SUFFIX)
        filled["moshi_weights"] = index if index.is_file() else weights
    if raw.get("mimi_config_name") is not None:
        filled["mimi_config_path"] = _located(folder, str(raw["mimi_config_name"]))
    filled["lora_weights"] = _adapters_beside(config_path)
    missing = [str(path) for path in filled.values() if path is not None and not path.is_file()]
    if missing:
        raise ReleaseError(f"{config_path} names files that are not there: {', '.join(missing)}")
    mimi_config_path = filled.get("mimi_config_path")
    if mimi_config_path is not None:
        read_json_object(mimi_config_path)
    return filled
