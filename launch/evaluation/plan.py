"""What an evaluation is to do, checked as far as it can be before weights and process groups."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.errors import UserError
from launch.evaluation.subjects import (
    Subject,
    common_piece,
    common_spec,
    common_weight,
    find_subjects,
    unfit_models,
)
from launch.export import refuse_existing
from ttt_dist.data.audio_alone import scan_audio_sources
from ttt_dist.data.cache import CodesCache
from ttt_dist.data.dataset import default_cache_folder
from ttt_dist.data.manifest import DataError, Source


@dataclass(frozen=True)
class Evaluation:
    """What is to be done, checked as far as it can be without a weight.

    Attributes:
        piece_frames: T, a multiple of every model's mini-batch.
        text_padding_weight, first_codebook_weight_multiplier: of all losses, as in training.
        inner_losses: look on at the inner loops of models with TTT, where it is on.
    """

    subjects: Sequence[Subject]
    sources: tuple[Source, ...]
    cache: CodesCache
    piece_frames: int
    batch_size: int
    tp: int
    text_padding_weight: float
    first_codebook_weight_multiplier: float
    inner_losses: bool
    out: Path
    device: torch.device


def check_evaluation(arguments: argparse.Namespace, device: torch.device) -> Evaluation:
    """Read everything that the command line names but weights.

    Raises:
        UserError: every mistake that was found.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    problems: list[str] = []
    if rank == 0:
        problems += _out_problems(arguments.out)
    for option in ("piece_sec", "batch_size", "tp"):
        value = getattr(arguments, option)
        if not 0 < value < math.inf:
            problems.append(f"--{option.replace('_', '-')}: found {value:g}, allowed is above 0")
    if arguments.tp > 0 and world_size % arguments.tp:
        problems.append(f"--tp: found {arguments.tp}, which doesn't divide {world_size} ranks")
    sources, found = scan_audio_sources(arguments.data, field="--data", check_files=rank == 0)
    problems += found
    subjects, found = find_subjects(arguments.checkpoint, base=arguments.base, device=device)
    problems += found
    if arguments.inner_losses and subjects and all(each.source.ttt is None for each in subjects):
        problems.append("--inner-losses: no CHECKPOINT has TTT layers")
    if problems:  # the rest follows from what is right
        raise UserError(problems)

    problems += unfit_models(subjects, arguments.tp)
    weights: dict[str, float] = {}
    for key in ("text_padding_weight", "first_codebook_weight_multiplier"):
        try:
            weights[key] = common_weight(subjects, key, getattr(arguments, key))
        except UserError as error:
            problems += error.problems
    frames, spec = 0, None
    try:
        frames = common_piece(subjects, arguments.piece_sec)
    except UserError as error:
        problems += error.problems
    try:
        spec = common_spec(subjects)
    except (UserError, DataError) as error:
        problems += error.problems
    if problems or spec is None:
        raise UserError(problems)
    return Evaluation(
        subjects=subjects,
        sources=sources,
        cache=CodesCache(_cache_folder(arguments.cache_dir, subjects, sources), spec),
        piece_frames=frames,
        batch_size=arguments.batch_size,
        tp=arguments.tp,
        **weights,
        inner_losses=arguments.inner_losses,
        out=arguments.out,
        device=device,
    )


def _out_problems(out: Path) -> list[str]:
    try:
        refuse_existing(out)
    except UserError as error:
        return list(error.problems)
    above = next(folder for folder in out.parents if folder.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return []
    return [f"--out: {out} can't be made in {above}, which is no folder that you may write into"]


def _cache_folder(
    given: Path | None, subjects: Sequence[Subject], sources: tuple[Source, ...]
) -> Path:
    """As a person says, or where the first run keeps its codes, or by the data."""
    configured = [subject.config.data.cache_dir for subject in subjects if subject.config]
    if given is not None or not any(configured):
        return given or default_cache_folder(sources)
    return Path(next(folder for folder in configured if folder))
