"""One checkpoint, saved and waited for, as training saves it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer

from parallel.checkpoint import Progress
from parallel.checkpoint_saver import CheckpointSaver, Keep


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: OptimizersContainer,
    schedule: LRSchedulersContainer,
    *,
    step: int,
    global_batch_size: int,
    layout: dict[str, int],
    carried: Mapping[str, Tensor] | None = None,
) -> Path:
    """The committed folder."""
    scheduler_steps = int(schedule.state_dict()["last_epoch"])
    with CheckpointSaver(folder, Keep()) as saver:
        progress = Progress(step, global_batch_size, scheduler_steps, layout)
        saver.save(model, optimizers, schedule, progress, carried)
        path = saver.finish()
    assert path is not None
    return path
