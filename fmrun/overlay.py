"""Values laid over each other, the last on top: each knows where it came from, so that an error names the flag or file."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

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


@dataclass(frozen=True)
class Override:
    """One value from the command line."""

    flag: str
    """As typed: `--lambda-feature`, or `-s train.steps=5`."""
    key: str
    value: Any
    """A string is parsed by the field's type; anything else is taken as it is."""


@dataclass(frozen=True)
class Given:
    value: Any
    label: str
    """What an error begins with."""
    name: str
    """The field as the user knows it."""
    is_text: bool = False
    """A flag's text, to be parsed by the field's type."""

    def shown(self, key: str) -> str:
        """The value as a message quotes it; a number typed as text stands as it was typed."""
        from .config.fields import FIELDS, show

        number = self.is_text and FIELDS[key].kind.wants_number(self.value)
        return show(self.value)[1:-1] if number else show(self.value)


@dataclass
class Layers:
    """What was given for each field, the last on top, and all that is wrong with it."""

    given: dict[str, Given] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def table(self, data: dict[str, Any], label: str, prefix: str = "") -> None:
        for name, value in data.items():
            self.put(f"{prefix}{name}", value, label)

    def put(self, key: str, value: Any, label: str) -> None:
        from .config.fields import FIELDS, NONE_WORDS, OPTIONAL, SECTIONS, members

        if key in FIELDS:
            self._lay(key, Given(value, label, key))
        elif key not in SECTIONS:
            self.problems.append((label, unknown(key)))
        elif key in OPTIONAL and (value is None or value in NONE_WORDS):
            self._drop(f"{key}.")
            self._lay(key, Given(None, label, key))
        elif key in OPTIONAL and value == {}:
            self._lay(key, Given({}, label, key))
        elif isinstance(value, dict):
            self.table(value, label, f"{key}.")
        elif value is not None:
            fields = ", ".join(members(key)) + (" (or none)" if key in OPTIONAL else "")
            self.problems.append((label, f"{key} is a section, not a value; its fields: {fields}"))

    def _drop(self, prefix: str) -> None:
        for key in [k for k in self.given if k.startswith(prefix)]:
            del self.given[key]

    def file(self, data: dict[str, Any], label: str) -> None:
        from .yaml_config import read_losses

        if not isinstance(data.get("losses"), list):
            return self.table(data, label)
        task = data.get("task") or (self.given["task"].value if "task" in self.given else "generate")
        try:
            losses = read_losses(data["losses"], str(task))
        except UserError as error:
            self.problems.append((label, str(error)))
            return self.table({k: v for k, v in data.items() if k != "losses"}, label)
        for section in losses.replaces:
            self._drop(f"{section}.")
        below = dict(self.given)
        self.table({k: v for k, v in data.items() if k != "losses"}, label)
        for setting in losses.settings:
            twice = self.given.get(setting.key) is not below.get(setting.key)
            if not twice:
                self._lay(setting.key, Given(setting.value, f"{label}: {setting.entry}", setting.name))
            elif not setting.implied:
                self.problems.append(
                    (
                        label,
                        f"{setting.key} and {setting.name} of {setting.entry} are the same setting; give one",
                    )
                )
        return None

    def override(self, override: Override) -> None:
        from .config.fields import FIELDS, NONE_WORDS, table_of, toml_value

        key, value, label = override.key, override.value, override.flag
        is_text = isinstance(value, str)
        if key in FIELDS:
            self._lay(key, Given(value, label, key, is_text))
        elif (table := table_of(key)) is not None:
            below = self.given[table].value if table in self.given else {}
            below = toml_value(below) if isinstance(below, str) else below
            parsed = toml_value(value) if is_text else value
            own = {**below} if isinstance(below, dict) else {}
            name = key.removeprefix(f"{table}.")
            if value is None or value in NONE_WORDS:
                own.pop(name, None)
            else:
                own[name] = value if parsed is None else parsed
            self._lay(table, Given(own, label, key))
        elif value is None or value in NONE_WORDS:
            self.put(key, "none", label)
        else:
            table = toml_value(value) if is_text else value
            self.put(key, table if isinstance(table, dict) else "", label)

    def _lay(self, key: str, given: Given) -> None:
        from .config.fields import OPTIONAL

        section = key.rpartition(".")[0]
        if section in OPTIONAL:
            self.given.pop(section, None)  # a section that was removed is there again with its first setting
        self.given.pop(key, None)  # the order of `given` is the order of laying
        self.given[key] = given

    def nested(self) -> dict[str, Any]:
        """The table pydantic validates; a value of the wrong type becomes a problem."""
        from .config.fields import FIELDS, Mismatch

        table: dict[str, Any] = {}
        for key, given in self.given.items():
            inner = table
            *sections, name = key.split(".")
            for section in sections:
                inner = inner.setdefault(section, {})
            if key not in FIELDS:  # a section that may be absent: absent, or there with its defaults
                inner.setdefault(name, None if given.value is None else {})
                continue
            kind = FIELDS[key].kind
            try:
                inner[name] = kind.parse(given.value) if given.is_text else kind.coerce(given.value)
            except Mismatch as mismatch:
                self.problems.append((given.label, f"{given.name} is {given.shown(key)}; {mismatch}"))
        return table

    def explain(self, error: "ValidationError") -> None:
        """Raises pydantic's findings as one sentence."""
        from .config.fields import FIELDS

        for problem in error.errors():
            loc = [str(part) for part in problem["loc"]]
            if problem["type"] == "model_type" and self.problems:
                continue  # a value where a section belongs, already told
            key = next((k for n in range(len(loc), 0, -1) if (k := ".".join(loc[:n])) in FIELDS), None)
            given = self.given.get(key) if key else None
            if key and given:
                kind = FIELDS[key].kind
                value = kind.parse(given.value) if given.is_text else given.value
                found = (given.label, f"{given.name} is {given.shown(key)}; {kind.wanted(value)}")
            else:
                text = str(problem.get("ctx", {}).get("error", problem["msg"]))
                found = self._cross_field(".".join(loc), " ".join(text.split()))
            if found not in self.problems:
                self.problems.append(found)
        self.stop_if_wrong()

    def _cross_field(self, section: str, text: str) -> tuple[str, str]:
        """Puts a validator's sentence to the last given of the fields (or sections that may be absent) it speaks of."""
        from .config.fields import is_optional

        prefix = f"{section}." if section else ""
        label, name = "", ""
        for key, given in self.given.items():
            short = key.removeprefix(prefix)
            spoken = [short, short.rpartition(".")[0]] if is_optional(key) and "." in short else [short]
            if key.startswith(prefix) and any(
                re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.]*\w)", text) for word in spoken
            ):
                label = given.label
                name = section
        if name and not label.startswith("-s ") and not text.startswith(section):
            text = f"{section}: {text}"
        return label, text

    def stop_if_wrong(self) -> None:
        if not self.problems:
            return
        parts: list[str] = []
        last = ""
        for label, message in self.problems[:MOST_ERRORS]:
            parts.append(message if label == last or not label else f"{label}: {message}")
            last = label
        if len(self.problems) > MOST_ERRORS:
            parts.append(f"and {len(self.problems) - MOST_ERRORS} more")
        raise UserError(one_line("; ".join(parts)))


