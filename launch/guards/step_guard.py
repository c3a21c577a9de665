"""Steps whose numbers can't be trusted: left out before the optimizer, counted, and stopped at.

One gradient that isn't finite would go through clipping into every weight and moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from launch.step import StepLoss
from ttt_dist.data.batches import Samples

_SHOWN = 4  # samples in a message
_DECAY = 0.98  # of the running gradient norm: about the last 50 steps
_SETTLED = 20  # steps in that norm before a spike is judged by it


class StepGuard:
    """Judges a step by its loss and gradient norm.

    Args:
        max_in_a_row: bad steps one after the other at which the run has to stop.
        spike_factor: a step is bad, too, where its gradient norm is more than this many times the
            running one; None: never for its size.
        counters: of the run so far, as `counters` gave them.
    """

    def __init__(
        self,
        max_in_a_row: int,
        spike_factor: float | None,
        counters: Mapping[str, float] | None = None,
    ) -> None:
        saved = counters or {}
        self._max_in_a_row, self._spike_factor = max_in_a_row, spike_factor
        self.skipped = int(saved.get("skipped_steps", 0))
        self.in_a_row = int(saved.get("skipped_in_a_row", 0))
        self._norm = saved.get("running_norm", 0.0)  # not yet divided by what 1's would give
        self._norms = int(saved.get("running_norm_steps", 0))

    @property
    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.in_a_row,
            "running_norm": self._norm,
            "running_norm_steps": self._norms,
        }

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row were bad."""
        return self.in_a_row >= self._max_in_a_row

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step; None: nothing."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm {grad_norm}"
        if self._spike_factor is None or self._norms < _SETTLED:
            return None
        running = self._norm / (1.0 - _DECAY**self._norms)
        if grad_norm > self._spike_factor * running:
            return f"gradient norm {grad_norm:.3g}, {grad_norm / running:.1f} times the usual"
        return None

    def skip(self) -> None:
        """The step was left out."""
        self.skipped += 1
        self.in_a_row += 1

    def accept(self, grad_norm: float) -> None:
        """The step was taken."""
        self.in_a_row = 0
        self._norm = _DECAY * self._norm + (1.0 - _DECAY) * grad_norm
        self._norms += 1


@dataclass(frozen=True)
class BadStep:
    """A step that was left out: why, its first tensor that isn't finite, the samples to look at."""

    step: int
    problem: str
    not_finite: str | None
    samples: list[str]

    def __str__(self) -> str:
        shown = "; ".join(self.samples[:_SHOWN]) + ("; …" if self.samples[_SHOWN:] else "")
        first = "" if self.not_finite is None else f"; first not finite: {self.not_finite}"
        return f"step {self.step} left out: {self.problem}{first}; its samples: {shown}"


def describe_bad_step(
    step: int,
    problem: str | None,
    not_finite: str | None,
    loss: StepLoss,
    samples: list[list[int]],
    pieces: Samples,
) -> BadStep:
    """What to tell of a bad step; all ranks call it together.

    Args:
        problem: as this rank sees it; None where another rank alone met one.
        not_finite: as `not_finite.where_not_finite` has it.
        loss: of this rank's microbatches, too.
        samples: of each of these microbatches.

    Returns:
        With the samples of microbatches whose loss isn't finite, on any rank; all of the step's
        where every loss is finite.
    """
    finite = loss.microbatches.isfinite().tolist()
    suspect = [i for good, each in zip(finite, samples, strict=True) if not good for i in each]
    own = (problem, suspect, [i for each in samples for i in each])
    gathered = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    found = [i for _, suspects, _ in gathered for i in suspects]
    found = found or [i for _, _, every in gathered for i in every]
    told = next((said for said, _, _ in gathered if said), "")
    # Ranks of one tp group have the same samples.
    return BadStep(
        step, told, not_finite, [pieces.describe(index) for index in dict.fromkeys(found)]
    )


def too_many_bad_steps(guard: StepGuard, last: BadStep, *, saved: bool) -> list[str]:
    """Why the run stops, for a person; `saved`: with a checkpoint (`do_ckpt`)."""
    weights = "are saved" if saved else "are not saved (do_ckpt=false)"
    return [
        f"{guard.in_a_row} steps in a row were left out (bad_steps.max_in_a_row); the last: {last}",
        f"the weights are those before them, and {weights}; look at these samples, lower the "
        "learning rates, or allow more; bad_steps.jsonl lists every such step",
    ]
