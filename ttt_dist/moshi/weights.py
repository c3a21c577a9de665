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
from ttt_dist.moshi.errors import ReleaseError, collapse_numbers
from ttt_dist.moshi.lora import (
    adapter_shapes,
    add_product,
    is_adapter_parameter,
    released_name,
)
from ttt_dist.moshi.packed import packed_parameters
from ttt_dist.moshi.released_lora import ReleasedAdapters
from ttt_dist.moshi.tensor_files import FLOAT_DTYPES, TensorFiles
from ttt_dist.placement import place_into, shard_slices

_ADAPTER_ENDS = ("lora_B.weight", "lora_A.weight")

# Released files pack the attention weights of all Depformer steps into one tensor, as moshi's own
# load hook unpacks them: `self_attn.in_proj_weight [steps * 3D, D]` holds `in_projs.{step}.weight`.
_PACKED = (
    (re.compile(r"\.in_projs\.(\d+)\.weight$"), (".in_proj_weight", ".in_proj.weight")),
    (re.compile(r"\.out_projs\.(\d+)\.weight$"), (".out_proj.weight",)),
)


def load_base_weights(
    model: nn.Module, path: Path, adapters: ReleasedAdapters | None = None
) -> set[str]:
    """Copy a release's weights into the parameters, in place: Moshi's, and TTT's where it has any.

    A release's adapters (`lora.py`) are copied into the model's, or, into a model without, merged
    with the weights that they adapt. Without adapters in the release the model's are left alone;
    the weights that they are put on have other names here.

    Only this rank's slices are read, one parameter at a time.

    Args:
        model: materialised (not on meta); parameters plain or DTensors, of any float dtype.
        path: the `.safetensors` file, or the index of several. Values are cast to each parameter's
            dtype.
        adapters: the release's, whose file's other tensors stand in place of those in `path`.

    Returns:
        Names of the TTT parameters and adapters that the release held, of each kind all of the
        model's or none; `init_ttt_weights` and `init_adapters` fill the others.

    Raises:
        ReleaseError: a file is damaged, or names are missing, unexpected, or of another shape or
            dtype: all of them in one message, before any value is copied. TTT parameters alone may
            be missing, and only all together.
    """
    wanted = {released_name(name): parameter for name, parameter in model.named_parameters()}
    packed = {released_name(name) for name in packed_parameters(model)}
    with TensorFiles(path, over=None if adapters is None else adapters.path) as files:
        if adapters is None:
            wanted = {n: p for n, p in wanted.items() if not is_adapter_parameter(n)}
        if not any(map(is_ttt_parameter, files.keys())):
            wanted = {n: p for n, p in wanted.items() if not is_ttt_parameter(n)}
        shapes = {name: _stock_shape(name, value, packed) for name, value in wanted.items()}
        merged: dict[str, list[int]] = {}
        if adapters is not None and not any(map(is_adapter_parameter, wanted)):
            merged = adapter_shapes(model, adapters.settings.rank)
        sources, unexpected = _match_names(shapes | merged, files.keys())
        problems = _mismatches(shapes | merged, sources, unexpected, files)
        if problems:
            where = path if adapters is None else f"{path} with {adapters.path}"
            raise ReleaseError(
                f"{where} does not fit the model of its config.json: {'; '.join(problems)}"
            )
        for name, parameter in wanted.items():
            key, part = sources[name]
            own = shard_slices(parameter)
            rows = parameter.shape[1] if name in packed else None
            first_row = (part or 0) * parameter.shape[0]
            values = _own_values(files.slice(key), own, rows, first_row)
            up_name, down_name = (name.removesuffix("weight") + end for end in _ADAPTER_ENDS)
            if adapters is not None and up_name in merged:
                up = _own_values(files.slice(up_name), (*own[:-1], slice(None)), rows)
                down = files.slice(down_name)[:, own[-1]]
                values = add_product(values, down, up, adapters.settings.scaling)
            fill_own(parameter, values)
    return {name for name in wanted if is_ttt_parameter(name) or is_adapter_parameter(name)}


def _mismatches(
    shapes: dict[str, list[int]],
    sources: dict[str, tuple[str, int | None]],
    unexpected: set[str],
    files: TensorFiles,
) -> list[str]:
    """Every name that the model lacks or the files lack, and every other shape and dtype."""
    parts = Counter(key for key, _ in sources.values())
    other_shapes = []
    for name, (key, part) in sources.items():
        found, expected = files.shape(key), shapes[name]
        stacked = expected if part is None else [parts[key] * expected[0], *expected[1:]]
        if found != stacked:
            other_shapes.append(f"{name}: found {found} in {key}, allowed {stacked}")
    dtypes = [
        f"{key}: found {files.dtype(key)}, allowed {', '.join(FLOAT_DTYPES)}"
        for key in sorted(parts)
        if files.dtype(key) not in FLOAT_DTYPES
    ]
    kinds = {
        "missing": collapse_numbers(set(shapes) - set(sources)),
        "unexpected": collapse_numbers(unexpected),
        "of another shape": other_shapes,
        "of another dtype": dtypes,
    }
    counts = {"missing": len(shapes) - len(sources), "unexpected": len(unexpected)}
    return [
        f"{counts.get(kind, len(names))} {kind}: {', '.join(names)}"
        for kind, names in kinds.items()
        if names
    ]


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


def init_adapters(model: nn.Module, seed: int, loaded: Collection[str] = ()) -> int:
    """Give every adapter its initial value, the same on every layout, as moshi-finetune does.

    `lora_A` is uniform within 1 / sqrt(inputs) (Kaiming's rule with a = sqrt(5)), `lora_B` is 0: at
    the start a model computes what it does without adapters.

    Args:
        loaded: names of those that have their values from the release (`load_base_weights`).

    Returns:
        The number of parameters' elements initialised.
    """
    count = 0
    for name, parameter in model.named_parameters():
        if not is_adapter_parameter(name) or name in loaded:
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
    wanted: Iterable[str], keys: set[str]
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


def _own_values(
    source: Any, own: tuple[slice, ...], rows: int | None, first_row: int = 0
) -> Tensor:
    """This rank's part, `own`, of a tensor in a file.

    Args:
        rows: of each part, where the file has a parameter `[parts, rows, inputs]` as one matrix.
        first_row: where the parameter begins in a tensor of several parameters.
    """
    if rows is None:
        start, *others = own
        return source[(slice(start.start + first_row, start.stop + first_row), *others)]
    parts, own_rows, inputs = own
    firsts = [part * rows for part in range(parts.start, parts.stop)]
    values = [source[first + own_rows.start : first + own_rows.stop, inputs] for first in firsts]
    if not values:  # FSDP leaves a rank without any part where it has to cut the parts
        return source[0:0, inputs].unflatten(0, (0, own_rows.stop - own_rows.start))
    return torch.stack(values)
