"""Host memory of ranks that load a base checkpoint of more than 1 GB, sharded.

    torchrun --nproc_per_node N loading_worker.py WEIGHTS.safetensors RESULTS.json TP

Rank 0 writes the checkpoint where there is none.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from parallel.mesh import (
    Layout,
    build_mesh,
    close_process_group,
    init_process_group,
    leave_job,
)
from parallel.parallelize import ParallelPlan, parallelize
from tests.distributed import tiny
from ttt_dist.moshi.build import build_model, is_ttt_parameter
from ttt_dist.moshi.packed import packed_parameters
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

LM_CONFIG: dict[str, Any] = tiny.LM_CONFIG | {
    "dim": 2048,
    "num_heads": 16,
    "num_layers": 8,
    "hidden_scale": 4.125,
    "text_card": 32000,
    "card": 2048,
}


def write_checkpoint(path: Path) -> None:
    """A release file of these shapes in bfloat16, random."""
    model = build_model(LM_CONFIG, None)
    packed = packed_parameters(model)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in model.named_parameters():
        shape = [value.shape[0] * value.shape[1], value.shape[2]] if name in packed else value.shape
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    save_file(tensors, path)


class PeakAnonymous:
    """Highest anonymous memory of this process, in bytes, while it is entered."""

    def __enter__(self) -> PeakAnonymous:
        self.start = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def main(weights: Path, results: Path, tp: int) -> None:
    init_process_group(timedelta(seconds=200))
    if dist.get_rank() == 0 and not weights.exists():
        write_checkpoint(weights)
    dist.barrier()
    mesh = build_mesh(Layout(tp=tp))
    placement = tiny.ttt_placement(lm_config=LM_CONFIG)
    model = build_model(LM_CONFIG, placement, dtype=torch.float32)
    parallelize(model, mesh, ParallelPlan(compute_dtype=torch.float32))
    with PeakAnonymous() as memory:
        model.to_empty(device="cpu")
        load_base_weights(model, weights)
        init_ttt_weights(model, seed=0)
    parameters = dict(model.named_parameters())
    own = sum(
        (p.to_local() if isinstance(p, DTensor) else p).numel() * p.element_size()
        for p in parameters.values()
    )
    largest = max(
        p.numel() * (p.element_size() if is_ttt_parameter(n) else 2) for n, p in parameters.items()
    )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        found, {"above": memory.peak - memory.start, "own": own, "largest": largest}
    )
    if dist.get_rank() == 0:
        size = weights.stat().st_size
        results.write_text(json.dumps({"file": size, "ranks": found}))
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    leave_job(0)
