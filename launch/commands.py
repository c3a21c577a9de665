"""What several commands share: the device that a person asks for, and how mistakes end them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launch.errors import UserError, exit_with
from parallel.checkpoint import CheckpointError
from parallel.device import hide_gpus, local_device
from ttt_dist.data.manifest import DataError
from ttt_dist.moshi.errors import ReleaseError


def chosen_device(name: str) -> torch.device:
    """The device that `--device` names. For "cpu" beside a GPU the process starts over."""
    if name == "cpu":
        hide_gpus()
    return local_device()


@contextmanager
def telling_mistakes(title: str) -> Iterator[None]:
    """End the process with exit code 2 and one message where a person has to mend something."""
    try:
        yield
    except (UserError, DataError) as error:
        exit_with(UserError(error.problems, title=title))
    except (ReleaseError, CheckpointError) as error:
        exit_with(UserError(str(error), title=title))
