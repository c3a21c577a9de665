"""The loss curve of a run as a PNG, from its metrics.jsonl."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.metrics import read_metrics

# (key, label, colour): the same colour for training and evaluation of one quantity.
SERIES = (("loss", "loss", "C0"), ("text_loss", "text", "C1"), ("audio_loss", "audio", "C2"))


def _points(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key`. A resumed run may log a step twice: the last row counts."""
    by_step = {row["step"]: row[key] for row in rows if row.get(key) is not None and "step" in row}
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def plot_losses(metrics: Path, png: Path) -> Path | None:
    """Draw training losses as lines and evaluations as points.

    Returns `png`; None where no step's loss is in `metrics`, or, with a warning, where the plot
    can't be made.
    """
    try:
        rows = read_metrics(metrics)
        return _draw(rows, png) if _points(rows, "loss")[0] else None
    except Exception as error:  # whatever it is, a run whose steps are done doesn't fail of it
        reason = f"{type(error).__name__}: {error}"
        print(f"warning: no loss curve: {reason}", file=sys.stderr, flush=True)
        return None


def _draw(rows: Sequence[dict[str, Any]], png: Path) -> Path:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, colour in SERIES:
        axes.plot(*_points(rows, key), color=colour, linewidth=1.5, label=label)
        steps, values = _points(rows, f"eval_{key}")
        if steps:
            axes.plot(steps, values, "o--", color=colour, linewidth=0.8, label=f"{label}, held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_title(png.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = png.with_name(f".{png.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(png)
    return png
