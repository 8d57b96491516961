"""Reads a TOML, YAML or JSON file into a dict; what is wrong with it is one sentence with its line."""

import json
import re
import tomllib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from fmrun.errors import UserError, nearest, reading

SUFFIXES = (".toml", ".yaml", ".yml", ".json")

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
MOST_NESTED = 50
"""What a file may hold, aliases of YAML written out."""


def read(path: Path) -> dict[str, Any]:
    """The top-level table of `path`; an empty file is an empty table."""
    with reading(path):
        return _read(path)


def _read(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a config file")
    if not path.exists():
        raise UserError(f"there is no file '{path}'{_neighbour(path)}")
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: a config file ends in .toml, .yaml, .yml or .json")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; a config has to be one")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES // 1_000_000} MB, too large for a config file")
    text = path.read_bytes().decode("utf-8-sig")
    parsers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": _json}
    parse = parsers.get(suffix, _yaml)
    try:
        data = parse(text)
    except UserError as error:
        raise UserError(f"{path}{error}") from None
    except ValueError as error:
        raise UserError(f"{path}{_where(error, text)}") from None
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


def _neighbour(path: Path) -> str:
    try:
        return nearest(path.name, sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES))
    except OSError:
        return f" (nor a folder '{path.parent}')" if str(path.parent) != "." else ""


def _where(error: Exception, source: str) -> str:
    """`, line 3: what is wrong` from a parser's own words."""
    if isinstance(error, json.JSONDecodeError):
        return f", line {error.lineno}: it is not valid JSON ({error.msg})"
    text = " ".join(str(error).split())
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", text)
    if place:
        line = place[1] or len(source.splitlines())
        reason = text[: place.start()].replace("Cannot overwrite a value", "a setting is given twice")
        return f", line {line}: it is not valid TOML ({reason})"
    return f": it cannot be parsed ({text})"


def _json(text: str) -> Any:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f": '{key}' is given twice")
            seen[key] = value
        return seen

    return json.loads(text, object_pairs_hook=table) if text.strip() else None


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses duplicate keys; does not read 010 as octal, 1:30 as 90, or a date as anything but text."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise UserError(f", line {line}: a key must be a name")
            if key in seen:
                raise UserError(f", line {line}: '{key}' is given twice")
            seen.add(key)
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    def integer(loader: Loader, node: yaml.ScalarNode) -> int | str:
        digits = node.value.replace("_", "")
        if re.fullmatch(r"[-+]?\d+", digits):
            return int(digits)
        return node.value if ":" in digits else loader.construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join((error.problem or error.context or "syntax error").split())
        raise UserError(f"{line}: it is not valid YAML ({reason})") from None
    except yaml.YAMLError as error:
        raise UserError(f": it is not valid YAML ({' '.join(str(error).split())})") from None
