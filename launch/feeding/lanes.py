"""Training along recordings: a step takes the next pieces of every lane, and states go along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.carry import Carry


class Lanes:
    """What this rank's lanes remember from one step to the next, outside of any graph.

    Args:
        carry: of all of them; zeros where every recording begins.
        batch_size: lanes of one forward.
        tbptt_pieces: pieces of a lane that one backward goes through.
    """

    def __init__(self, carry: Carry, *, batch_size: int, tbptt_pieces: int = 1) -> None:
        self.tbptt_pieces = tbptt_pieces
        self._batch_size = batch_size
        self._begin_anew: list[Tensor] = []  # bool [batch_size] of each group
        self._groups: list[Carry] = []
        self.put(carry)

    @property
    def carry(self) -> Carry:
        """All lanes'."""
        return _joined(self._groups)

    @property
    def begin_anew(self) -> Tensor:
        """Bool `[lanes]`: those that lost what they remembered, and begin with the next piece."""
        return torch.cat(self._begin_anew)

    def put(self, carry: Carry, begin_anew: Tensor | None = None) -> None:
        """Let all lanes remember this."""
        self._groups = _split(carry, self._batch_size)
        anew = torch.zeros_like(carry.layers[0].window.length, dtype=torch.bool)
        anew = anew if begin_anew is None else begin_anew
        self._begin_anew = list(anew.split(self._batch_size))

    def pieces(
        self,
        steps: Sequence[Sequence[Tensor]],
        begins: Sequence[Sequence[Tensor]],
        offsets: Sequence[Sequence[int]] | None = None,
    ) -> LanePieces:
        """The pieces of a step, to be computed in their order; each lane goes on by them.

        Args:
            steps: of each group of `batch_size` lanes, of each piece: int `[batch_size, K, T + 1]`.
            begins: likewise, bool `[batch_size]`.
            offsets: of each piece and lane, as `launch.step.Microbatches` has them.
        """
        return LanePieces(self, steps, begins, offsets)

    def forget_broken(self, group: dist.ProcessGroup | None) -> int:
        """Lanes in which a number isn't finite begin anew; returns how many of this rank's.

        Args:
            group: of tp ranks, which hold other heads of the same lanes and call this together.
        """
        carry = self.carry
        broken = torch.zeros_like(self.begin_anew)
        for value in carry.tensors().values():
            broken |= ~value.isfinite().flatten(1).all(dim=1) if value.ndim > 1 else False
        if group is not None:
            dist.all_reduce(broken_ := broken.to(torch.int32), dist.ReduceOp.MAX, group=group)
            broken = broken_.bool()

        def without(value: Tensor) -> Tensor:
            lanes = broken.view(-1, *(1,) * (value.ndim - 1))
            return torch.where(lanes, torch.zeros_like(value), value)

        self.put(carry.map(without), self.begin_anew | broken)
        return int(broken.sum())

    def _start(self, group: int) -> tuple[Carry, Tensor]:
        return self._groups[group], self._begin_anew[group]

    def _end(self, group: int, carry: Carry) -> None:
        self._groups[group] = carry.detach()
        self._begin_anew[group] = torch.zeros_like(self._begin_anew[group])


def _joined(groups: Sequence[Carry]) -> Carry:
    """All groups' lanes in one, in storage of its own."""
    named = [group.tensors() for group in groups]
    return groups[0].with_tensors({name: torch.cat([t[name] for t in named]) for name in named[0]})


def _split(carry: Carry, size: int) -> list[Carry]:
    """Groups of `size` lanes."""
    named = {name: value.split(size) for name, value in carry.tensors().items()}
    groups = len(next(iter(named.values())))
    return [carry.with_tensors({n: parts[g] for n, parts in named.items()}) for g in range(groups)]


class LanePieces:
    """The `launch.step.Microbatches` of a step along recordings: group after group of lanes, and of
    each group piece after piece."""

    def __init__(
        self,
        lanes: Lanes,
        steps: Sequence[Sequence[Tensor]],
        begins: Sequence[Sequence[Tensor]],
        offsets: Sequence[Sequence[int]] | None,
    ) -> None:
        self._lanes = lanes
        self._pieces = len(steps[0])  # of each group
        if self._pieces % lanes.tbptt_pieces:
            raise ValueError(
                f"tbptt_pieces: found {lanes.tbptt_pieces}, allowed are divisors of the "
                f"{self._pieces} pieces of a lane's step"
            )
        self.steps: Sequence[Tensor] = [piece for group in steps for piece in group]
        self.offsets = offsets
        self._begins = [piece for group in begins for piece in group]
        self._carry: Carry | None = None
        # What the last backward reaches back to: a microbatch, its carry and lanes that begin.
        # Its graph keeps that carry anyway; earlier ones are not held on to.
        self._held: tuple[int, Carry, Tensor] | None = None

    def losses(self, model: TTTMoshi, index: int) -> tuple[Tensor, Tensor]:
        group, piece = divmod(index, self._pieces)
        begins = self._begins[index]
        if piece == 0:
            self._carry, anew = self._lanes._start(group)
            begins = begins | anew
        assert self._carry is not None  # microbatches are computed in their order
        if piece % self._lanes.tbptt_pieces == 0:
            self._held = (index, self._carry, begins)
        with model.passing(self._carry, begins) as passage:
            losses = model.step_losses(self.steps[index])
        self._carry = passage.carry.detach() if self.backward_after(index) else passage.carry
        if piece == self._pieces - 1:
            self._lanes._end(group, self._carry)
        return losses

    def backward_after(self, index: int) -> bool:
        return (index % self._pieces + 1) % self._lanes.tbptt_pieces == 0

    @torch.no_grad()
    def aside(self, model: TTTMoshi, index: int) -> tuple[Tensor, Tensor]:
        """As `launch.step.Microbatches` has it.

        After all, it starts where it started, if the last backward reached back to it; else its
        lanes begin anew.
        """
        if self._held is None:
            carry, anew = self._lanes._start(0)
            first, begins = 0, self._begins[0] | anew
        else:
            first, carry, begins = self._held
        if not (first <= index and first // self._pieces == index // self._pieces):
            first, carry = index, carry.map(torch.zeros_like)
            begins = torch.ones_like(begins)
        for at in range(first, index + 1):
            with model.passing(carry, begins if at == first else self._begins[at]) as passage:
                losses = model.step_losses(self.steps[at])
            carry = passage.carry
        return losses
