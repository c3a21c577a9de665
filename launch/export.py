"""Write a trained model as a folder in the layout of Kyutai's releases.

    python launch/export.py RUN_DIR [--step N] [--out FOLDER] [--base-only]
                            [--merge-lora | --adapters-only] [--dtype float32]

Takes a sharded checkpoint of any layout; one process, without torchrun and GPU. Tensors go one by
one from the checkpoint into the file, so a few of the largest have to fit in memory, never the
model. The folder appears complete or not at all, and none is written over.

Without --base-only the folder holds the TTT layers: `config.json` has a section `ttt`, which stock
moshi refuses; train on from it with `moshi_paths.hf_repo_id=FOLDER`. With --base-only it holds
Moshi alone, for stock moshi.

A run with adapters (LoRA) asks for one of two: --merge-lora adds them to the weights that they
adapt; --adapters-only writes `lora.safetensors` with everything that was trained, and a
`config.json` that names the base's files where they are. Both go on training here; with --base-only
`moshi.server --config-path FOLDER/config.json --lora-weight FOLDER/lora.safetensors` takes them.
Without it the file holds the TTT layers, which stock moshi refuses.
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

from launch.commands import telling_mistakes
from launch.config import TrainConfig, load_config
from launch.configuration.model_checks import lora_settings, ttt_section
from launch.errors import UserError
from launch.exporting.config_file import (
    MIMI_CONFIG_FILE,
    MOSHI_FILE,
    copied_files,
    names_inside,
    release_config,
)
from launch.exporting.tensors import TrainedTensors, tensor_specs
from launch.run_checkpoints import choose_checkpoint
from launch.setup import lay_out_model
from parallel.checkpoint import read_progress
from ttt_dist.moshi.build import is_ttt_parameter, lm_settings
from ttt_dist.moshi.context import (
    check_attention_contexts,
    describe_attention_contexts,
    read_attention_contexts,
)
from ttt_dist.moshi.lm_config import lm_config_problems
from ttt_dist.moshi.release import names_elsewhere, open_release
from ttt_dist.moshi.released_lora import ADAPTERS_FILE, released_adapters
from ttt_dist.moshi.tensor_files import TensorFiles
from ttt_dist.moshi.tensor_writer import TensorSpec, TensorWriter

TITLE = "Can't export"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Export:
    """What is to be written, checked: nothing of it can turn out wrong while it is.

    Attributes:
        tensors: the checkpoint's.
        file: name of the file of tensors.
        specs: name to shape and dtype of what it will hold.
        config: the folder's `config.json`.
        mimi_config: Mimi's, where the folder has it.
        files: name in the folder to the file that is copied there.
        step: of the checkpoint.
        summary: what a person is told, in lines.
    """

    tensors: TrainedTensors
    file: str
    specs: dict[str, TensorSpec]
    config: dict[str, Any]
    mimi_config: dict[str, Any] | None
    files: dict[str, Path]
    step: int
    summary: str


def plan_export(
    run: Path,
    step: int | None,
    *,
    base_only: bool = False,
    merge_lora: bool = False,
    adapters_only: bool = False,
    dtype: torch.dtype,
) -> Export:
    """Everything about an export but its tensors' values.

    Args:
        merge_lora, adapters_only: one of them has to be asked for where the run trained adapters.
        dtype: of Moshi's tensors; TTT's are float32.

    Raises:
        UserError, CheckpointError, ReleaseError: what a person has to mend.
    """
    if not (run / "config.yaml").is_file():
        what = "holds no config.yaml" if run.is_dir() else "is no folder"
        raise UserError(f"RUN_DIR: {run} {what}, so no run began there; check the path")
    config = load_config(run / "config.yaml")
    _check_adapters_wanted(run, config, merge_lora=merge_lora, adapters_only=adapters_only)
    release = open_release(**config.moshi_paths.model_dump())
    problems = lm_config_problems(lm_settings(release.lm_config))
    if problems:
        raise UserError(problems)
    checkpoint = choose_checkpoint(run, step, named="RUN_DIR")  # reads all of it, so it comes late
    progress = read_progress(checkpoint)
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
    adapters_for: set[str] | None = None
    files = {} if adapters_only else copied_files(release)
    names = names_inside(release)
    if adapters_only:
        summary.append(f"adapters of rank {config.lora.rank} for {release.moshi_weights}")
        adapters_for = _replaced_names(release)
        _check_base(release, base_only=base_only)
        names = names_elsewhere(release, **config.moshi_paths.model_dump())
    exported = release_config(
        release,
        names,
        section=None if base_only else section,
        adapters=lora_settings(config) if adapters_only else None,
    )
    if section is None and not base_only:
        # Without TTT all layers trained with one window, which may not be the release's.
        (exported["context"],) = {context for _, context in contexts}
    specs = tensor_specs(model, base_only=base_only, dtype=dtype, adapters_for=adapters_for)
    return Export(
        tensors=TrainedTensors(checkpoint, model, config.lora.scaling if merge_lora else None),
        file=ADAPTERS_FILE if adapters_only else MOSHI_FILE,
        specs=specs,
        config=exported,
        mimi_config=None if adapters_only else release.mimi_config,
        files=files,
        step=progress.step,
        summary="\n".join(summary),
    )


def _check_adapters_wanted(
    run: Path, config: TrainConfig, *, merge_lora: bool, adapters_only: bool
) -> None:
    """A run with adapters says what is to become of them, and no other does."""
    asked = [
        flag
        for flag, given in (("--merge-lora", merge_lora), ("--adapters-only", adapters_only))
        if given
    ]
    if len(asked) == 2:
        raise UserError(f"{' and '.join(asked)}: allowed is one of them")
    if asked and not config.lora.enable:
        raise UserError(f"{asked[0]}: {run} has no adapters (lora.enable: false); leave it out")
    if config.lora.enable and not asked:
        raise UserError(
            f"RUN_DIR: {run} trained LoRA adapters (lora.enable: true); add --merge-lora, which "
            "adds them to the weights that they adapt, or --adapters-only, which writes them by "
            "themselves"
        )


def _check_base(release: CheckpointInfo, *, base_only: bool) -> None:
    """Adapters without TTT need a base without."""
    with TensorFiles(release.moshi_weights) as files:
        if base_only and any(map(is_ttt_parameter, files.keys())):
            raise UserError(
                f"--base-only: the run's base, {release.moshi_weights}, holds TTT layers, so stock "
                "moshi can't load it with the adapters; use --merge-lora --base-only"
            )


def _replaced_names(release: CheckpointInfo) -> set[str]:
    """Tensors that the run's own base takes from another file than Moshi's."""
    adapters = released_adapters(release)
    if adapters is None:
        return set()
    with TensorFiles(adapters.path) as files:
        return files.keys()


def refuse_existing(out: Path) -> None:
    """Raise UserError where `out` is there already."""
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: {out} exists; nothing is ever overwritten: name a new folder")


def write_export(plan: Export, out: Path) -> None:
    """Write the folder `out`, which isn't there yet, by another name and a rename.

    Raises:
        UserError: `out` exists, or the disk is too small or refuses.
        CheckpointError: a tensor's bytes can't be read.
    """
    refuse_existing(out)
    wanted = sum(spec.bytes for spec in plan.specs.values())
    wanted += sum(path.stat().st_size for path in plan.files.values())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < wanted:
            raise UserError(
                f"--out: {out} needs {wanted / 1e9:.2f} GB, and {out.parent} has {free / 1e9:.2f} "
                "GB left; name a folder on another disk"
            )
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            _write_tensors(plan, folder / plan.file)
            for name, path in plan.files.items():
                shutil.copyfile(path, folder / name)
            if plan.mimi_config is not None:
                _write_json(folder / MIMI_CONFIG_FILE, plan.mimi_config)
            _write_json(folder / "config.json", plan.config)
            folder.rename(out)
    except OSError as error:
        raise UserError(f"--out: {out} can't be written: {error}") from error


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
    parser.add_argument(
        "--adapters-only", action="store_true", help="what was trained, in lora.safetensors"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    options = parse_arguments(arguments)
    with telling_mistakes(TITLE):
        if options.out is not None:  # ahead of reading and hashing the checkpoint
            refuse_existing(options.out)
        plan = plan_export(
            options.run,
            options.step,
            base_only=options.base_only,
            merge_lora=options.merge_lora,
            adapters_only=options.adapters_only,
            dtype=DTYPES[options.dtype],
        )
        kind = "-adapters" * options.adapters_only + "-base" * options.base_only
        out = options.out or options.run / f"export{kind}-step-{plan.step:06d}"
        print(plan.summary, flush=True)
        write_export(plan, out)
    print(f"folder: {out}: {len(plan.specs)} tensors in {plan.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
