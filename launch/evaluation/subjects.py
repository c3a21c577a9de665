"""The models that an evaluation compares: which they are, and what they must have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models.loaders import CheckpointInfo

from launch.config import TrainConfig
from launch.configuration.model_checks import piecewise_problems, splitting_problems
from launch.errors import UserError
from launch.evaluation.minutes import TTTMode
from launch.model_source import (
    ModelSource,
    find_checkpoint,
    open_source,
    release_source,
    run_config,
)
from ttt_dist.data.cache import CodesSpec
from ttt_dist.data.encode import mimi_config_problems
from ttt_dist.data.interleave import FRAME_RATE
from ttt_dist.data.manifest import DataError
from ttt_dist.moshi.build import lm_settings
from ttt_dist.moshi.errors import ReleaseError


@dataclass(frozen=True)
class Subject:
    """One model to be evaluated.

    Attributes:
        label: what reports call it; no other subject's.
        path: of its checkpoint, or of its release's weights.
        config: the run's; None for a release.
    """

    label: str
    path: Path
    source: ModelSource
    config: TrainConfig | None

    @property
    def modes(self) -> tuple[TTTMode, ...]:
        """What is to be compared of it."""
        return ("none",) if self.source.ttt is None else ("on", "off", "reset")

    @property
    def mini_batch_size(self) -> int:
        """Of its TTT layers; 1 where it has none."""
        return 1 if self.source.ttt is None else self.source.ttt.layer.mini_batch_size


def find_subjects(
    folders: Sequence[Path], *, base: bool, device: torch.device
) -> tuple[list[Subject], list[str]]:
    """The models that a person names, and why others can't be evaluated; no weight is read.

    Args:
        folders: runs, checkpoints of runs, or releases.
        base: the releases that the runs began with, too.
    """
    subjects: list[Subject] = []
    bases: list[Subject] = []
    problems: list[str] = []
    for folder in folders:
        try:
            found, checkpoint = find_checkpoint(folder, None, read=False)
            source = open_source(found, checkpoint, device)
            if checkpoint is None:
                subjects.append(Subject(folder.name, source.release.moshi_weights, source, None))
                continue
            config = run_config(found)
            label = f"{found.name}/{checkpoint.name}"
            subjects.append(Subject(label, checkpoint, source, config))
            if base:
                bases.append(_base_of(source.release, device))
        except UserError as error:
            problems += [f"{folder}: {problem}" for problem in error.problems]
        except ReleaseError as error:
            problems.append(f"{folder}: {error}")
    if base and not bases and not problems:
        problems.append("--base: no CHECKPOINT is a run, so it isn't known what they began with")
    known = {subject.path for subject in subjects}
    if len(known) < len(subjects):
        problems.append("CHECKPOINT: name each once; found one that stands there twice")
    # Runs may share a base, and it may be named by itself.
    unique = {each.path: each for each in bases if each.path not in known}
    return _with_own_labels([*subjects, *unique.values()]), problems


def common_spec(subjects: Sequence[Subject]) -> CodesSpec:
    """What all of them read: whole recordings as codes of one Mimi, text of one tokenizer.

    Raises:
        UserError: they don't read the same.
        DataError: a release's codes can't be made.
    """
    for subject in subjects:
        if problems := mimi_config_problems(subject.source.release):
            raise DataError(problems)
    specs = {
        each.label: CodesSpec.from_release(each.source.release, duration_sec=None)
        for each in subjects
    }
    first, *others = specs.items()
    wrong = [name for name, spec in others if spec != first[1]]
    if wrong:
        raise UserError(
            f"CHECKPOINT: {', '.join(wrong)} has another Mimi, tokenizer or codebooks than "
            f"{first[0]}, so their losses can't be compared; evaluate it by itself"
        )
    return first[1]


def common_piece(subjects: Sequence[Subject], seconds: float) -> int:
    """Frames of a piece: at most `seconds`, and whole mini-batches of all models.

    Raises:
        UserError: so many fit into no piece of this length.
    """
    together = math.lcm(*(subject.mini_batch_size for subject in subjects))
    frames = int(seconds * FRAME_RATE) // together * together
    if frames == 0:
        sizes = sorted({subject.mini_batch_size for subject in subjects})
        raise UserError(
            f"--piece-sec: found {seconds:g}; pieces end at a border of mini-batches of "
            f"{' and of '.join(map(str, sizes))} frames: allowed are {together / FRAME_RATE:g} s "
            "or more"
        )
    return frames


def unfit_models(subjects: Sequence[Subject], tp: int) -> list[str]:
    """Models that can't go from piece to piece, or that `--tp` can't split, and why."""
    problems = []
    for subject in subjects:
        settings = lm_settings(subject.source.release.lm_config)
        problems += piecewise_problems(settings, named=f"{subject.label}:")
        found = splitting_problems(settings, tp, named="--tp")
        problems += [f"{subject.label}: {problem}" for problem in found]
    return problems


def common_weight(subjects: Sequence[Subject], key: str, given: float | None) -> float:
    """A weight of the loss, `key` of a configuration: as given, or as all runs were trained.

    Raises:
        UserError: runs were trained with different ones, and none is given.
    """
    option = f"--{key.replace('_', '-')}"
    if given is not None:
        if not 0 <= given < math.inf:
            raise UserError(f"{option}: found {given:g}, allowed is 0 or above")
        return given
    trained = {
        each.label: float(getattr(each.config, key)) for each in subjects if each.config is not None
    }
    if len(set(trained.values())) > 1:
        told = ", ".join(f"{value:g} in {label}" for label, value in trained.items())
        raise UserError(f"CHECKPOINT: {key} was {told}; say with {option} what to weight all with")
    default = float(TrainConfig.model_fields[key].default)
    return next(iter(trained.values()), default)


def _base_of(release: CheckpointInfo, device: torch.device) -> Subject:
    weights = release.moshi_weights
    return Subject(f"base {weights.parent.name}", weights, release_source(release, device), None)


def _with_own_labels(subjects: list[Subject]) -> list[Subject]:
    """Short labels where they tell subjects apart, and paths where they don't."""
    labels = [subject.label for subject in subjects]
    return [
        Subject(
            each.label if labels.count(each.label) == 1 else str(each.path),
            each.path,
            each.source,
            each.config,
        )
        for each in subjects
    ]
