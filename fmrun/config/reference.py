"""Writes `docs/config.md` and `docs/config.schema.json` from the schema and the presets: `python -m fmrun.config.reference`."""

import json
from pathlib import Path
from typing import Any

from . import presets
from .fields import FIELDS, OPTIONAL, SECTIONS, members, takes
from .overrides import SHORTHANDS
from .schema import Config
from .yaml import TYPES, WEIGHT

DOCS = Path(__file__).parents[2] / "docs"

DEFAULTS = presets.flatten(Config.model_validate({"losses": {key.rpartition(".")[2]: {} for key in OPTIONAL}}))

BEGIN = (
    "<!-- From here on made from the schema by `python -m fmrun.config.reference`; edit the descriptions there. -->\n"
)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(section: str) -> list[str]:
    prefix = f"{section}." if section else ""
    keys = [prefix + name for name in members(section) if prefix + name in FIELDS]
    rows = ["| field | takes | default | |", "|---|---|---|---|"]
    for key in keys:
        default = "none" if DEFAULTS[key] is None else DEFAULTS[key]
        cells = (
            f"`{key.removeprefix(prefix)}`",
            " | ".join(takes(FIELDS[key].schema, "`{}`")),
            f"`{default if isinstance(default, str) else json.dumps(default)}`",
            FIELDS[key].description,
        )
        rows.append(f"| {' | '.join(_cell(c) for c in cells)} |")
    return [*rows, ""] if keys else []


def markdown() -> str:
    """The reference page: what is written there by hand, and the tables."""
    lines = [(DOCS / "config.md").read_text(encoding="utf-8").partition(BEGIN)[0] + BEGIN, "## Shorthands", ""]
    lines += ["| shorthand | sets |", "|---|---|", *(f"| `{flag}` | `{key}` |" for flag, key in SHORTHANDS.items())]
    lines += ["", "## Presets", "", "| preset | |", "|---|---|"]
    for name in presets.names():
        default = " (The default.)" if name == presets.DEFAULT else ""
        lines.append(f"| `{name}` | {_cell(presets.describe(name))}{default} |")
    lines += ["", "## Types of a `losses:` list", "", "| type | goes to | keys of other names |", "|---|---|---|"]
    for type_, target in TYPES.items():
        renamed = ", ".join(f"`{theirs}`: `{ours}`" for theirs, ours in {**WEIGHT, **target.rename}.items())
        lines.append(f"| `{type_}` | `{target.section}` | {renamed} |")
    lines += ["", "## Top level", "", *_table("")]
    for section, info in SECTIONS.items():
        if (table := _table(section)) or section == "losses":
            lines += [f"## `{section}`", "", " ".join((info.description or "").split()), "", *table]
    return "\n".join(lines)


def schema() -> dict[str, Any]:
    """The JSON schema of a config file: that of `Config`, and what files may say beyond it."""
    result = Config.model_json_schema()
    _admit_none(result)
    layers = result["$defs"]["FeatureMatchingConfig"]["properties"]["layers"]
    text = {key: layers.pop(key) for key in ("default", "description", "title")}
    result["$defs"]["FeatureMatchingConfig"]["properties"]["layers"] = {
        "anyOf": [layers, {"type": ["string", "integer"]}],
        **text,
    }
    top = result["properties"]
    top["losses"] = {
        "anyOf": [{"$ref": top["losses"]["$ref"]}, {"type": "array", "items": {"$ref": "#/$defs/LossEntry"}}],
        **{k: v for k, v in top["losses"].items() if k != "$ref"},
    }
    result["$defs"]["LossEntry"] = {
        "type": "object",
        "description": "One loss, in the style of super-resolution configs.",
        "required": ["type"],
        "properties": {"type": {"type": "string", "examples": list(TYPES)}},
    }
    result["properties"] = {
        "description": {"type": "string", "description": "One sentence about this file."},
        "extends": {"enum": presets.names(), "description": "The preset beneath this file."},
        **top,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result, "title": "fmrun config"}


def _admit_none(node: Any) -> None:
    """Where null is allowed, allows the word `none` as well: TOML has no null."""
    if isinstance(node, dict):
        options = node.get("anyOf", [])
        if {"type": "null"} in options:
            options.insert(options.index({"type": "null"}), {"const": "none"})
        for value in node.values():
            _admit_none(value)
    elif isinstance(node, list):
        for value in node:
            _admit_none(value)


def pages() -> dict[str, str]:
    """File name → text."""
    return {
        "config.md": markdown(),
        "config.schema.json": json.dumps(schema(), indent=2, ensure_ascii=False) + "\n",
    }


if __name__ == "__main__":
    for page, text in pages().items():
        (DOCS / page).write_text(text, encoding="utf-8", newline="\n")
