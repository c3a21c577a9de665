"""Filling a (possibly sharded) model: Moshi's released weights and TTT's initial values.

Each rank fills its own part of every parameter and nothing else: released tensors are read slice by
slice from the mapped file, initial values are drawn from a generator that depends on the seed and
the parameter's name alone, so they are the same whatever the layout.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt_dist.layer import initial_value
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.packed import packed_parameters
from ttt_dist.moshi.release import ReleaseError
from ttt_dist.placement import place_into, shard_slices

# Released files pack the attention weights of all Depformer steps into one tensor, as moshi's own
# load hook unpacks them: `self_attn.in_proj_weight [steps * 3D, D]` holds `in_projs.{step}.weight`.
_PACKED = (
    (re.compile(r"\.in_projs\.(\d+)\.weight$"), (".in_proj_weight", ".in_proj.weight")),
    (re.compile(r"\.out_projs\.(\d+)\.weight$"), (".out_proj.weight",)),
)
_SHOWN = 8  # names listed of each kind of mismatch


def load_base_weights(model: nn.Module, path: Path) -> None:
    """Copy a released `model.safetensors` into all parameters but TTT's, in place.

    Args:
        model: materialised (not on meta); parameters plain or DTensors, of any float dtype.
        path: the `.safetensors` file. Values are cast to each parameter's dtype.

    Raises:
        ReleaseError: the file is damaged, or names are missing, unexpected, or of another shape:
            all of them in one message, before any value is copied.
    """
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not is_ttt_parameter(name)
    }
    packed = packed_parameters(model)
    try:
        with safe_open(path, framework="pt") as file:
            sources, unexpected = _match_names(wanted, set(file.keys()))
            problems = []
            missing = sorted(set(wanted) - set(sources))
            for kind, names in (("missing", missing), ("unexpected", sorted(unexpected))):
                if names:
                    problems.append(f"{len(names)} {kind}: {_shorten(names)}")
            shapes = []
            parts = Counter(key for key, _ in sources.values())
            for name, (key, part) in sources.items():
                found = list(file.get_slice(key).get_shape())
                expected = _stock_shape(name, wanted[name], packed)
                stacked = expected if part is None else [parts[key] * expected[0], *expected[1:]]
                if found != stacked:
                    shapes.append(f"{name}: found {found} in {key}, allowed {stacked}")
            if shapes:
                problems.append(f"{len(shapes)} of another shape: {_shorten(shapes)}")
            if problems:
                raise ReleaseError(
                    f"{path} does not fit the model of its config.json: {'; '.join(problems)}"
                )
            for name, (key, part) in sources.items():
                rows = (part or 0) * _stock_shape(name, wanted[name], packed)[0]
                if name in packed:
                    _copy_packed(wanted[name], file.get_slice(key))
                else:
                    _copy_slice(wanted[name], file.get_slice(key), first_row=rows)
    except SafetensorError as error:
        raise ReleaseError(f"{path}: cannot be read as safetensors: {error}") from error


def init_ttt_weights(model: nn.Module, seed: int) -> int:
    """Give every TTT parameter its initial value, the same on every layout.

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
            if not is_ttt_parameter(name):
                continue
            full = torch.empty(parameter.shape, dtype=torch.float32)
            if name in alphas:
                full.fill_(alphas[name])
            else:
                initial_value(name, full, seeded_generator(seed, name))
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


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
