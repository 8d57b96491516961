"""What every section of the schema has in common."""

import json
import tomllib
from contextlib import suppress
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """What Pydantic's own parsing leaves to do: TOML's numbers, lists without brackets, none; true is no number."""
        assert info.field_name is not None
        types, choices = _parts(cls, info.field_name)
        if value is None:
            if "none" in choices:
                return "none"
            return None if NoneType in types else () if tuple in types else {} if dict in types else None
        if tuple in types and value not in choices:
            if isinstance(value, str):
                parts = value.strip().removeprefix("[").removesuffix("]").split(",")
                value = [item.strip().strip("\"'") for item in parts if item.strip()]
            elif isinstance(value, bool | int | float):
                value = [value]
        elif isinstance(value, str) and not {str, bool} & types and value not in choices:
            number = toml_value(value)
            value = number if isinstance(number, int | float) and not isinstance(number, bool) else value
        if bool not in types and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError("a truth value")
        return value


def toml_value(text: str) -> Any:
    """The TOML, or else JSON, value `text`, or None where it is neither."""
    for parse in (lambda: tomllib.loads(f"value = {text}")["value"], lambda: json.loads(text)):
        with suppress(ValueError, RecursionError):
            if "\n" not in text and "\r" not in text:
                return parse()
    return None


@cache
def _parts(section: type[Section], name: str) -> tuple[frozenset[Any], tuple[Any, ...]]:
    """The types that a field may have, and the values of its literals."""
    waiting: list[Any] = [section.model_fields[name].annotation]
    types: set[Any] = set()
    choices: list[Any] = []
    while waiting:
        annotation = waiting.pop()
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            waiting.append(args[0])
        elif origin in (Union, UnionType):
            waiting += args
        elif origin is Literal:
            choices += args
        else:
            types.add(origin or annotation)
    return frozenset(types), tuple(choices)
