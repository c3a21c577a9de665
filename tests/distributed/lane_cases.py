"""Training along recordings on ranks, beside the same steps on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.feeding.lanes import Lanes
from launch.guards.not_finite import where_not_finite
from launch.optim import build_optimizers, build_schedule
from launch.reporting.inner_loop import CURVES, InnerLossCurves
from launch.reporting.ttt_health import ttt_health
from launch.step import accumulate_gradients, evaluate
from parallel.carry import carry_tensors, empty_carry, own_carry
from parallel.checkpoint import load_checkpoint
from parallel.mesh import Mesh
from parallel.reduce import clip_gradients
from tests.distributed import tiny
from tests.distributed.cases import MAX_NORM, Trained
from tests.distributed.measure import worst
from tests.distributed.saving import save_checkpoint
from tests.distributed.training import (
    OPTIM,
    OneRank,
    copies,
    errors_on_ranks,
    gradients,
    loss_config,
    make_model,
    step_losses,
    values,
)
from ttt_dist.data.steps import delayed_steps, piece_of_steps
from ttt_dist.moshi.block import TTTMoshi

PIECE = 16  # two mini-batches of 8; attention sees 7 and 5 frames
# Frames of each lane's recordings, one after the other: six pieces a lane. Some end in the middle
# of a piece, and lanes begin anew at different pieces.
RECORDINGS = [[41, 48], [30, 60], [96], [10, 80]]
PIECES_PER_STEP, STEPS, SAVED_AFTER = 2, 3, 2


def lane_pieces(model: TTTMoshi) -> list[list[tuple[Tensor, bool]]]:
    """Of each lane, its pieces `[K, T + 1]` and whether a recording begins with them."""
    lanes = []
    for lane, lengths in enumerate(RECORDINGS):
        pieces = []
        for number, frames in enumerate(lengths):
            codes = tiny.random_codes(2, frames, seed=10 * lane + number)[0]
            steps = delayed_steps(codes, model.delays, model.initial_tokens())
            count = -(-frames // PIECE)
            pieces += [(piece_of_steps(steps, n, PIECE), n == 0) for n in range(count)]
        lanes.append(pieces)
    return lanes


class LaneTraining:
    """Some of the lanes, on `mesh` or on one process.

    Args:
        batch_size: lanes of one forward.
    """

    def __init__(
        self, weights: Path, mesh: Mesh | None, trained: Trained, batch_size: int, tbptt: int
    ) -> None:
        self.mesh = mesh or OneRank()
        self.model = make_model(weights, trained, mesh, {})
        self.config = loss_config(self.model)
        self.optimizers = build_optimizers(self.model, OPTIM, fused=False)
        self.schedule = build_schedule(self.optimizers, OPTIM, 10)
        count = len(RECORDINGS) // self.mesh.dp_size
        rank = mesh.dp_rank if mesh is not None else 0
        self._pieces = lane_pieces(self.model)[rank * count : (rank + 1) * count]
        self._batch_size, self._dtype = batch_size, trained.dtype
        self.lanes = self._new_lanes(batch_size, tbptt)
        self.losses: list[list[float]] = []
        self.norms: list[float] = []

    def step(self, number: int) -> None:
        """Losses, gradients and an AdamW step; the gradients stay."""
        self.optimizers.zero_grad()
        first = number * PIECES_PER_STEP
        steps, begins = [], []
        for start in range(0, len(self._pieces), self._batch_size):
            group = self._pieces[start : start + self._batch_size]
            pieces = [[lane[first + n] for lane in group] for n in range(PIECES_PER_STEP)]
            steps.append([torch.stack([piece for piece, _ in each]) for each in pieces])
            begins.append([torch.tensor([begin for _, begin in each]) for each in pieces])
        microbatches = self.lanes.pieces(steps, begins)
        loss = accumulate_gradients(self.model, microbatches, self.config, self.mesh)
        self.losses.append(step_losses(loss))
        self.gradients = copies(gradients(self.model))  # before they are clipped
        if isinstance(self.mesh, OneRank):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        else:
            norm = clip_gradients(self.model.parameters(), MAX_NORM)
        self.norms.append(norm.item())

    def look_on(self) -> tuple[dict[int, Any], dict[str, float]]:
        """Inner losses by position over all recordings, and TTT's health after two pieces."""
        lanes = self._new_lanes(len(self._pieces))
        longest = max(frames for lane in RECORDINGS for frames in lane)
        curves = InnerLossCurves(self.model, longest, self.mesh, torch.device("cpu"))
        offsets = [0] * len(self._pieces)
        for number in range(len(self._pieces[0])):
            now = [lane[number] for lane in self._pieces]
            begins = torch.tensor([begin for _, begin in now])
            offsets = [0 if b else o + PIECE for (_, b), o in zip(now, offsets, strict=True)]
            batch = lanes.pieces([[torch.stack([p for p, _ in now])]], [[begins]], [offsets])
            if number == 2:
                health = ttt_health(self.model, batch, self.mesh)
            evaluate(self.model, [batch], self.config, self.mesh, torch.device("cpu"), curves)
        return curves.figures().curves, health

    def not_finite(self) -> str | None:
        """What is told of a step after one rank's part of a parameter is broken."""
        (weight,) = (v for n, v in values(self.model).items() if n.endswith("2.ttt.layer.W2"))
        if dist.get_rank() == dist.get_world_size() - 1:
            weight.to_local().view(-1)[-1] = float("nan")
        now = torch.stack([lane[0][0] for lane in self._pieces])
        begins = torch.ones(len(now), dtype=torch.bool)
        batch = self._new_lanes(len(now)).pieces([[now]], [[begins]])
        self.optimizers.zero_grad()
        loss = accumulate_gradients(self.model, batch, self.config, self.mesh)
        return where_not_finite(self.model, batch, loss.microbatches, loss.total.item())

    def _new_lanes(self, batch_size: int, tbptt: int = 1) -> Lanes:
        count = len(self._pieces)
        carry = empty_carry(self.model, count, self.mesh, dtype=self._dtype, device="cpu")
        return Lanes(carry, batch_size=batch_size, tbptt_pieces=tbptt)


