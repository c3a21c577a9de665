"""Filling a (possibly sharded) model: released weights, and TTT's initial values where it has none.

Each rank fills its own part of every parameter and nothing else: released tensors are read slice by
slice from the mapped file, initial values are drawn from a generator that depends on the seed and
the parameter's name alone, so they are the same whatever the layout.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_dist.layer import initial_value
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.lora import is_adapter_parameter, released_name
from ttt_dist.moshi.packed import packed_parameters
from ttt_dist.moshi.tensor_files import FLOAT_DTYPES, TensorFiles
from ttt_dist.placement import place_into, shard_slices

# Released files pack the attention weights of all Depformer steps into one tensor, as moshi's own
# load hook unpacks them: `self_attn.in_proj_weight [steps * 3D, D]` holds `in_projs.{step}.weight`.
_PACKED = (
    (re.compile(r"\.in_projs\.(\d+)\.weight$"), (".in_proj_weight", ".in_proj.weight")),
    (re.compile(r"\.out_projs\.(\d+)\.weight$"), (".out_proj.weight",)),
)


def load_base_weights(model: nn.Module, path: Path) -> set[str]:
    """Copy a release's weights into the parameters, in place: Moshi's, and TTT's where it has any.

    Adapters' (`lora.py`) are left alone; the weights that they are put on have other names here.

    Only this rank's slices are read, one parameter at a time.

    Args:
        model: materialised (not on meta); parameters plain or DTensors, of any float dtype.
        path: the `.safetensors` file, or the index of several. Values are cast to each parameter's
            dtype.

    Returns:
        Names of the TTT parameters that the release held: all of the model's, or none; those are
        for `init_ttt_weights` to fill.

    Raises:
        ReleaseError: a file is damaged, or names are missing, unexpected, or of another shape or
            dtype: all of them in one message, before any value is copied. TTT parameters alone may
            be missing, and only all together.
    """
    wanted = {
        released_name(name): parameter
        for name, parameter in model.named_parameters()
        if not is_adapter_parameter(name)
    }
    ttt = {name for name in wanted if is_ttt_parameter(name)}
    packed = {released_name(name) for name in packed_parameters(model)}
    with TensorFiles(path) as files:
        if not any(map(is_ttt_parameter, files.keys())):
            wanted = {name: value for name, value in wanted.items() if name not in ttt}
            ttt = set()
        sources, unexpected = _match_names(wanted, files.keys())
        problems = _mismatches(wanted, packed, sources, unexpected, files)
        if problems:
            raise ReleaseError(
                f"{path} does not fit the model of its config.json: {'; '.join(problems)}"
            )
        for name, (key, part) in sources.items():
            if name in packed:
                _copy_packed(wanted[name], files.slice(key))
            else:
                first_row = (part or 0) * wanted[name].shape[0]
                _copy_slice(wanted[name], files.slice(key), first_row)
    return ttt


def _mismatches(
    wanted: dict[str, nn.Parameter],
    packed: set[str],
    sources: dict[str, tuple[str, int | None]],
    unexpected: set[str],
    files: TensorFiles,
) -> list[str]:
    """Every name that the model lacks or the files lack, and every other shape and dtype."""
    parts = Counter(key for key, _ in sources.values())
    shapes = []
    for name, (key, part) in sources.items():
        found, expected = files.shape(key), _stock_shape(name, wanted[name], packed)
        stacked = expected if part is None else [parts[key] * expected[0], *expected[1:]]
        if found != stacked:
            shapes.append(f"{name}: found {found} in {key}, allowed {stacked}")
    dtypes = [
        f"{key}: found {files.dtype(key)}, allowed {', '.join(FLOAT_DTYPES)}"
        for key in sorted(parts)
        if files.dtype(key) not in FLOAT_DTYPES
    ]
    kinds = {
        "missing": collapse_numbers(set(wanted) - set(sources)),
        "unexpected": collapse_numbers(unexpected),
        "of another shape": shapes,
        "of another dtype": dtypes,
    }
    counts = {"missing": len(wanted) - len(sources), "unexpected": len(unexpected)}
    return [
        f"{counts.get(kind, len(names))} {kind}: {', '.join(names)}"
        for kind, names in kinds.items()
        if names
    ]


def collapse_numbers(names: Iterable[str]) -> list[str]:
    """All names, sorted; those that differ in one number stand together, `layers.{0-3,7}.norm`."""
    groups: dict[tuple[str, ...], set[int]] = {}
    single: list[str] = []
    for name in names:
        pieces = re.split(r"(\d+)", name)
        if len(pieces) == 1:
            single.append(name)
        else:  # the first number is that of the layer
            groups.setdefault((pieces[0], "".join(pieces[2:])), set()).add(int(pieces[1]))
    return sorted(single + [f"{a}{_ranges(numbers)}{b}" for (a, b), numbers in groups.items()])


def _ranges(numbers: set[int]) -> str:
    """`7`, or `{0-3,7}`."""
    if len(numbers) == 1:
        return str(*numbers)
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) + "}"


def init_ttt_weights(model: nn.Module, seed: int, loaded: Collection[str] = ()) -> int:
    """Give every TTT parameter its initial value, the same on every layout.

    Args:
        loaded: names of those that have their values from the release (`load_base_weights`).

    Returns:
        The number of parameters' elements initialised.
    """
    count = 0
    alphas = {
        f"{name}.alpha": float(module.initial_alpha)
        for name, module in model.named_modules()
        if name.endswith(".ttt")
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_ttt_parameter(name) or name in loaded:
                continue
            full = torch.empty(parameter.shape, dtype=torch.float32)
            if name in alphas:
                full.fill_(alphas[name])
            else:
                initial_value(name, full, seeded_generator(seed, name))
            fill_own(parameter, full[shard_slices(parameter)])
            count += parameter.numel()
    return count


def init_adapters(model: nn.Module, seed: int) -> int:
    """Give every adapter its initial value, the same on every layout, as moshi-finetune does.

    `lora_A` is uniform within 1 / sqrt(inputs) (Kaiming's rule with a = sqrt(5)), `lora_B` is 0: at
    the start a model computes what it does without adapters.

    Returns:
        The number of parameters' elements initialised.
    """
    count = 0
    for name, parameter in model.named_parameters():
        if not is_adapter_parameter(name):
            continue
        full = torch.zeros(parameter.shape, dtype=torch.float32)
        if ".lora_A." in name:
            generator = seeded_generator(seed, name)
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        fill_own(parameter, full[shard_slices(parameter)])
        count += parameter.numel()
    return count


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of a parameter, the same whatever the layout and the other parameters are."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fill_own(parameter: nn.Parameter, own_values: Tensor) -> None:
    """Give a parameter the values of this rank's part (`placement.shard_slices`), in place.

    Values are cast to the parameter's dtype; a part of another shape is a ValueError.
    """
    values = own_values.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        parameter.copy_(place_into(values, like=parameter))


def _match_names(
    wanted: dict[str, nn.Parameter], keys: set[str]
) -> tuple[dict[str, tuple[str, int | None]], set[str]]:
    """Parameter name -> (key in the file, which part of a packed tensor), and keys left over."""
    sources: dict[str, tuple[str, int | None]] = {}
    used: set[str] = set()
    for name in wanted:
        if name in keys:
            sources[name] = (name, None)
            used.add(name)
            continue
        for pattern, suffixes in _PACKED:
            match = pattern.search(name)
            if match is None:
                continue
            for suffix in suffixes:
                key = name[: match.start()] + suffix
                if key in keys:
                    sources[name] = (key, int(match.group(1)))
                    used.add(key)
                    break  # the same weights under a second name stay unexpected
    return sources, keys - used


def _stock_shape(name: str, parameter: nn.Parameter, packed: set[str]) -> list[int]:
    """The shape that a release has: `[parts, rows, inputs]` of `packed.py` is one matrix there."""
    shape = list(parameter.shape)
    return [shape[0] * shape[1], *shape[2:]] if name in packed else shape


def _copy_slice(parameter: nn.Parameter, source: Any, first_row: int) -> None:
    """This rank's part of the rows of `source` from `first_row` on."""
    rows, *others = shard_slices(parameter)
    rows = slice(rows.start + first_row, rows.stop + first_row)
    fill_own(parameter, source[(rows, *others)])


def _copy_packed(parameter: nn.Parameter, source: Any) -> None:
    """This rank's rows of every part, from `source [parts * rows, inputs]`."""
    parts, rows, inputs = shard_slices(parameter)
    firsts = [part * parameter.shape[1] for part in range(parts.start, parts.stop)]
    values = [source[first + rows.start : first + rows.stop, inputs] for first in firsts]
    if values:  # FSDP leaves a rank without any where it has to cut the parts
        fill_own(parameter, torch.stack(values))
