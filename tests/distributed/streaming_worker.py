"""Streams of a model whose heads are split over ranks, beside the whole one.

torchrun --nproc_per_node N streaming_worker.py RESULTS.json
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from parallel.mesh import Layout, build_mesh, close_process_group, init_process_group, leave_job
from parallel.tensor_parallel import apply_tensor_parallel
from tests.unit.moshi_cases import clean_codes
from tests.unit.streaming_cases import in_steps, joined, largest_difference, ready, states, step

FRAMES = 29  # over three mini-batches of 8 and windows of 5 and 7 frames


@torch.no_grad()
def main(results: Path) -> None:
    init_process_group(timedelta(minutes=5))
    mesh = build_mesh(Layout(dp_shard=1, tp=dist.get_world_size()))
    assert mesh.tp is not None
    codes = clean_codes(2, FRAMES)
    measured: dict[str, Any] = {}
    for inner in ("mlp", "linear"):
        expected = ready(inner)(codes)
        model = ready(inner)
        apply_tensor_parallel(model, mesh.tp)
        sequence = in_steps(model, codes)
        with model.streaming(2):
            steps = [
                step(model, sequence[:, :, t : t + 1], sequence[:, :, t + 1 : t + 2])
                for t in range(FRAMES)
            ]
            heads = [state.inner.W1.shape[1] for state in states(model)]
        found = joined(model, steps, expected)
        error = torch.tensor(largest_difference(found, expected))
        dist.all_reduce(error, dist.ReduceOp.MAX)
        measured[inner] = {"error": error.item(), "heads": heads}
    if dist.get_rank() == 0:
        results.write_text(json.dumps(measured))
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_job(0)
