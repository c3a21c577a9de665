"""Checkpoints of one set of weights from several layouts; and an export, loaded on them.

    torchrun --nproc_per_node N export_worker.py BASE RUNS [EXPORTED] LAYOUT...

Each LAYOUT, `DP_SHARDxTP`, leaves a run folder RUNS/LAYOUT with the checkpoint of step 3. Where
EXPORTED is no layout, it is a release that has to hold these very weights.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.config import DEFAULT_CONFIG, TrainConfig, dump_yaml, load_config
from launch.optim import build_optimizers, build_schedule
from launch.setup import make_model
from parallel.mesh import (
    Layout,
    Mesh,
    build_mesh,
    close_process_group,
    init_process_group,
    leave_job,
)
from tests.distributed.saving import save_checkpoint
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.weights import fill_own, seeded_generator
from ttt_dist.placement import shard_slices

STEP = 3


def trained_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """What stands for a parameter's trained value, whole, float32; no two are alike."""
    return torch.empty(shape).normal_(std=0.05, generator=seeded_generator(9, name))


def config_of(base: Path, run: Path) -> TrainConfig:
    return load_config(
        DEFAULT_CONFIG,
        [f"moshi_paths.hf_repo_id={base}", f"run_dir={run}", "device=cpu", "param_dtype=float32"],
    )


def built(config: TrainConfig, mesh: Mesh) -> TTTMoshi:
    release = open_release(**config.moshi_paths.model_dump())
    return make_model(config, release, mesh, torch.device("cpu"))


def save(config: TrainConfig, mesh: Mesh) -> None:
    model = built(config, mesh)
    for name, parameter in model.named_parameters():
        fill_own(parameter, trained_value(name, tuple(parameter.shape))[shard_slices(parameter)])
    optimizers = build_optimizers(model, config.optim, fused=False)
    schedule = build_schedule(optimizers, config.optim, config.max_steps)
    run = Path(config.run_dir)
    if dist.get_rank() == 0:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(dump_yaml(config))
    dist.barrier()
    save_checkpoint(
        run / "checkpoints",
        model,
        optimizers,
        schedule,
        step=STEP,
        global_batch_size=8,
        layout=mesh.shape,
    )


def check_loaded(config: TrainConfig, mesh: Mesh) -> None:
    for name, parameter in built(config, mesh).named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        expected = trained_value(name, tuple(parameter.shape))[shard_slices(parameter)]
        if not torch.equal(own.detach(), expected):
            raise AssertionError(f"rank {dist.get_rank()} of {mesh.shape}: {name} differs")


def main(base: Path, runs: Path, exported: Path | None, layouts: list[str]) -> None:
    init_process_group(timedelta(seconds=100))
    for layout in layouts:
        dp_shard, tp = map(int, layout.split("x"))
        mesh = build_mesh(Layout(dp_shard=dp_shard, tp=tp))
        save(config_of(base, runs / layout), mesh)
        if exported is not None:
            check_loaded(config_of(exported, runs / layout), mesh)
    close_process_group()


if __name__ == "__main__":
    base, runs, *others = sys.argv[1:]
    release = Path(others.pop(0)) if "/" in others[0] else None
    main(Path(base), Path(runs), release, others)
    leave_job(0)
