"""Pieces that can't be read any more while a run trains: left out by all ranks, up to a budget.

An evaluation leaves none out: it ends the run, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from launch.errors import UserError
from parallel.reduce import highest_over_ranks
from ttt_dist.data.batches import SampledStep, Samples

_SHOWN = 4  # pieces in a message


class SampleGuard:
    """Counts what the whole run, over all ranks and all its starts, has left out.

    A piece that can't be read becomes one of -1, which carries no loss: batches keep their shapes
    and every other piece its place in the global order, so the count doesn't depend on the layout.

    Args:
        limit: pieces that may be left out; one that is met again counts again.
        counters: of the run so far, as `counters` gave them.
    """

    def __init__(self, limit: int, counters: Mapping[str, float]) -> None:
        self._limit = limit
        self.skipped = int(counters.get("skipped_samples", 0))
        self.must_stop = False
        self._come_ready: list[bool] = []  # of the pieces that stop the run

    @property
    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"skipped_samples": self.skipped}

    def leave_out(self, step: SampledStep, pieces: Samples) -> list[str]:
        """Agree with all other ranks on what is left out of a step; all call it together.

        Ranks of one tp group hold the same pieces, and a disk may fail one of them alone: what any
        rank couldn't read is left out on every rank.

        Returns:
            One line for each such piece: the recording, and why. Where they are more than is left
            of the budget, `must_stop` is set, and the step may not be taken: it isn't counted.
        """
        broken = _of_all_ranks(step.broken)
        if not broken:
            return []
        self.must_stop = self.skipped + len(broken) > self._limit
        if self.must_stop:
            self._come_ready = [pieces.comes_ready(index) for index in broken]
        else:
            step.leave_out(broken)
            self.skipped += len(broken)
        return _describe(broken, pieces)

    def why_it_stops(self, step: int, lines: list[str], newest: Path | None) -> list[str]:
        """What to tell a person once `must_stop`.

        Args:
            lines: of `leave_out`, for this step.
            newest: the newest checkpoint.
        """
        count = self.skipped + len(lines)
        return [
            f"step {step}: {count} piece{'' if count == 1 else 's'} of this run could not be read; "
            f"data.max_bad_samples allows {self._limit}",
            *_shown(lines),
            f"{_how_to_mend(self._come_ready, lines_may_go=newest is None)}; "
            f"{_how_to_go_on(newest)}",
        ]


def refuse_broken_evaluation(
    broken: Mapping[int, str],
    pieces: Samples,
    newest: Callable[[], Path | None],
    *,
    is_last: bool,
) -> None:
    """Agree with all other ranks that every piece of an evaluation was read; all call it together.

    Args:
        broken: what this rank couldn't read, by number, and why.
        newest: finds the newest checkpoint; called by all ranks, where any piece is broken.
        is_last: every step of the run is done.

    Raises:
        UserError: on all ranks alike, with the pieces that any rank couldn't read.
    """
    every = _of_all_ranks(broken)
    if not every:
        return
    count, checkpoint = len(every), newest()
    come_ready = [pieces.comes_ready(index) for index in every]
    next_step = _how_to_go_on(checkpoint)
    if is_last and checkpoint is not None:
        next_step = f"all steps are done and saved, in {checkpoint}"
    raise UserError(
        [
            f"an evaluation: {count} piece{'' if count == 1 else 's'} of data.eval_data could not "
            "be read, without which its losses can't be compared with others",
            *_shown(_describe(every, pieces)),
            f"{_how_to_mend(come_ready, lines_may_go=True)}; {next_step}",
        ],
        title="The run stopped",
    )


def _of_all_ranks(broken: Mapping[int, str]) -> dict[int, str]:
    (found,) = highest_over_ranks([len(broken)])
    if not found:
        return {}
    gathered = [broken] * dist.get_world_size()
    dist.all_gather_object(gathered, broken)
    return {index: why for each in gathered for index, why in each.items()}


def _describe(broken: Mapping[int, str], pieces: Samples) -> list[str]:
    return [f"{pieces.describe(index)}: {broken[index]}" for index in sorted(broken)]


def _shown(lines: list[str]) -> list[str]:
    more = [f"and {len(lines) - _SHOWN} more"] if lines[_SHOWN:] else []
    return [*lines[:_SHOWN], *more]


def _how_to_mend(come_ready: Sequence[bool], *, lines_may_go: bool) -> str:
    """What to do about broken codes.

    Args:
        come_ready: of each piece, whether its codes are a file that the manifest names.
        lines_may_go: the manifest may do without the lines of such files.
    """
    ways = []
    if not all(come_ready):
        ways.append("look at the disk of data.cache_dir; a new start encodes anew what is damaged")
    if any(come_ready):
        without = (
            "or take their lines out of the manifest"
            if lines_may_go
            else "and leave their lines in the manifest: without them resume is refused"
        )
        ways.append(
            f"put the files of ready codes back as they were (no start makes them anew), {without}"
        )
    return "; ".join(ways)


def _how_to_go_on(newest: Path | None) -> str:
    if newest is None:
        return "there is no checkpoint to go on from"
    return f"resume=true then goes on from {newest}"
