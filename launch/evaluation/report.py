"""What an evaluation leaves: `evaluation.json`, `.csv` and `.png`, and the tables it prints."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.evaluation.minutes import Figures, TTTMode

MEANING = {
    "ttt": "on: states go along the recording; off: gates at zero; reset: TTT begins each piece "
    "with its learned weights, while attention goes on; none: the model has no TTT",
    "minute": "of the recording, from 0; every figure is a mean over all recordings' frames of it",
    "mono": "a mono recording is Moshi's channel, beside a silent user; predicted is Moshi's alone",
    "frames": "frames of audio that were predicted, 12.5 a second",
    "loss": "text_loss + audio_loss, what training minimises",
    "padding_share": "share of text tokens that are padding or end of padding",
    "text_loss": "nats a token, padding included with text_padding_weight",
    "text_loss_without_padding": "nats a token, of words alone",
    "audio_loss": "nats a code, the first codebook with first_codebook_weight_multiplier",
    "audio_loss_K": "nats a code of codebook K",
    "text_perplexity": "exp(text_loss_without_padding)",
    "audio_perplexity": "exp of the mean over all codebooks, unweighted",
}
_STYLES: dict[TTTMode, str] = {"on": "-", "off": ":", "reset": "--", "none": "-."}
_COLUMNS = {
    "loss": "loss",
    "text_loss": "text",
    "text_loss_without_padding": "words",
    "audio_loss": "audio",
    "padding_share": "padding",
    "text_perplexity": "ppl words",
    "audio_perplexity": "ppl audio",
}


@dataclass(frozen=True)
class Result:
    """What one model gave, with TTT as `ttt` says.

    Attributes:
        about: what the model is, for the JSON.
    """

    label: str
    ttt: TTTMode
    overall: Figures
    by_minute: Sequence[Figures]
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.label if self.ttt == "none" else f"{self.label}, TTT {self.ttt}"

    @property
    def broken_minute(self) -> int | None:
        """The first minute with a figure that isn't finite."""
        for figures in self.by_minute:
            if not all(value is None or math.isfinite(value) for value in figures.values()):
                return int(figures["minute"] or 0)
        return None


def write_report(
    folder: Path, results: Sequence[Result], about: Mapping[str, Any], *, complete: bool
) -> None:
    """Write all three files anew, each whole or not at all.

    Args:
        about: data and settings, for the JSON.
        complete: whether nothing is left to do.
    """
    found = {
        "complete": complete,
        **about,
        "meaning": MEANING,
        "results": [
            {
                "checkpoint": each.label,
                "ttt": each.ttt,
                **each.about,
                "not_finite_from_minute": each.broken_minute,
                "overall": _finite(each.overall),
                "by_minute": [_finite(figures) for figures in each.by_minute],
            }
            for each in results
        ],
    }
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    _replace(folder / "evaluation.json", text.encode())
    _replace(folder / "evaluation.csv", table_csv(results).encode())
    _replace(folder / "evaluation.png", plot_png(results))


def table_csv(results: Sequence[Result]) -> str:
    """A row a model, mode and minute; empty where there was nothing to predict."""
    names = dict.fromkeys(name for each in results for row in each.by_minute for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, ["checkpoint", "ttt", *names], lineterminator="\n")
    writer.writeheader()
    for each in results:
        for figures in each.by_minute:
            writer.writerow({"checkpoint": each.label, "ttt": each.ttt, **_finite(figures)})
    return out.getvalue()


def printed_tables(results: Sequence[Result]) -> str:
    """Losses of all minutes together, of the codebooks, and by minute."""
    overall = [["", *_COLUMNS.values()]]
    overall += [[each.name, *(_cell(each.overall[key]) for key in _COLUMNS)] for each in results]
    codebooks = max(sum(name.startswith("audio_loss_") for name in r.overall) for r in results)
    keys = [f"audio_loss_{k}" for k in range(1, codebooks + 1)]
    audio = [["audio loss by codebook", *(str(k) for k in range(1, codebooks + 1))]]
    audio += [[each.name, *(_cell(each.overall.get(key)) for key in keys)] for each in results]
    quantity = _plotted(results)[0]
    minutes = [[f"{_COLUMNS[quantity]} by minute", *(f"({n + 1})" for n in range(len(results)))]]
    for minute in range(max(len(each.by_minute) for each in results)):
        row = [each.by_minute[minute][quantity] for each in results]
        minutes.append([str(minute), *map(_cell, row)])
    names = [f"({number}) {each.name}" for number, each in enumerate(results, start=1)]
    return "\n\n".join([*map(_aligned, (overall, audio)), "\n".join([_aligned(minutes), *names])])


def plot_png(results: Sequence[Result]) -> bytes:
    """Losses by minute, a line a model and mode; the mode shows in its style."""
    quantities = _plotted(results)
    worth = _worth(results, quantities[0])
    panels = len(quantities) + bool(worth)
    figure = Figure(figsize=(8, 3.2 * panels + 1), layout="constrained")
    FigureCanvasAgg(figure)
    minutes = max(len(each.by_minute) for each in results)
    for place, quantity in enumerate(quantities, start=1):
        axes = figure.add_subplot(panels, 1, place)
        for number, each in enumerate(results):
            points = [
                (float(row["minute"] or 0) + 0.5, row[quantity])
                for row in each.by_minute
                if row[quantity] is not None
            ]
            axes.plot(
                *zip(*points, strict=True),
                color=f"C{number}",
                linestyle=_STYLES[each.ttt],
                marker="." if len(points) < 30 else "",
                label=each.name,
            )
        axes.set_title(f"{quantity}: {MEANING[quantity]}", fontsize=9)
        axes.set_ylabel("nats")
        axes.set_xlim(0, minutes)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    if worth:
        axes = figure.add_subplot(panels, 1, panels)
        for number, values in worth.items():
            x = [minute + 0.5 for minute in values]
            style = _STYLES[results[number].ttt]
            axes.plot(x, [*values.values()], color=f"C{number}", linestyle=style, marker=".")
        axes.axhline(0, color="black", linewidth=0.8)
        title = f"{quantities[0]}: how much more it is than of the same model with TTT on"
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("nats")
        axes.set_xlim(0, minutes)
        axes.grid(alpha=0.3)
    axes.set_xlabel("minute of the recording")
    out = io.BytesIO()
    figure.savefig(out, dpi=120, format="png")
    return out.getvalue()


def _worth(results: Sequence[Result], quantity: str) -> dict[int, dict[int, float]]:
    """By place in `results` and minute, how much TTT's being on is worth against other modes."""
    on = {each.label: each.by_minute for each in results if each.ttt == "on"}
    found: dict[int, dict[int, float]] = {}
    for number, each in enumerate(results):
        if each.ttt in ("off", "reset") and each.label in on:
            pairs = [(a[quantity], b[quantity]) for a, b in zip(each.by_minute, on[each.label])]
            found[number] = {
                minute: value - base
                for minute, (value, base) in enumerate(pairs)
                if value is not None and base is not None
            }
    return found


def _plotted(results: Sequence[Result]) -> list[str]:
    """Losses that some recording has; audio always."""
    if all(each.overall["text_loss"] is None for each in results):
        return ["audio_loss"]
    return ["loss", "audio_loss", "text_loss_without_padding"]


def _finite(figures: Figures) -> Figures:
    """JSON has no other numbers."""
    return {k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(content)
    draft.replace(path)
