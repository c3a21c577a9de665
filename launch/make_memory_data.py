"""Write the memory benchmark's base checkpoint and sequences, where a configuration has them.

    python -m launch.make_memory_data [key.path=value …]        (configs/memory.yaml)

Three things in one new folder, that of `data.train_data`:

    train.jsonl, train.safetensors       a sequence for every sample of the run, each met once
    eval.jsonl, gap-NNN.safetensors      held out: as many sequences for each gap, in frames
    base/                                a release folder: a tiny Moshi, random; Mimi and tokenizer
                                         of the demo's base (`make_demo_base.py`), which only have
                                         to be there

A file of sequences holds `codes` int32 `[R, N T]` and `kinds` int32 `[N T]` (`memory_task.py`), one
sequence after the other. The same configuration gives the same files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import _lm_kwargs, get_moshi_lm
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.config import REPO_ROOT, TrainConfig, load_config
from launch.errors import UserError, exit_with
from launch.feeding.batch_plan import resolve_global_batch_size
from launch.make_demo_base import DEFAULT_OUT, DemoBaseError, make_demo_base
from launch.make_demo_base import FILES as BASE_FILES
from launch.memory_task import CARD, CODEBOOKS, ROWS, MemoryTask
from ttt_dist.data.codes_file import FRAME_RATE
from ttt_dist.data.interleave import num_frames

CONFIG = REPO_ROOT / "configs" / "memory.yaml"
TITLE = "Can't make the memory benchmark's data"
LAYERS = 2
# Gaps in multiples of attention's reach: of those in training, and of those that are measured.
MULTIPLES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10)
HELD_OUT = 64  # sequences a gap
SEED = 0


def lm_config() -> dict[str, Any]:
    """Moshi 7B's keyword arguments with smaller widths, depths and vocabularies, without delays."""
    return {
        **_lm_kwargs,
        "dim": 128,
        "num_heads": 2,
        "num_layers": LAYERS,
        "text_card": 8,
        "card": CARD,
        "n_q": 2 * CODEBOOKS,
        "dep_q": CODEBOOKS,
        "delays": [0] * ROWS,
        "depformer_dim": 64,
        "depformer_dim_feedforward": int(4.125 * 64),
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
        "depformer_context": CODEBOOKS,
    }


def attention_reach(windows: Sequence[int | None]) -> int:
    """How many frames back anything can come to a frame through attention alone.

    Args:
        windows: of every layer, in frames, the frame itself included.

    Raises:
        ValueError: a window is unlimited.
    """
    limited = [window for window in windows if window is not None]
    if len(limited) < len(windows):
        raise ValueError("a layer's attention has no window: its reach is unlimited")
    return sum(window - 1 for window in limited)


def gaps_of(reach: int) -> list[int]:
    """MULTIPLES of `reach` in whole frames, each once."""
    return sorted({round(multiple * reach) for multiple in MULTIPLES})


def sequence_frames(config: TrainConfig) -> int:
    """Frames of a sequence, which a piece is; UserError where pieces grow."""
    if isinstance(config.duration_sec, dict):
        raise UserError(
            f"duration_sec: found {config.duration_sec}; allowed: one length, that of a sequence",
            title=TITLE,
        )
    return num_frames(config.duration_sec)


def write_sequences(path: Path, task: MemoryTask, gaps: Tensor, seed: int) -> None:
    """A file of one sequence for each of `gaps`, and nothing else of `seed`."""
    codes, kinds = task.draw(gaps, torch.Generator().manual_seed(seed))
    tensors = {"codes": codes.transpose(0, 1).flatten(1).contiguous(), "kinds": kinds.flatten()}
    save_file(tensors, path)


def read_sequences(path: Path, frames: int) -> tuple[Tensor, Tensor]:
    """Codes int64 `[N, R, T]` and kinds int32 `[N, T]` of a file of `write_sequences`."""
    tensors = load_file(path)
    codes = tensors["codes"].long().unflatten(1, (-1, frames)).transpose(0, 1)
    return codes, tensors["kinds"].unflatten(0, (-1, frames))


