"""Values laid over each other, the last on top: each knows where it came from, so that an error names the flag or file."""

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from .schema import Config

SHORTHANDS = {
    "--lambda-feature": "feature_matching.weight",
    "--balance": "feature_matching.balance",
    "--layers": "feature_matching.layers",
    "--steps": "train.steps",
    "--batch-size": "train.batch_size",
    "--data": "data.path",
    "--seed": "seed",
    "--device": "device",
}

MOST_ERRORS = 5

BENEATH, FILE, TYPED = range(3)
"""Where a value comes from: a preset or a saved run, the user's file, the command line."""


@dataclass(frozen=True)
class Override:
    """One value from the command line."""

    flag: str
    """As typed: `--lambda-feature`, or `-s train.steps=5`."""
    key: str
    value: Any
    """Text, or a value as files have it."""


@dataclass(frozen=True)
class Given:
    value: Any
    label: str
    """What an error begins with."""
    name: str
    """The field as the user knows it."""
    source: int


@dataclass
class Layers:
    """What was given for each field, the last on top, and all that is wrong with it."""

    given: dict[str, Given] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def table(self, data: dict[str, Any], label: str, source: int = BENEATH, prefix: str = "") -> None:
        for name, value in data.items():
            self.put(f"{prefix}{name}", value, label, source)

    def put(self, key: str, value: Any, label: str, source: int) -> None:
        from .fields import FIELDS, NONE_WORDS, OPTIONAL, SECTIONS, members

        absent = value is None or (isinstance(value, str) and value in NONE_WORDS)
        if key in FIELDS:
            self.lay(key, Given(None if absent else value, label, key, source))
        elif key not in SECTIONS:
            self.problems.append((label, unknown(key)))
        elif key in OPTIONAL and (absent or value == {}):
            if absent:
                self.drop(f"{key}.")
            self.lay(key, Given(None if absent else {}, label, key, source))
        elif isinstance(value, dict):
            self.table(value, label, source, f"{key}.")
        elif value is not None:
            fields = ", ".join(members(key)) + (" (or none)" if key in OPTIONAL else "")
            self.problems.append((label, f"{key} is a section, not a value; its fields: {fields}"))

    def drop(self, prefix: str) -> None:
        for key in [k for k in self.given if k.startswith(prefix)]:
            del self.given[key]

    def lay(self, key: str, given: Given) -> None:
        from .fields import OPTIONAL

        section = key.rpartition(".")[0]
        if section in OPTIONAL:
            self.given.pop(section, None)  # a section that was removed is there again with its first setting
        self.given.pop(key, None)  # the order of `given` is the order of laying
        self.given[key] = given

    def override(self, override: Override) -> None:
        from .base import toml_value
        from .fields import NONE_WORDS, table_of

        key, value, label = override.key, override.value, override.flag
        parsed = toml_value(value) if isinstance(value, str) else value
        if (table := table_of(key)) is not None:
            below = self.given[table].value if table in self.given else None
            entries = {**below} if isinstance(below, dict) else {}
            entries[key.removeprefix(f"{table}.")] = value if parsed is None else parsed
            if value is None or value in NONE_WORDS:
                del entries[key.removeprefix(f"{table}.")]
            self.lay(table, Given(entries, label, key, TYPED))
        else:  # numbers and truth values stay text, which Pydantic reads by the field's type
            self.put(key, parsed if isinstance(parsed, str | list | dict) else value, label, TYPED)

    def config(self) -> "Config":
        """All of it, validated; UserError tells all that is wrong in one line."""
        from pydantic import ValidationError

        from .schema import Config

        tree: dict[str, Any] = {}
        for key, given in self.given.items():
            inner = tree
            *sections, name = key.split(".")
            for section in sections:
                inner = inner.setdefault(section, {})
            inner.setdefault(name, given.value)  # a section that may be absent is, or is there with its defaults
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            self._explain(error)
        self.stop_if_wrong()
        return config

    def _explain(self, error: "ValidationError") -> None:
        """Puts pydantic's findings to the problems."""
        from .fields import FIELDS, show

        explained = set()
        for problem in error.errors(include_url=False):
            loc = [str(part) for part in problem["loc"]]
            key = next((k for n in range(len(loc), 0, -1) if (k := ".".join(loc[:n])) in FIELDS), None)
            if key is None and not self.problems:
                text = str(problem.get("ctx", {}).get("error", problem["msg"]))
                self.problems.append(self._cross_field(".".join(loc), one_line(text)))
            elif key is not None and key not in explained:
                explained.add(key)
                given = self.given[key]
                scalar = loc == key.split(".") and isinstance(problem["input"], str | bool | int | float)
                value = problem["input"] if scalar else given.value
                allowed = FIELDS[key].wanted(value)
                self.problems.append((given.label, f"{given.name} is {show(value)}; {allowed}"))

    def _cross_field(self, section: str, text: str) -> tuple[str, str]:
        """Puts a validator's sentence to the last given of the fields (or sections that may be absent) it speaks of."""
        from .fields import OPTIONAL

        prefix, label = f"{section}." if section else "", ""
        for key, given in self.given.items():
            names = [key.removeprefix(prefix)] + [s.removeprefix(prefix) for s in OPTIONAL if key.startswith(f"{s}.")]
            if key.startswith(prefix) and any(re.search(rf"(?<![\w.]){re.escape(n)}(?!\.?\w)", text) for n in names):
                label = given.label
        return label, text if not section or text.startswith(section) else f"{section}: {text}"

    def stop_if_wrong(self) -> None:
        if not self.problems:
            return
        labels = ["", *(label for label, _ in self.problems)]
        parts = [
            message if label in ("", before) else f"{label}: {message}"
            for before, (label, message) in zip(labels, self.problems, strict=False)
        ]
        more = [f"and {len(parts) - MOST_ERRORS} more"] if len(parts) > MOST_ERRORS else []
        raise UserError(one_line("; ".join(parts[:MOST_ERRORS] + more)))


def unknown(key: str) -> str:
    """`there is no field 'train.stpes'; did you mean 'train.steps'?`"""
    from .fields import FIELDS, OPTIONAL, SECTIONS

    lower = key.lower().replace("-", "_")
    short, endings = lower.rpartition(".")[2], {k.rpartition(".")[2] for k in FIELDS}
    shorthand = SHORTHANDS.get(f"--{lower.replace('_', '-')}")
    near = difflib.get_close_matches(short, sorted(endings), n=1, cutoff=0.6)
    hits = (
        difflib.get_close_matches(lower, [*FIELDS, *SECTIONS], n=1, cutoff=0.85)
        or [k for k in FIELDS if k.rpartition(".")[2] == short]
        or ([shorthand] if shorthand else [])
        or difflib.get_close_matches(lower, [*FIELDS, *SECTIONS], n=1, cutoff=0.6)
        or [k for k in FIELDS if k.rpartition(".")[2] in near]
    )
    if not hits:
        return f"there is no field '{key}'; `fmrun presets dcgan` lists them"
    hits = sorted(hits, key=lambda k: k.rpartition(".")[0] in OPTIONAL)
    return f"there is no field '{key}'; did you mean {' or '.join(repr(k) for k in hits[:4])}?"


def one_line(text: str) -> str:
    return " ".join(text.split())
