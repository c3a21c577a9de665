"""All cases of one world size in one job; rank 0 writes what was measured as JSON.

    torchrun --nproc_per_node N worker.py RESULTS.json WORK_FOLDER PLAIN_RUNS JOB

cases.py lists the cases, training.py runs them; the tests judge what comes out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from launch.optim import build_optimizers, build_schedule
from launch.step import SeparatePieces, accumulate_gradients
from parallel.checkpoint import load_checkpoint
from parallel.mesh import (
    Mesh,
    build_mesh,
    close_process_group,
    init_process_group,
    leave_job,
)
from tests.distributed import tiny
from tests.distributed.cases import (
    ALONG,
    CASES,
    LAYOUTS,
    LORA,
    RESHARDS,
    SAMPLES,
    TP_LAYOUTS,
    WAITING,
    Trained,
)
from tests.distributed.faults import FAULTS, LORA_FAULTS
from tests.distributed.lane_cases import compare_lanes
from tests.distributed.measure import whole
from tests.distributed.saving import save_checkpoint
from tests.distributed.tp_cases import carried_window, layer_traffic, placement_words
from tests.distributed.training import (
    OPTIM,
    PlainRuns,
    compare_training,
    gradients_that_wait,
    loss_config,
    make_model,
    own_microbatches,
    planted_fault,
)


def reshard_checkpoint(
    weights: Path, folder: Path, meshes: list[Mesh], lora_rank: int
) -> dict[str, Any]:
    """Save after a step on one layout, load on another: parameters and moments, bit for bit."""
    saved: dict[str, Tensor] = {}
    result: dict[str, Any] = {}
    for index, mesh in enumerate(meshes):
        model = make_model(weights, Trained(torch.float32, lora_rank=lora_rank), mesh, {})
        optimizers = build_optimizers(model, OPTIM, fused=False)
        schedule = build_schedule(optimizers, OPTIM, 10)
        if index == 0:
            pieces = SeparatePieces(model, own_microbatches(0, mesh))
            accumulate_gradients(model, pieces, loss_config(model), mesh)
            optimizers.step()
            schedule.step()
            path = save_checkpoint(
                folder,
                model,
                optimizers,
                schedule,
                step=1,
                global_batch_size=SAMPLES,
                layout=mesh.shape,
            )
        else:
            progress = load_checkpoint(path, model, optimizers, schedule)
            result["progress"] = [progress.step, progress.global_batch_size]
        state = {f"model.{k}": v for k, v in model.state_dict().items()}
        state |= {k: v for k, v in optimizers.state_dict().items() if k.startswith("state.")}
        full = {name: whole(value).clone() for name, value in state.items()}
        if index == 0:
            saved = full
        else:
            result["same_names"] = sorted(saved) == sorted(full)
            result["different"] = [n for n, v in saved.items() if not torch.equal(v, full[n])]
            result["moments"] = sum(n.endswith("exp_avg_sq") for n in full)
    return result


def main(results: Path, work: Path, plain: Path, job: str) -> None:
    init_process_group(timeout := timedelta(seconds=120))
    world_size = dist.get_world_size()
    weights = work / "tiny.safetensors"
    if dist.get_rank() == 0:
        tiny.save_release_weights(weights, tiny.WIDE_LM_CONFIG)
    dist.barrier()
    meshes = {
        name: build_mesh(lay, timeout)
        for name, (ranks, lay) in LAYOUTS.items()
        if ranks == world_size
    }
    cases = {n: c for n, c in CASES.items() if c.layout in meshes and c.job == job}
    plain_runs = PlainRuns(weights, plain)
    plain_runs.compute(list(dict.fromkeys(case.trained for case in cases.values())))
    found: dict[str, Any] = {"seconds": {}, "timeouts": {}}
    for name, mesh in meshes.items():
        backends = [group._get_backend(torch.device("cpu")) for group in mesh.groups]
        found["timeouts"][name] = [each.options._timeout.total_seconds() for each in backends]

    def run(name: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        start = time.monotonic()
        found[name] = measure(*arguments)
        found["seconds"][name] = round(time.monotonic() - start, 1)

    for name, case in cases.items():
        run(name, compare_training, plain_runs, meshes[case.layout], case)
    if job == "eager":
        run_other_measurements(meshes, run, plain_runs, work)
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found, indent=1))
    close_process_group()


def run_other_measurements(
    meshes: dict[str, Mesh], run: Callable[..., None], plain_runs: PlainRuns, work: Path
) -> None:
    """What is measured beside training: words of DTensor, one layer, faults, checkpoints."""
    for layout in TP_LAYOUTS:
        if layout in meshes:
            run(f"placement {layout}", placement_words, meshes[layout])
            run(f"layer {layout}", layer_traffic, meshes[layout])
            run(f"window {layout}", carried_window, meshes[layout])
    for name, (layout, trained) in WAITING.items():
        if layout in meshes:
            run(f"waiting {name}", gradients_that_wait, plain_runs, meshes[layout], trained)
    for name, (layout, fault) in FAULTS.items():
        if layout in meshes:
            trained = LORA if name in LORA_FAULTS else Trained()
            run(f"fault {name}", planted_fault, plain_runs, meshes[layout], fault, trained)
    for name, (trained_on, resumed_on, tbptt_pieces) in ALONG.items():
        if trained_on in meshes:
            both = [meshes[trained_on], meshes[resumed_on]]
            run(f"along {name}", compare_lanes, plain_runs.weights, work / name, both, tbptt_pieces)
    for name, (saved, loaded, lora_rank) in RESHARDS.items():
        if saved in meshes:
            both = [meshes[saved], meshes[loaded]]
            folder = work / name
            run(f"reshard {name}", reshard_checkpoint, plain_runs.weights, folder, both, lora_rank)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
    leave_job(0)