def make_memory_data(config: TrainConfig, demo_base: Path = DEFAULT_OUT) -> list[int]:
    """Write all of it; returns the gaps, in frames.

    Raises:
        UserError: the folder exists, or the configuration doesn't suit the benchmark.
        DemoBaseError: the demo's base can't be made.
    """
    folder, task, gaps = _plan(config)
    if demo_base == DEFAULT_OUT:
        make_demo_base(demo_base)
    folder.mkdir(parents=True)
    _write_base(folder / "base", demo_base)
    samples = config.max_steps * resolve_global_batch_size(config, 1)[0]
    pick = torch.randint(len(gaps), (samples,), generator=torch.Generator().manual_seed(SEED))
    write_sequences(folder / "train.safetensors", task, torch.tensor(gaps)[pick], SEED + 1)
    _write_manifest(folder / "train.jsonl", {"train.safetensors": samples * task.frames})
    held_out = {}
    for number, gap in enumerate(gaps):
        name = f"gap-{gap:03d}.safetensors"
        write_sequences(folder / name, task, torch.full((HELD_OUT,), gap), SEED + 2 + number)
        held_out[name] = HELD_OUT * task.frames
    _write_manifest(folder / "eval.jsonl", held_out)
    return gaps


def _plan(config: TrainConfig) -> tuple[Path, MemoryTask, list[int]]:
    folder = Path(config.data.train_data).parent
    paths = {
        "data.train_data": (config.data.train_data, folder / "train.jsonl"),
        "data.eval_data": (config.data.eval_data, folder / "eval.jsonl"),
        "moshi_paths.hf_repo_id": (config.moshi_paths.hf_repo_id, folder / "base"),
    }
    problems = [
        f"{key}: found {found}, allowed: {allowed}"
        for key, (found, allowed) in paths.items()
        if found is None or Path(found) != allowed
    ]
    windows = (config.ttt.ttt_layer_context, config.ttt.non_ttt_layer_context)
    if windows[0] is None or windows[0] != windows[1]:
        problems.append(
            f"ttt.ttt_layer_context, ttt.non_ttt_layer_context: found {windows[0]} and "
            f"{windows[1]}; allowed: the same number, so that attention reaches as far with TTT "
            "as without"
        )
        raise UserError(problems, title=TITLE)
    gaps = gaps_of(attention_reach([windows[0]] * LAYERS))
    task = MemoryTask(sequence_frames(config))
    if gaps[-1] > task.longest_gap:
        least = (task.frames - task.longest_gap + gaps[-1]) / FRAME_RATE
        problems.append(
            f"duration_sec: found {config.duration_sec}, allowed: {least:g} or more, for a gap "
            f"of {gaps[-1]} frames"
        )
    if folder.exists():
        problems.append(f"{folder} exists; nothing is ever overwritten: delete it, or use it")
    if problems:
        raise UserError(problems, title=TITLE)
    return folder, task, gaps


def _write_base(folder: Path, demo_base: Path) -> None:
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        moshi = get_moshi_lm(None, lm_config(), dtype=torch.float32)
    save_file(moshi.state_dict(), folder / BASE_FILES["moshi_name"])
    for key in ("mimi_name", "mimi_config_name", "tokenizer_name"):
        shutil.copyfile(demo_base / BASE_FILES[key], folder / BASE_FILES[key])
    config = {**lm_config(), **BASE_FILES, "model_type": "moshi"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_manifest(path: Path, frames: dict[str, int]) -> None:
    entries = [{"path": name, "duration": count / FRAME_RATE} for name, count in frames.items()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def main(arguments: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    try:
        config = load_config(CONFIG, arguments)
        gaps = make_memory_data(config)
    except UserError as error:
        exit_with(error)
    except DemoBaseError as error:
        exit_with(UserError(str(error), title=TITLE))
    folder = Path(config.data.train_data).parent
    print(f"{folder}: base checkpoint, and sequences with gaps of {', '.join(map(str, gaps))}")


if __name__ == "__main__":
    main(sys.argv[1:])
