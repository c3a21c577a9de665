"""What is wrong with a release, told to the person who brought it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ReleaseError(ValueError):
    """The base checkpoint cannot be used; the message says which file and how to mend it."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises ReleaseError naming the file where it is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReleaseError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReleaseError(f"{path}: found a JSON {type(value).__name__}, allowed is an object")
    return value


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
