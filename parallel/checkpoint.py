"""Sharded checkpoints (DCP): what a run keeps in them, and getting it back on any layout.

Writing: `parallel.checkpoint_saver`; whether files are whole: `parallel.checkpoint_manifest`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

from parallel.checkpoint_files import CheckpointReader, load_tensors
from parallel.checkpoint_metadata import CheckpointError

PROGRESS_FILE = "progress.json"
_STEP_FOLDER = re.compile(r"step-\d{6,}")
_UNFIT = "cannot be loaded into this model"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its tensors.

    Attributes:
        step: steps done; the next takes samples `[step * G, (step + 1) * G)` of the global order.
        global_batch_size: `G`.
        scheduler_steps: steps of the learning-rate schedule.
        layout: ranks of each mesh axis at the time of saving.
        counters: what else a run counts, by name.
        sources: of the training data, one after the other, what the global order depends on.
    """

    step: int
    global_batch_size: int
    scheduler_steps: int
    layout: dict[str, int]
    counters: dict[str, float] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders `step-NNNNNN` in `folder`, oldest first; no other name is looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Steps done at a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: OptimizersContainer,
    schedulers: LRSchedulersContainer,
    carried: Mapping[str, Tensor] | None = None,
) -> Progress:
    """Put a saved state into a built and sharded model, its optimizers and schedule, in place.

    All ranks call it together. Tensors are resharded where the layout differs from the saved one;
    random states that were not saved (ranks that the saved layout did not have, GPUs where it had
    none) stay as they are.

    Args:
        carried: other tensors to load, `carry.…`: what lanes hand from step to step.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the model.
    """
    progress = read_progress(path)
    model_tensors = _model_tensors(model)
    optimizer_tensors = _optimizer_tensors(optimizers)
    reader = CheckpointReader(path)
    saved = reader.read_metadata().state_dict_metadata
    random_states = {name: state for name, state in _random_states().items() if name in saved}
    # What is loaded is written into these very tensors: the parameters and Adam's moments.
    tensors = model_tensors | optimizer_tensors | random_states | dict(carried or {})
    _refuse_others(path, reader, tensors, "model.", "optimizer.", "carry.")
    load_tensors(tensors, reader, f"{path}: {_UNFIT}")
    hyperparameters = {
        key: value
        for key, value in optimizers.state_dict().items()
        if key.startswith("param_groups.")
    }
    optimizers.load_state_dict(hyperparameters | _strip(optimizer_tensors))
    with warnings.catch_warnings():
        # torchtitan computes the rates anew, which torch takes for a mistake.
        warnings.filterwarnings("ignore", "To get the last learning rate computed")
        schedulers.load_state_dict({"last_epoch": progress.scheduler_steps})
    for scheduler in schedulers:
        for group, lr in zip(
            scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = lr
    _restore_random_states(random_states)
    return progress


def load_weights(path: Path, model: nn.Module, *, alone: bool = True) -> Progress:
    """Put a checkpoint's weights alone into a model, without what its training needs to go on.

    Args:
        path: saved on any number of ranks.
        model: built and materialised; values are cast to its parameters' dtypes.
        alone: it is whole, in this process; otherwise sharded, and all ranks call it together.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the model.
    """
    progress = read_progress(path)
    tensors = _model_tensors(model)
    reader = CheckpointReader(path)
    _refuse_others(path, reader, tensors, "model.")
    load_tensors(tensors, reader, f"{path}: {_UNFIT}", alone=alone)
    return progress


def _refuse_others(
    path: Path, reader: CheckpointReader, tensors: dict[str, Tensor], *prefixes: str
) -> None:
    """Raise a CheckpointError where tensors were saved that would be passed over; DCP doesn't."""
    saved = reader.read_metadata().state_dict_metadata
    unknown = {name for name in saved if name.startswith(prefixes)} - set(tensors)
    if unknown:
        raise CheckpointError(f"{path}: the model has no {', '.join(sorted(unknown))}")


def read_progress(path: Path) -> Progress:
    """The `Progress` saved in the checkpoint folder `path`; raises CheckpointError."""
    file = path / PROGRESS_FILE
    try:
        return Progress(**json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint's progress: {error}"
        ) from None


def run_tensors(
    model: nn.Module, optimizers: OptimizersContainer, carried: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors that a run needs to go on, by the name under which they are saved."""
    own = _model_tensors(model) | _optimizer_tensors(optimizers) | _random_states()
    return own | dict(carried)


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
