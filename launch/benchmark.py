"""How fast and how lean the scan and the TTT layer are, forward and backward.

    python -m launch.benchmark [--what scan|layer|both] [--op mlp|linear] [--shapes B,H,d,h,C …]
        [--lengths L …] [--compiled] [--json FILE] [--help]

A scan is timed in turn with its slow twin, the dual form under autograd with checkpoint groups of
16 mini-batches, on the same fresh random inputs in each pair; a layer in turn with its own scan,
and with the same layer around the twin. Before anything is timed, outputs, returned states and all
gradients of scan and twin, and of both layers, are compared.
Each measurement is one JSON object a line; tables for reading follow.

Exit code 0: measured; 1: results disagree, memory ran out, or a process of --resident failed; 2:
the command line can't be used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from launch.benchmarking import measure
from launch.benchmarking.cases import (
    FAST,
    Case,
    TwinLayer,
    Workload,
    flops_counted,
    layer_config,
    layer_flops,
    layer_workload,
    scan_bytes,
    scan_flops,
    scan_workload,
)
from launch.benchmarking.measure import DisagreementError, medians, spread
from launch.benchmarking.report import Row, tables
from launch.benchmarking.resident import ResidentError, resident_bytes, resident_supported
from launch.errors import UserError, exit_with
from ttt_dist.ops import describe_scan
from ttt_dist.ops.dual_form import dual_form

DEFAULT = {  # (B, H, d, h, C): lengths
    (1, 4, 64, 256, 16): (1024, 4096, 16384),
    (1, 4, 128, 512, 16): (1024,),
    (1, 4, 128, 512, 64): (1024,),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
H200_BFLOAT16 = 790e12  # FLOP/s, dense, as it is reached by large products
STOPPED = 1  # exit code


@dataclass(frozen=True)
class Settings:
    """The command line, checked."""

    what: tuple[str, ...]
    cases: tuple[Case, ...]
    pairs: int
    group_size: int | None
    threads: int
    resident: bool
    compiled: bool
    json: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)", title="benchmark can't start")


def read_arguments(arguments: Sequence[str]) -> Settings:
    """Raises UserError with all problems."""
    parser = _Parser(prog="python -m launch.benchmark", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--what", choices=("scan", "layer", "both"), default="both")
    add("--op", choices=("mlp", "linear"), default="mlp", help="TTT-MLP or TTT-Linear (h is d)")
    add("--shapes", nargs="+", metavar="B,H,d,h,C", help="default: " + _default_shapes())
    add("--lengths", nargs="+", metavar="L", help="default: those; 1024 with --shapes")
    add("--pairs", default="7", metavar="N", help="repetitions of each of the two; default 7")
    add("--threads", default="1", metavar="N", help="CPU threads; default 1")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the inputs")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--group-size", metavar="N", help="mini-batches between saved states; default: the op's")
    add("--resident", action="store_true", help="also peak resident bytes of scans, on a CPU")
    add("--compiled", action="store_true", help="compile the scan's elementwise code; not the twin")
    add("--json", metavar="FILE", help="append the rows to FILE; default: standard output")
    found = parser.parse_args(arguments)
    problems: list[str] = []

    def number(option: str, text: str, least: int) -> int:
        if text.strip().isdecimal() and int(text) >= least:
            return int(text)
        problems.append(f"{option}: found {text!r}, allowed are whole numbers from {least}")
        return least

    pairs = number("--pairs", found.pairs, 1)
    threads = number("--threads", found.threads, 1)
    group_size = found.group_size and number("--group-size", found.group_size, 0)
    shapes = []
    for text in found.shapes or []:
        sizes = [number("--shapes", size, 1) for size in text.split(",")]
        if len(sizes) == 5:
            shapes.append((sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]))
        else:
            problems.append(f"--shapes: found {text!r}, allowed are five numbers B,H,d,h,C")
    lengths = tuple(number("--lengths", text, 1) for text in found.lengths or [])
    what = ("scan", "layer") if found.what == "both" else (found.what,)
    device = torch.device(found.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        problems.append("--device: found 'cuda', but torch sees no GPU here; allowed is 'cpu'")
    if found.resident and (device.type != "cpu" or not resident_supported()):
        problems.append("--resident: allowed with --device cpu, on Linux")
    if found.resident and found.compiled:
        problems.append("--resident: allowed without --compiled")
    plan = dict.fromkeys(shapes, (1024,)) if shapes else DEFAULT
    cases = []
    for (B, H, d, h, C), usual in plan.items():
        h = h if found.op == "mlp" else d
        if "layer" in what and (h % d or d % 2):
            problems.append(
                f"--shapes: found d {d}, h {h}; a layer has an even d and h a multiple of it"
            )
        dtype = DTYPES[found.dtype]
        cases += [
            Case(found.op, B, H, d, h, C, L, dtype, device) for L in sorted(set(lengths or usual))
        ]
    path = found.json and Path(found.json)
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        problems.append(f"--json: found {found.json!r}, allowed is a file in an existing folder")
    if problems:
        raise UserError(problems, title="benchmark can't start")
    return Settings(
        what, tuple(cases), pairs, group_size, threads, found.resident, found.compiled, path
    )


def _default_shapes() -> str:
    return "; ".join(
        f"{','.join(map(str, shape))} at L {', '.join(map(str, lengths))}"
        for shape, lengths in DEFAULT.items()
    )


def scan_sides(case: Case, settings: Settings) -> tuple[Workload, Workload]:
    """The scan and its slow twin."""
    fast: dict[str, Any] = {"compiled": settings.compiled}
    if settings.group_size is not None:
        fast["checkpoint_group_size"] = settings.group_size
    return scan_workload(case, FAST[case.inner], **fast), scan_workload(case, dual_form)


def layer_sides(case: Case, settings: Settings) -> tuple[Workload, Workload]:
    """The layer, and the same one around the slow twin."""
    config = layer_config(case, settings.group_size)
    return (
        layer_workload(case, config, compiled=settings.compiled),
        layer_workload(case, config, TwinLayer),
    )


def measure_scan(case: Case, settings: Settings, seed: int) -> Row:
    """The scan beside its slow twin."""
    fast, twin = scan_sides(case, settings)
    # Measuring memory is a step in full, and so the warm-up too.
    peak, twin_peak = (measure.peak_bytes(side, seed + 1, case.device) for side in (fast, twin))
    rates = _machine(case)
    pairs = measure.interleaved(fast, twin, settings.pairs, seed + 2, case.device)
    ours, twins = zip(*pairs, strict=True)
    row = medians(ours) | {f"twin_{key}": value for key, value in medians(twins).items()}
    for prefix, seconds in (
        ("", lambda s: s.total),
        ("forward_", lambda s: s.forward),
        ("backward_", lambda s: s.backward),
        ("cpu_", lambda s: s.cpu),
    ):
        row |= spread(f"{prefix}ratio", [seconds(b) / seconds(a) for a, b in pairs])
    row |= {
        "peak_bytes": peak,
        "twin_peak_bytes": twin_peak,
        "memory_ratio": peak / twin_peak,
        "bytes_needed": scan_bytes(case),
        "share_of_copy_bandwidth": scan_bytes(case) / row["seconds"] / rates["copy_bandwidth"],
    }
    counted = flops_counted(case, "scan")
    row |= _arithmetic(case, scan_flops(case), counted, row["seconds"], rates)
    if settings.resident:
        ours_most, twins_most = (
            resident_bytes(side, case, size, settings.threads)
            for side, size in (("fast", settings.group_size), ("twin", None))
        )
        row |= {
            "resident_bytes": ours_most,
            "twin_resident_bytes": twins_most,
            "resident_ratio": ours_most / twins_most,
        }
    if case.device.type == "cuda":
        counts = measure.count_launches(twin, seed, case.device)
        row |= {"twin_launches": counts.launches, "twin_kernels": counts.kernels}
        row |= vars(measure.count_launches(fast, seed, case.device))
    return row


def measure_layer(case: Case, settings: Settings, seed: int) -> Row:
    """The layer beside a scan as it runs one, and beside a layer around the twin."""
    group = layer_config(case, settings.group_size).checkpoint_group_size
    layer, twin = layer_sides(case, settings)
    scan, _ = scan_sides(case, replace(settings, group_size=group))
    peak, twin_peak, _ = (
        measure.peak_bytes(side, seed + 1, case.device) for side in (layer, twin, scan)
    )
    rates = _machine(case)
    pairs = measure.interleaved(layer, scan, settings.pairs, seed + 2, case.device)
    row = medians([whole for whole, _ in pairs])
    row |= spread("scan_share", [part.total / whole.total for whole, part in pairs])
    pairs = measure.interleaved(layer, twin, settings.pairs, seed + 2, case.device)
    row |= {f"twin_{key}": value for key, value in medians([slow for _, slow in pairs]).items()}
    row |= spread("ratio", [slow.total / fast.total for fast, slow in pairs])
    row |= spread("cpu_ratio", [slow.cpu / fast.cpu for fast, slow in pairs])
    row |= {
        "peak_bytes": peak,
        "twin_peak_bytes": twin_peak,
        "memory_ratio": peak / twin_peak,
    }
    counted = flops_counted(case, "layer")
    row |= _arithmetic(case, layer_flops(case), counted, row["seconds"], rates)
    if case.device.type == "cuda":
        row |= vars(measure.count_launches(layer, seed, case.device))
    return row


def _machine(case: Case) -> dict[str, float]:
    return {
        "matmul_peak": measure.matmul_peak(case.dtype, case.device),
        "copy_bandwidth": measure.copy_bandwidth(case.device),
    }


def _arithmetic(
    case: Case, flops: tuple[int, int], counted: str, seconds: float, rates: dict[str, float]
) -> Row:
    rate = sum(flops) / seconds
    row: Row = {
        "forward_flops": flops[0],
        "backward_flops": flops[1],
        "flops_counted": counted,
        "flops_per_second": rate,
        "share_of_matmul_peak": rate / rates["matmul_peak"],
        **rates,
    }
    if case.device.type == "cuda":
        row["share_of_790_tflops"] = rate / H200_BFLOAT16
    return row


def compare(what: str, case: Case, settings: Settings, seed: int) -> float:
    """The worst relative difference of scan or layer and its twin. Raises DisagreementError."""
    sides = (scan_sides if what == "scan" else layer_sides)(case, settings)
    try:
        return measure.check_agreement(*sides, seed, case.dtype)
    except DisagreementError as error:
        raise DisagreementError(f"{what} {case}: {error}") from None


def run(settings: Settings) -> Iterator[Row]:
    """Rows as they are measured. Raises DisagreementError, before that case is timed."""
    done: dict[tuple[str, Case | None], Row] = {}
    for what in settings.what:
        for case in settings.cases:
            print(f"benchmark: {what} {case} …", file=sys.stderr, flush=True)
            # No two repetitions of a command share their inputs.
            seed = len(done) * (settings.pairs + 2)
            # The first call compiles, where anything is compiled.
            first = measure.timed_step(_fast_side(what, case, settings), seed, case.device).total
            difference = compare(what, case, settings, seed)
            found = (measure_scan if what == "scan" else measure_layer)(case, settings, seed)
            row: Row = {
                "what": what,
                "op": case.inner,
                **{size: getattr(case, size) for size in ("B", "H", "d", "h", "C", "L")},
                "dtype": str(case.dtype).removeprefix("torch."),
                "device": case.device.type,
                "device_name": measure.device_name(case.device),
                "threads": settings.threads,
                "torch": torch.__version__,
                "pairs": settings.pairs,
                "group_size": settings.group_size,
                "compiled": settings.compiled,
                "code": describe_scan(1 if case.inner == "linear" else 2, case.device, case.dtype),
                "first_seconds": first,
                "worst_difference": difference,
                **found,
                **_growth(found, done.get((what, _quarter(case)))),
            }
            done[what, case] = row
            yield row


def _fast_side(what: str, case: Case, settings: Settings) -> Workload:
    return (scan_sides if what == "scan" else layer_sides)(case, settings)[0]


def _quarter(case: Case) -> Case | None:
    return None if case.L % 4 else replace(case, L=case.L // 4)


def _growth(row: Row, shorter: Row | None) -> dict[str, Any]:
    """Factors from a quarter of the length, where that was measured before."""
    return {
        f"growth_{name}": None if shorter is None else row[name] / shorter[name]
        for name in ("seconds", "peak_bytes")
    }


def main(arguments: Sequence[str]) -> int:
    """Measure as the command line says; the exit code."""
    try:
        settings = read_arguments(arguments)
    except UserError as error:
        exit_with(error)
    # The profiler's own log lines say nothing about the measurement.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.set_num_threads(settings.threads)
    rows = []
    try:
        for row in run(settings):
            rows.append(row)
            if settings.json is None:
                print(json.dumps(row), flush=True)
            else:
                with settings.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    except (DisagreementError, ResidentError, torch.OutOfMemoryError) as error:
        print(f"benchmark: stopped. {error}", file=sys.stderr, flush=True)
        return STOPPED
    print(f"\n{tables(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
