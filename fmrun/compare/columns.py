"""Scores of runs: one column a measure and way of taking it, its last and best value for every group."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError, nearest
from ..intervals import mean_interval
from ..measures import REALS, REFERENCE, Better, base, measure, poolable, rank
from ..runs import Run
from .configs import flatten
from .curves import Series, is_finite, mean
from .groups import FAILED

QUICK = re.compile(r"task|data\.(path|image_size|scale|fit|valid_path|valid_fraction)")
"""Fields that two measurements during training must share to be compared, beside the number of images."""


Reals = Mapping[int, str | None]
"""Of one run: step to the real images that it was measured against there."""


@dataclass(frozen=True)
class Score:
    """A group in one column: the mean over its runs that have not failed, with its 95 % interval over seeds."""

    mean: float
    low: float | None
    high: float | None
    count: int
    runs: Mapping[str, tuple[float, int]]
    """Name of the run to its value and the step at which it was measured."""
    reals: Mapping[str, str | None]
    """Name of the run to which real images its value is against; None where that was not noted."""

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({step for _, step in self.runs.values()}))


@dataclass(frozen=True)
class Column:
    """One measure, taken in one way: what differs in extractor, number of images, data or weights is another column.

    Which images of the data were held out may differ from run to run (`Score.reals`).
    """

    key: str
    label: str
    better: Better | None
    unit: str
    about: str
    source: str
    """`eval`, or `training` for the quick measurements in metrics.jsonl."""
    weights: str
    settings: Mapping[str, Any]
    floor: float | None
    """What real images score against other real ones; the mean where runs held out different ones."""
    reference: float | None
    """What bicubic upscaling scores."""
    step: int | None
    """At which all of `last` was taken: the last that all runs have. None where they have none in common, and `last` is
    what each was measured at last."""
    newest: Mapping[str, int]
    """Name of each run that counts to the last step at which it was measured."""
    last: tuple[Score | None, ...]
    best: tuple[Score | None, ...]

    @property
    def dated(self) -> bool:
        """Whether `last` is of several steps, or some runs were measured after it."""
        steps = {step for score in self.last if score is not None for step in score.steps}
        return bool(steps) and (len(steps) > 1 or max(self.newest.values()) > max(steps))

    @property
    def has_better(self) -> bool:
        """Whether any group was better at another step than at its last."""
        return any(
            b.mean != s.mean for s, b in zip(self.last, self.best, strict=True) if s is not None and b is not None
        )

    def scores(self, by: str) -> tuple[Score | None, ...]:
        return self.last if by == "last" else self.best

    def ranking(self, by: str) -> tuple[int, ...]:
        """Places of the groups that have a score, the best first."""
        sign = 1 if self.better == "lower" else -1
        return tuple(i for _, i in sorted((sign * s.mean, i) for i, s in enumerate(self.scores(by)) if s is not None))


@dataclass(frozen=True)
class Way:
    """A measure and how it was taken: what a column holds is equal in all of this."""

    key: str
    source: str
    weights: str
    settings: str
    """JSON."""


def columns_of(
    runs: Sequence[Run],
    names: Sequence[str],
    states: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Series]],
    places: Sequence[Sequence[int]],
) -> tuple[Column, ...]:
    """A column for each way in which anything was measured, the most telling measures first. Runs that failed have no score."""
    measured: dict[Way, dict[int, Series]] = {}
    floors: dict[Way, dict[str | None, float]] = {}
    reals: dict[Way, dict[int, dict[int, str | None]]] = {}
    for i, run in enumerate(runs):
        for record in run.evaluations():
            settings, against = json.dumps(poolable(record.get("settings", {})), sort_keys=True), reals_of(record)
            for name, value in record.get("metrics", {}).items():
                way = Way(name, "eval", str(record.get("weights", "ema")), settings)
                if is_finite(value):
                    measured.setdefault(way, {}).setdefault(i, {})[int(record["step"])] = float(value)
                    reals.setdefault(way, {}).setdefault(i, {})[int(record["step"])] = against
                if is_finite(floor := record.get("floor", {}).get(name)):
                    floors.setdefault(way, {})[against] = float(floor)
                if is_finite(bicubic := record.get("bicubic", {}).get(name)):
                    measured.setdefault(replace(way, key=f"{name}{REFERENCE}"), {})[i] = {0: float(bicubic)}
        for key, values in rows[i].items():
            if key.startswith("eval/"):
                settings = json.dumps(quick_settings(configs[i], key), sort_keys=True)
                measured.setdefault(Way(key, "training", "ema", settings), {})[i] = values
    order = sorted(measured, key=lambda way: (rank(way.key), way.source, way.weights))
    return tuple(
        _column(way, measured, floors, reals.get(way, {}), names, states, places, order)
        for way in order
        if not way.key.endswith(REFERENCE)
    )


def quick_settings(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The fields that two measurements of `key` during training must share to be compared."""
    flat, num = flatten(config), "eval.kid_num" if base(key)[0] == "kid" else "eval.num"
    return {field: value for field, value in flat.items() if QUICK.fullmatch(field)} | {num: flat.get(num)}


