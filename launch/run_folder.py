"""What a run leaves on disk: configuration and manifest. Nothing is ever deleted here."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.config import REPO_ROOT, TIME, TrainConfig, dump_yaml, load_config, utc_timestamp
from launch.errors import UserError
from launch.feeding.batch_plan import carries_states

PACKAGES = ("torch", "moshi", "torchtitan", "safetensors", "numpy", "sphn", "sentencepiece")

# What a resumed run may not change: it would go on as a different run under the old name.
KEPT_ON_RESUME = (
    "seed",
    "duration_sec",
    "full_finetuning",
    "data.shuffle",
    "lora.enable",
    "lora.rank",
    "lora.scaling",
    "lora.ft_embed",
    "ttt.enable",
    "ttt.layers",
    "ttt.inner_model",
    "ttt.mini_batch_size",
    "ttt.base_lr",
    "ttt.inner_eps",
    "ttt.causal",
    "ttt.persistent_states",
    "ttt.ttt_mlp_layers",
    "ttt.ttt_mlp_expansion_factor",
    "ttt.ttt_layer_context",
    "ttt.non_ttt_layer_context",
)

_SEEN_WITHIN_SEC = 90.0  # NFS may believe for 60 s that another node's new file isn't there

# Of these, null means what the run began with.
_RESOLVED = ("global_batch_size", "num_lanes")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, meets the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_new(folder: Path, name: str, text: str) -> Path:
    """Write `folder/name`; where that stands already (a resumed run), a time goes into the name."""
    path = folder / name
    for number in range(1000):
        if not path.exists():
            write_atomically(path, text)
            return path
        counter = f"-{number}" if number else ""
        path = folder / f"{Path(name).stem}.{utc_timestamp()}{counter}{Path(name).suffix}"
    raise FileExistsError(f"no free name for {folder / name}")


def _value(config: TrainConfig, key: str) -> Any:
    section, _, leaf = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, leaf)


def read_saved_config(config: TrainConfig) -> TrainConfig:
    """The configuration that the run in `config.run_dir` was started with.

    Raises:
        UserError: the folder holds no usable `config.yaml`.
    """
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"run_dir: {config.run_dir} holds no config.yaml, so no run began there; "
            "name the folder of a run to resume, or leave out resume=true"
        )
    return load_config(path)


def adopt_saved(config: TrainConfig) -> TrainConfig:
    """For a resumed run: `config` with `global_batch_size` and `num_lanes` as the run began.

    Raises:
        UserError: `config` changes something that a resumed run has to keep.
    """
    saved = read_saved_config(config)
    kept = {key: _value(config, key) or _value(saved, key) for key in _RESOLVED}
    config = config.model_copy(update=kept)
    problems = [
        f"{key}: found {_value(config, key)!r}, but the run in {config.run_dir} began with "
        f"{_value(saved, key)!r}, which a resumed run keeps; set it back, or start a new run_dir"
        for key in (*KEPT_ON_RESUME, *_RESOLVED)
        if _value(config, key) != _value(saved, key)
        and (key != "num_lanes" or carries_states(config))
    ]
    if problems:
        raise UserError(problems)
    return config


def run_dir_problems(config: TrainConfig) -> list[str]:
    """Why this run can't write into `config.run_dir`, a line each. Creates nothing."""
    if not config.run_dir:
        return ["run_dir: is empty; allowed: the path of a new folder, such as runs/first"]
    if TIME in config.run_dir:
        if config.resume:
            return [
                f"run_dir: found {config.run_dir!r} with resume=true; {TIME} makes a new folder; "
                "name the one to resume: run_dir=PATH resume=true"
            ]
        return []
    path = Path(config.run_dir)
    if path.exists() and not path.is_dir():
        return [f"run_dir: {path} is a file; allowed: a new folder"]
    if config.resume:
        if not path.is_dir():
            return [f"run_dir: {path} doesn't exist, so there is nothing to resume; check the path"]
        try:
            adopt_saved(config)
        except UserError as error:
            return list(error.problems)
    elif path.is_dir() and any(path.iterdir()):
        return [
            f"run_dir: {path} exists and isn't empty; nothing is ever overwritten: "
            "name a new folder, or go on with that run by resume=true"
        ]
    return unwritable_problems("run_dir", path)


