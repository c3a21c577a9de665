"""Inner-loop losses along recordings: what the inner loops learn and keep, by position.

Figure 5 of "Learning to (Learn at Test Time)", arXiv 2407.04620, for every TTT layer: the loss of
each token at the learned initial weights, before and after the step of its mini-batch.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from launch.run_folder import write_atomically
from parallel.mesh import Mesh
from parallel.reduce import sum_over_data_ranks, sum_over_tp_ranks
from ttt_dist.data.interleave import FRAME_RATE
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import transformer_layers
from ttt_dist.moshi.probe import probing
from ttt_dist.reading import Reading

CURVES = ("w0", "before", "after")
_BINS = 500
_COLUMNS = 4  # of the plot
_CAPTION = (
    "Inner loss ½‖LN(f(k; W)) − (v − k)‖² of a token, the mean over heads and recordings, by its "
    "position in the recording. W0: at the learned initial weights, which no reading changes: how "
    "hard the tokens are by themselves. Before: at the weights with which its mini-batch starts. "
    "After: once the step of its mini-batch is done. W0 − before is what the state has learned of "
    "earlier tokens: 0 if nothing, a gap that is there at once and stays if it is what all tokens "
    "share, one that widens if the state goes on learning from the recording. Before − after is "
    "what one step learns of the very tokens it is made of."
)


@dataclass(frozen=True)
class InnerLossFigures:
    """Mean inner losses by position, over all heads, lanes and ranks.

    Attributes:
        edges: in frames from the recording's start, one more than bins; all but the last are
            multiples of the mini-batch.
        frames: read frames of each bin.
        curves: by layer, of each of `CURVES` a value a bin; NaN where nothing was read.
    """

    edges: list[int]
    frames: list[int]
    curves: dict[int, dict[str, list[float]]]

    def mean(self) -> dict[str, list[float]]:
        """The mean over layers."""
        layers = self.curves.values()
        return {
            name: [sum(values) / len(values) for values in zip(*(c[name] for c in layers))]
            for name in CURVES
        }

    def write(self, stem: Path, title: str) -> None:
        """`stem` with `.json` and `.png`; its folder is made where it isn't there."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "title": title,
            "caption": _CAPTION,
            "frames_per_second": FRAME_RATE,
            "bin_edges": self.edges,
            "frames": self.frames,
            "mean": _for_json(self.mean()),
            "layers": {str(layer): _for_json(each) for layer, each in self.curves.items()},
        }
        write_atomically(stem.with_name(f"{stem.name}.json"), json.dumps(facts, indent=1) + "\n")
        self._plot(stem.with_name(f"{stem.name}.png"), title)

    def _plot(self, png: Path, title: str) -> None:
        panels = {"all TTT layers": self.mean()} if len(self.curves) > 1 else {}
        panels |= {f"layer {layer}": curves for layer, curves in self.curves.items()}
        columns = min(_COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        width = max(7.0, 3.6 * columns)
        caption = textwrap.fill(_CAPTION, int(13 * width))
        figure = Figure(figsize=(width, 2.8 * rows + 1.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, curves) in zip(grid, panels.items(), strict=False):
            self._panel(axes, name, curves)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        grid[0].legend()
        figure.suptitle(title)
        figure.supxlabel(caption, fontsize=8)
        temporary = png.with_name(f".{png.name}.tmp")
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(png)

    def _panel(self, axes: Axes, name: str, curves: dict[str, list[float]]) -> None:
        seconds = [edge / FRAME_RATE for edge in self.edges]
        unit, label = (60.0, "minutes") if seconds[-1] > 120 else (1.0, "seconds")
        for curve, colour, text in zip(
            CURVES, ("C7", "C0", "C3"), ("W0", "before", "after"), strict=True
        ):
            axes.stairs(curves[curve], [s / unit for s in seconds], baseline=None, color=colour)
            axes.plot([], [], color=colour, label=text)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"{label} from the start", fontsize=8)
        axes.set_ylabel("inner loss", fontsize=8)
        axes.grid(alpha=0.3)


class InnerLossCurves:
    """Sums up the inner losses of an evaluation, forward after forward.

    Args:
        model: with TTT layers; probed by nobody else meanwhile.
        longest: frames of the longest recording (or piece, where pieces stand alone), the same on
            all ranks.
        bins: at most so many; a bin is one mini-batch or several.

    Raises:
        ValueError: the model has no TTT layer.
    """

    def __init__(
        self,
        model: TTTMoshi,
        longest: int,
        mesh: Mesh,
        device: torch.device,
        bins: int = _BINS,
    ) -> None:
        layers = {i: layer.ttt for i, layer in enumerate(transformer_layers(model)) if layer.ttt}
        if not layers:
            raise ValueError("inner losses: the model has no TTT layer")
        config = next(iter(layers.values())).layer.config
        size = config.mini_batch_size
        self._model, self._mesh, self._longest = model, mesh, longest
        self._num_heads = config.num_heads
        self._bin = size * -(-longest // (size * bins))  # frames
        count = -(-longest // self._bin)
        self._frames = torch.zeros(count, dtype=torch.float64, device=device)
        self._sums = {i: torch.zeros(3, count, dtype=torch.float64, device=device) for i in layers}

    @contextmanager
    def reading(self, steps: Tensor, offsets: Sequence[int]) -> Iterator[None]:
        """Inside, one forward without gradients is added.

        Args:
            steps: what it reads, int `[B, K, T + 1]` (`TTTMoshi.step_losses`).
            offsets: frames of each lane's recording that came before.
        """
        read = self._model.read_frames(steps)  # [B, T]
        before = torch.tensor(offsets, device=steps.device)
        position = before[:, None] + torch.arange(read.shape[1], device=steps.device)
        # Frames that aren't read count for nothing, wherever they are put.
        bins = torch.where(read, position // self._bin, 0).flatten()
        self._frames.index_add_(0, bins, read.flatten().double())

        def add(layer: int, given: Reading) -> None:
            losses = given.learned(read)[0].double().sum(dim=2)  # [3, B, T]
            self._sums[layer].index_add_(1, bins, torch.where(read, losses, 0.0).flatten(1))

        with probing(self._model, add):
            yield

    def figures(self) -> InnerLossFigures:
        """Over all ranks, which call it together."""
        group = self._mesh.dp_group
        frames = sum_over_data_ranks(self._frames, group)
        own = sum_over_tp_ranks(torch.stack([*self._sums.values()]), self._mesh)
        means = sum_over_data_ranks(own, group) / (frames * self._num_heads)  # 0 / 0: NaN
        counts = [int(each) for each in frames.tolist()]
        # Up to the last frame that was read: a last piece goes on after its recording's end.
        last = max((i for i, count in enumerate(counts) if count), default=0) + 1
        edges = [min(i * self._bin, self._longest) for i in range(last + 1)]
        curves = {
            layer: dict(zip(CURVES, values[:, :last].tolist(), strict=True))
            for layer, values in zip(self._sums, means, strict=True)
        }
        return InnerLossFigures(edges, counts[:last], curves)

    def save(self, stem: Path, title: str) -> None:
        """Write the figures, once; all ranks call it together."""
        figures = self.figures()
        if dist.get_rank() == 0:
            figures.write(stem, title)


def _for_json(curves: dict[str, list[float]]) -> dict[str, Any]:
    """JSON has no NaN: it becomes null."""
    return {
        name: [value if math.isfinite(value) else None for value in values]
        for name, values in curves.items()
    }
