"""The settings by their dotted keys (`train.steps`), and what each takes: to explain an error, and for the reference page.

`FIELDS` holds the settings, `SECTIONS` the groups, in the schema's order; `OPTIONAL` are the groups that may be absent
(`losses.l1=none`) and come into being with the first of their settings.
"""

from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from ..runtime.errors import nearest
from .base import Section
from .schema import Config

NONE_WORDS = ("none", "None", "null")

NOUNS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "names"),
    "object": ("a table, like {depth = 3}", "tables"),
}


@dataclass(frozen=True)
class Setting:
    """One field of the schema."""

    info: FieldInfo

    @property
    def description(self) -> str:
        return " ".join((self.info.description or "").split())

    @cached_property
    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        return TypeAdapter(Annotated[self.info.annotation, self.info]).json_schema()  # type: ignore[arg-type]

    def wanted(self, value: Any) -> str:
        """What must be there instead of `value`: `it must be text`, `allowed: a, b; did you mean 'b'?`."""
        options, choices = takes(self.schema), _choices(self.schema)
        guess = nearest(value, choices) if isinstance(value, str) else ""
        if choices and set(options) <= {*choices, "none"}:
            return f"allowed: {', '.join(options)}{guess}"
        quotes = "; put it in quotes" if self.schema.get("type") == "string" and not isinstance(value, str) else ""
        return f"it must be {' or '.join(options)}{quotes}{guess}"


def _choices(schema: dict[str, Any]) -> list[str]:
    inner = [*schema.get("anyOf", ()), *schema.get("prefixItems", ())] + [schema[k] for k in ("items",) if k in schema]
    choices = schema.get("examples") or schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    return [str(c) for c in choices] + [c for alternative in inner for c in _choices(alternative)]


def takes(schema: dict[str, Any], quote: str = "{}") -> list[str]:
    """What a setting may be, one for each alternative: `fp32`, `bf16`; `a whole number from 1 to 64`, `none`."""
    if "anyOf" in schema:
        return [text for option in schema["anyOf"] for text in takes(option, quote)]
    if choices := _choices({k: v for k, v in schema.items() if k in ("examples", "enum", "const")}):
        return [quote.format(choice) for choice in choices]
    if schema.get("type") in ("null", "boolean"):
        return [quote.format(word) for word in (("none",) if schema["type"] == "null" else ("true", "false"))]
    if schema["type"] != "array":
        return [NOUNS[schema["type"]][0] + _bounds(schema, ", ") + ", not empty" * ("minLength" in schema)]
    item = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
    count = f"{schema['maxItems']} " if "maxItems" in schema else "one or more " if "minItems" in schema else ""
    choices = [quote.format(c) for c in _choices(item)]
    nouns = ", ".join(choices) or ("names or indices" if "anyOf" in item else NOUNS[item["type"]][1])
    return [f"a list of {count}{nouns}{_bounds(item, ', each ')}"]


def _bounds(schema: dict[str, Any], before: str) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f"{before}from {_plain(schema['minimum'])} to {_plain(schema['maximum'])}"
    texts = {
        "minimum": "{} or greater",
        "exclusiveMinimum": "greater than {}",
        "maximum": "{} or less",
        "exclusiveMaximum": "less than {}",
    }
    bounds = " and ".join(text.format(_plain(schema[key])) for key, text in texts.items() if key in schema)
    return f"{before}{bounds}" if bounds else ""


def _plain(bound: float) -> str:
    return "2^63" if bound == 2**63 else f"{int(bound):,}" if bound > 9999 else f"{bound:g}"


def _walk(section: type[Section], prefix: str = "") -> tuple[dict[str, Setting], dict[str, FieldInfo]]:
    fields: dict[str, Setting] = {}
    sections: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        key, annotation = prefix + name, info.annotation
        parts = [a for a in get_args(annotation) if a is not NoneType] or [annotation]
        if len(parts) == 1 and isinstance(parts[0], type) and issubclass(parts[0], Section):
            sections[key] = info
            inner_fields, inner_sections = _walk(parts[0], f"{key}.")
            fields |= inner_fields
            sections |= inner_sections
        else:
            fields[key] = Setting(info)
    return fields, sections


FIELDS, SECTIONS = _walk(Config)
OPTIONAL = tuple(key for key, info in SECTIONS.items() if NoneType in get_args(info.annotation))


def table_of(key: str) -> str | None:
    """The table of the user's own keys that `key` lies in: `generator.params` of `generator.params.depth`."""
    section, _, name = key.partition(".params.")
    return f"{section}.params" if name and f"{section}.params" in FIELDS else None


def members(section: str) -> list[str]:
    """Names of what a section holds directly; `""` is the top level."""
    prefix = f"{section}." if section else ""
    keys = [*FIELDS, *SECTIONS]
    return [k.removeprefix(prefix) for k in keys if k.startswith(prefix) and "." not in k.removeprefix(prefix)]


def show(value: Any) -> str:
    """A value as a message quotes it: `'btach'`, `-1`, `true`; one line, 60 characters."""
    text = str(value).lower() if isinstance(value, bool) else "none" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:58]}…{text[-1]}"