def unwritable_problems(key: str, folder: Path) -> list[str]:
    """Why files can't be written into `folder`, whether it is there or not."""
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not nearest.is_dir():
        return [f"{key}: {folder} can't be a folder, since {nearest} is a file"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{key}: {folder} can't be written, since {nearest} is read-only for you"]
    return []


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run. Rank 0 alone writes."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def inner_loop(self) -> Path:
        return self.path / "inner_loop"

    @property
    def bad_steps(self) -> Path:
        return self.path / "bad_steps.jsonl"


def create_run_folder(
    config: TrainConfig, *, world_size: int, hosts: Sequence[Mapping[str, Any]]
) -> RunFolder:
    """Create (or, with `resume`, open) `config.run_dir`; write `config.yaml` and `manifest.json`.

    Call it on rank 0, after every rank has passed `launch.configuration.preflight` and a
    collective: a slower rank would take the new folder for somebody else's.

    Args:
        config: resolved: no `${time}`, and `global_batch_size` set.
        world_size: ranks of the job.
        hosts: one `host_facts()` per rank, gathered.

    Raises:
        UserError: the folder can't be used.
    """
    problems = run_dir_problems(config)
    if problems:
        raise UserError(problems)
    folder = RunFolder(Path(config.run_dir))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir: {folder.path} can't be created: {error}") from error
    _write_new(folder.path, "config.yaml", dump_yaml(config))
    manifest = {
        "started": utc_now(),
        "command": sys.argv,
        "git": git_facts(REPO_ROOT),
        "versions": versions(),
        "world_size": world_size,
        "ranks": [dict(facts) for facts in hosts],
    }
    _write_new(folder.path, "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return folder


def require_shared(folder: RunFolder, hosts: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a folder that other nodes don't see; all ranks call it together, once rank 0 made it.

    Each rank looks for the manifest that rank 0 has just written.

    Args:
        hosts: as `create_run_folder` has it.

    Raises:
        UserError: on all ranks alike.
    """
    written = [("", "")]
    if dist.get_rank() == 0:
        manifest = max(folder.path.glob("manifest*.json"), key=lambda path: path.stat().st_mtime_ns)
        written = [(manifest.name, manifest.read_text(encoding="utf-8"))]
    dist.broadcast_object_list(written, src=0, device=torch.device("cpu"))
    name, text = written[0]
    seen = [True] * len(hosts)
    dist.all_gather_object(seen, _comes_to_hold(folder.path / name, text))
    others = dict.fromkeys(
        facts["host"] for facts, sees in zip(hosts, seen, strict=True) if not sees
    )
    if others:
        raise UserError(
            f"run_dir: {folder.path.absolute()}, made on {hosts[0]['host']}, isn't seen on "
            f"{', '.join(others)}; every rank writes its part of a checkpoint there: name a folder "
            "on a file system that all nodes share"
        )


def _comes_to_hold(path: Path, text: str) -> bool:
    """Whether the file holds `text`, now or soon."""
    deadline = time.monotonic() + _SEEN_WITHIN_SEC
    while True:
        try:
            if path.read_text(encoding="utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_facts(rank: int, device: torch.device) -> dict[str, Any]:
    """This rank's part of the manifest: host, device, CPU cores."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "device": f"{device.type}: {name}",
        "cpu_cores": os.cpu_count(),
    }


def git_facts(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout at `folder`, and whether files differ from it; None: no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    root, revision = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    # An unpacked archive inside somebody else's checkout must not carry that one's revision.
    if revision is None or root is None or Path(root).resolve() != folder.resolve():
        return None
    return {"revision": revision, "dirty": bool(git("status", "--porcelain"))}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape a run's numbers; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the build, e.g. +cu130
    found["cuda"] = torch.version.cuda
    return found
