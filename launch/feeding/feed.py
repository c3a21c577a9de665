"""What training and evaluation read: pieces that stand alone, or pieces along recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from launch.config import TrainConfig
from launch.feeding.batch_plan import LanePlan
from launch.feeding.lanes import LanePieces, Lanes
from launch.setup import model_dtypes
from launch.step import Microbatches, SeparatePieces
from parallel.carry import carry_tensors, empty_carry, lane_tensor, own_carry, own_lanes
from parallel.mesh import Mesh
from ttt_dist.data.batches import SampledStep, Step, StepBatches, eval_batches
from ttt_dist.data.dataset import GlobalOrder, PieceDataset
from ttt_dist.data.lanes import LaneBatches, LaneStep, recording_batches
from ttt_dist.data.recordings import RecordingDataset
from ttt_dist.moshi.block import TTTMoshi

BEGIN_ANEW = "carry.begin_anew"


StepT = TypeVar("StepT", bound=SampledStep)


class Feed(Protocol[StepT]):
    """What a run reads, as its loop wants it."""

    @property
    def sets(self) -> Mapping[str, PieceDataset] | Mapping[str, RecordingDataset]:
        """`train`, and `eval` where it is asked for."""
        ...

    def start(self, model: TTTMoshi) -> None:
        """Get ready to feed this model; before anything below."""
        ...

    def finish(self) -> None:
        """Free what goes along from step to step: the next one would begin without it."""
        ...

    def batches(self, first_step: int) -> AbstractContextManager[Iterator[StepT]]:
        """This rank's share of step `first_step` (from 0) and of every next one."""
        ...

    def microbatches(self, batch: StepT) -> Microbatches:
        """A step's share, ready for the model."""
        ...

    def held_out(self, broken: dict[int, str]) -> Iterator[Microbatches]:
        """One pass over the evaluation's data; all ranks give equally many.

        Args:
            broken: samples that can't be read are added to it, with the cause.
        """
        ...

    @property
    def held_out_frames(self) -> int:
        """Frames of the evaluation's longest recording; of a piece, where these stand alone."""
        ...

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by name, over all ranks."""
        ...

    def restore(self, carried: Mapping[str, Tensor]) -> None:
        """Go on from values that were loaded into what `carried` gave."""
        ...

    def forget_broken(self) -> int:
        """Drop what isn't finite in what goes on to the next step; all ranks call it together.

        Returns:
            Lanes of this rank that begin anew.
        """
        ...


class PieceFeed:
    """Pieces in their global order; none knows of another.

    Args:
        config: with `global_batch_size`.
        sets: `train`, and `eval` where it is asked for.
        first_step: of the run, from 0, that it feeds; orders of other ones differ.
    """

    def __init__(
        self,
        config: TrainConfig,
        sets: Mapping[str, PieceDataset],
        mesh: Mesh,
        device: torch.device,
        first_step: int,
    ) -> None:
        assert config.global_batch_size is not None  # resolved by now
        self.sets = sets
        self._config, self._mesh, self._device = config, mesh, device
        self._global_batch_size = config.global_batch_size
        self._order = _order(config, sets["train"], first_step)

    def start(self, model: TTTMoshi) -> None:
        self._model = model

    def finish(self) -> None:
        pass

    def batches(self, first_step: int) -> StepBatches:
        return StepBatches(
            self.sets["train"],
            self._order,
            global_batch_size=self._global_batch_size,
            batch_size=self._config.batch_size,
            dp_rank=self._mesh.dp_rank,
            dp_size=self._mesh.dp_size,
            start_step=first_step,
            prefetch=self._config.data.prefetch,
        )

    def microbatches(self, batch: Step) -> SeparatePieces:
        return SeparatePieces(self._model, [codes.to(self._device) for codes in batch.codes])

    def held_out(self, broken: dict[int, str]) -> Iterator[Microbatches]:
        limit = self._config.eval_batches and self._config.eval_batches * self._global_batch_size
        for codes in eval_batches(
            self.sets["eval"],
            batch_size=self._config.batch_size,
            dp_rank=self._mesh.dp_rank,
            dp_size=self._mesh.dp_size,
            broken=broken,
            limit=limit,
        ):
            yield SeparatePieces(self._model, [codes.to(self._device)])

    @property
    def held_out_frames(self) -> int:
        return self.sets["eval"].frames

    def carried(self) -> dict[str, Tensor]:
        return {}

    def restore(self, carried: Mapping[str, Tensor]) -> None:
        pass

    def forget_broken(self) -> int:
        return 0


class RecordingFeed:
    """Lanes along recordings, whose states go from piece to piece.

    Args:
        plan: what a step takes.
        sets: `train`, and `eval` where it is asked for.
        first_step: of the run, from 0, that it feeds; orders of other ones differ.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: LanePlan,
        sets: Mapping[str, RecordingDataset],
        mesh: Mesh,
        device: torch.device,
        first_step: int,
    ) -> None:
        self.sets = sets
        self._config, self._plan, self._mesh, self._device = config, plan, mesh, device
        self._dtype = model_dtypes(config, device)[1]
        self._training: Lanes | None = None
        self._order = _order(config, sets["train"], first_step)

    def start(self, model: TTTMoshi) -> None:
        self._model = model
        self._rows = {"delays": list(model.delays), "initial": model.initial_tokens()}

    def finish(self) -> None:
        self._training = None

    @property
    def _lanes(self) -> Lanes:
        """Those of training; in memory from their first use to `finish`."""
        if self._training is None:
            lanes = self._plan.num_lanes // self._mesh.dp_size
            self._training = self._new_lanes(lanes, self._config.ttt.tbptt_pieces)
        return self._training

    def batches(self, first_step: int) -> LaneBatches:
        return LaneBatches(
            self.sets["train"],
            self._order,
            num_lanes=self._plan.num_lanes,
            batch_size=self._config.batch_size,
            pieces_per_step=self._plan.pieces_per_step,
            **self._rows,
            dp_rank=self._mesh.dp_rank,
            dp_size=self._mesh.dp_size,
            start_step=first_step,
            prefetch=self._config.data.prefetch,
        )

    def microbatches(self, batch: LaneStep) -> LanePieces:
        steps, begins = (
            [[piece.to(self._device) for piece in group] for group in nested]
            for nested in (batch.steps, batch.begins)
        )
        return self._lanes.pieces(steps, begins)

    def held_out(self, broken: dict[int, str]) -> Iterator[Microbatches]:
        lanes = self._new_lanes(self._config.batch_size, tbptt_pieces=1)
        for batch in recording_batches(
            self.sets["eval"],
            batch_size=self._config.batch_size,
            **self._rows,
            dp_rank=self._mesh.dp_rank,
            dp_size=self._mesh.dp_size,
            broken=broken,
            limit=self._config.eval_batches and self._config.eval_batches * self._plan.num_lanes,
        ):
            steps, begins = batch.steps.to(self._device), batch.begins.to(self._device)
            yield lanes.pieces([[steps]], [[begins]], [batch.offsets])

    @property
    def held_out_frames(self) -> int:
        held_out = self.sets["eval"]
        pieces = max(held_out.pieces_of(each) for each in range(held_out.num_recordings))
        return pieces * held_out.frames

    def carried(self) -> dict[str, Tensor]:
        anew = lane_tensor(self._lanes.begin_anew, self._mesh)
        return carry_tensors(self._lanes.carry, self._mesh) | {BEGIN_ANEW: anew}

    def restore(self, carried: Mapping[str, Tensor]) -> None:
        anew = own_lanes(carried[BEGIN_ANEW])
        self._lanes.put(own_carry(carried, like=self._lanes.carry), anew)

    def forget_broken(self) -> int:
        tp = self._mesh.tp
        return self._lanes.forget_broken(None if tp is None else tp.get_group())

    def _new_lanes(self, lanes: int, tbptt_pieces: int) -> Lanes:
        carry = empty_carry(self._model, lanes, self._mesh, dtype=self._dtype, device=self._device)
        return Lanes(carry, batch_size=self._config.batch_size, tbptt_pieces=tbptt_pieces)


def _order(config: TrainConfig, train: PieceDataset | RecordingDataset, stage: int) -> GlobalOrder:
    return GlobalOrder(
        train.source_sizes,
        train.order_weights,
        seed=config.seed,
        shuffle=config.data.shuffle,
        stage=stage,
    )
