"""Host memory of an export from a checkpoint of more than 1 GB.

python export_memory_worker.py make FOLDER          # FOLDER/base, and the run FOLDER/run
python export_memory_worker.py export FOLDER DTYPE  # FOLDER/DTYPE, and FOLDER/DTYPE.json
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from launch.config import DEFAULT_CONFIG, dump_yaml, load_config
from launch.export import main as export
from launch.optim import build_optimizers, build_schedule
from launch.setup import make_model
from parallel.checkpoint import list_checkpoints
from parallel.checkpoint_files import SavedTensors
from parallel.mesh import Layout, build_mesh, close_process_group, init_process_group, leave_job
from tests.distributed import loading_worker
from tests.distributed.saving import save_checkpoint
from ttt_dist.moshi.release import open_release

LM_CONFIG = loading_worker.LM_CONFIG | {"dim": 1024, "num_layers": 16}
FILES = {"mimi_name": "mimi.safetensors", "tokenizer_name": "tokenizer.model"}


def make(folder: Path) -> None:
    """One rank saves: the parts are whole tensors, as large as they get."""
    base = folder / "base"
    base.mkdir(parents=True)
    loading_worker.LM_CONFIG = LM_CONFIG
    loading_worker.write_checkpoint(base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(LM_CONFIG | FILES))
    # Copied as they are: an export doesn't look into them.
    (base / "mimi.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (base / "tokenizer.model").touch()
    run = folder / "run"
    config = load_config(
        DEFAULT_CONFIG,
        [
            *(f"moshi_paths.hf_repo_id={base}", f"run_dir={run}", "device=cpu"),
            # Adam's moments of TTT alone; the weights are all there is to export.
            *("param_dtype=float32", "full_finetuning=false"),
        ],
    )
    init_process_group(timedelta(seconds=100))
    mesh = build_mesh(Layout(dp_shard=1))
    release = open_release(**config.moshi_paths.model_dump())
    model = make_model(config, release, mesh, torch.device("cpu"))
    optimizers = build_optimizers(model, config.optim, fused=False)
    schedule = build_schedule(optimizers, config.optim, config.max_steps)
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config))
    kept = {"step": 1, "global_batch_size": 8, "layout": mesh.shape}
    save_checkpoint(run / "checkpoints", model, optimizers, schedule, **kept)
    close_process_group()


def measure(folder: Path, dtype: str) -> None:
    (checkpoint,) = list_checkpoints(folder / "run" / "checkpoints")
    shapes = SavedTensors(checkpoint).shapes()
    sizes = {n: 4 * torch.Size(s).numel() for n, s in shapes.items() if n.startswith("model.")}
    with loading_worker.PeakAnonymous() as memory:
        export([str(folder / "run"), "--out", str(folder / dtype), "--dtype", dtype])
    found = {
        "above": memory.peak - memory.start,
        "largest": max(sizes.values()),
        "model": sum(sizes.values()),
    }
    (folder / f"{dtype}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        measure(Path(sys.argv[2]), sys.argv[3])
    leave_job(0)
