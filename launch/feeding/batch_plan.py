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


def backwards_per_step(config: TrainConfig, dp: int) -> int:
    """Backward passes of a step on each rank: one a microbatch, or a `ttt.tbptt_pieces` of them."""
    _, passes = resolve_global_batch_size(config, dp)
    return passes // config.ttt.tbptt_pieces if carries_states(config) else passes


@dataclass(frozen=True)
class LanePlan:
    """How a step goes along recordings (`ttt.persistent_states`).

    Attributes:
        num_lanes: recordings side by side, over all ranks.
        pieces_per_step: pieces of each that a step takes.
        mini_batch_size: a piece is cut down to a multiple of it.
    """

    num_lanes: int
    pieces_per_step: int
    mini_batch_size: int

    def piece_frames(self, duration_sec: float) -> int:
        """Frames of a piece that is asked to last so long."""
        return num_frames(duration_sec) // self.mini_batch_size * self.mini_batch_size


def length_stages(config: TrainConfig) -> dict[int, float]:
    """Lengths of a piece in seconds, by the step (counted from 0) that each begins with, in order.

    A schedule of lengths is TTT-Video's way to long sequences (arXiv 2504.05298).
    """
    lengths = config.duration_sec
    return dict(sorted(lengths.items())) if isinstance(lengths, dict) else {0: lengths}


def describe_step(config: TrainConfig, plan: LanePlan | None) -> str:
    """What a step takes, in one line."""
    stages = length_stages(config)
    if plan is not None:
        stages = {step: plan.piece_frames(sec) / FRAME_RATE for step, sec in stages.items()}
    first, *later = [f"{sec:g} s" for sec in stages.values()]
    begins = list(stages)[1:]
    lengths = [first, *(f"{s} from step {n + 1} on" for s, n in zip(later, begins, strict=True))]
    if plan is None:
        return f"{config.global_batch_size} pieces of {', '.join(lengths)}"
    pieces = f"{plan.pieces_per_step} piece{'' if plan.pieces_per_step == 1 else 's'}"
    return (
        f"{pieces} of each of {plan.num_lanes} lanes, of {', '.join(lengths)}; states go along "
        "recordings"
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
    size = config.ttt.mini_batch_size
    for seconds in length_stages(config).values():
        if (frames := num_frames(seconds)) < size:
            problems.append(
                f"duration_sec: found {seconds:g}, {frames} frames; with ttt.persistent_states "
                f"allowed is a mini-batch of {size} frames or more: {size / FRAME_RATE:g}"
            )
    if problems:
        raise UserError(problems)
    return LanePlan(lanes, per_step, size)


def carries_states(config: TrainConfig) -> bool:
    """Whether training goes along recordings."""
    return config.ttt.enable and config.ttt.persistent_states
