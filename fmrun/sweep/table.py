"""The comparison that a sweep ends in: means over seeds, and differences from the control on the same seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..intervals import TWO_SEEDS, Interval, Paired, holm, mean_interval, paired, smallest_effect
from ..report import format_number, format_table
from .plan import Sweep, control_of
from .results import Metric, Result, read

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Against:
    """A combination against its control."""

    control: str
    paired: Paired
    p_holm: float | None
    """Corrected over all comparisons of the sweep."""
    smallest: float | None
    """The smallest true difference that would probably have been found."""

    @property
    def visible(self) -> float | None:
        """`smallest`, where that says something."""
        return self.smallest if self.paired.telling else None

    @property
    def differs(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA


@dataclass(frozen=True)
class Row:
    """One combination."""

    name: str
    label: str
    settings: Mapping[str, Any]
    steps: int
    """Its runs count when they have made these."""
    way: str | None
    """JSON of how the metric was taken; None where it was not."""
    results: Sequence[Result]
    last: Interval | None
    best: Interval | None
    against: Against | None

    def count(self, *states: str) -> int:
        return sum(result.state in states for result in self.results)

    @property
    def finished(self) -> int:
        """Runs that ended where the combination does."""
        return sum(result.ended for result in self.results)

    @property
    def open(self) -> int:
        """Runs that are still to be trained, or trained on."""
        return len(self.results) - self.finished - self.count("diverged")

    @property
    def collapsed(self) -> int:
        return sum(result.collapsed for result in self.results)

    @property
    def images_per_second(self) -> float | None:
        found = [r.images_per_second for r in self.results if r.images_per_second is not None]
        return median(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """All combinations, controls first."""

    sweep: Sweep
    metric: Metric | None
    rows: Sequence[Row]
    comparisons: int
    """How many p-values were corrected together."""
    controls: Mapping[str, str]
    """What each combination is to be compared with, both by name."""
    remarks: Sequence[str]
    """Sentences on what could not be compared."""

    @property
    def ways_differ(self) -> bool:
        """Whether the metric was taken in one way in some rows and in another in others."""
        return len({row.way for row in self.rows if row.last is not None}) > 1

    @property
    def steps_differ(self) -> bool:
        """Whether some rows have other steps than others, and their labels do not say it."""
        return "train.steps" not in self.sweep.keys and len({row.steps for row in self.rows}) > 1


def compare(sweep: Sweep, metric: str | None = None, control: str | None = None) -> Comparison:
    """What the sweep's runs show by now; UserError for a control that it has not."""
    controls = control_of(sweep, control)
    reading = read(sweep, metric, controls)
    by_name = {name: [r for r in reading.results if r.planned.combination == name] for name in sweep.combinations}
    pairs = {name: paired(found.own, found.control, LEVEL) for name, found in reading.pairings.items()}
    tested = [name for name, pair in pairs.items() if pair is not None and pair.p is not None]
    corrected = dict(zip(tested, holm([pairs[name].p for name in tested]), strict=True))  # type: ignore[union-attr]

    def against(name: str) -> Against | None:
        pair = pairs.get(name)
        if pair is None:
            return None
        smallest = smallest_effect(pair.differences, ALPHA / max(1, len(tested)), POWER)
        return Against(controls[name], pair, corrected.get(name), smallest)

    def interval(found: Sequence[float | None]) -> Interval | None:
        finite = [value for value in found if value is not None]
        return mean_interval(finite, LEVEL) if finite else None

    rows = [
        Row(
            name,
            sweep.label(name),
            sweep.combinations[name].settings,
            sweep.combinations[name].config.train.steps,
            reading.ways.get(name),
            own,
            interval([r.last for r in own if r.counts]),
            interval([r.best for r in own if r.counts]),
            against(name),
        )
        for name, own in by_name.items()
    ]
    first = set(controls.values())
    rows.sort(key=lambda row: row.name not in first)
    return Comparison(sweep, reading.metric, rows, len(tested), controls, reading.remarks)


def text(comparison: Comparison) -> str:
    """The table for a terminal."""
    metric, rows = comparison.metric, comparison.rows
    if metric is None:
        columns = ["combination", "runs", "finished", "diverged"]
        return format_table(columns, [[r.label, len(r.results), r.finished, r.count("diverged")] for r in rows])
    compares = any(r.against for r in rows)
    has_best = any(r.best is not None and r.best != r.last for r in rows)  # else it would stand there twice
    columns = ["combination", *["steps"] * comparison.steps_differ, "n"]
    columns += [metric.key + " (ways differ)" * comparison.ways_differ, "95 %"]
    columns += ["best", "95 %"] if has_best else []
    columns += ["− control", "95 %", "p", "p (Holm)", "visible from"] if compares else []
    columns += ["diverged", "collapsed", "open", "images/s"]
    cells: list[list[Any]] = []
    for row in rows:
        line: list[Any] = [row.label, *[row.steps] * comparison.steps_differ, row.last.count if row.last else 0]
        line += _interval(row.last)
        if has_best:
            line += _interval(row.best)
        if compares:
            line += _against(row, {r.against.control for r in rows if r.against})
        speed = round(row.images_per_second) if row.images_per_second is not None else None
        cells.append([*line, row.count("diverged"), row.collapsed, row.open, speed])
    return format_table(columns, cells)


