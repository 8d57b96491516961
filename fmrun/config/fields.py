"""What each setting takes, read off the schema: to parse a flag, explain an error, write the reference page.

Keys are dotted (`train.steps`). `FIELDS` holds the settings, `SECTIONS` the groups, in the schema's order; `OPTIONAL`
are the groups that may be absent (`losses.l1=none`) and come into being with the first of their settings.
"""

import math
import re
import tomllib
from dataclasses import dataclass, replace
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fmrun.errors import nearest

from . import Config
from .base import Section

NONE_WORDS = ("none", "None", "null")


class Mismatch(ValueError):
    """A value that is not of the field's type; its text says what is."""


@dataclass(frozen=True)
class Kind:
    """The type of a setting: a scalar, one of `choices`, a list of `item`, or a table with keys of the user's own."""

    name: Literal["bool", "int", "float", "str", "choice", "layer", "list", "table"]
    nullable: bool = False
    choices: tuple[Any, ...] = ()
    item: "Kind | None" = None
    length: int | None = None
    min_length: int = 0
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def parse(self, text: str) -> Any:
        """The value that `KEY=TEXT` means: TOML where it parses and fits the type, else the text itself."""
        value = toml_value(text)
        if self.name in ("str", "choice"):
            # A quoted string is literal, so that '"none"' can name a file; 007 and 2024-01-01 stay text.
            return value if isinstance(value, str) else self.coerce(text)
        fits: tuple[type, ...] = (bool, int, float, str)
        fits += {"list": (list, dict), "table": (dict,)}.get(self.name, ())
        return self.coerce(value if isinstance(value, fits) else text)

    def coerce(self, value: Any) -> Any:
        """`value` (from a file, or a flag's text) as the schema takes it; else `Mismatch`."""
        if value is None or (isinstance(value, str) and value in NONE_WORDS):
            if "none" in self.choices:
                return "none"
            if self.nullable:
                return None
            if self.name == "list":
                return []
            if self.name == "table":
                return {}
        if self.choices and not isinstance(value, bool):
            for choice in self.choices:
                if value == choice or (isinstance(value, str) and value == str(choice)):
                    return choice
        match self.name:
            case "choice" if isinstance(value, str):
                return value  # perhaps an alias, which the schema knows
            case "bool" if isinstance(value, bool):
                return value
            case "bool" if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            case "int" | "float" if (number := self._number(value)) is not None:
                return number
            case "str" if isinstance(value, str):
                return value
            case "layer" if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
                return value
            case "table" if isinstance(value, dict) and _is_json(value):
                return value
            case "list" if not isinstance(value, dict) and value is not None:
                assert self.item is not None
                try:
                    return [self.item.coerce(v) for v in _items(value)]
                except Mismatch:
                    raise Mismatch(self.wanted(value)) from None
        raise Mismatch(self.wanted(value))

    def _number(self, value: Any) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            if self.name == "int" and (isinstance(value, int) or re.fullmatch(r"\s*[-+]?[\d_]+\s*", str(value))):
                return int(value)
            number = float(value)
        except (ValueError, OverflowError):
            return None
        if not math.isfinite(number) or (self.name == "int" and not number.is_integer()):
            return None
        return int(number) if self.name == "int" else number

    def wanted(self, value: Any) -> str:
        """What must be there instead: `it must be 0 or greater`, `allowed: a, b; did you mean 'b'?`."""
        if self.name == "choice" or (self.name == "str" and self.choices):
            options = [str(c) for c in self.choices] + ["none"] * self.nullable
            quote = (
                "put it in quotes (a bare yes, no, on or off is a truth value in YAML); "
                if isinstance(value, bool)
                else ""
            )
            return f"{quote}allowed: {', '.join(options)}{_guess(value, options)}"
        if self.name == "str":
            return "it must not be empty" if value == "" else "it must be text; put it in quotes"
        if self.name in ("int", "float") and self._number(value) is not None:
            return f"it must be {self._range()}"
        guess = ""
        if self.name == "list" and self.item:
            options = [str(c) for c in (*self.choices, *self.item.choices)]
            guess = next((g for v in _items(value) if (g := _guess(v, options))), "")
        return f"it must be {self.words()}{guess}"

    def wants_number(self, value: Any) -> bool:
        """Whether this is a number and `value` reads as one, if perhaps not a permitted one."""
        numeric = self.name in ("int", "float") or (self.name == "choice" and not isinstance(self.choices[0], str))
        return numeric and Kind("float")._number(value) is not None

    def words(self) -> str:
        """The type in words: `a whole number, 1 or greater`."""
        noun, bounds = self.noun(), self._range()
        article = {"int": "a ", "float": "a "}.get(self.name, "")
        return f"{article}{noun}{', ' if bounds else ''}{bounds}" + (" (or none)" if self.nullable else "")

    def noun(self, plural: bool = False) -> str:
        """`whole number`, `list of names or indices`, …, without its bounds."""
        if self.name == "list":
            assert self.item is not None
            bounds = self.item._range()
            amount = f"{self.length} " if self.length else "one or more " if self.min_length else ""
            items = f"{amount}{self.item.noun(plural=True)}{f', each {bounds}' if bounds else ''}"
            return " or ".join([*(f"'{c}'" for c in self.choices), f"a list of {items}"])
        if self.name == "choice":
            return ", ".join(str(c) for c in self.choices)
        single, many = {
            "bool": ("true or false", "true or false"),
            "int": ("whole number", "whole numbers"),
            "float": ("finite number", "finite numbers"),
            "str": ("text", "texts"),
            "layer": ("a layer's name or index", "names or indices"),
            "table": ("a table, like {depth = 3}", "tables"),
        }[self.name]
        return many if plural else single

    def _range(self) -> str:
        low = f"{_plain(self.ge)} or greater" if self.ge is not None else ""
        low = f"greater than {_plain(self.gt)}" if self.gt is not None else low
        high = f"{_plain(self.le)} or less" if self.le is not None else ""
        high = f"less than {_plain(self.lt)}" if self.lt is not None else high
        if self.ge is not None and self.le is not None:
            return f"from {_plain(self.ge)} to {_plain(self.le)}"
        return " and ".join(part for part in (low, high) if part)


