"""A checkpoint of ranks that don't all see one folder.

    torchrun --nproc_per_node N saving_worker.py FOLDER RESULTS.json

Rank 0 saves into FOLDER/0, all others into FOLDER/1, as nodes do whose disks aren't shared.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist
from torch import nn

from launch.configuration.schema import OptimConfig
from launch.optim import build_optimizers, build_schedule
from parallel import checkpoint_saver
from parallel.checkpoint import Progress
from parallel.checkpoint_saver import CheckpointSaver, Keep, SaveError
from parallel.mesh import close_process_group, init_process_group, leave_job


def main(folder: Path, results: Path) -> None:
    # Nothing here is late, so what isn't seen at once never will be.
    checkpoint_saver._SEEN_WITHIN_SEC = checkpoint_saver._SECOND_TRY_AFTER_SEC = 0.5
    init_process_group(timedelta(seconds=120))
    rank = dist.get_rank()
    model, config = nn.Linear(3, 2), OptimConfig()
    optimizers = build_optimizers(model, config, fused=False)
    schedule = build_schedule(optimizers, config, 10)
    own = folder / str(min(rank, 1))
    said: list[str] = []
    failure = ""
    try:
        with CheckpointSaver(own, Keep(), said.append if rank == 0 else None) as saver:
            saver.save(model, optimizers, schedule, Progress(1, 1, 0, {}))
    except SaveError as error:
        failure = str(error)
    every = [("", said)] * dist.get_world_size()
    dist.all_gather_object(every, (failure, said))
    if rank == 0:
        results.write_text(json.dumps(every))
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_job(0)