def _interval(found: Interval | None) -> list[Any]:
    return [found.mean, _range(found)] if found is not None else [None, None]


def _range(found: Interval) -> str | None:
    if found.low is None or found.high is None:
        return None
    return f"{format_number(found.low)} … {format_number(found.high)}"


def _against(row: Row, controls: set[str]) -> list[Any]:
    if row.against is None:
        return ["control" if row.name in controls else None, None, None, None, None]
    found = row.against
    mark = "*" if found.differs else ""
    holm_p = None if found.p_holm is None else f"{format_number(found.p_holm)}{mark}"
    return [
        f"{found.paired.difference.mean:+.4g}",
        _range(found.paired.difference),
        found.paired.p,
        holm_p,
        found.visible,
    ]


def sentences(comparison: Comparison) -> list[str]:
    """What the table says, in words."""
    metric, sweep = comparison.metric, comparison.sweep
    found: list[str] = list(comparison.remarks)
    if metric is None:
        return [*found, "no run has come to its end yet, so there is nothing to compare"]
    if not metric.evaluated and not metric.key.startswith("eval/"):
        found.append(
            f"{metric.key} is no measure of quality, but the runs have no better one: measure them with fmrun eval, or "
            "name one with --metric"
        )
    compared = [row for row in comparison.rows if row.against is not None]
    if not compared:
        if len(comparison.rows) > 1 and not comparison.controls:
            found.append(
                "no combination is the control: vary feature_matching.weight from 0 on, or name one with --control"
            )
        return found
    differing = [row for row in compared if row.against is not None and row.against.differs]
    for row in differing:
        assert row.against is not None
        mean, control = row.against.paired.difference.mean, sweep.label(row.against.control)
        by = f"by {format_number(abs(mean))} in {metric.key}"
        better = (mean < 0) == (metric.better == "lower")
        said = f"differs {by} from" if metric.better is None else f"is {'better' if better else 'worse'} {by} than"
        found.append(
            f"{row.label} {said} {control} (p = {format_number(row.against.p_holm or 0.0)} after Holm's correction)"
        )
    if not differing:
        found.append(
            f"no combination differs from the control in {metric.key}, at 5 % over {comparison.comparisons} "
            f"comparison{'s' * (comparison.comparisons != 1)} (Holm)"
        )
    pairs_of = [
        (row.against.visible, len(row.against.paired.differences)) for row in compared if row.against is not None
    ]
    seen = [visible for visible, _ in pairs_of if visible is not None]
    if seen:
        pairs = min(pairs for visible, pairs in pairs_of if visible is not None)
        low, high = format_number(min(seen)), format_number(max(seen))
        found.append(
            f"with {pairs} seeds a true difference is found {5 * POWER:.0f} times in 5 from "
            f"{low if low == high else f'{low} to {high}'} on; smaller ones may well have been missed"
        )
    elif any(pairs > 1 for _, pairs in pairs_of):
        found.append(TWO_SEEDS + ": give --seeds 5")
    else:
        found.append("a single seed compares nothing: give --seeds 5")
    return found


def to_json(comparison: Comparison, failures: Mapping[str, str]) -> dict[str, Any]:
    """All of it as plain data."""
    sweep, metric = comparison.sweep, comparison.metric
    controls = {row.against.control for row in comparison.rows if row.against is not None}
    return {
        "sweep": sweep.name,
        "path": str(sweep.folder),
        "over": sweep.keys,
        "seeds": sweep.seeds,
        "metric": None if metric is None else {"key": metric.key, "better": metric.better},
        "level": LEVEL,
        "alpha": ALPHA,
        "power": POWER,
        "comparisons": comparison.comparisons,
        "combinations": [_row(row, row.name in controls) for row in comparison.rows],
        "remarks": list(comparison.remarks),
        "failures": dict(failures),
    }


def _row(row: Row, is_control: bool) -> dict[str, Any]:
    against = row.against
    return {
        "name": row.name,
        "label": row.label,
        "settings": dict(row.settings),
        "control": is_control,
        "steps": row.steps,
        "way": json.loads(row.way) if row.way else None,
        "last": _bounds(row.last),
        "best": _bounds(row.best),
        "against": None
        if against is None
        else {
            "control": against.control,
            "difference": _bounds(against.paired.difference),
            "differences": list(against.paired.differences),
            "p": against.paired.p,
            "p_holm": against.p_holm,
            "smallest_effect": against.smallest,
        },
        "finished": row.finished,
        "diverged": row.count("diverged"),
        "collapsed": row.collapsed,
        "open": row.open,
        "images_per_second": row.images_per_second,
        "runs": [
            {
                "name": r.planned.name,
                "seed": r.planned.seed,
                "state": r.state,
                "step": r.step,
                "last": r.last,
                "last_step": r.last_step,
                "reals": r.reals,
                "best": r.best,
                "best_step": r.best_step,
                "collapsed": r.collapsed,
                "images_per_second": r.images_per_second,
                "message": r.message,
            }
            for r in row.results
        ],
    }


def _bounds(found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": found.count}
