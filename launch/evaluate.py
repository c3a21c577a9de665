"""Losses by minute of whole recordings: with TTT, without it, and with TTT reset at every piece.

    python launch/evaluate.py CHECKPOINT [CHECKPOINT ...] --data DATA --out FOLDER
    torchrun --nproc_per_node=8 launch/evaluate.py CHECKPOINT ... --data DATA --out FOLDER [--tp N]

CHECKPOINT is a run (its newest checkpoint), one of its checkpoints, or a release folder: exported,
or a base without TTT. Recordings stream through each model whole, however long, in pieces whose
states go on: TTT's inner weights and what attention still sees. Ranks share the recordings.

Each model with TTT is passed three times: "on"; "off", its gates at zero; and "reset", where TTT
begins every piece with its learned weights while attention goes on, so that the difference to "on"
is what TTT carries from piece to piece. A model without TTT keeps its own attention windows.

DATA is a manifest as training takes it (a .jsonl, a folder of them, path:weight,path:weight), or a
folder of audio files without any. Here recordings may be mono and without alignments. Mono audio
is Moshi's own channel, beside a user who is silent. Without alignments the text is padding
throughout, and the recording doesn't count for text losses. Audio is encoded where the cache lacks
its codes; mp3 and ogg are decoded whole, wav and flac block by block.

The new folder FOLDER gets evaluation.json (all figures, and what they mean), evaluation.csv (a row
a model, mode and minute) and evaluation.png; they are written anew after each pass. With
--inner-losses it gets what the inner loops of TTT learn and keep, by position, too.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch.distributed as dist
from tqdm import tqdm

from launch.commands import chosen_device, telling_mistakes
from launch.errors import UserError
from launch.evaluation.minutes import MINUTE_FRAMES, MinuteSums, TTTMode, stream_recordings
from launch.evaluation.plan import Evaluation, check_evaluation
from launch.evaluation.report import Result, printed_tables, write_report
from launch.evaluation.subjects import Subject
from launch.export import refuse_existing
from launch.feeding.encoding import encoding_over_ranks, problems_of_all_ranks
from launch.model_source import CHECKPOINT_HELP, describe_model, load_model
from launch.reporting.inner_loop import InnerLossCurves
from launch.setup import say
from parallel.checkpoint_manifest import content_problems
from parallel.mesh import (
    Layout,
    Mesh,
    build_mesh,
    close_process_group,
    init_process_group,
    leave_job,
)
from ttt_dist.data.interleave import FRAME_RATE
from ttt_dist.data.lanes import RecordingBatch
from ttt_dist.data.manifest import DataError, all_recordings
from ttt_dist.data.recordings import RecordingDataset, open_recordings
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import without_ttt
from ttt_dist.moshi.loss import LossConfig

TITLE = "Can't evaluate"
# Ranks wait for each other while audio is encoded, hours of it on CPUs; and piece by piece.
ENCODING_TIMEOUT = timedelta(hours=12)
PIECE_TIMEOUT = timedelta(minutes=30)


def evaluate(plan: Evaluation) -> None:
    """The whole command on this rank, once everything is checked.

    Raises:
        UserError, DataError, CheckpointError, ReleaseError: what only reading all of it shows.
    """
    init_process_group(ENCODING_TIMEOUT)
    mesh = build_mesh(Layout(dp_shard=-1, tp=plan.tp), PIECE_TIMEOUT)
    say("mesh: " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    _check_checkpoints(plan.subjects)
    dataset = _open_data(plan)
    about = _describe_data(plan, dataset)
    say(f"data: recordings: {about['recordings']}, hours: {about['hours']:.2f}; {_piece(plan)}")
    for note in _notes(plan, dataset):
        say(f"note: {note}")
    if dist.get_rank() == 0:
        _make_folder(plan.out)
    results: list[Result] = []
    passes = sum(len(subject.modes) for subject in plan.subjects)
    for subject in plan.subjects:
        model = load_model(subject.source, mesh)
        lines = describe_model(subject.source, model)
        say("\n".join([f"\n{subject.label}: {subject.path}", *lines]))
        for mode in subject.modes:
            result = _pass(plan, subject, model, mode, dataset, mesh, lines)
            results.append(result)
            if result.broken_minute is not None:
                say(f"warning: {result.name}: not finite from minute {result.broken_minute} on")
            if dist.get_rank() == 0:
                write_report(plan.out, results, about, complete=len(results) == passes)
        del model  # before the next is loaded; FSDP2's hooks refer to it in circles
        gc.collect()
    say(f"\n{printed_tables(results)}\n\nfolder: {plan.out}: evaluation.json, .csv, .png")
    close_process_group()


def _pass(
    plan: Evaluation,
    subject: Subject,
    model: TTTMoshi,
    mode: TTTMode,
    dataset: RecordingDataset,
    mesh: Mesh,
    lines: Sequence[str],
) -> Result:
    """All recordings through one model, once."""
    config = LossConfig.of_model(
        model,
        text_padding_weight=plan.text_padding_weight,
        first_codebook_weight_multiplier=plan.first_codebook_weight_multiplier,
    )
    longest = max(map(dataset.frames_of, range(dataset.num_recordings)))
    sums = MinuteSums(config, -(-longest // MINUTE_FRAMES), plan.device)
    inner = None
    if plan.inner_losses and mode == "on":
        reach = -(-longest // dataset.frames) * dataset.frames  # of the last piece
        inner = InnerLossCurves(model, reach, mesh, plan.device)
    broken: dict[int, str] = {}
    begin = time.monotonic()
    with (
        without_ttt(model) if mode == "off" else nullcontext(),
        tqdm(
            total=len(dataset),
            desc=f"{subject.label}, TTT {mode}",
            unit="piece",
            disable=dist.get_rank() != 0,
        ) as bar,
    ):

        def progress(batch: RecordingBatch) -> None:
            # This rank's, and meanwhile as many of each other's.
            done = sum(recording >= 0 for recording in batch.recordings) * mesh.dp_size
            bar.update(min(done, len(dataset) - bar.n))

        stream_recordings(
            model,
            dataset,
            sums,
            reset=mode == "reset",
            batch_size=plan.batch_size,
            mesh=mesh,
            dtype=subject.source.compute,
            device=plan.device,
            broken=broken,
            inner=inner,
            progress=progress,
        )
    unread = problems_of_all_ranks(
        [f"{dataset.describe(index)}: {why}" for index, why in broken.items()]
    )
    if unread:
        raise DataError(unread)
    sums.sum_over_ranks(mesh.dp_group)
    about: dict[str, Any] = {
        "path": str(subject.path),
        "model": list(lines),
        "compute": str(subject.source.compute).removeprefix("torch."),
        "seconds": round(time.monotonic() - begin, 1),
    }
    if inner is not None:
        name = f"inner-losses-{plan.subjects.index(subject) + 1}"
        inner.save(plan.out / name, f"inner losses of {subject.label}")
        about["inner_losses"] = f"{name}.json"
    return Result(subject.label, mode, sums.overall(), sums.by_minute(), about)


def _make_folder(out: Path) -> None:
    refuse_existing(out)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out: {out} can't be made: {error}") from error


def _check_checkpoints(subjects: Sequence[Subject]) -> None:
    """Hash all checkpoints, ranks sharing the files."""
    problems = [
        f"CHECKPOINT: {subject.path} is damaged: {problem}; name another one"
        for subject in subjects
        if subject.source.checkpoint is not None
        for problem in content_problems(subject.source.checkpoint)
    ]
    if problems:
        raise UserError(problems)


def _open_data(plan: Evaluation) -> RecordingDataset:
    recordings, release = all_recordings(plan.sources), plan.subjects[0].source.release
    with encoding_over_ranks(
        recordings, release, plan.cache.spec, plan.device, math.inf
    ) as encoding:
        return open_recordings(
            {"eval": plan.sources}, plan.cache, piece_frames=plan.piece_frames, **encoding
        )["eval"]


def _describe_data(plan: Evaluation, dataset: RecordingDataset) -> dict[str, Any]:
    frames = [dataset.frames_of(number) for number in range(dataset.num_recordings)]
    return {
        "data": [str(source.path) for source in plan.sources],
        "recordings": len(frames),
        "recordings_without_text": len(_without_text(dataset)),
        "hours": sum(frames) / FRAME_RATE / 3600,
        "piece_frames": plan.piece_frames,
        "text_padding_weight": plan.text_padding_weight,
        "first_codebook_weight_multiplier": plan.first_codebook_weight_multiplier,
        "ranks": {"data_parallel": dist.get_world_size() // plan.tp, "tp": plan.tp},
    }


def _notes(plan: Evaluation, dataset: RecordingDataset) -> list[str]:
    """What a person may not expect."""
    notes = []
    silent, count = _without_text(dataset), dataset.num_recordings
    if silent:
        notes.append(
            f"{len(silent)} of {count} recordings have no alignments ({dataset.path(silent[0])}, "
            "…): their text is padding throughout, and they don't count for text losses; where one "
            "is mono, it is Moshi's channel beside a silent user"
        )
    if all(dataset.pieces_of(number) == 1 for number in range(count)):
        notes.append(
            f"no recording is longer than a piece, {_piece(plan)}: with TTT, reset is the same "
            "as on; see --piece-sec"
        )
    return notes


def _without_text(dataset: RecordingDataset) -> list[int]:
    return [n for n in range(dataset.num_recordings) if not dataset.has_text(n)]


def _piece(plan: Evaluation) -> str:
    return f"pieces of {plan.piece_frames} frames ({plan.piece_frames / FRAME_RATE:g} s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=_absolute, nargs="+", help=CHECKPOINT_HELP
    )
    parser.add_argument("--data", required=True, help="a manifest, or a folder of audio files")
    parser.add_argument("--out", type=_absolute, required=True, help="a new folder")
    parser.add_argument("--base", action="store_true", help="the releases that runs began with too")
    parser.add_argument(
        "--piece-sec", type=float, default=80.0, help="of a piece (80), rounded to mini-batches"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="recordings side by side on a rank (1)"
    )
    parser.add_argument("--tp", type=int, default=1, help="ranks that split heads (1)")
    parser.add_argument(
        "--cache-dir", type=_absolute, help="where codes are kept; default: the run's, or by DATA"
    )
    parser.add_argument(
        "--inner-losses",
        action="store_true",
        help="inner-losses-N.json and .png too, by position, of the Nth model where TTT is on",
    )
    weight = "of the losses named with it; default: the run's own"
    parser.add_argument("--text-padding-weight", type=float, help=weight)
    parser.add_argument("--first-codebook-weight-multiplier", type=float, help=weight)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: GPUs")
    return parser


def _absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


def main(command_line: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    arguments = _parser().parse_args(command_line)
    with telling_mistakes(TITLE):
        evaluate(check_evaluation(arguments, chosen_device(arguments.device)))


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_job(0)
