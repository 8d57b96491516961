"""What sets runs apart: fields of their configs that differ and act, and which runs are one experiment over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pydantic_core import PydanticUndefined

from ..config.fields import FIELDS

SEED = "seed"

NOT_THE_EXPERIMENT = ("log.", "eval.", "checkpoint.", "data.workers", "data.cache", "data.root", "device")
"""Fields that change what is written down, or how fast, but not what is learned."""

WEIGHT = re.compile(r"(.*\bfeature_matching\.)weight")
"""The field that turns a section of feature matching off."""

MATCHES = {
    "criterion": ("sample", "mean", "moments"),
    "estimator": ("mean",),
    "running_decay": ("mean",),
    "kernel": ("mmd",),
    "directions": ("sliced",),
}
"""Fields of feature matching that act under these values of `match` only."""

ABSENT = "none"
"""Value of a section that one run has and another has not."""

Flat = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A field in which groups differ."""

    field: str
    values: tuple[Any, ...]
    """One a group; None is the config's `none`, or a field that does not act."""
    acts: tuple[bool, ...]
    """Whether the field does anything in that group: of feature matching none but the weight does where that is 0."""
    folded: bool
    """Whether it differs only where it does not act, or is no part of the experiment: nothing a reader has to know."""


def flatten(config: Mapping[str, Any]) -> Flat:
    """`{"train.steps": 2500, …}` of a run's config.json, whatever version wrote it; a section that is absent is None."""
    return dict(_leaves(config, ""))


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def acting(flat: Flat) -> Flat:
    """The fields that have an effect: without those of feature matching where it is off."""
    idle: set[str] = set()
    for section in [m[1] for key in flat if (m := WEIGHT.fullmatch(key))]:
        if flat[f"{section}weight"] == 0:
            idle |= {key for key in flat if key.startswith(section)} - {f"{section}weight"}
        elif (match := flat.get(f"{section}match")) is not None:
            idle |= {f"{section}{name}" for name, where in MATCHES.items() if match not in where}
    return {key: value for key, value in flat.items() if key not in idle}


def complete(config: Mapping[str, Any]) -> Flat:
    """`flatten`, with the defaults of fields that were not there yet when the run was made."""
    flat = flatten(config)
    sections = {key.rpartition(".")[0] for key in flat}
    new = {key: s.info.default for key, s in FIELDS.items() if key not in flat and key.rpartition(".")[0] in sections}
    return flat | {key: list(v) if isinstance(v, tuple) else v for key, v in new.items() if v is not PydanticUndefined}


def experiment(config: Mapping[str, Any]) -> str:
    """The same text for two runs exactly if they are one experiment on, perhaps, different seeds."""
    kept = {k: v for k, v in acting(complete(config)).items() if k != SEED and not k.startswith(NOT_THE_EXPERIMENT)}
    return json.dumps(kept, sort_keys=True)


def matches_features(config: Mapping[str, Any]) -> bool:
    """Whether any discriminator's features are matched."""
    return any(WEIGHT.fullmatch(key) and value for key, value in flatten(config).items())


def differences(configs: Sequence[Mapping[str, Any]]) -> tuple[Difference, ...]:
    """Fields in which these configs (one a group) differ, in the order of the schema; the seed is none of them."""
    flats = [complete(config) for config in configs]
    live = [acting(flat) for flat in flats]
    fields = dict.fromkeys(key for flat in flats for key in flat)
    sections = {key for key in fields if any(other.startswith(f"{key}.") for other in fields)}
    found = []
    for field in fields:
        inside = any(field.startswith(f"{section}.") for section in sections)
        if field == SEED or (_all_equal([flat.get(field) for flat in flats]) and field not in sections):
            continue
        acts = tuple(field in flat for flat in live)
        if field in sections:  # there in some configs only
            values: tuple[Any, ...] = tuple(ABSENT if field in flat else "set" for flat in flats)
            acts = (True,) * len(flats)
        else:
            values = tuple(flat.get(field) for flat in flats)
        shown = [value for value, there in zip(values, acts, strict=True) if there]
        idle = _all_equal(shown) and not (inside and field.endswith(".weight"))
        found.append(Difference(field, values, acts, idle or field.startswith(NOT_THE_EXPERIMENT)))
    return tuple(found)


TASKS = {"generate": "images from noise", "upscale": "super-resolution"}


def facts(configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """In words, what these runs are, as far as it is the same for all: task, data, size, nets, batch."""

    def told(flat: Flat) -> list[str | None]:
        task, path, maker, judge = (flat.get(k) for k in ("task", "data.path", "generator.type", "discriminator.type"))
        patch, size, batch = (flat.get(k) for k in ("data.patch_size", "data.image_size", "train.batch_size"))
        return [
            TASKS.get(str(task)),
            re.split(r"[/\\]", str(path).rstrip("/"))[-1] if path else None,
            f"patches of {patch} px, ×{flat.get('data.scale')}" if task == "upscale" else f"{size} px",
            f"{maker} against {judge}" if maker and judge else None,
            f"batches of {batch}",
        ]

    rows = [told(flatten(config)) for config in configs]
    return tuple(values[0] for values in zip(*rows, strict=True) if values[0] and _all_equal(values))


def _all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def grouped(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Places of the configs that are one experiment on different seeds, groups in the order of their first. A seed that is
    there twice begins a group of its own: two runs of it are no two samples."""
    groups: dict[str, list[list[int]]] = {}
    for place, config in enumerate(configs):
        same = groups.setdefault(experiment(config), [])
        free = (g for g in same if config.get(SEED) not in [configs[i].get(SEED) for i in g])
        group = next(free, None)
        if group is None:
            same.append([place])
        else:
            group.append(place)
    return sorted(group for same in groups.values() for group in same)


def group_names(members: Sequence[Sequence[tuple[str, Any]]]) -> list[str]:
    """A name for each group of runs, given as (name, seed): of one run its own, of several what is left without the seed
    or what they begin with. All names differ."""
    names = [_common_name(runs) for runs in members]
    return [name if names.count(name) == 1 else runs[0][0] for name, runs in zip(names, members, strict=True)]


def _common_name(runs: Sequence[tuple[str, Any]]) -> str:
    first = runs[0][0]
    if len(runs) == 1:
        return first
    stems = {_without_seed(name, seed) for name, seed in runs}
    if len(stems) == 1 and (stem := stems.pop()):
        return stem
    letters = zip(*(name for name, _ in runs), strict=False)
    common = "".join(together[0] for together in takewhile(_all_equal, letters))
    return re.sub(r"[-_.][^-_.]*$", "", common) or first


def _without_seed(name: str, seed: Any) -> str | None:
    found = re.fullmatch(rf"(.+?)(?:[-_.]?seed|[-_.]s)?[-_.=]?{re.escape(str(seed))}", name, re.IGNORECASE)
    return found and found[1]


def short_fields(fields: Sequence[str]) -> list[str]:
    """The last part of each field's name, and as many more as it takes to tell them apart."""

    def tail(field: str, parts: int) -> str:
        return ".".join(field.split(".")[-parts:])

    short = []
    for field in fields:
        parts = 1
        while sum(tail(other, parts) == tail(field, parts) for other in fields) > 1 and parts < field.count(".") + 1:
            parts += 1
        short.append(tail(field, parts))
    return short


def show_value(value: Any, acts: bool = True) -> str:
    """A setting as a reader types it; `·` where it does not act."""
    if not acts:
        return "·"
    if isinstance(value, list | tuple):
        return ", ".join(show_value(v) for v in value) or "[]"
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
