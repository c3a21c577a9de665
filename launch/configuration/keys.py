"""The keys in words: what each allows, which is nearest to a wrong one, what is wrong."""

import difflib
from collections.abc import Container, Sequence
from typing import Any

from launch.configuration.schema import TrainConfig

SECRET_KEYS = frozenset({"wandb.key"})


def _flat_schema() -> dict[str, dict[str, Any]]:
    """Key path → its JSON schema (type, range, enum, default, description)."""
    schema = TrainConfig.model_json_schema()
    flat: dict[str, dict[str, Any]] = {}
    for name, entry in schema["properties"].items():
        if "$ref" in entry:
            section = schema["$defs"][entry["$ref"].rsplit("/", 1)[-1]]
            flat |= {f"{name}.{key}": value for key, value in section["properties"].items()}
        else:
            flat[name] = entry
    return flat


KEYS = _flat_schema()
SECTIONS = frozenset(path.split(".")[0] for path in KEYS if "." in path)
_KINDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "null": "null",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _allowed(entry: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in entry:
        return " or ".join(_allowed(option) for option in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(str(value) for value in entry["enum"])
    if entry.get("type") == "array":
        items = entry["prefixItems"]
        return f"a list of {len(items)} items, each {_allowed(items[0])}"
    if entry.get("type") == "object":
        return f"a mapping from whole numbers to {_allowed(entry['additionalProperties'])} each"
    bounds = " and ".join(f"{sign} {entry[key]:g}" for key, sign in _BOUNDS.items() if key in entry)
    return f"{_KINDS[entry['type']]} {bounds}".rstrip()


def is_text(path: str) -> bool:
    entry = KEYS.get(path, {})
    return any(option.get("type") == "string" for option in [entry, *entry.get("anyOf", [])])


def nearest_key(path: str) -> str | None:
    """The known key that `path` most likely means: the same name elsewhere, a similar one, or one
    that is described in its words (`optim.learning_rate`: `optim.lr`)."""
    leaf = path.rsplit(".", 1)[-1]
    same_name = [key for key in KEYS if key.rsplit(".", 1)[-1] == leaf]
    if same_name:
        return difflib.get_close_matches(path, same_name, n=1, cutoff=0.0)[0]
    close = difflib.get_close_matches(path, [*KEYS, *SECTIONS], n=1, cutoff=0.6)
    if close:
        return close[0]
    leaves = {key.rsplit(".", 1)[-1]: key for key in KEYS}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    if close:
        return leaves[close[0]]
    words, prefix = leaf.replace("_", " "), path[: -len(leaf)]
    if len(words) < 4:  # it would be found in the middle of other words
        return None
    described = [key for key, entry in KEYS.items() if words in entry["description"]]
    described.sort(key=lambda key: not key.startswith(prefix))  # its own section first
    return described[0] if described else None


def describe_keys() -> str:
    """One line a key: path, allowed values, default, meaning."""
    lines = []
    for path, entry in KEYS.items():
        default = f"default {entry['default']!r}" if "default" in entry else "required"
        lines.append(f"  {path}: {_allowed(entry)} ({default})\n      {entry['description']}")
    return "\n".join(lines)


def key_path(location: Sequence[Any]) -> str:
    """pydantic's error location as a key path, cut at the known key that contains it."""
    names = [str(part) for part in location]
    for end in range(1, len(names) + 1):
        if ".".join(names[:end]) in KEYS:
            return ".".join(names[:end])
    return ".".join(names)


def describe_error(error: Any, path: str, overridden: Container[str]) -> str:
    where = " (on the command line)" if path in overridden else ""
    if error["type"] == "extra_forbidden":
        nearest = nearest_key(path)
        if nearest is None:
            return f"{path}: unknown key{where}; `launch/train.py --help` lists all keys"
        return f"{path}: unknown key{where}; the nearest known key is {nearest}"
    if error["type"] == "missing":
        entry = KEYS[path]
        return f"{path}: is missing; allowed: {_allowed(entry)} ({entry['description']}); add it"
    if path in SECTIONS:
        found = type(error["input"]).__name__
        return (
            f"{path}: found a {found}; allowed: a section, `{path}:` with its keys indented below"
        )
    if path not in KEYS:
        return f"{path}: {error['msg']}"
    entry = KEYS[path]
    found = "" if path in SECRET_KEYS else f"found {repr(error['input'])[:80]}{where}; "
    hint = f", for example {entry['default']!r}, the default" if entry.get("default") else ""
    quote = "" if isinstance(error["input"], str) or not is_text(path) else "; write it in quotes"
    meaning = entry["description"].strip()
    return f"{path}: {found}allowed: {_allowed(entry)} ({meaning}{hint}){quote}"
