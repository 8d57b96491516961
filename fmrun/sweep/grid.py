"""The grid of a sweep: `--over` and `--seeds`, and the combinations and names that they make."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..compare.configs import NOT_THE_EXPERIMENT, experiment, show_value
from ..config.overrides import SHORTHANDS
from ..config.presets import Override, flatten, resolve
from ..config.schema import Config
from ..runtime.errors import UserError

MATCHING = "feature_matching."
WEIGHT = "feature_matching.weight"

VALUE = r"""(?:[^],[{}"']|\[[^]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+"""
"""One of the values between commas; in a list, a table or quotes commas do not count."""

MOST_NAME = 70
MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Over:
    """One `--over`."""

    key: str
    values: tuple[str, ...]
    """As typed."""

    def override(self, value: str) -> Override:
        return Override(f"--over {self.key}={value}", self.key, value)


@dataclass(frozen=True)
class Combination:
    """One point of the grid; with a seed it is a run."""

    name: str
    """What its runs' names begin with."""
    config: Config
    """Resolved; its seed has no meaning here."""
    train: tuple[str, ...]
    """What the command line sets for it, as arguments of `fmrun train`."""


def parse_over(text: str) -> Over:
    """`FIELD=VALUE,VALUE,…`, the field also by its shorthand; whether it exists is seen when all is resolved."""
    key, _, values = text.partition("=")
    key = SHORTHANDS.get("--" + key.strip().removeprefix("--").replace("_", "-"), key.strip())
    if not key or not re.fullmatch(f"{VALUE}(?:,{VALUE})*", values):
        raise UserError(
            f"--over {text}: write it as --over FIELD=VALUE,VALUE, like --over feature_matching.weight=0,0.1,1; a list "
            "stands in brackets"
        )
    if key == "seed":
        raise UserError(f"--over {text}: seeds are given with --seeds, so that all combinations have the same")
    return Over(key, tuple(value.strip() for value in re.findall(VALUE, values)))


def parse_seeds(text: str) -> tuple[int, ...]:
    """`5` is 0, 1, 2, 3, 4; `3,7,9` is itself, and `7,` is 7 alone."""
    try:
        seeds = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        seeds = []
    if seeds and "," not in text:
        seeds = list(range(min(seeds[0], MOST_SEEDS + 1)))
    if not 0 < len(seeds) <= MOST_SEEDS or min(seeds) < 0 or max(seeds) >= 2**63 or len({*seeds}) < len(seeds):
        raise UserError(
            f"--seeds {text}: give how many (5 is seeds 0 to 4), or the seeds themselves (3,7,9), each once; at most "
            f"{MOST_SEEDS}"
        )
    return tuple(seeds)


def combinations(
    preset: str | None,
    config_file: Path | None,
    overrides: Sequence[Override],
    overs: Sequence[Over],
    trust_code: bool = False,
) -> list[Combination]:
    """Every combination, in the order given, the last field varying fastest; UserError if one is no valid config.

    Combinations that are the same experiment are one. So is feature matching of weight 0 whatever else is said of it.
    """
    keys = [over.key for over in overs]
    for override in overrides:
        if override.key in keys:
            raise UserError(f"{override.flag}: --over varies {override.key}; leave one of the two out")
        if override.key == "seed":
            raise UserError(f"{override.flag}: seeds are given with --seeds")
    if len({*keys}) < len(keys):
        raise UserError("--over is given twice for a field; put all its values into one")
    files = [*(("--preset", preset) if preset else ()), *(("--config", str(config_file)) if config_file else ())]
    by_experiment: dict[str, Combination] = {}
    for values in product(*(over.values for over in overs)):
        chosen = [over.override(value) for over, value in zip(overs, values, strict=True)]
        config = resolve(preset, config_file, [*overrides, *chosen], trust_code=trust_code)
        if config.feature_matching.weight == 0:
            chosen = [one for one in chosen if not one.key.startswith(MATCHING) or one.key == WEIGHT]
        flat = flatten(config)
        free = {key: flat.get(key) for key in keys if key.startswith(NOT_THE_EXPERIMENT)}  # but it was asked for
        same = json.dumps([experiment(config.model_dump(mode="json")), free], sort_keys=True)
        if same not in by_experiment:
            settings = {one.key: flat.get(one.key, one.value) for one in chosen}
            name = folder_name(settings, short_names(keys), [other.name for other in by_experiment.values()])
            train = (*files, *(part for one in (*overrides, *chosen) for part in ("-s", f"{one.key}={one.value}")))
            by_experiment[same] = Combination(name, config, train)
    idle = [over.key for over in overs if over.key.startswith(MATCHING) and over.key != WEIGHT and len(over.values) > 1]
    if idle and not any(one.config.feature_matching.weight for one in by_experiment.values()):
        raise UserError(
            f"--over {idle[0]}: {WEIGHT} is 0 in every combination, so this changes nothing; add --lambda-feature 0.1, or "
            "vary the weight too"
        )
    return list(by_experiment.values())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each field by its last part, or whole where others end in it too."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def folder_name(settings: Mapping[str, Any], shorts: Mapping[str, str], existing: Iterable[str]) -> str:
    """For file systems: `weight-0.1_match-mean`, and other than those `existing` even where case does not count."""
    parts = (f"{shorts[key]}-{show_value(value)}" for key, value in settings.items())
    stem = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part.replace("_", "-")).strip("-") for part in parts)[:MOST_NAME]
    stem = stem.lstrip(".-") or "base"
    known = {name.casefold() for name in existing}
    name, number = stem, 1
    while name.casefold() in known:
        number += 1
        name = f"{stem}-{number}"
    return name


def default_name(preset: str, keys: Sequence[str]) -> str:
    """The same for every command that varies the same fields of the same preset, whatever the values and seeds."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join([preset, *short_names(keys).values()]))[:MOST_NAME].strip(".-")
