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
MOST_VALUES = 10_000
MOST_NESTED = 50
"""What a file may hold, aliases of YAML written out."""

YAML_TYPES = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")


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

        yaml_constructors = {  # noqa: RUF012
            tag: make
            for tag, make in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.rpartition(":")[2] in YAML_TYPES
        }

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, KeyError, TypeError) as error:  # what a tag says the value is, and it is not
                raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
        own: dict[Hashable, Any] = {}
        merged: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            value = loader.construct_object(value_node, deep=True)
            if key_node.tag == "tag:yaml.org,2002:merge":
                tables = value if isinstance(value, list) else [value]
                if merged or not all(isinstance(table, dict) for table in tables):
                    raise UserError(
                        f", line {line}: '<<' is given once, with a table or a list of tables, like <<: *name"
                    )
                for table in reversed(tables):  # the first of them that has a key decides
                    merged |= table
                continue
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise UserError(f", line {line}: a key must be a name")
            if key in own:
                raise UserError(f", line {line}: '{key}' is given twice")
            own[key] = value
        return merged | own

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
        if mark and "'\\t'" in reason:
            reason = "a tab where only spaces may be"
        raise UserError(f"{line}: it is not valid YAML ({reason})") from None
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise UserError(f"{line}: it is not valid YAML (a control character, {error.character:#04x})") from None
