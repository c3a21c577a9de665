"""Write a trained model as a folder in the layout of Kyutai's releases.

    python launch/export.py RUN_DIR [--step N] [--out FOLDER] [--base-only] [--merge-lora]
                            [--dtype float32]

Takes a sharded checkpoint of any layout; one process, without torchrun and GPU. Tensors go one by
one from the checkpoint into the file, so a few of the largest have to fit in memory, never the
model. The folder appears complete or not at all, and none is written over.

Without --base-only the folder holds the TTT layers: `config.json` has a section `ttt`, which stock
moshi refuses; train on from it with `moshi_paths.hf_repo_id=FOLDER`. With --base-only it holds
Moshi alone, for stock moshi. Adapters (LoRA) are added to the weights that they adapt, and that is
asked for by --merge-lora.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from moshi.models.loaders import CheckpointInfo
from tqdm import tqdm

from launch.config import TrainConfig, load_config
from launch.errors import UserError, exit_with
from launch.export_tensors import TrainedTensors, tensor_specs
from launch.model_checks import ttt_section
from launch.run_folder import RunFolder
from launch.setup import lay_out_model
from parallel.checkpoint import CheckpointError, list_checkpoints, read_progress
from ttt_dist.moshi.build import lm_settings
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
)
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.release import open_release
from ttt_dist.moshi.released_lora import ADAPTER_KEYS
from ttt_dist.moshi.released_ttt import SECTION
from ttt_dist.moshi.tensor_writer import TensorSpec, TensorWriter

TITLE = "Can't export"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MOSHI_FILE, MIMI_FILE = "model.safetensors", "mimi.safetensors"
MIMI_CONFIG_FILE = "mimi_config.json"


@dataclass(frozen=True)
class Export:
    """What is to be written, checked: nothing of it can turn out wrong while it is.

    Attributes:
        tensors: the checkpoint's.
        specs: name to shape and dtype of what `model.safetensors` will hold.
        config: the folder's `config.json`.
        files: name in the folder to the file that is copied there.
    """

    tensors: TrainedTensors
    specs: dict[str, TensorSpec]
    config: dict[str, Any]
    mimi_config: dict[str, Any] | None
    files: dict[str, Path]
    step: int
    summary: str


def find_checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of `step` in the run's folder, or the newest; raises UserError."""
    if not (run / "config.yaml").is_file():
        what = "holds no config.yaml" if run.is_dir() else "is no folder"
        raise UserError(
            f"RUN_DIR: {run} {what}, so no run began there; check the path", title=TITLE
        )
    folder = RunFolder(run).checkpoints
    found = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(folder)}
    if not found:
        raise UserError(
            f"RUN_DIR: {folder} holds no checkpoint (step-NNNNNN); train with do_ckpt=true",
            title=TITLE,
        )
    if step is None:
        return found[max(found)]
    if step not in found:
        raise UserError(
            f"--step: found {step}, but {folder} has steps {', '.join(map(str, found))}; name one "
            "of them, or leave --step out for the newest",
            title=TITLE,
        )
    return found[step]


def plan_export(
    run: Path, step: int | None, *, base_only: bool, merge_lora: bool, dtype: torch.dtype
) -> Export:
    """Everything about an export but its tensors' values.

    Args:
        merge_lora: has to be asked for where the run trained adapters.
        dtype: of Moshi's tensors; TTT's are float32.

    Raises:
        UserError, CheckpointError, ReleaseError: what a person has to mend.
    """
    checkpoint = find_checkpoint(run, step)
    progress = read_progress(checkpoint)
    config = load_config(run / "config.yaml")
    if config.lora.enable and not merge_lora:
        raise UserError(
            f"RUN_DIR: {run} trained LoRA adapters (lora.enable: true); add --merge-lora, which "
            "adds them to the weights that they adapt",
            title=TITLE,
        )
    if merge_lora and not config.lora.enable:
        raise UserError(
            f"--merge-lora: {run} has no adapters (lora.enable: false); leave it out", title=TITLE
        )
    release = open_release(**config.moshi_paths.model_dump())
    model = lay_out_model(config, release.lm_config, None, torch.float32)
    section = ttt_section(config, lm_settings(release.lm_config))
    contexts = read_attention_contexts(model)
    if section is not None:  # it has to tell of the very modules that trained
        check_attention_contexts(
            contexts,
            ttt_layers=tuple(section["layers"]),
            ttt_context=section["ttt_layer_context"],
            other_context=section["non_ttt_layer_context"],
        )
    files = _files(release)
    summary = [
        f"checkpoint: {checkpoint}, saved on "
        + " x ".join(f"{axis} {size}" for axis, size in progress.layout.items()),
        f"attention context in training: {describe_attention_contexts(contexts)}",
    ]
    if base_only:
        summary.append(
            f"without TTT: attention context {lm_settings(release.lm_config).get('context')} in "
            "every layer, the release's own"
        )
    return Export(
        tensors=TrainedTensors(checkpoint, model, config.lora.scaling),
        specs=tensor_specs(model, base_only=base_only, dtype=dtype),
        config=_release_config(config, release, files, None if base_only else section),
        mimi_config=release.mimi_config,
        files=files,
        step=progress.step,
        summary="\n".join(summary),
    )