@dataclass(frozen=True)
class Setting:
    """One field of the schema."""

    key: str
    info: FieldInfo

    @cached_property
    def kind(self) -> Kind:
        kind = _kind(self.info.annotation, tuple(self.info.metadata))
        return replace(kind, choices=tuple(self.info.examples)) if self.info.examples else kind

    @property
    def description(self) -> str:
        return " ".join((self.info.description or "").split())


def toml_value(text: str) -> Any:
    """The TOML value `text`, or None where it is not one (TOML itself has no null)."""
    if "\n" in text or "\r" in text:
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return None


def _is_json(value: Any) -> bool:
    """Whether a run's config.json can hold it: TOML and YAML have dates, which it cannot."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_json(v) for v in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        inner = value.strip().removeprefix("[").removesuffix("]")
        return [part.strip().strip("\"'") for part in inner.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _guess(value: Any, options: list[str]) -> str:
    return nearest(value, options) if isinstance(value, str) and value not in options else ""


def _plain(bound: float | None) -> str:
    assert bound is not None
    return "2^63" if bound == 2**63 else f"{bound:,}" if isinstance(bound, int) and bound > 9999 else f"{bound:g}"


def _kind(annotation: Any, metadata: tuple[Any, ...] = ()) -> Kind:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0], (*args[1:], *metadata))
    flat = [m for outer in metadata for m in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]
    bounds = {name: getattr(m, name) for name in ("ge", "gt", "le", "lt") for m in flat if hasattr(m, name)}
    if origin is Literal:
        return Kind("choice", choices=args)
    if origin in (Union, UnionType):
        parts = [a for a in args if a is not NoneType]
        if set(parts) == {str, int}:
            kind = Kind("layer")
        else:
            kinds = sorted((_kind(p, metadata) for p in parts), key=lambda k: k.name == "choice")
            kind = replace(kinds[0], choices=tuple(c for k in kinds for c in k.choices))
        return replace(kind, nullable=len(parts) < len(args))
    if origin is tuple:
        least = next((m.min_length for m in flat if getattr(m, "min_length", None)), 0)
        length = None if args[-1] is Ellipsis else len(args)
        return Kind("list", item=_kind(args[0]), length=length, min_length=least)
    if origin is dict:
        return Kind("table")
    names: dict[Any, Any] = {bool: "bool", int: "int", float: "float", str: "str"}
    return Kind(names[annotation], **bounds)


def _section(annotation: Any) -> type[Section] | None:
    """The section that `Section` or `Section | None` stands for; None for a setting."""
    parts = [a for a in get_args(annotation) if a is not NoneType] or [annotation]
    single = len(parts) == 1 and isinstance(parts[0], type) and issubclass(parts[0], Section)
    return parts[0] if single else None


def _walk(section: type[Section], prefix: str = "") -> tuple[dict[str, Setting], dict[str, FieldInfo]]:
    fields: dict[str, Setting] = {}
    sections: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        key = prefix + name
        if (inner := _section(info.annotation)) is not None:
            sections[key] = info
            inner_fields, inner_sections = _walk(inner, f"{key}.")
            fields |= inner_fields
            sections |= inner_sections
        else:
            fields[key] = Setting(key, info)
    return fields, sections


FIELDS, SECTIONS = _walk(Config)
OPTIONAL = tuple(key for key, info in SECTIONS.items() if NoneType in get_args(info.annotation))


def table_of(key: str) -> str | None:
    """The table of the user's own keys that `key` lies in: `generator.params` of `generator.params.depth`."""
    parents = (key[:i] for i, character in enumerate(key) if character == ".")
    return next((p for p in parents if p in FIELDS and FIELDS[p].kind.name == "table"), None)


def is_optional(key: str) -> bool:
    """Whether the setting belongs to a section that may be absent."""
    return key.startswith(tuple(f"{section}." for section in OPTIONAL))


def members(section: str) -> list[str]:
    """Names of what a section holds directly; `""` is the top level."""
    prefix = f"{section}." if section else ""
    keys = [*FIELDS, *SECTIONS]
    return [k.removeprefix(prefix) for k in keys if k.startswith(prefix) and "." not in k.removeprefix(prefix)]


def show(value: Any) -> str:
    """A value as a message quotes it: `'btach'`, `-1`, `true`, `[1, 'a']`; one line, 60 characters."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif value is None:
        text = "none"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(show(v) for v in value[:20])}]"
    elif isinstance(value, str):
        text = "'" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in value[:100]) + "'"
    else:
        text = " ".join(str(value)[:200].split())
    return text if len(text) <= 60 else f"{text[:57]}…{text[-1] if text[-1] in chr(39) + ']' else ''}"
