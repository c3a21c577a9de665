"""What `verify` measures beside the training itself, and the tables it prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.verification.compare import Check

# Operators of torch.distributed, functional and in place, and the collective each one is.
COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "all_gather_into_tensor_coalesced": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_tensor_out": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
}
_GROUP_ARGUMENTS = {"group_name", "process_group"}  # what makes an operator a collective
_LISTED = 12  # deviations told by name


class TrafficCounter(TorchDispatchMode):
    """Counts every collective issued inside, by mesh axes, kind and dtype, with its bytes.

    The bytes of a collective are those of its whole tensor, as one rank has it: what is reduced,
    what a gather ends with, what a reduce-scatter starts from. Groups of one rank don't count.

    Args:
        shape: axis name -> size, the mesh's, outermost first.
    """

    def __init__(self, shape: Mapping[str, int]) -> None:
        super().__init__()
        self.shape = dict(shape)
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled layers run as they are; the collectives in them are counted as they run."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: it issues collectives on plain tensors
        result = func(*args, **(kwargs or {}))
        if isinstance(func, OpOverload) and func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            if name in COLLECTIVES:
                self._record(COLLECTIVES[name], args, result)
            elif _GROUP_ARGUMENTS & {argument.name for argument in func._schema.arguments}:
                raise RuntimeError(f"torch issued a collective that verify doesn't know: {name}")
        return result

    def _record(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        ranks = dist.get_process_group_ranks(_group(args))
        axes = axes_of(ranks, self.shape)
        if not axes:
            return
        sides = [[leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in args]
        sides.append([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        largest = max(sides, key=_bytes)
        key = (axes, kind, str(largest[0].dtype).removeprefix("torch."))
        self.calls[key] += 1
        self.bytes[key] += _bytes(largest)


def _group(args: Sequence[Any]) -> dist.ProcessGroup:
    """The process group among a collective's arguments: by name or as an object of TorchScript."""
    for value in args:
        if isinstance(value, dist.ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    name: Any = [value for value in args if isinstance(value, str)][-1]  # after an op's name
    return dist.distributed_c10d._resolve_process_group(name)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def axes_of(ranks: Sequence[int], shape: Mapping[str, int]) -> str:
    """The mesh axes along which `ranks` differ, e.g. `dp_shard x tp`; empty for one rank.

    Ranks are numbered along the last axis first, as `parallel.mesh` does.
    """
    names, sizes = list(shape), list(shape.values())
    varying = []
    for index, name in enumerate(names):
        stride = prod(sizes[index + 1 :])
        if len({rank // stride % sizes[index] for rank in ranks}) > 1:
            varying.append(name)
    return " x ".join(varying)


@dataclass(frozen=True)
class Memory:
    """Bytes of one kind of tensor: on the rank that holds most, and of the whole model."""

    kind: str
    rank: int
    total: int


def memory_of(kinds: Mapping[str, Iterable[Tensor]]) -> list[Memory]:
    """Measure tensors of each kind from their local storage; all ranks call it together."""
    own: list[tuple[str, int, int]] = []
    for kind, tensors in kinds.items():
        held = list(tensors)
        local = [t.to_local() if isinstance(t, DTensor) else t for t in held]
        own.append((kind, _bytes(local), _bytes(held)))
    everyone: list[list[tuple[str, int, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return [
        Memory(kind, max(of_rank[index][1] for of_rank in everyone), total)
        for index, (kind, _, total) in enumerate(own)
    ]


def module_of(name: str) -> str:
    """The row of the table that a parameter belongs to."""
    layer = re.match(r"(transformer\.layers\.\d+)\.(\w+)", name)
    if layer is not None:
        part = layer.group(2)
        return f"{layer.group(1)}.{'norms' if part.startswith('norm') else part}"
    if name.startswith("depformer"):
        return "depformer"
    if re.match(r"(text_)?emb\b", name):
        return "embeddings"
    return "heads"


def comparison_table(checks: Sequence[Check]) -> list[str]:
    """For each dtype and quantity: the worst difference, its tolerance, and where it is."""
    rows = [("", "compared", "worst", "allowed", "at")]
    for dtype in dict.fromkeys(check.dtype for check in checks):
        for what in dict.fromkeys(check.what for check in checks if check.dtype == dtype):
            members = [c for c in checks if c.dtype == dtype and c.what == what]
            worst = max(members, key=_badness)
            rows.append(
                (
                    dtype,
                    f"{what} ({len(members)})",
                    *_figures(worst.error, worst.allowed),
                    worst.where if worst.error else "-",
                )
            )
    return _align(rows, left=(0, 1, 4))


def module_table(checks: Sequence[Check], sizes: Mapping[str, int]) -> list[str]:
    """Worst gradient and parameter difference of every module; `sizes`: parameter -> elements."""
    columns = list(
        dict.fromkeys((c.what, c.dtype) for c in checks if c.what in ("gradient", "parameter"))
    )
    rows = [("module", "parameters", *(f"{what} {dtype}" for what, dtype in columns))]
    elements: Counter[str] = Counter()
    worst: dict[tuple[str, str, str], Check] = {}
    for name, size in sizes.items():
        elements[module_of(name)] += size
    for check in checks:
        if (check.what, check.dtype) in columns:
            key = (module_of(check.where), check.what, check.dtype)
            worst[key] = max(worst.get(key, check), check, key=_badness)
    for module, size in elements.items():
        cells = []
        for what, dtype in columns:
            found = worst.get((module, what, dtype))
            mark = "" if found is None or not found.failed else " !"
            cells.append("frozen" if found is None else f"{found.error:.1e}{mark}")
        rows.append((module, f"{size:,}", *cells))
    return _align(rows, left=(0,))


def traffic_table(traffic: TrafficCounter) -> list[str]:
    """Collectives and bytes of the counted step, by axes."""
    rows = [("axes", "collective", "dtype", "calls", "bytes")]
    for axes, kind, dtype in sorted(traffic.calls):
        key = (axes, kind, dtype)
        rows.append((axes, kind, dtype, f"{traffic.calls[key]:,}", f"{traffic.bytes[key]:,}"))
    calls, total = sum(traffic.calls.values()), sum(traffic.bytes.values())
    rows.append(("all", "", "", f"{calls:,}", f"{total:,}"))
    return _align(rows, left=(0, 1, 2))


def memory_table(memory: Sequence[Memory], ranks: int) -> list[str]:
    """Bytes a rank beside the whole model's, and their ratio to an even split over `ranks`."""
    rows = [("tensors", "unsharded", "a rank", f"x even share of {ranks}")]
    for entry in [
        *memory,
        Memory("all", sum(m.rank for m in memory), sum(m.total for m in memory)),
    ]:
        share = f"{entry.rank * ranks / entry.total:.3f}" if entry.total else "-"
        rows.append((entry.kind, f"{entry.total:,}", f"{entry.rank:,}", share))
    return _align(rows, left=(0,))


def verdict(checks: Sequence[Check]) -> list[str]:
    """The last lines: that all is well, or what isn't."""
    failed = [check for check in checks if check.failed]
    if not failed:
        return ["verify: all within tolerance"]
    modules = Counter(module_of(c.where) for c in failed if not c.where.startswith("step "))
    lines = [f"verify: {len(failed)} of {len(checks)} comparisons beyond tolerance"]
    if modules:
        lines.append("modules: " + ", ".join(f"{name} ({n})" for name, n in modules.items()))
    # Losses and norms step by step, then parameters, the worst first.
    of_steps = [check for check in failed if check.where.startswith("step ")]
    of_names = [check for check in failed if not check.where.startswith("step ")]
    failed = of_steps + sorted(of_names, key=_badness, reverse=True)
    for check in failed[:_LISTED]:
        error, allowed = _figures(check.error, check.allowed)
        lines.append(
            f"  {check.dtype} {check.what}, {check.where}: found {error}, allowed {allowed}"
        )
    if len(failed) > _LISTED:
        lines.append(f"  and {len(failed) - _LISTED} more")
    return lines


def print_tables(
    checks: Sequence[Check],
    sizes: Mapping[str, int],
    traffic: TrafficCounter,
    memory: Sequence[Memory],
    shape: Mapping[str, int],
    dtype: str,
) -> None:
    """The report of rank 0, its verdict last."""
    ranks = shape["dp_shard"] * shape["tp"]
    lines = [
        "\nDifference of this layout from one process, ‖a − b‖ / ‖b‖ (number of comparisons):",
        *comparison_table(checks),
        "\nWorst by module:",
        *module_table(checks, sizes),
        f"\nCollectives of one step in {dtype}, issued by rank 0 (bytes: a collective's whole",
        "tensor; tp reductions run in float32, so they double the bytes of a bfloat16 model):",
        *traffic_table(traffic),
        f"\nBytes in {dtype}, whole model and on the rank that holds most:",
        *memory_table(memory, ranks),
        "",
        *verdict(checks),
    ]
    print("\n".join(lines), flush=True)


def _badness(check: Check) -> float:
    """How far beyond its tolerance, NaN furthest."""
    if check.error != check.error:
        return float("inf")
    if check.allowed == 0:
        return float("inf") if check.error > 0 else 0.0
    return check.error / check.allowed


def _figures(error: float, allowed: float) -> tuple[str, str]:
    return f"{error:.1e}", f"{allowed:.1e}" if allowed else "0"


def _align(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Columns of equal width, two spaces apart; those in `left` flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