def write_export(plan: Export, out: Path) -> None:
    """Write the folder `out`, which isn't there yet, by another name and a rename.

    Raises:
        UserError: `out` exists, or the disk is too small or refuses.
        CheckpointError: a tensor's bytes can't be read.
    """
    if out.exists() or out.is_symlink():
        raise UserError(
            f"--out: {out} exists; nothing is ever overwritten: name a new folder", title=TITLE
        )
    wanted = sum(spec.bytes for spec in plan.specs.values())
    wanted += sum(path.stat().st_size for path in plan.files.values())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < wanted:
            raise UserError(
                f"--out: {out} needs {wanted / 1e9:.2f} GB, and {out.parent} has {free / 1e9:.2f} "
                "GB left; name a folder on another disk",
                title=TITLE,
            )
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            _write_tensors(plan, folder / MOSHI_FILE)
            for name, path in plan.files.items():
                shutil.copyfile(path, folder / name)
            if plan.mimi_config is not None:
                _write_json(folder / MIMI_CONFIG_FILE, plan.mimi_config)
            _write_json(folder / "config.json", plan.config)
            folder.rename(out)
    except OSError as error:
        raise UserError(f"--out: {out} can't be written: {error}", title=TITLE) from error


def _files(release: CheckpointInfo) -> dict[str, Path]:
    """Name in the folder to file, of what is copied."""
    mimi = release.mimi_weights
    name = mimi.name if mimi.name != MOSHI_FILE else MIMI_FILE
    return {name: mimi, release.tokenizer.name: release.tokenizer}


def _release_config(
    config: TrainConfig,
    release: CheckpointInfo,
    files: dict[str, Path],
    section: dict[str, Any] | None,
) -> dict[str, Any]:
    """The release's own `config.json`, with this folder's file names and TTT's section."""
    raw = dict(lm_settings(None) if release.raw_config is None else release.raw_config)
    # Of the weights that this run began with, whose adapters are merged now.
    for key in ("model_id", "mimi_config_name", SECTION, *ADAPTER_KEYS):
        raw.pop(key, None)
    mimi_name, tokenizer_name = files
    raw |= {"moshi_name": MOSHI_FILE, "mimi_name": mimi_name, "tokenizer_name": tokenizer_name}
    if release.mimi_config is not None:
        raw["mimi_config_name"] = MIMI_CONFIG_FILE
    if section is not None:
        raw[SECTION] = section
    return raw


def _write_tensors(plan: Export, path: Path) -> None:
    metadata = {"format": "pt", "step": str(plan.step)}
    total = sum(spec.bytes for spec in plan.specs.values())
    with (
        TensorWriter(path, plan.specs, metadata) as writer,
        tqdm(total=total, desc="exporting", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for name in writer.order:
            spec = plan.specs[name]
            writer.write(name, plan.tensors.read(name, spec.shape))
            bar.update(spec.bytes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; its mistakes end the process with exit code 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="launch/export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a training run")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--out", type=Path, help="new folder; default: RUN_DIR/export-step-NNNNNN")
    parser.add_argument("--base-only", action="store_true", help="Moshi without TTT")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of Moshi's tensors; TTT's are float32"
    )
    parser.add_argument(
        "--merge-lora", action="store_true", help="add LoRA adapters to the weights they adapt"
    )
    parser.add_argument("--adapters-only", action="store_true", help="refused: not built yet")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    options = parse_arguments(arguments)
    try:
        if options.adapters_only:
            raise UserError(
                "--adapters-only: writing adapters by themselves isn't built yet; --merge-lora "
                "adds them to the weights that they adapt",
                title=TITLE,
            )
        plan = plan_export(
            options.run,
            options.step,
            base_only=options.base_only,
            merge_lora=options.merge_lora,
            dtype=DTYPES[options.dtype],
        )
        kind = "export-base" if options.base_only else "export"
        out = options.out or options.run / f"{kind}-step-{plan.step:06d}"
        print(plan.summary, flush=True)
        write_export(plan, out)
    except UserError as error:
        exit_with(error)
    except (CheckpointError, ReleaseError) as error:
        exit_with(UserError(str(error), title=TITLE))
    print(f"folder: {out}: {len(plan.specs)} tensors in {MOSHI_FILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
