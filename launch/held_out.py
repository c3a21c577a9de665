"""What a run measures on its held-out data, from its first step to its last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.config import TrainConfig, has_ttt
from launch.feeding.feed import Feed
from launch.guards.sample_guard import refuse_broken_evaluation
from launch.guards.watchdog import Watchdog
from launch.reporting.inner_loop import InnerLossCurves
from launch.run_folder import RunFolder
from launch.step import evaluate
from parallel.mesh import Mesh
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import without_ttt
from ttt_dist.moshi.loss import LossConfig


class HeldOut:
    """The held-out data of a run and the model that is trained; all ranks call it together.

    Args:
        feed: the one whose `eval` set is read.
        folder: where curves of inner losses go, unless the configuration says where.
    """

    def __init__(
        self,
        config: TrainConfig,
        feed: Feed[Any],
        model: TTTMoshi,
        loss_config: LossConfig,
        mesh: Mesh,
        device: torch.device,
        folder: RunFolder,
    ) -> None:
        self._feed, self._model, self._loss_config = feed, model, loss_config
        self._mesh, self._device = mesh, device
        self._max_steps, self._ttt = config.max_steps, config.ttt.enable
        self._plots = config.ttt.save_inner_loop_plots and has_ttt(config)
        self._plot_dir = Path(config.ttt.inner_loop_plot_dir or folder.inner_loop)

    def measure(
        self, step: int, watchdog: Watchdog, newest_checkpoint: Callable[[], Path | None]
    ) -> dict[str, float]:
        """Losses after `step`, by name; after the last step also with the gates at zero.

        Args:
            newest_checkpoint: for the message where a piece can't be read.

        Raises:
            UserError: one can't, on any rank.
        """
        arguments = (step, watchdog, newest_checkpoint)
        if self._plots:
            frames = self._feed.held_out_frames
            inner = InnerLossCurves(self._model, frames, self._mesh, self._device)
            values = self._losses(*arguments, inner)
            inner.save(self._plot_dir / f"step-{step:06d}", f"inner losses after step {step}")
        else:
            values = self._losses(*arguments)
        if step == self._max_steps and self._ttt:
            # What the trained TTT layers contribute: the same data with their gates at zero.
            with without_ttt(self._model):
                values["eval_loss_without_ttt"] = self._losses(*arguments)["eval_loss"]
        return values

    def _losses(
        self,
        step: int,
        watchdog: Watchdog,
        newest_checkpoint: Callable[[], Path | None],
        inner: InnerLossCurves | None = None,
    ) -> dict[str, float]:
        broken: dict[int, str] = {}
        watched = watchdog.over(self._feed.held_out(broken), "a batch of the evaluation")
        losses = evaluate(self._model, watched, self._loss_config, self._mesh, self._device, inner)
        is_last = step == self._max_steps
        refuse_broken_evaluation(
            broken, self._feed.sets["eval"], newest_checkpoint, is_last=is_last
        )
        return losses.as_metrics()
