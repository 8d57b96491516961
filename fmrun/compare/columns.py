"""Scores and curves of groups of runs, from the table of measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..config.tables import Better
from ..metrics.measures import REFERENCE, TELLING, base, decides, metric, rank
from ..runtime.errors import UserError
from .measurements import FAILED, WAY, at_best, at_last, last_step, over_seeds


@dataclass(frozen=True)
class Score:
    """A group in one column: the mean over its runs that count, and its 95 % interval where they are several."""

    mean: float
    low: float | None
    high: float | None
    count: int
    runs: Mapping[str, tuple[float, int]]
    """Name of the run to its value and the step at which it was measured."""


@dataclass(frozen=True)
class Column:
    """One measure, taken in one way: what differs in extractor, number of images, data or weights is another column."""

    key: str
    label: str
    better: Better | None
    unit: str
    about: str
    source: str
    weights: str
    settings: Mapping[str, Any]
    floor: float | None
    """What real images score against other real ones; the mean where runs held out different ones."""
    reference: float | None
    """What bicubic upscaling scores."""
    step: int | None
    """Of all of `last`: the last step that all runs have. Where there is none, `last` is of each run's own."""
    last: tuple[Score | None, ...]
    best: tuple[Score | None, ...]
    rows: Mapping[str, pd.DataFrame] = field(repr=False, compare=False)
    """Of the table of measurements: `last`, `best`, and `all` of this way of measuring."""

    def scores(self, by: str) -> tuple[Score | None, ...]:
        return self.last if by == "last" else self.best

    def ranking(self, by: str) -> tuple[int, ...]:
        """Places of the groups that have a score, the best first."""
        sign = 1 if self.better == "lower" else -1
        return tuple(i for _, i in sorted((sign * s.mean, i) for i, s in enumerate(self.scores(by)) if s is not None))


def columns_of(table: pd.DataFrame, groups: Sequence[str]) -> tuple[Column, ...]:
    """A column for each way in which anything was measured, the most telling measures first. Failed runs have no score."""
    scored = table[(table.source == "eval") | table.metric.str.startswith("eval/")]
    ways: dict[Any, pd.DataFrame] = dict(iter(scored.groupby(WAY, sort=False)))
    order = sorted(ways, key=lambda way: (rank(way[0]), way[1], way[2]))
    return tuple(
        _column(way, ways, groups)
        for way in order
        if not way[0].endswith(REFERENCE) and not ways[way].state.isin(FAILED).all()
    )


def _column(way: Any, ways: Mapping[Any, pd.DataFrame], groups: Sequence[str]) -> Column:
    rows, known, (key, source, weights, settings) = ways[way], metric(way[0]), way
    counted = rows[~rows.state.isin(FAILED)]
    last = at_last(counted)
    best = last if known.better is None else at_best(counted, known.better)
    bicubic = ways.get((f"{key}{REFERENCE}", source, weights, settings))
    return Column(
        key,
        _label(way, [other for other in ways if other != way and metric(other[0]).label == known.label]),
        known.better,
        known.unit,
        known.about,
        source,
        weights,
        json.loads(settings),
        or_none(rows.groupby("reals").floor.last().mean()),
        None if bicubic is None else float(bicubic.groupby("run").value.last().mean()),
        last_step(counted),
        _scores(last, groups),
        _scores(best, groups),
        {"last": last, "best": best, "all": rows},
    )


def _scores(rows: pd.DataFrame, groups: Sequence[str]) -> tuple[Score | None, ...]:
    summary = over_seeds(rows.groupby("group").value)
    runs = {name: (float(value), int(step)) for name, value, step in zip(rows.run, rows.value, rows.step, strict=True)}
    members = rows.groupby("group").run.apply(list)
    return tuple(
        Score(*interval(summary.loc[name]), {run: runs[run] for run in members[name]}) if name in members else None
        for name in groups
    )


def interval(row: Any) -> tuple[float, float | None, float | None, int]:
    """Mean, low, high and count of a row of `over_seeds`."""
    return float(row["mean"]), or_none(row["low"]), or_none(row["high"]), int(row["count"])


def or_none(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _label(way: Any, ways: Sequence[Any]) -> str:
    """The measure's name, with what tells it from others of its name."""
    key, source, weights, settings = way
    same = [other for other in ways if other[1] == source]
    extra = ["in training"] if source == "training" and len(same) < len(ways) else []
    extra += [weights] if any(other[2] != weights for other in same) else []
    values, theirs = json.loads(settings), [json.loads(other[3]) for other in same]
    differing = sorted(k for k in values if any(other.get(k) != values[k] for other in theirs))
    return ", ".join([metric(key).label, *extra, *(f"{k.rpartition('.')[2]} {values[k]}" for k in differing)])


def headline(columns: Sequence[Column], by: str, metric: str | None, runs: Sequence[str]) -> int | None:
    """Place of the column that decides: the one that covers the most groups, then the most telling measure."""
    candidates = [i for i, column in enumerate(columns) if decides(column.key)]
    if metric is not None:
        known = {column.key: column for column in columns if column.better is not None}
        candidates = [
            i
            for i, c in enumerate(columns)
            if c.key in known and metric in (c.key, c.key.removeprefix("eval/"), base(c.key)[0])
        ]
        if not candidates:
            there = f"they have {', '.join(known)}" if known else f"`fmrun eval {' '.join(runs[:2])}` measures some"
            raise UserError(
                f"--metric {metric}: these runs have no such measure, or neither way of it is better; {there}"
            )
    covered = {i: sum(score is not None for score in columns[i].scores(by)) for i in candidates}
    return min(candidates, key=lambda i: (-covered[i], i), default=None)


def curves_of(table: pd.DataFrame, decisive: Column | None) -> dict[str, pd.DataFrame]:
    """The telling curves, those of evaluations first: frames of `group`, `step`, and what `over_seeds` gives. A point is the
    mean over the runs of a group at a step that at least half of them have, so that a curve does not leap where most ended."""
    rows = table[(table.source == "training") & ~table.metric.str.endswith(REFERENCE)]
    if decisive is not None and decisive.source == "eval":
        rows = pd.concat([rows[rows.metric != decisive.key], decisive.rows["all"]])
    several = rows.groupby(["metric", "run"]).size().groupby("metric").max() > 1
    keys = set(several[several].index)
    scored = sorted((key for key in keys if key.startswith("eval/") and decides(key)), key=rank)
    first = [key for key in dict.fromkeys([*([decisive.key] if decisive else []), *scored]) if key in keys][:3]
    curves = {}
    for key in (*first, *(key for key in TELLING if key in keys)):
        measured = rows[rows.metric == key]
        points = over_seeds(measured.groupby(["group", "step"]).value)
        points = points.join(measured.groupby("group").run.nunique().rename("runs")).query("2 * count >= runs")
        curves[key] = points.reset_index()
    return curves
