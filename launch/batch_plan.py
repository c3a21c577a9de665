"""What one step takes from the data, over all ranks: pieces, or lanes along recordings."""

from __future__ import annotations

from dataclasses import dataclass

from launch.config import TrainConfig
from launch.errors import UserError
from ttt_dist.data.interleave import FRAME_RATE, num_frames


def resolve_global_batch_size(config: TrainConfig, dp: int) -> tuple[int, int]:
    """Pieces of a step over all ranks, and forward passes of a step on each rank.

    Args:
        config: where `global_batch_size` is null, it is `batch_size * num_microbatches * dp`;
            otherwise the number of microbatches follows from it.
        dp: data-parallel ranks, `dp_replicate * dp_shard`; the ranks of a tp group count once.

    Raises:
        UserError: `global_batch_size` isn't a multiple of `batch_size * dp`, or it contradicts
            `num_microbatches` (on resume that is recomputed, since the layout may have changed).
    """
    per_pass = config.batch_size * dp
    total = config.global_batch_size
    if total is None:
        return per_pass * config.num_microbatches, config.num_microbatches
    if total % per_pass != 0:
        below, above = total // per_pass * per_pass, (total // per_pass + 1) * per_pass
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"global_batch_size: found {total}, which isn't a multiple of batch_size * dp = "
            f"{config.batch_size} * {dp} = {per_pass}; nearest allowed: {nearest}; "
            "or change batch_size or the number of ranks"
        )
    passes = total // per_pass
    if not config.resume and config.num_microbatches not in (1, passes):
        raise UserError(
            f"num_microbatches: found {config.num_microbatches}, but global_batch_size {total} "
            f"over batch_size * dp = {per_pass} makes {passes}; remove one of the two keys"
        )
    return total, passes


@dataclass(frozen=True)
class LanePlan:
    """How a step goes along recordings (`ttt.persistent_states`).

    Attributes:
        num_lanes: recordings side by side, over all ranks.
        pieces_per_step: pieces of each that a step takes.
        piece_frames: length of a piece, a multiple of `ttt.mini_batch_size`.
    """

    num_lanes: int
    pieces_per_step: int
    piece_frames: int

    def describe(self) -> str:
        """One line."""
        pieces = f"{self.pieces_per_step} piece{'' if self.pieces_per_step == 1 else 's'}"
        return (
            f"{pieces} of {self.piece_frames} frames ({self.piece_frames / FRAME_RATE:g} s) from "
            f"each of {self.num_lanes} lanes; states go along recordings"
        )


def resolve_lanes(config: TrainConfig, dp: int) -> LanePlan | None:
    """The lanes of a run on `dp` data-parallel ranks; None where pieces stand alone.

    Raises:
        UserError: every number that doesn't fit the others.
    """
    if not carries_states(config):
        return None
    problems = []
    pieces, _ = resolve_global_batch_size(config, dp)
    together = config.batch_size * dp
    lanes = config.num_lanes or together
    if lanes % together:
        problems.append(
            f"num_lanes: found {lanes}, allowed are multiples of batch_size * dp = "
            f"{config.batch_size} * {dp} = {together}; change batch_size or the number of ranks"
        )
    per_step = pieces // lanes
    if pieces % lanes:
        problems.append(
            f"global_batch_size: found {pieces}, which isn't a multiple of the {lanes} lanes "
            "(num_lanes) of ttt.persistent_states: a step takes as many pieces from each"
        )
    elif per_step % config.ttt.tbptt_pieces:
        problems.append(
            f"ttt.tbptt_pieces: found {config.ttt.tbptt_pieces}, allowed are divisors of the "
            f"{per_step} pieces that a step takes from each lane (num_microbatches)"
        )
    frames, size = num_frames(config.duration_sec), config.ttt.mini_batch_size
    if frames < size:
        problems.append(
            f"duration_sec: found {config.duration_sec:g}, {frames} frames; with "
            f"ttt.persistent_states allowed is a mini-batch of {size} frames or more: "
            f"{size / FRAME_RATE:g}"
        )
    if problems:
        raise UserError(problems)
    return LanePlan(lanes, per_step, frames // size * size)


def carries_states(config: TrainConfig) -> bool:
    """Whether training goes along recordings."""
    return config.ttt.enable and config.ttt.persistent_states