def unknown(key: str) -> str:
    """`there is no field 'train.stpes'; did you mean 'train.steps'?`"""
    import difflib

    from .config.fields import FIELDS, SECTIONS, is_optional

    known = [*FIELDS, *SECTIONS]
    lower = key.lower().replace("-", "_")
    short = lower.rpartition(".")[2]
    hits: list[str] = difflib.get_close_matches(lower, known, n=1, cutoff=0.85)
    if not hits:
        hits = [k for k in FIELDS if k.rpartition(".")[2] == short]
    if not hits and (shorthand := SHORTHANDS.get(f"--{lower.replace('_', '-')}")):
        hits = [shorthand]
    hits = hits or difflib.get_close_matches(lower, known, n=1, cutoff=0.6)
    if not hits:
        near = difflib.get_close_matches(short, [k.rpartition(".")[2] for k in FIELDS], n=1, cutoff=0.6)
        hits = [k for k in FIELDS if k.rpartition(".")[2] in near]
    if not hits:
        return f"there is no field '{key}'; `fmrun presets dcgan` lists them"
    hits = sorted(hits, key=is_optional)
    return f"there is no field '{key}'; did you mean {' or '.join(repr(k) for k in hits[:4])}?"


def one_line(text: str) -> str:
    return " ".join(text.split())
