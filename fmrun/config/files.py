"""Reads a TOML, YAML or JSON file into a dict; what is wrong with it is one sentence with its line."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, neighbour, reading

MOST_BYTES = 1_000_000
MOST_VALUES = 10_000
MOST_NESTED = 50
"""What a file may hold, aliases of YAML written out."""


def read_settings(path: Path) -> dict[str, Any]:
    """The top-level table of `path`; an empty file is an empty table."""
    suffix = path.suffix.lower()
    with reading(path):
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a config file")
        if not path.exists():
            raise UserError(f"there is no file '{path}'{neighbour(path, tuple(PARSERS))}")
        if suffix not in PARSERS:
            raise UserError(f"{path}: a config file ends in .toml, .yaml, .yml or .json")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file; a config has to be one")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES // 1_000_000} MB, too large for a config file")
        text = path.read_bytes().decode("utf-8-sig")
        kind, parse = PARSERS[suffix]
        try:
            data = parse(text)
        except ValueError as error:
            raise UserError(f"{path}: it is not valid {kind} ({' '.join(str(error).split())})") from None
        if data is None:
            return {}
        check_size(data, path)
    if not isinstance(data, dict):
        what = "a list" if isinstance(data, list) else "a single value"
        raise UserError(f"{path}: the top level is {what}; a config is a table of settings, like seed = 0")
    return data


def check_size(data: Any, label: Path | str) -> None:
    """UserError for more values, or deeper ones, than any config has. Aliases count as written out, and may be endless."""
    count, waiting = 0, [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise UserError(
                f"{label} holds more than {MOST_VALUES} values, counting each use of an alias; it is no config file"
            )
        if depth > MOST_NESTED:
            raise UserError(f"cannot read {label}: it is nested too deeply")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(item, depth + 1) for item in inner]


def _json(text: str) -> Any:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"'{twice}' is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=table) if text.strip() else None


def _yaml(text: str) -> Any:
    """YAML 1.2: yes, no, on and off are words. ValueError tells the line."""
    from ruamel.yaml import YAML, SafeConstructor, YAMLError

    class Constructor(SafeConstructor):  # type: ignore[misc]
        def flatten_mapping(self, node: Any) -> None:
            """Merges, each key once: a merge of merges of merges would grow without end."""
            super().flatten_mapping(node)
            if getattr(node, "merge", None):
                node.value = list({str(key.value): (key, value) for key, value in node.value}.values())

    Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = Constructor
    try:
        return yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "context", None) or str(error)
        raise ValueError(f"line {mark.line + 1}: {reason}" if mark else reason) from None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a value is not what its tag says: {error}") from None


PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".toml": ("TOML", lambda text: tomllib.loads(f"{text}\n")),
    ".yaml": ("YAML", _yaml),
    ".yml": ("YAML", _yaml),
    ".json": ("JSON", _json),
}
