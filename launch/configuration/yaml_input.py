"""Strict reading of a YAML mapping and of `key.path=value` overrides; knows nothing of the schema.

Every function returns its problems beside its result, so that a caller can tell all at once.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
# Configurations nest a key in a section. Deeper mappings are mistakes for the schema to tell, and a
# YAML alias may nest in itself without end.
MAX_DEPTH = 2


@dataclass(frozen=True)
class Override:
    """One `key.path=value` of the command line; `text` is the value as it was typed."""

    keys: tuple[str, ...]
    text: str

    @property
    def path(self) -> str:
        return ".".join(self.keys)


# A date such as 2024-13-45 fails in datetime, outside PyYAML's own errors.
_INVALID_YAML = (yaml.YAMLError, ValueError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _duplicates(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[str]:
    """Duplicate keys below `node`. An aliased node is walked once: aliases may repeat or nest."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _duplicates(child, f"{prefix}{index}.", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in first_line:
            yield (
                f"{prefix}{key}: written twice, in lines {first_line[key]} and {line}; "
                "a key may stand once: delete one of the two"
            )
        first_line.setdefault(key, line)
        yield from _duplicates(value_node, f"{prefix}{key}.", seen)


def parse_mapping(text: str, source: str) -> tuple[dict[str, Any], list[str]]:
    """Read YAML `text` into a mapping, refusing duplicate keys. `source` names it in problems."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, []
        problems = list(_duplicates(node, "", set()))
        data = loader.construct_document(node)
    except _INVALID_YAML as error:
        return {}, [f"{source}: isn't valid YAML: {_one_line(error)}"]
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        found = type(data).__name__
        return {}, [f"{source}: holds a {found}; allowed: a mapping of `key: value` lines"]
    return data, problems


def read_mapping(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the YAML file `path` into a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, [f"config file {path}: not found; name an existing .yaml file first"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"config file {path}: can't be read: {error}"]
    return parse_mapping(text, f"config file {path}")


def parse_override(argument: str) -> Override | str:
    """Split one `key.path=value`; a string in return is the problem."""
    key, equals, text = argument.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys) or key.startswith("-"):
        return (
            f"override {key.strip()!r}: isn't `key.path=value`; "
            "write for example optim.lr=1e-4 (no dashes, no spaces around the =)"
        )
    return Override(keys, text)


def parse_value(override: Override) -> tuple[Any, str | None]:
    """The override's value read as YAML, or the problem."""
    try:
        return yaml.safe_load(override.text), None
    except _INVALID_YAML as error:
        problem = f"{override.path}: the value on the command line isn't valid YAML: "
        return None, problem + _one_line(error)


def merge(
    base: Mapping[str, Any], keys: tuple[str, ...], value: Any, sections: Container[str] = ()
) -> dict[str, Any]:
    """A copy of `base` with `value` at `keys`; of a section, the keys in `value` alone change."""
    head, rest = keys[0], keys[1:]
    merged = dict(base)
    inner = merged.get(head)
    if rest:
        merged[head] = merge(inner if isinstance(inner, Mapping) else {}, rest, value)
    elif head in sections and isinstance(value, Mapping) and isinstance(inner, Mapping):
        merged[head] = {**inner, **value}
    else:
        merged[head] = value
    return merged


def expand(value: Any, known: Mapping[str, str], path: str = "") -> tuple[Any, dict[str, str]]:
    """Replace `${name}` in every string below `value` by `known[name]`.

    Returns the expanded value, and the problems by key path.
    """
    problems: dict[str, str] = {}
    depth = path.count(".") + 1 if path else 0
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        expanded = {}
        for key, item in value.items():
            expanded[key], below = expand(item, known, f"{path}.{key}" if path else str(key))
            problems |= below
        return expanded, problems
    if not isinstance(value, str):
        return value, problems
    allowed = ", ".join(f"${{{name}}}" for name in known)
    for name in PLACEHOLDER.findall(value):
        if name not in known:
            problems[path] = f"{path}: unknown placeholder ${{{name}}}; allowed: {allowed}"
    return PLACEHOLDER.sub(lambda match: known.get(match[1], match[0]), value), problems
