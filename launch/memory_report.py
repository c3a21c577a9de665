"""What the memory benchmark found: thresholds, `memory.json`, `memory.csv`, `memory.png`."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Gaps, in multiples of attention's reach, for which thresholds hold; shares of chance.
JUDGED = (2, 4)
REMEMBERED, NOT_REMEMBERED = 0.25, 0.95

CAPTION = (
    "Attention carries a phrase as far as it reaches, TTT beyond. An inner loop that looks ahead\n"
    "predicts frames that are new and random: it has seen them, so its losses mean nothing."
)


@dataclass(frozen=True)
class Point:
    """Mean losses in nats of a phrase that comes back `gap` frames after its end."""

    gap: int
    returning: float
    new: float


@dataclass(frozen=True)
class Curve:
    """A run's losses, gap by gap, and the seconds that its training took."""

    run: str
    seconds: float
    points: tuple[Point, ...]

    def at(self, gap: int) -> Point:
        return next(point for point in self.points if point.gap == gap)

    @property
    def new(self) -> float:
        """Mean loss of new frames over all gaps, which they come before."""
        return sum(point.new for point in self.points) / len(self.points)


@dataclass(frozen=True)
class Check:
    """A threshold: a loss as a share of chance, and where it may lie."""

    what: str
    share: float
    least: float = 0.0
    most: float = math.inf

    @property
    def passed(self) -> bool:
        return self.least <= self.share <= self.most

    def describe(self) -> str:
        wanted = f"at least {self.least:.0%}" if self.least else f"at most {self.most:.0%}"
        verdict = "ok" if self.passed else "MISSED"
        return f"{verdict}: {self.what}: {self.share:.1%} of chance, wanted {wanted}"


@dataclass(frozen=True)
class MemoryResult:
    """Losses of the three runs.

    Attributes:
        reach: frames that attention reaches back, layers x (window - 1).
        symbols: of which each frame of a phrase is one.
        phrase_frames, sequence_frames: of a phrase, and of a whole sequence.
        steps: of each run.
        overrides: of configs/memory.yaml, for all runs, as given on the command line.
        curves: "with TTT", "without TTT", "looks ahead".
    """

    reach: int
    symbols: int
    phrase_frames: int
    sequence_frames: int
    steps: int
    overrides: tuple[str, ...]
    curves: tuple[Curve, ...]

    @property
    def chance(self) -> float:
        """Loss of who knows nothing of a phrase, in nats."""
        return math.log(self.symbols)

    def curve(self, run: str) -> Curve:
        return next(curve for curve in self.curves if curve.run == run)

    def checks(self) -> list[Check]:
        """What the benchmark has to show."""
        without, ttt = self.curve("without TTT"), self.curve("with TTT")
        ahead, checks = self.curve("looks ahead"), []
        for multiple in JUDGED:
            gap = multiple * self.reach
            after = f"returning after {multiple} times the reach"
            share = without.at(gap).returning / self.chance
            checks.append(Check(f"without TTT, {after}", share, least=NOT_REMEMBERED))
            share = ttt.at(gap).returning / self.chance
            checks.append(Check(f"with TTT, {after}", share, most=REMEMBERED))
        for curve in (without, ttt):
            what = f"{curve.run}, new frames (nothing leaks)"
            checks.append(Check(what, curve.new / self.chance, least=NOT_REMEMBERED))
        leak = "looks ahead, new frames (the leak shows)"
        checks.append(Check(leak, ahead.new / self.chance, most=NOT_REMEMBERED))
        return checks

    def table(self) -> list[str]:
        """Losses as shares of chance, a line for each gap."""
        head = f"{'gap':>4} {'/reach':>7}"
        lines = [head + "".join(f" | {curve.run:>11}: back, new" for curve in self.curves)]
        for point in self.curves[0].points:
            line = f"{point.gap:>4} {point.gap / self.reach:>7.1f}"
            for curve in self.curves:
                at = curve.at(point.gap)
                line += f" | {at.returning / self.chance:>16.1%} {at.new / self.chance:>6.1%}"
            lines.append(line)
        return lines


def write_result(result: MemoryResult, out: Path, *, total_seconds: float) -> list[Path]:
    """Write all files into `out`, in place of an earlier result; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "memory.json": _as_json(result, total_seconds).encode(),
        "memory.csv": _as_csv(result).encode(),
        "memory.png": _as_png(result),
    }
    for name, content in files.items():
        draft = out / f".{name}.tmp"
        draft.write_bytes(content)
        draft.replace(out / name)
    return [out / name for name in files]


def _as_json(result: MemoryResult, total_seconds: float) -> str:
    found = {
        **asdict(result),
        "chance": result.chance,
        "checks": [asdict(check) | {"passed": check.passed} for check in result.checks()],
        "total_seconds": total_seconds,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    for check in found["checks"]:
        check["most"] = None if math.isinf(check["most"]) else check["most"]
    return json.dumps(found, indent=2) + "\n"


def _as_csv(result: MemoryResult) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "gap_frames", "gap_in_reaches", "returning_loss", "new_loss"])
    for curve in result.curves:
        for point in curve.points:
            multiple = point.gap / result.reach
            losses = (f"{point.returning:.4f}", f"{point.new:.4f}")
            writer.writerow([curve.run, point.gap, f"{multiple:g}", *losses])
    return text.getvalue()


def _as_png(result: MemoryResult) -> bytes:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = (
        ("without TTT", "returning", "C1", "o-", "returning frames, without TTT"),
        ("with TTT", "returning", "C0", "o-", "returning frames, with TTT"),
        ("with TTT", "new", "C0", ":", "new random frames, with TTT"),
        ("looks ahead", "new", "C3", "s--", "new random frames, TTT that looks ahead: a leak"),
    )
    for run, what, colour, style, label in lines:
        points = result.curve(run).points
        gaps = [point.gap / result.reach for point in points]
        losses = [point.returning if what == "returning" else point.new for point in points]
        axes.plot(gaps, losses, style, color=colour, linewidth=1.5, markersize=4, label=label)
    axes.axhline(result.chance, color="0.5", linewidth=0.8)
    axes.annotate(
        f"chance, ln {result.symbols}",
        (1, result.chance),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="0.4",
        fontsize=8,
    )
    for multiple in JUDGED:
        axes.axvline(multiple, color="0.8", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.15 * result.chance)
    axes.set_xlabel(
        f"gap, in multiples of attention's reach ({result.reach} frames)\n\n{CAPTION}", fontsize=9
    )
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_title(f"A random phrase comes back, after {result.steps} steps of training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")
    image = io.BytesIO()
    figure.savefig(image, dpi=100, format="png")
    return image.getvalue()
