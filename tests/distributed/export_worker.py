"""Checkpoints of one set of weights from several layouts; and exports, loaded on them.

    torchrun --nproc_per_node N export_worker.py BASE RUNS [EXPORTED ADAPTERS] LAYOUT...

Each LAYOUT, `DP_SHARDxTP`, leaves a run folder RUNS/LAYOUT with the checkpoint of step 3, and one
rank, RUNS/lora too, where adapters and TTT were trained on BASE. EXPORTED is a release that has to
hold the weights of the former, ADAPTERS one of the latter's.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.config import DEFAULT_CONFIG, TrainConfig, dump_yaml, load_config
from launch.optim import build_optimizers, build_schedule
from launch.setup import lay_out_model, make_model
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
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.lora import is_adapter_parameter
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.released_lora import released_adapters
from ttt_dist.moshi.tensor_files import TensorFiles
from ttt_dist.moshi.weights import fill_own, load_base_weights, seeded_generator
from ttt_dist.placement import shard_slices

STEP = 3


def trained_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """What stands for a parameter's trained value, whole, float32; no two are alike."""
    return torch.empty(shape).normal_(std=0.05, generator=seeded_generator(9, name))


LORA = ("full_finetuning=false", "lora.enable=true", "lora.rank=5")


def config_of(base: Path, run: Path, *more: str) -> TrainConfig:
    return load_config(
        DEFAULT_CONFIG,
        [
            *(f"moshi_paths.hf_repo_id={base}", f"run_dir={run}"),
            *("device=cpu", "param_dtype=float32", *more),
        ],
    )


def built(config: TrainConfig, mesh: Mesh) -> TTTMoshi:
    release = open_release(**config.moshi_paths.model_dump())
    return make_model(config, release, mesh, torch.device("cpu"))


def save(config: TrainConfig, mesh: Mesh) -> None:
    model = built(config, mesh)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = trained_value(name, tuple(parameter.shape))
            fill_own(parameter, value[shard_slices(parameter)])
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


class CountedSlice:
    """A tensor of a file; counts the elements that are read of it."""

    read = 0

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getitem__(self, index: Any) -> Tensor:
        values = self._source[index]
        CountedSlice.read += values.numel()
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def check_loaded(config: TrainConfig, mesh: Mesh) -> None:
    """Every value is right, and no rank reads more than it keeps."""
    original, CountedSlice.read = TensorFiles.slice, 0
    with mock.patch.object(TensorFiles, "slice", lambda *args: CountedSlice(original(*args))):
        model = built(config, mesh)
    kept = sum(own_part(parameter).numel() for parameter in model.parameters())
    if CountedSlice.read != kept:
        raise AssertionError(f"rank {dist.get_rank()}: read {CountedSlice.read}, keeps {kept}")
    for name, parameter in model.named_parameters():
        expected = trained_value(name, tuple(parameter.shape))[shard_slices(parameter)]
        if not torch.equal(own_part(parameter), expected):
            raise AssertionError(f"rank {dist.get_rank()} of {mesh.shape}: {name} differs")


def check_adapted(config: TrainConfig, mesh: Mesh) -> None:
    """Each rank's part is that of a whole model, whose values moshi's loader judges elsewhere."""
    release = open_release(**config.moshi_paths.model_dump())
    whole = lay_out_model(config, release.lm_config, None, torch.float32)
    whole.to_empty(device="cpu")
    load_base_weights(whole, release.moshi_weights, released_adapters(release))
    for name, parameter in built(config, mesh).named_parameters():
        expected = whole.get_parameter(name)[shard_slices(parameter)]
        # Merged weights are sums in float32, of which each rank forms those of its own part; all
        # else is read as it is.
        exact = config.lora.enable or is_ttt_parameter(name)
        rtol, atol = (0.0, 0.0) if exact else (1e-6, 1e-7)
        torch.testing.assert_close(own_part(parameter), expected, rtol=rtol, atol=atol, msg=name)
        if is_adapter_parameter(name) or is_ttt_parameter(name):
            value = trained_value(name, tuple(parameter.shape))[shard_slices(parameter)]
            if not torch.equal(expected, value):
                raise AssertionError(f"rank {dist.get_rank()} of {mesh.shape}: {name} was lost")


def own_part(parameter: Tensor) -> Tensor:
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return own.detach()


def main(base: Path, runs: Path, exported: list[Path], layouts: list[str]) -> None:
    init_process_group(timedelta(seconds=100))
    for layout in layouts:
        dp_shard, tp = map(int, layout.split("x"))
        mesh = build_mesh(Layout(dp_shard=dp_shard, tp=tp))
        save(config_of(base, runs / layout), mesh)
        if dist.get_world_size() == 1:
            save(config_of(base, runs / "lora", *LORA), mesh)
        if exported:
            whole, adapters = exported
            check_loaded(config_of(whole, runs / layout), mesh)
            for more in (LORA, LORA[:1]):  # adapters go on training, or are merged
                check_adapted(config_of(adapters, runs / layout, *more), mesh)
    close_process_group()


if __name__ == "__main__":
    base, runs, *others = sys.argv[1:]
    releases = [Path(other) for other in others if "/" in other]
    main(Path(base), Path(runs), releases, others[len(releases) :])
    leave_job(0)
