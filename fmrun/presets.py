"""Presets, config files and flags, merged into one validated `Config`.

A preset, the file of `--config`, and `-s` and its shorthands lie on top of each other in this order; a later
one wins field by field. At the bottom is the default preset, or what the file's own `extends` names
(`--preset`, being typed, comes before `extends`). Each value remembers where it came from, so that an error
names the flag or file.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrun.errors import UserError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

    from fmrun.config import Config

DEFAULT = "dcgan-fm"

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

META = ("description", "extends")
"""Top-level keys of a preset or config file that are no settings."""

MOST_ERRORS = 5


@dataclass(frozen=True)
class Override:
    """One value from the command line."""

    flag: str
    """As typed: `--lambda-feature`, or `-s train.steps=5`."""
    key: str
    value: Any
    """A string is parsed by the field's type; anything else is taken as it is."""


# ---- presets; nothing here imports pydantic, so that completion is quick


def _folder() -> Path:
    packaged = Path(__file__).parent / "presets_data"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "presets"


def names() -> list[str]:
    """All presets, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def describe(name: str) -> str:
    """The preset's own sentence about itself."""
    return str(_read(name).get("description", ""))


def load(name: str) -> dict[str, Any]:
    """The preset with its bases applied, unvalidated; without `description` and `extends`."""
    chain = [name]
    data = _read(name)
    while (base := data.get("extends")) is not None:
        if base in chain:
            raise UserError(f"preset '{chain[-1]}' extends itself: {' -> '.join([*chain, base])}")
        chain.append(base)
        data = _merge(_read(base), {k: v for k, v in data.items() if k not in META})
    return {k: v for k, v in data.items() if k not in META}


def _read(name: Any) -> dict[str, Any]:
    known = names()
    if name not in known:
        if str(name).endswith((".toml", ".yaml", ".yml", ".json")):
            raise UserError(f"there is no preset '{name}'; a file goes with --config")
        raise UserError(f"there is no preset '{name}'{nearest(str(name), known)} (fmrun presets lists them)")
    path = _folder() / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"preset '{name}' cannot be read: {error}") from None


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# ---- flags


def parse_set(text: str) -> Override:
    """`KEY=VALUE` of `-s`; whether the field exists is seen when all is resolved."""
    key, equals, value = text.partition("=")
    key, flag = key.strip(), f"-s {_one_line(text)}"
    if not equals:
        raise UserError(f"{flag}: there is no '='; write it as -s KEY=VALUE, like -s train.steps=100")
    if not key:
        raise UserError(f"{flag}: there is no field before '='; write it as -s KEY=VALUE, like -s train.steps=100")
    return Override(flag, key, value.strip())


def render(key: str, value: Any) -> str:
    """The `KEY=VALUE` that sets `key` to `value` when given to `-s` (unquoted for the shell)."""
    from fmrun.config.fields import FIELDS

    if value is None:
        return f"{key}=none"
    kind = FIELDS[key].kind
    if isinstance(value, str) and value and value.isprintable() and value == value.strip():
        try:
            if kind.parse(value) == value:
                return f"{key}={value}"
        except ValueError:
            pass
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    """A value of JSON's types as TOML writes it inline. (TOML has no null: keys without a value are left out.)"""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---- the whole


def resolve(
    preset: str | None, config_file: Path | None, overrides: Sequence[Override], *, need_data: bool = True
) -> "Config":
    """The config that the command line asks for; `UserError` names every mistake in one line.

    `need_data=False` skips the check that the bundled images are as large as the config wants them.
    """
    from pydantic import ValidationError

    from fmrun import config_files
    from fmrun.config import Config

    file: dict[str, Any] = {}
    if config_file is not None:
        try:
            file = config_files.read(config_file)
        except UserError as error:
            raise UserError(f"--config: {error}") from None
    extends, label = (preset, "--preset") if preset is not None else (file.get("extends"), f"{config_file}: extends")
    base = DEFAULT if extends is None else extends
    try:
        raw = load(base)
    except UserError as error:
        raise UserError(f"{label}: {error}" if extends is not None else str(error)) from None

    layers = _Layers()
    layers.table(raw, f"preset {base}")
    if config_file is not None:
        layers.file({k: v for k, v in file.items() if k not in META}, str(config_file))
    for override in overrides:
        layers.override(override)
    nested = layers.nested()
    layers.stop_if_wrong()
    try:
        config = Config.model_validate(nested)
    except ValidationError as error:
        layers.explain(error)
        raise AssertionError("explain raises") from error
    if need_data:
        _check_bundled(config, layers)
    return config


def from_json(data: "dict[str, Any] | Path") -> "Config":
    """The resolved config of a run, from its `config.json`: what was written, with no preset beneath."""
    from pydantic import ValidationError

    from fmrun import config_files
    from fmrun.config import Config

    label = "the run's config"
    if isinstance(data, Path):
        label, data = str(data), config_files.read(data)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        unknown = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "extra_forbidden"]
        if unknown:
            raise UserError(
                f"{label}: this version of fmrun has no field {', '.join(repr(k) for k in unknown)}; "
                "the run was made by a newer one, or its config was edited"
            ) from None
        layers = _Layers()
        layers.table(data, label)
        layers.explain(error)
        raise AssertionError("explain raises") from error


