"""What a sweep is asked for: `--over` and `--seeds`, and the combinations and names that they make."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..config import Config, FeatureMatchingConfig
from ..errors import UserError
from ..overlay import SHORTHANDS
from ..presets import FREE_ON_RESUME, Override, flatten, resolve

MATCHING = "feature_matching."
WEIGHT = "feature_matching.weight"

MOST_NAME = 70


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
    overrides: tuple[Override, ...]
    """All that the command line sets for it."""
    train: tuple[str, ...]
    """The same as arguments of `fmrun train`."""


def split_top(text: str) -> list[str]:
    """The parts between commas that are in no bracket and no quotes: `[a,b],c` is `[a,b]` and `c`."""
    parts, start, quote, skip = [], 0, "", False
    open_: list[str] = []
    closing = {"[": "]", "{": "}", "(": ")"}
    for place, char in enumerate(text):
        if skip:
            skip = False
        elif quote:
            skip = char == "\\" and quote == '"'
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in closing:
            open_.append(closing[char])
        elif char in closing.values():
            if not open_ or open_.pop() != char:
                raise UserError(f"there is a '{char}' that closes nothing")
        elif char == "," and not open_:
            parts.append(text[start:place])
            start = place + 1
    if quote or open_:
        raise UserError(f"a {quote or open_[-1]} is missing at the end")
    return [part.strip() for part in (*parts, text[start:])]


def parse_over(text: str) -> Over:
    """`FIELD=VALUE,VALUE,…`, the field also by its shorthand; whether it exists is seen when all is resolved."""
    flag, (key, equals, values) = f"--over {text}", text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{flag}: write it as --over FIELD=VALUE,VALUE, like --over feature_matching.weight=0,0.1,1")
    key = SHORTHANDS.get("--" + key.removeprefix("--").replace("_", "-"), key)
    if key == "seed":
        raise UserError(f"{flag}: seeds are given with --seeds, so that all combinations have the same")
    try:
        parts = split_top(values)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if "" in parts:
        raise UserError(f"{flag}: a value is missing{' between two commas' if len(parts) > 1 else ''}")
    return Over(key, tuple(parts))


def parse_seeds(text: str) -> tuple[int, ...]:
    """`5` is 0, 1, 2, 3, 4; `3,7,9` is itself, and `7,` is 7 alone."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and parts[-1] == "":
        parts.pop()
    elif len(parts) == 1 and parts[0].isascii() and parts[0].isdigit() and int(parts[0]) > 0:
        parts = [str(seed) for seed in range(min(int(parts[0]), 100_001))]
    elif len(parts) == 1:
        parts = [""]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) < 2**63 for part in parts):
        raise UserError(f"--seeds {text}: give how many (5 is seeds 0 to 4), or the seeds themselves (3,7,9)")
    seeds = tuple(map(int, parts))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed is given twice")
    if len(seeds) > 100_000:
        raise UserError(f"--seeds {text}: at most 100000")
    return seeds


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
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise UserError(f"--over {twice[0]} is given twice; put all its values into one")
    files = [*(("--preset", preset) if preset else ()), *(("--config", str(config_file)) if config_file else ())]
    found: dict[str, Combination] = {}
    acting: set[str] = set()
    for values in product(*(over.values for over in overs)):
        chosen = [over.override(value) for over, value in zip(overs, values, strict=True)]
        config = resolve(preset, config_file, [*overrides, *chosen], trust_code=trust_code)
        if config.feature_matching.weight == 0:
            chosen = [one for one in chosen if not one.key.startswith(MATCHING) or one.key == WEIGHT]
        acting |= {one.key for one in chosen}
        if (same := identity(config, keys)) not in found:
            flat, given = flatten(config), (*overrides, *chosen)
            settings = {one.key: flat.get(one.key, one.value) for one in chosen}
            name = folder_name(settings, short_names(keys), [other.name for other in found.values()])
            train = (*files, *(part for one in given for part in ("-s", f"{one.key}={one.value}")))
            found[same] = Combination(name, config, given, train)
    for over in overs:
        if len(over.values) > 1 and over.key not in acting:
            raise UserError(
                f"--over {over.key}: {WEIGHT} is 0 in every combination, so this changes nothing; "
                "add --lambda-feature 0.1, or vary the weight too"
            )
    return list(found.values())


def without_matching(config: Config) -> Config:
    """The same config where feature matching acts; where its weight is 0, with nothing else said of it."""
    if config.feature_matching.weight:
        return config
    return config.model_copy(update={"feature_matching": FeatureMatchingConfig()})


def identity(config: Config, varied: Iterable[str]) -> str:
    """Equal for equal experiments: of the settings that do not change the experiment, only those `varied` count."""
    kept, flat = tuple(varied), flatten(without_matching(config))
    acting = {k: v for k, v in flat.items() if k != "seed" and (k in kept or not k.startswith(FREE_ON_RESUME))}
    return json.dumps(acting, sort_keys=True)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each field by as little of its end as tells it from the others: `weight`, or `gan.weight`."""

    def ends(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]

    return {
        key: next((end for end in ends(key) if not any(end in ends(k) for k in keys if k != key)), key) for key in keys
    }


def value_text(value: Any) -> str:
    """A value as it is typed: `0.1`, `block1,block2`, `none`."""
    if isinstance(value, list | tuple):
        return ",".join(value_text(v) for v in value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return str(value)


def folder_name(settings: Mapping[str, Any], shorts: Mapping[str, str], taken: Iterable[str]) -> str:
    """For file systems: `weight-0.1_match-mean`, and other than those `taken` even where case does not count."""
    parts = (f"{shorts[key]}-{value_text(value)}" for key, value in settings.items())
    stem = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part.replace("_", "-")).strip("-") for part in parts)[:MOST_NAME]
    stem = stem.lstrip(".-") or "base"
    known = {name.casefold() for name in taken}
    name, number = stem, 1
    while name.casefold() in known:
        number += 1
        name = f"{stem}-{number}"
    return name


def default_name(preset: str, found: Sequence[Combination], keys: Sequence[str]) -> str:
    """The same for every command that varies the same fields of the same experiment, whatever the values and seeds."""
    # one with feature matching, where there is one: it has more settings
    first = next((c for c in found if c.config.feature_matching.weight), found[0])
    fixed = {k: v for k, v in json.loads(identity(first.config, ())).items() if k not in keys}
    digest = hashlib.sha256(json.dumps([fixed, sorted(keys)], sort_keys=True).encode()).hexdigest()[:6]
    shorts = short_names(keys)
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join([preset, *(shorts[key] for key in keys)])).strip(".-")
    return f"{stem[:60] or 'sweep'}-{digest}"