def compare_lanes(
    weights: Path, folder: Path, meshes: list[Mesh], tbptt_pieces: int
) -> dict[str, Any]:
    """Train on the first mesh, resume on the second; differences from one process all through."""
    trained = Trained()  # float64
    plain = LaneTraining(weights, None, trained, len(RECORDINGS), tbptt_pieces)
    found = LaneTraining(weights, meshes[0], trained, 1, tbptt_pieces)
    result: dict[str, Any] = {}
    for number in range(STEPS):
        if number == SAVED_AFTER:
            path = save_checkpoint(
                folder,
                found.model,
                found.optimizers,
                found.schedule,
                step=number,
                global_batch_size=len(RECORDINGS) * PIECES_PER_STEP,
                layout=meshes[0].shape,
                carried=carry_tensors(found.lanes.carry, meshes[0]),
            )
            earlier = found
            found = LaneTraining(weights, meshes[1], trained, 2, tbptt_pieces)
            found.losses, found.norms = earlier.losses, earlier.norms
            carried = carry_tensors(found.lanes.carry, meshes[1])
            load_checkpoint(path, found.model, found.optimizers, found.schedule, carried)
            found.lanes.put(own_carry(carried, like=found.lanes.carry))
        plain.step(number)
        found.step(number)
        if number in (0, SAVED_AFTER):
            errors = errors_on_ranks(found.gradients, plain.gradients)
            result[f"gradients {number}"] = worst(errors)
        plain.optimizers.step()
        found.optimizers.step()
    result["parameters"] = worst(errors_on_ranks(values(found.model), values(plain.model)))
    carried = carry_tensors(found.lanes.carry, meshes[1])
    expected = {f"carry.{name}": value for name, value in plain.lanes.carry.tensors().items()}
    result["carried"] = worst(
        errors_on_ranks({n: t.double() for n, t in carried.items()}, _doubled(expected))
    )
    result["sharded"] = {n: list(map(str, t.placements)) for n, t in carried.items()}
    (curves, health), (plain_curves, plain_health) = found.look_on(), plain.look_on()
    result["health"] = [health, plain_health]
    result["inner losses"] = [
        [curves[layer][name], plain_curves[layer][name]]
        for layer in tiny.TTT_LAYERS
        for name in CURVES
    ]
    result["not finite"] = found.not_finite()
    result["losses"] = [found.losses, plain.losses]
    result["norms"] = [found.norms, plain.norms]
    return result


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}
