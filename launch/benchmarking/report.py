"""The rows of `launch.benchmark` as tables for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

FREE = 0.95  # share of the wall time that a step on an otherwise idle machine computes

_NOTES = """\
time: median of forward + backward, ms; faster: the twin's time over ours in the same pair, median
and (least - most) over the pairs; memory: most MiB of tensors alive at once beyond the inputs, and
its ratio to the twin's; resident: that ratio for all memory of a process of its own (--resident);
t(L)/t(L/4) and m(L)/m(L/4): growth of time and memory from a quarter of the length; peak: share of
the rate of torch's large matrix products, measured before the row. Counted:
{flops}. Scans run by: {code}."""


def tables(rows: Sequence[Row]) -> str:
    """Scans beside their slow twins, and layers beside their scan."""
    parts = []
    scans = [row for row in rows if row["what"] == "scan"]
    layers = [row for row in rows if row["what"] == "layer"]
    if scans:
        parts += ["Scan, and its slow twin:", *align([SCAN_HEAD, *map(_scan_cells, scans)]), ""]
    if layers:
        parts += [
            "Layer, its twin around the slow scan, and the scan in it:",
            *align([LAYER_HEAD, *map(_layer_cells, layers)]),
            "",
        ]
    on_gpu = [row for row in rows if row["device"] == "cuda"]
    if on_gpu:
        parts += ["GPU:", *align([GPU_HEAD, *map(_gpu_cells, on_gpu)]), ""]
    busy = [row for row in rows if _was_busy(row)]
    if busy:
        parts.append(
            f"In {len(busy)} of {len(rows)} rows the process got less than {FREE:.0%} of the wall\n"
            "time; others were at work. Compare by CPU time, or measure on a quiet machine.\n"
        )
    flops, code = (
        "; ".join(dict.fromkeys(row[key] for row in rows)) for key in ("flops_counted", "code")
    )
    parts.append(_NOTES.format(flops=flops, code=code))
    return "\n".join(parts)


def _was_busy(row: Row) -> bool:
    """With several threads, which wait for each other, a low share tells nothing."""
    return (
        row["device"] == "cpu"
        and row["threads"] == 1
        and row["cpu_seconds"] < FREE * row["seconds"]
    )


SCAN_HEAD = (
    "op, B H d h C",
    "L",
    "time",
    "twin",
    "faster",
    "forward",
    "backward",
    "by CPU time",
    "memory",
    "twin",
    "ratio",
    "resident",
    "t(L)/t(L/4)",
    "m(L)/m(L/4)",
    "peak",
)
LAYER_HEAD = (
    "op, B H d h C",
    "L",
    "time",
    "forward",
    "backward",
    "twin",
    "faster",
    "scan's share",
    "memory",
    "ratio",
    "t(L)/t(L/4)",
    "m(L)/m(L/4)",
    "peak",
)
GPU_HEAD = (
    "what, op, B H d h C",
    "L",
    "launches",
    "kernels",
    "twin's launches",
    "of 790 TFLOP/s",
    "of copy bandwidth",
)


def _scan_cells(row: Row) -> tuple[str, ...]:
    return (
        _name(row),
        f"{row['L']:,}",
        _ms(row["seconds"]),
        _ms(row["twin_seconds"]),
        f"{row['ratio']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})",
        f"{row['forward_ratio']:.2f}",
        f"{row['backward_ratio']:.2f}",
        _times(row["cpu_ratio"] if row["device"] == "cpu" else None),
        _mib(row["peak_bytes"]),
        _mib(row["twin_peak_bytes"]),
        f"{row['memory_ratio']:.2f}",
        _times(row.get("resident_ratio")),
        _times(row["growth_seconds"]),
        _times(row["growth_peak_bytes"]),
        f"{row['share_of_matmul_peak']:.1%}",
    )


def _layer_cells(row: Row) -> tuple[str, ...]:
    return (
        _name(row),
        f"{row['L']:,}",
        _ms(row["seconds"]),
        _ms(row["forward_seconds"]),
        _ms(row["backward_seconds"]),
        _ms(row["twin_seconds"]),
        f"{row['ratio']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})",
        f"{row['scan_share']:.0%} ({row['scan_share_min']:.0%} - {row['scan_share_max']:.0%})",
        _mib(row["peak_bytes"]),
        f"{row['memory_ratio']:.2f}",
        _times(row["growth_seconds"]),
        _times(row["growth_peak_bytes"]),
        f"{row['share_of_matmul_peak']:.1%}",
    )


def _gpu_cells(row: Row) -> tuple[str, ...]:
    twin, copied = row.get("twin_launches"), row.get("share_of_copy_bandwidth")
    return (
        f"{row['what']} {_name(row)}",
        f"{row['L']:,}",
        f"{row['launches']:,}",
        f"{row['kernels']:,}",
        "-" if twin is None else f"{twin:,}",
        f"{row['share_of_790_tflops']:.2%}",
        "-" if copied is None else f"{copied:.2%}",
    )


def _name(row: Row) -> str:
    return " ".join(str(row[key]) for key in ("op", "B", "H", "d", "h", "C"))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
