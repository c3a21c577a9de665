"""Starting the real commands, and reading what they leave."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.config import load_config
from launch.setup import lora_settings, ttt_placement
from tests.ranks import REPO, run_command
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.released_lora import released_adapters
from ttt_dist.moshi.weights import init_adapters, init_ttt_weights, load_base_weights

TRAIN = REPO / "launch" / "train.py"
PREPARE = REPO / "launch" / "prepare.py"
DEMO = REPO / "configs" / "demo.yaml"
# On 2 idle cores no command here takes over 25 s; the rest is for machines that do other work too.
TIMEOUT = 150.0


@dataclass(frozen=True)
class Run:
    """A run of `launch/train.py` that has ended."""

    folder: Path
    job: CompletedProcess[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All of metrics.jsonl, in the order of writing."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def checkpoint(self, step: int) -> dict[str, Tensor]:
        return read_checkpoint(self.folder / "checkpoints" / f"step-{step:06d}")


def single(arguments: Sequence[str], *, script: Path = TRAIN, **environment: str):
    """One process without torchrun, from another folder than the repository's."""
    command = [sys.executable, str(script), *arguments]
    return run_command(command, timeout=TIMEOUT, cwd=Path("/"), **environment)


def side_by_side(
    commands: Mapping[str, Sequence[str]], *, script: Path = TRAIN
) -> dict[str, CompletedProcess[str]]:
    """`single` for each, two at a time: nearly all of their time is spent importing."""
    with ThreadPoolExecutor(2) as pool:
        jobs = pool.map(partial(single, script=script), commands.values())
        return dict(zip(commands, jobs, strict=True))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder`, with its time of change and its size."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded checkpoint, put together from the ranks' parts."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant here
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def initial_model(run: Run, release: Path | None = None) -> TTTMoshi:
    """The model that a run began with, whole and in one process: base, initial TTT and adapters.

    Args:
        release: begin with this one instead.
    """
    config = load_config(run.folder / "config.yaml")
    paths = config.moshi_paths.model_dump()
    info = open_release(**paths) if release is None else open_release(str(release))
    placement = ttt_placement(config, info.lm_config)
    model = build_model(info.lm_config, placement, lora_settings(config), device="cpu")
    loaded = load_base_weights(model, Path(info.moshi_weights), released_adapters(info))
    init_ttt_weights(model, config.seed, loaded)
    init_adapters(model, config.seed, loaded)
    return model


def check_trained(run: Run, step: int, names: set[str]) -> None:
    """Each of the named parameters has had a gradient by `step`, and is not what it was."""
    saved, initial = run.checkpoint(step), dict(initial_model(run).named_parameters())
    still = [name for name in names if torch.equal(saved[f"model.{name}"], initial[name])]
    assert still == []
    # Weight decay moves a parameter too; Adam's second moment is zero without a gradient.
    moments = {name: f"optimizer.state.{name}.exp_avg_sq" for name in names}
    assert [name for name, key in moments.items() if not saved[key].any()] == []
