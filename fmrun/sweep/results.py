"""What the runs of a sweep reached: one metric for all, its last and best value in each, failures, speed."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..errors import UserError, nearest
from ..health import collapsed
from ..measures import FIRST, REFERENCE, measure, rank
from ..runs import Run
from .plan import Planned, Sweep

LAST_RESORT = ("loss/g_adv", "loss/g")


@dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl, or the name of a score in evaluations.json with the way it was taken."""

    key: str
    settings: str | None = None
    """JSON of an evaluation's weights and settings: scores with others are not comparable."""

    @property
    def better(self) -> str | None:
        """`lower`, `higher`, or None where neither is, as of the losses of two nets against each other."""
        return measure(self.key).better


@dataclass(frozen=True)
class Result:
    """One run."""

    planned: Planned
    state: str
    """finished, diverged, failed, stopped, interrupted, running, missing."""
    step: int
    last: float | None
    best: float | None
    best_step: int | None
    collapsed: bool
    images_per_second: float | None
    message: str | None

    @property
    def counts(self) -> bool:
        """Whether its values are compared: it came to its end."""
        return self.state == "finished" and self.last is not None


def read(sweep: Sweep, asked: str | None) -> tuple[Metric | None, list[Result]]:
    """The metric to compare by and every run's result; UserError if no run has the metric `asked` for."""
    runs = [sweep.planned(name) for name in sweep.runs]
    states = {p.name: p.run.state if p.run.config_file.is_file() else "missing" for p in runs}
    ended = [p.run for p in runs if states[p.name] == "finished"]
    metric = choose(ended, asked)
    return metric, [_result(p, states[p.name], metric) for p in runs]


def choose(runs: Sequence[Run], asked: str | None) -> Metric | None:
    """The metric asked for, or the most telling one that most of these runs have; None where there is none."""
    rows: Counter[str] = Counter()
    scores: Counter[tuple[str, str]] = Counter()
    for run in runs:
        rows.update({key for row in run.metrics() for key, value in row.items() if _is_number(value) and key != "step"})
        scores.update(
            {
                (key, _way(record))
                for record in run.evaluations()
                for key, value in record.get("metrics", {}).items()
                if _is_number(value)
            }
        )
    found = {key: Metric(key) for key in rows}
    for (key, way), _ in sorted(scores.items(), key=lambda item: (item[1], '"ema"' in item[0][1])):
        found[key] = Metric(key, way)  # the way that most runs were evaluated in; the average rather than the raw
    if asked is not None:
        if asked not in found and runs:
            known = sorted(found, key=lambda key: (_rank(found[key]), key))
            raise UserError(f"--metric: no run has '{asked}'{nearest(asked, known)}; there are {', '.join(known)}")
        return found.get(asked)
    telling = sorted((m for m in found.values() if _rank(m)[0] < len(FIRST)), key=_rank)
    return telling[0] if telling else next((found[key] for key in LAST_RESORT if key in found), None)


def _rank(metric: Metric) -> tuple[int, bool, int]:
    """The first is the most telling: evaluations before measurements in training, Inception before other extractors."""
    place, other_extractor = rank(metric.key)
    if metric.key.endswith(REFERENCE) or (metric.settings is None and not metric.key.startswith("eval/")):
        place = len(FIRST)
    return place, metric.settings is None, other_extractor


def series(run: Run, metric: Metric) -> dict[int, float]:
    """The metric's finite values by step."""
    if metric.settings is not None:
        records = [r for r in run.evaluations() if _way(r) == metric.settings]
        pairs = [(int(r["step"]), r.get("metrics", {}).get(metric.key)) for r in records]
    else:
        pairs = [(row["step"], row.get(metric.key)) for row in run.metrics()]
    return {step: float(value) for step, value in pairs if _is_number(value)}


def _result(planned: Planned, state: str, metric: Metric | None) -> Result:
    run = planned.run
    if state == "missing":
        return Result(planned, state, 0, None, None, None, False, None, None)
    rows, status = run.metrics(), run.status()
    values = series(run, metric) if metric is not None else {}
    speeds = [row["time/images_per_second"] for row in rows if _is_number(row.get("time/images_per_second"))]
    best_step = None
    if values and metric is not None and metric.better is not None:
        best_step = (min if metric.better == "lower" else max)(values, key=lambda step: values[step])
    message = status.get("message")
    return Result(
        planned,
        state,
        int(status.get("step", 0)),
        values[max(values)] if values else None,
        values[best_step] if best_step is not None else None,
        best_step,
        state == "finished" and collapsed(rows),
        median(speeds) if speeds else None,
        str(message) if message else None,
    )


def _way(record: Mapping[str, Any]) -> str:
    return json.dumps([record.get("weights", "ema"), record.get("settings", {})], sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
