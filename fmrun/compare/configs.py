"""What sets runs apart: fields of their configs that differ and act, and which runs are one experiment over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pydantic_core import PydanticUndefined

from ..config.fields import FIELDS

NOT_THE_EXPERIMENT = ("log.", "eval.", "checkpoint.", "data.workers", "data.cache", "data.root", "device")
"""Fields that change what is written down, or how fast, but not what is learned."""

WEIGHT = re.compile(r"(.*\bfeature_matching\.)weight")
"""The field that turns a section of feature matching off."""

SWITCH = re.compile(rf"{WEIGHT.pattern}|data\.degradation\.kind")
"""Fields on which it depends whether the others of their section act."""

SEED = re.compile(r"(?<=.)[-_.]?(seed|s)?[-_.=]?\d+$", re.IGNORECASE)
"""What tells the seeds of one experiment apart at the end of a run's name."""

FACTS = {
    "data.path": "{}",
    "data.image_size": "{} px",
    "generator.type": "generator {}",
    "train.batch_size": "batch {}",
}
"""What is said of runs where it is the same for all."""

Flat = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A field in which groups differ. `values` and `acts` are one a group."""

    field: str
    values: tuple[Any, ...]
    acts: tuple[bool, ...]
    """Whether the field does anything there: of feature matching none but the weight does where that is 0."""
    folded: bool
    """Whether it differs only where it does not act, or is no part of the experiment."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Flat:
    """`{"train.steps": 2500, …}` of a run's config.json; a section that is absent is None."""
    flat: Flat = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def complete(config: Mapping[str, Any]) -> Flat:
    """`flatten`, with the defaults of fields that were not there yet when the run was made."""
    flat = flatten(config)
    sections = {key.rpartition(".")[0] for key in flat}
    new = {key: s.info.default for key, s in FIELDS.items() if key not in flat and key.rpartition(".")[0] in sections}
    return flat | {key: list(v) if isinstance(v, tuple) else v for key, v in new.items() if v is not PydanticUndefined}


def acting(flat: Flat) -> Flat:
    """The fields that have an effect."""
    idle = [found[1] for key in flat if (found := WEIGHT.fullmatch(key)) and not flat[key]]
    idle += ["data.degradation."] * (flat.get("data.degradation.kind") != "chain")
    idle += ["data.degradation.second."] * (flat.get("data.degradation.passes") == 1)
    return {key: value for key, value in flat.items() if SWITCH.fullmatch(key) or not key.startswith(tuple(idle))}


def experiment(config: Mapping[str, Any]) -> str:
    """The same text for two runs exactly if they are one experiment on, perhaps, different seeds."""
    kept = {k: v for k, v in acting(complete(config)).items() if k != "seed" and not k.startswith(NOT_THE_EXPERIMENT)}
    return json.dumps(kept, sort_keys=True)


def matches_features(config: Mapping[str, Any]) -> bool:
    """Whether any discriminator's features are matched."""
    return any(WEIGHT.fullmatch(key) and value for key, value in flatten(config).items())


def differences(configs: Sequence[Mapping[str, Any]]) -> tuple[Difference, ...]:
    """Fields in which these configs (one a group) differ, in the order of the schema; the seed is none of them. Of a section
    that some have and others have not, the weight is shown."""
    flats = [complete(config) for config in configs]
    live = [acting(flat) for flat in flats]
    found = []
    for field in dict.fromkeys(key for flat in flats for key in flat if key != "seed"):
        values = tuple(flat.get(field) for flat in flats)
        if all(value == values[0] for value in values) and all(field in flat for flat in flats):
            continue
        acts = tuple(field in flat for flat in live)
        shown = [value for value, there in zip(values, acts, strict=True) if there]
        idle = all(value == shown[0] for value in shown) and not field.endswith(".weight")
        found.append(Difference(field, values, acts, idle or field.startswith(NOT_THE_EXPERIMENT)))
    return tuple(found)


def facts(configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What these runs are, as far as it is the same for all."""
    values = {field: {str(flatten(config).get(field)) for config in configs} for field in FACTS}
    return tuple(
        form.format(PurePath(values[field].pop()).name) for field, form in FACTS.items() if len(values[field]) == 1
    )


def grouped(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Places of the configs that are one experiment on different seeds, groups in the order of their first. A seed that is
    there twice begins a group of its own: two runs of it are no two samples."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, config in enumerate(configs):
        what, seed, copy = experiment(config), config.get("seed"), 0
        while seed in [configs[i].get("seed") for i in groups.get((what, copy), ())]:
            copy += 1
        groups.setdefault((what, copy), []).append(place)
    return list(groups.values())


def group_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """A name for each group of runs, given as their names: of one run its own, of several what is left without the seed. All
    differ."""
    names = [
        runs[0] if len(runs) == 1 or len({SEED.sub("", r) for r in runs}) > 1 else SEED.sub("", runs[0])
        for runs in groups
    ]
    return [name if names.count(name) == 1 else runs[0] for name, runs in zip(names, groups, strict=True)]


def show_value(value: Any, acts: bool = True) -> str:
    """A setting as a reader types it; `·` where it does not act."""
    if not acts:
        return "·"
    if isinstance(value, list | tuple):
        return ", ".join(map(show_value, value)) or "[]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