def revise(data: dict[str, Any], overrides: Sequence[Override], free: Sequence[str]) -> "Config":
    """A run's config with `overrides`, which may touch only the settings in `free` (a trailing dot frees a section)."""
    from pydantic import ValidationError

    from fmrun.config import Config

    from_json(data)
    layers = _Layers()
    layers.table(data, "the run's config")
    before = dict(layers.given)
    for override in overrides:
        layers.override(override)
    changed = [key for key, given in layers.given.items() if given is not before.get(key)]
    for key in changed:
        if not any(key == f or (f.endswith(".") and key.startswith(f)) for f in free):
            shown = ", ".join(f"{f}*" if f.endswith(".") else f for f in free)
            layers.problems.append(
                (
                    layers.given[key].label,
                    f"{key} would make it another experiment; only {shown} may be changed here; for another experiment: fmrun train",
                )
            )
    layers.stop_if_wrong()
    nested = layers.nested()
    layers.stop_if_wrong()
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        layers.explain(error)
        raise AssertionError("explain raises") from error


def flatten(config: "Config") -> dict[str, Any]:
    """`{"train.steps": 2500, …}`, values as in JSON, in the order of the schema; a section that is absent is None."""
    return dict(_leaves(config.model_dump(mode="json")))


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    from fmrun.config.fields import FIELDS

    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in FIELDS:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@dataclass(frozen=True)
class _Given:
    value: Any
    label: str
    """What an error begins with."""
    name: str
    """The field as the user knows it."""
    is_text: bool = False
    """A flag's text, to be parsed by the field's type."""

    def shown(self, key: str) -> str:
        """The value as a message quotes it; a number typed as text stands as it was typed."""
        from fmrun.config.fields import FIELDS, show

        number = self.is_text and FIELDS[key].kind.wants_number(self.value)
        return show(self.value)[1:-1] if number else show(self.value)


@dataclass
class _Layers:
    """What was given for each field, the last on top, and all that is wrong with it."""

    given: dict[str, _Given] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def table(self, data: dict[str, Any], label: str, prefix: str = "") -> None:
        for name, value in data.items():
            self.put(f"{prefix}{name}", value, label)

    def put(self, key: str, value: Any, label: str) -> None:
        from fmrun.config.fields import FIELDS, NONE_WORDS, OPTIONAL, SECTIONS, members

        if key in FIELDS:
            self._lay(key, _Given(value, label, key))
        elif key not in SECTIONS:
            self.problems.append((label, _unknown(key)))
        elif key in OPTIONAL and (value is None or value in NONE_WORDS):
            self._drop(f"{key}.")
            self._lay(key, _Given(None, label, key))
        elif key in OPTIONAL and value == {}:
            self._lay(key, _Given({}, label, key))
        elif isinstance(value, dict):
            self.table(value, label, f"{key}.")
        elif value is not None:
            fields = ", ".join(members(key)) + (" (or none)" if key in OPTIONAL else "")
            self.problems.append((label, f"{key} is a section, not a value; its fields: {fields}"))

    def _drop(self, prefix: str) -> None:
        for key in [k for k in self.given if k.startswith(prefix)]:
            del self.given[key]

    def file(self, data: dict[str, Any], label: str) -> None:
        from fmrun.yaml_config import read_losses

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
                self._lay(setting.key, _Given(setting.value, f"{label}: {setting.entry}", setting.name))
            elif not setting.implied:
                self.problems.append(
                    (
                        label,
                        f"{setting.key} and {setting.name} of {setting.entry} are the same setting; give one",
                    )
                )
        return None

    def override(self, override: Override) -> None:
        from fmrun.config.fields import FIELDS, NONE_WORDS, table_of, toml_value

        key, value, label = override.key, override.value, override.flag
        is_text = isinstance(value, str)
        if key in FIELDS:
            self._lay(key, _Given(value, label, key, is_text))
        elif (table := table_of(key)) is not None:
            below = self.given[table].value if table in self.given else {}
            below = toml_value(below) if isinstance(below, str) else below
            parsed = toml_value(value) if is_text else value
            inner = {key.removeprefix(f"{table}."): value if parsed is None else parsed}
            self._lay(table, _Given({**(below if isinstance(below, dict) else {}), **inner}, label, key))
        elif value is None or value in NONE_WORDS:
            self.put(key, "none", label)
        else:
            table = toml_value(value) if is_text else value
            self.put(key, table if isinstance(table, dict) else "", label)

    def _lay(self, key: str, given: _Given) -> None:
        from fmrun.config.fields import OPTIONAL

        section = key.rpartition(".")[0]
        if section in OPTIONAL:
            self.given.pop(section, None)  # a section that was removed is there again with its first setting
        self.given.pop(key, None)  # the order of `given` is the order of laying
        self.given[key] = given

    def nested(self) -> dict[str, Any]:
        """The table pydantic validates; a value of the wrong type becomes a problem."""
        from fmrun.config.fields import FIELDS, Mismatch

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
        from fmrun.config.fields import FIELDS

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
        from fmrun.config.fields import is_optional

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
        raise UserError(_one_line("; ".join(parts)))


def _check_bundled(config: "Config", layers: _Layers) -> None:
    size = config.data.image_size
    if config.data.path.startswith("bundled:") and size > 32 and config.data.fit != "pad":
        given = layers.given.get("data.image_size")
        raise UserError(
            f"{given.label if given else 'data'}: data.image_size is {size}, but the bundled images are "
            "28 px; give larger ones with --data FOLDER"
        )


def _unknown(key: str) -> str:
    """`there is no field 'train.stpes'; did you mean 'train.steps'?`"""
    import difflib

    from fmrun.config.fields import FIELDS, SECTIONS, is_optional

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


def _one_line(text: str) -> str:
    return " ".join(text.split())
