"""Sharded checkpoints (DCP): saved beside and committed by a rename.

A folder `step-NNNNNN` is complete: all ranks have written into a folder of another name before rank
0 renames it. Nothing that exists is written to again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

from parallel.checkpoint_files import CheckpointReader, load_tensors
from parallel.checkpoint_metadata import CheckpointError
from parallel.mesh import from_first_rank

__all__ = [
    "CheckpointError",
    "Progress",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights",
    "read_progress",
    "save_checkpoint",
]

_STEP_FOLDER = re.compile(r"step-(\d{6,})$")
_PROGRESS_FILE = "progress.json"
_UNFIT = "cannot be loaded into this model"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its tensors.

    Attributes:
        step: steps done; the next takes samples `[step * G, (step + 1) * G)` of the global order.
        global_batch_size: `G`.
        scheduler_steps: steps of the learning-rate schedule.
        layout: ranks of each mesh axis at the time of saving.
    """

    step: int
    global_batch_size: int
    scheduler_steps: int
    layout: dict[str, int]


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first; other names are not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: OptimizersContainer,
    schedulers: LRSchedulersContainer,
    *,
    step: int,
    global_batch_size: int,
    layout: dict[str, int],
    keep: int | None,
) -> Path:
    """Save all that a run needs to go on; all ranks call it together.

    Args:
        folder: the run's `checkpoints` folder, on a file system that all ranks see.
        keep: older checkpoints beyond the newest `keep` are removed once this one is committed;
            None keeps all.

    Returns:
        The committed folder `step-NNNNNN`.
    """
    target = folder / f"step-{step:06d}"
    if target.exists():
        raise CheckpointError(f"{target} exists; a checkpoint is never written over")
    token = from_first_rank(uuid.uuid4().hex[:8])
    partial = folder / f".saving-step-{step:06d}-{token}"
    progress = Progress(
        step=step,
        global_batch_size=global_batch_size,
        scheduler_steps=int(schedulers.state_dict()["last_epoch"]),
        layout=layout,
    )
    tensors = _model_tensors(model) | _optimizer_tensors(optimizers) | _random_states()
    dcp.save(tensors, checkpoint_id=str(partial))
    if dist.get_rank() == 0:
        (partial / _PROGRESS_FILE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        _sync_files(partial)
        os.rename(partial, target)
        _prune(folder, keep)
    dist.barrier()
    return target


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: OptimizersContainer,
    schedulers: LRSchedulersContainer,
) -> Progress:
    """Put a saved state into a built and sharded model, its optimizers and schedule, in place.

    All ranks call it together. Tensors are resharded where the layout differs from the saved one;
    ranks that the saved layout did not have keep their own random state.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the model.
    """
    progress = read_progress(path)
    model_tensors = _model_tensors(model)
    optimizer_tensors = _optimizer_tensors(optimizers)
    same_layout_ranks = dist.get_rank() < _ranks(progress.layout)
    random_states = _random_states() if same_layout_ranks else {}
    # What is loaded is written into these very tensors: the parameters and Adam's moments.
    tensors = model_tensors | optimizer_tensors | random_states
    load_tensors(tensors, CheckpointReader(path), f"{path}: {_UNFIT}")
    hyperparameters = {
        key: value
        for key, value in optimizers.state_dict().items()
        if key.startswith("param_groups.")
    }
    optimizers.load_state_dict(hyperparameters | _strip(optimizer_tensors))
    schedulers.load_state_dict({"last_epoch": progress.scheduler_steps})
    for scheduler in schedulers:
        for group, lr in zip(
            scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = lr
    _restore_random_states(random_states)
    return progress


def load_weights(path: Path, model: nn.Module) -> Progress:
    """Put a checkpoint's weights alone into a whole model, in one process without a process group.

    Args:
        path: saved on any number of ranks.
        model: built and materialised; values are cast to its parameters' dtypes.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the model.
    """
    progress = read_progress(path)
    tensors = _model_tensors(model)
    reader = CheckpointReader(path)
    saved = reader.read_metadata().state_dict_metadata
    unknown = {name for name in saved if name.startswith("model.")} - set(tensors)
    if unknown:
        raise CheckpointError(f"{path}: the model has no {', '.join(sorted(unknown))}")
    load_tensors(tensors, reader, f"{path}: {_UNFIT}", alone=True)
    return progress


def read_progress(path: Path) -> Progress:
    """The `Progress` saved in the checkpoint folder `path`; raises CheckpointError."""
    file = path / _PROGRESS_FILE
    try:
        return Progress(**json.loads(file.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint's progress: {error}"
        ) from None


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def _optimizer_tensors(optimizers: OptimizersContainer) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name. Learning rates and the like are the
    configuration's, so nothing but tensors is ever saved or loaded."""
    return {
        f"optimizer.{key}": value
        for key, value in optimizers.state_dict().items()
        if key.startswith("state.")
    }


def _strip(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key.removeprefix("optimizer."): value for key, value in tensors.items()}


def _random_states() -> dict[str, Tensor]:
    states = {f"random.{dist.get_rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        if name.endswith(".cpu"):
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state)


def _ranks(layout: dict[str, int]) -> int:
    ranks = 1
    for size in layout.values():
        ranks *= size
    return ranks


def _sync_files(folder: Path) -> None:
    """Have the files on disk before the name says that they are."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, keep: int | None) -> None:
    if keep is None:
        return
    for path in list_checkpoints(folder)[:-keep]:
        # Renamed first, so that no half-deleted folder ever has a checkpoint's name.
        doomed = path.with_name(f".removing-{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
