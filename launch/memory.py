"""The proof that TTT remembers what attention can't reach: `make memory`.

    python -m launch.memory [--work FOLDER] [--out FOLDER] [key.path=value …]

Trains `configs/memory.yaml` three times through `launch/train.py`, two runs side by side, one core
each: as it stands, without TTT, and with an inner loop that looks ahead. Then it measures the loss
on held-out sequences in which a phrase comes back after a gap, gap by gap, from the runs' last
checkpoints, and writes `memory.json`, `memory.csv` and `memory.png`. Exit code 1 where a threshold
is missed.

FOLDER of --work (new; default: runs/memory-TIME) gets data, runs and their logs; that of --out
(default: the same) the figures, in place of earlier ones. `key.path=value` goes to all three runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from launch.config import REPO_ROOT, TrainConfig, load_config, utc_timestamp
from launch.errors import UserError, exit_with
from launch.make_demo_base import DEFAULT_OUT, DemoBaseError
from launch.make_memory_data import (
    CONFIG,
    attention_reach,
    make_memory_data,
    read_sequences,
    sequence_frames,
)
from launch.memory_report import Curve, MemoryResult, Point, write_result
from launch.memory_task import NEW, RETURNING, MemoryTask
from launch.model_source import ModelSource, load_model
from launch.run_checkpoints import choose_checkpoint
from launch.setup import attention_windows, model_dtypes, ttt_placement
from parallel.checkpoint_metadata import CheckpointError
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.context import read_attention_contexts
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.release import open_release

TITLE = "The memory benchmark stopped"
TRAIN = REPO_ROOT / "launch" / "train.py"
# In the order in which they start, two at a time: the longer ones first.
RUNS: dict[str, tuple[str, ...]] = {
    "with TTT": (),
    "looks ahead": ("ttt.causal=false",),
    "without TTT": ("ttt.layers=none",),
}
SIDE_BY_SIDE = 2


def folder_name(run: str) -> str:
    """Of a run, in the work folder."""
    return run.lower().replace(" ", "-")


def train_all(work: Path, settings: Sequence[str]) -> dict[str, float]:
    """Make the runs, two at a time; returns the seconds that each took.

    Raises:
        UserError: the runs that failed, with the ends of their logs.
    """
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        try:
            jobs = {run: pool.submit(_train, run, work, settings) for run in RUNS}
            outcomes = {run: job.result() for run, job in jobs.items()}
        finally:  # after Ctrl-C, which the runs get too, no further one begins
            pool.shutdown(cancel_futures=True)
    problems = [problem for _, problem in outcomes.values() if problem]
    if problems:
        raise UserError(problems, title=TITLE)
    return {run: seconds for run, (seconds, _) in outcomes.items()}


def _train(run: str, work: Path, settings: Sequence[str]) -> tuple[float, str]:
    """Seconds that it took, and what went wrong, or nothing."""
    folder = work / folder_name(run)
    log = work / f"{folder_name(run)}.log"
    command = [sys.executable, str(TRAIN), str(CONFIG), *settings, *RUNS[run], f"run_dir={folder}"]
    started = time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith(("step ", "eval after", "warning")):
                print(f"[{run}] {line}", end="", flush=True)
    problem = ""
    if process.returncode != 0:
        last = " | ".join(log.read_text().splitlines()[-3:])
        problem = f"{run}: launch/train.py ended with code {process.returncode} ({log}): {last}"
    return time.monotonic() - started, problem


def load_run(folder: Path) -> tuple[TTTMoshi, TrainConfig]:
    """The model of a run after its last step, whole, in eval mode on the CPU.

    (`launch.model_source.open_source` refuses one that looks ahead: it can't talk.)
    """
    config = load_config(folder / "config.yaml")
    release = open_release(**config.moshi_paths.model_dump())
    device = torch.device("cpu")
    source = ModelSource(
        release=release,
        checkpoint=choose_checkpoint(folder, config.max_steps, named=str(folder)),
        merged=None,
        ttt=ttt_placement(config, release.lm_config),
        windows=attention_windows(config),
        lora=None,
        compute=model_dtypes(config, device)[1],
        device=device,
    )
    return load_model(source), config


@torch.no_grad()
def measure(model: TTTMoshi, codes: Tensor, kinds: Tensor) -> tuple[float, float]:
    """Mean losses of a phrase's returning frames and of its new ones, in nats.

    Args:
        codes, kinds: int `[N, R, T]` and `[N, T]`, as `read_sequences` gives them.
    """
    # The base has no delays: step s + 1 predicts frame s.
    losses = model.step_losses(model.steps(codes))[1][:, 0]  # [N, T], of Moshi's first codebook
    return losses[kinds == RETURNING].mean().item(), losses[kinds == NEW].mean().item()


def measure_all(
    work: Path, gaps: Sequence[int], seconds: dict[str, float], overrides: Sequence[str]
) -> MemoryResult:
    """Loss by gap of every run's last checkpoint.

    Raises:
        RuntimeError: attention doesn't reach equally far in all of them.
    """
    curves, reaches = [], {}
    for run in RUNS:
        model, config = load_run(work / folder_name(run))
        reaches[run] = attention_reach([window for _, window in read_attention_contexts(model)])
        frames = sequence_frames(config)
        points = []
        for gap in gaps:
            path = work / "data" / f"gap-{gap:03d}.safetensors"
            points.append(Point(gap, *measure(model, *read_sequences(path, frames))))
        curves.append(Curve(run, seconds[run], tuple(points)))
    if len(set(reaches.values())) != 1:
        raise RuntimeError(f"attention reaches {reaches} frames: the runs can't be compared")
    task = MemoryTask(frames)
    return MemoryResult(
        reach=reaches[run],
        symbols=task.symbols,
        phrase_frames=task.phrase_frames,
        sequence_frames=frames,
        steps=config.max_steps,
        overrides=tuple(overrides),
        curves=tuple(curves),
    )


def run_benchmark(work: Path, out: Path, overrides: Sequence[str], demo_base: Path) -> bool:
    """The whole benchmark; returns whether every threshold is met.

    Raises:
        UserError, DemoBaseError, ReleaseError, CheckpointError: what stopped it.
    """
    if work.exists():
        raise UserError(f"--work: {work} exists; nothing is ever overwritten", title=TITLE)
    data = work / "data"
    settings = [
        *overrides,
        f"data.train_data={data}/train.jsonl",
        f"data.eval_data={data}/eval.jsonl",
        f"moshi_paths.hf_repo_id={data}/base",
    ]
    print(f"work folder: {work}", flush=True)
    started = time.monotonic()
    gaps = make_memory_data(load_config(CONFIG, settings), demo_base)
    seconds = train_all(work, settings)
    result = measure_all(work, gaps, seconds, overrides)
    for path in write_result(result, out, total_seconds=time.monotonic() - started):
        print(f"written: {path}")
    print("\n".join(result.table()))
    for check in result.checks():
        print(check.describe())
    return all(check.passed for check in result.checks())


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 1 where a threshold is missed, 2 for a person's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = REPO_ROOT / "runs" / f"memory-{utc_timestamp()}"
    parser.add_argument("--work", metavar="FOLDER", type=Path, default=default)
    parser.add_argument("--out", metavar="FOLDER", type=Path)
    parser.add_argument(
        "--demo-base",
        metavar="FOLDER",
        type=Path,
        default=DEFAULT_OUT,
        help="where Mimi and the tokenizer come from; default: the demo's, made if it isn't there",
    )
    parser.add_argument("overrides", metavar="key.path=value", nargs="*")
    options = parser.parse_args(arguments)
    work = options.work.absolute()
    out = work if options.out is None else options.out.absolute()
    torch.set_num_threads(1)  # small shapes: more threads only wait for each other
    try:
        passed = run_benchmark(work, out, options.overrides, options.demo_base.absolute())
    except UserError as error:
        exit_with(error)
    except (DemoBaseError, ReleaseError, CheckpointError) as error:
        exit_with(UserError(str(error), title=TITLE))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
