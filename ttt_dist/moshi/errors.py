"""What is wrong with a release, told to the person who brought it."""

from __future__ import annotations

import json
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
