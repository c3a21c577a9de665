"""Pieces that can't be read any more while a run trains: left out by all ranks, up to a budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

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
        (found,) = highest_over_ranks([len(step.broken)])
        if not found:
            return []
        gathered = [step.broken] * dist.get_world_size()
        dist.all_gather_object(gathered, step.broken)
        broken = {index: why for each in gathered for index, why in each.items()}
        self.must_stop = self.skipped + len(broken) > self._limit
        if not self.must_stop:
            step.leave_out(broken)
            self.skipped += len(broken)
        return [f"{pieces.describe(index)}: {broken[index]}" for index in sorted(broken)]

    def why_it_stops(self, step: int, lines: list[str], newest: Path | None) -> list[str]:
        """What to tell a person once `must_stop`.

        Args:
            lines: of `leave_out`, for this step.
            newest: the newest checkpoint.
        """
        more = [f"and {len(lines) - _SHOWN} more"] if lines[_SHOWN:] else []
        count = self.skipped + len(lines)
        return [
            f"step {step}: {count} piece{'' if count == 1 else 's'} of this run could not be read; "
            f"data.max_bad_samples allows {self._limit}",
            *lines[:_SHOWN],
            *more,
            "look at the disk of data.cache_dir; "
            + (
                f"resume=true then encodes what is damaged anew and goes on from {newest}"
                if newest is not None
                else "a new start then encodes what is damaged anew (there is no checkpoint)"
            ),
        ]
