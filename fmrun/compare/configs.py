"""What sets runs apart: fields of their configs that differ and act, and which runs are one experiment over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from ..config.fields import FIELDS
from ..config.presets import FREE_ON_RESUME

NOT_THE_EXPERIMENT = (*(key for key in FREE_ON_RESUME if key != "train.steps"), "data.root")
"""Fields that change what is written down, or how fast, but not what is learned."""

WEIGHT = re.compile(r"(.*\bfeature_matching\.)weight")
"""The field that turns a section of feature matching off."""

SWITCH = re.compile(rf"{WEIGHT.pattern}|data\.degradation\.kind")
"""Fields on which it depends whether the others of their section act."""

SEED = re.compile(r"(?<=.)[-_.]?(seed|s)?[-_.=]?\d+$", re.IGNORECASE)
"""What tells the seeds of one experiment apart at the end of a run's name."""

IDLE = "·"
"""Shown where a field does not act."""

Flat = dict[str, Any]


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> Flat:
    """`{"train.steps": 2500, …}` of a run's config.json; a section that is absent is None."""
    flat: Flat = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= flat_fields(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def acting(config: Mapping[str, Any]) -> Flat:
    """The fields that have an effect, with the defaults of those that were not there yet when the run was made."""
    flat = flat_fields(config)
    sections = {key.rpartition(".")[0] for key in flat}
    new = {key: s.info.default for key, s in FIELDS.items() if key not in flat and key.rpartition(".")[0] in sections}
    flat |= {key: list(v) if isinstance(v, tuple) else v for key, v in new.items() if v is not PydanticUndefined}
    idle = [match[1] for key in flat if (match := WEIGHT.fullmatch(key)) and not flat[key]]
    idle += ["data.degradation."] * (flat.get("data.degradation.kind") != "chain")
    idle += ["data.degradation.second."] * (flat.get("data.degradation.passes") == 1)
    return {key: value for key, value in flat.items() if SWITCH.fullmatch(key) or not key.startswith(tuple(idle))}


def experiment(config: Mapping[str, Any]) -> Flat:
    """The fields by which an experiment is another one; its seed is none of them."""
    return {k: v for k, v in acting(config).items() if k != "seed" and not k.startswith(NOT_THE_EXPERIMENT)}


def matches_features(config: Mapping[str, Any]) -> bool:
    """Whether any discriminator's features are matched."""
    return any(WEIGHT.fullmatch(key) and value for key, value in flat_fields(config).items())


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The fields in which these experiments differ, in the order of the schema, and what each has. Of a section that some
    have and others have not, the weight is one."""
    flats = [experiment(config) for config in configs]
    differing = {}
    for field in dict.fromkeys(key for flat in flats for key in flat):
        values = tuple(show_value(flat[field]) if field in flat else IDLE for flat in flats)
        if len({*values} - {IDLE}) > 1 or (IDLE in values and field.endswith(".weight")):
            differing[field] = values
    return differing


def grouped(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Places of the configs that are one experiment on different seeds, groups in the order of their first. A seed that is
    there twice begins a group of its own: two runs of it are no two samples."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, config in enumerate(configs):
        what, seed, copy = json.dumps(experiment(config), sort_keys=True), config.get("seed"), 0
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


def show_value(value: Any) -> str:
    """A setting as a reader types it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(show_value, value)) or "[]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