def reals_of(record: Mapping[str, Any]) -> str | None:
    """Which real images an evaluation is against."""
    found = record.get("settings", {}).get(REALS)
    return None if found is None else str(found)


def _column(
    way: Way,
    measured: Mapping[Way, Mapping[int, Series]],
    floors: Mapping[Way, Mapping[str | None, float]],
    reals: Mapping[int, Reals],
    names: Sequence[str],
    states: Sequence[str],
    places: Sequence[Sequence[int]],
    ways: Sequence[Way],
) -> Column:
    known = measure(way.key)
    own = {i: values for i, values in measured[way].items() if values and states[i] not in FAILED}
    step = _common(own, states, places)

    def last(values: Series) -> tuple[float, int] | None:
        at = max(values) if step is None else step
        return (values[at], at) if at in values else None

    def best(values: Series) -> tuple[float, int] | None:
        if known.better is None:
            return last(values)
        value = (min if known.better == "lower" else max)(values.values())
        return value, next(step for step, v in values.items() if v == value)

    def scores(pick: Any) -> tuple[Score | None, ...]:
        found = {i: value for i, values in own.items() if (value := pick(values)) is not None}
        return tuple(_score({i: found[i] for i in group if i in found}, reals, names) for group in places)

    bicubic = measured.get(Way(f"{way.key}{REFERENCE}", way.source, way.weights, way.settings), {})
    return Column(
        way.key,
        _label(way, ways),
        known.better,
        known.unit,
        known.about,
        way.source,
        way.weights,
        json.loads(way.settings),
        mean(floors.get(way, {}).values()),
        mean(values[max(values)] for values in bicubic.values()),
        step,
        {names[i]: max(values) for i, values in own.items()},
        scores(last),
        scores(best),
    )


def _common(own: Mapping[int, Series], states: Sequence[str], places: Sequence[Sequence[int]]) -> int | None:
    """The last step that all of these runs have; of the finished ones alone where they are of two groups, so that a run
    that has just begun does not take the others back to its beginning."""
    ended = [i for i in own if states[i] == "finished"]
    counted = ended if sum(any(i in ended for i in group) for group in places) > 1 else own
    return max(set.intersection(*(set(own[i]) for i in counted)), default=None) if counted else None


def _score(found: Mapping[int, tuple[float, int]], reals: Mapping[int, Reals], names: Sequence[str]) -> Score | None:
    if not found:
        return None
    interval = mean_interval([value for value, _ in found.values()])
    runs = {names[i]: value for i, value in found.items()}
    against = {names[i]: reals.get(i, {}).get(step) for i, (_, step) in found.items()}
    return Score(interval.mean, interval.low, interval.high, interval.count, runs, against)


def _label(way: Way, ways: Sequence[Way]) -> str:
    """The measure's name, with what tells it from others of its name."""
    label = measure(way.key).label
    others = [w for w in ways if w != way and measure(w.key).label == label]
    own = json.loads(way.settings)
    extra = ["in training"] if way.source == "training" and any(w.source == "eval" for w in others) else []
    same = [w for w in others if w.source == way.source]
    if any(w.weights != way.weights for w in same):
        extra.append(way.weights)
    differing = {key for w in same for key, value in json.loads(w.settings).items() if own.get(key) != value}
    extra += [f"{key.rpartition('.')[2]} {own[key]}" for key in sorted(differing) if key in own]
    return f"{label}, {', '.join(extra)}" if extra else label


def headline_of(columns: Sequence[Column], by: str, asked: str | None, runs: Sequence[str]) -> int | None:
    """The column that decides: the one that covers the most groups, then the most telling measure."""
    if asked is not None:
        wanted = [
            i
            for i, column in enumerate(columns)
            if asked in (column.key, column.key.removeprefix("eval/"), base(column.key)[0])
        ]
        if not wanted:
            known = list(dict.fromkeys(column.key for column in columns))
            there = (
                f"; there are: {', '.join(known)}" if known else f"; `fmrun eval {' '.join(runs[:2])}` measures some"
            )
            raise UserError(f"--metric {asked}: these runs have no such measure{nearest(asked, known) or there}")
        if columns[wanted[0]].better is None:
            raise UserError(f"--metric {asked}: neither more nor less of it is better; give another, like --metric kid")
    else:
        wanted = [i for i, c in enumerate(columns) if c.better is not None and rank(c.key) < rank("eval/overfit")]
    covered = {i: sum(score is not None for score in columns[i].scores(by)) for i in wanted}
    found = [i for i in wanted if covered[i] >= min(2, len(columns[i].last))]
    return min(found or wanted, key=lambda i: (-covered[i], i), default=None)
