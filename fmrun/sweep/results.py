"""What the runs of a sweep reached: one metric for all, its last and best value in each, failures, speed."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeGuard

from ..compare.columns import quick_settings, reals_of
from ..errors import UserError, nearest
from ..health import collapsed
from ..measures import FIRST, REFERENCE, base, measure, poolable, rank
from ..runs import Run
from .plan import Planned, Sweep

LAST_RESORT = ("loss/g_adv", "loss/g")

Family = tuple[str, int]
"""What is compared with each other: the name of the control, and the number of steps."""


@dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl, or the name of a score in evaluations.json."""

    key: str
    evaluated: bool = False
    """Whether it is the latter."""

    @property
    def better(self) -> str | None:
        """`lower`, `higher`, or None where neither is, as of the losses of two nets against each other."""
        return measure(self.key).better


@dataclass(frozen=True)
class Value:
    """One measurement."""

    value: float
    reals: str | None = None
    """The real images that it is against, where that was noted."""


@dataclass(frozen=True)
class Result:
    """One run."""

    planned: Planned
    state: str
    """finished, diverged, failed, stopped, interrupted, running, missing."""
    step: int
    steps: int
    """That its combination has; a run that ended before the sweep was extended may have fewer."""
    last: float | None
    last_step: int | None
    reals: str | None
    """The real images that `last` is against."""
    best: float | None
    best_step: int | None
    collapsed: bool
    images_per_second: float | None
    message: str | None

    @property
    def ended(self) -> bool:
        """Whether it came to the end that its combination has."""
        return self.state == "finished" and self.step == self.steps

    @property
    def counts(self) -> bool:
        """Whether its values are compared."""
        return self.ended and self.last is not None


@dataclass(frozen=True)
class Pairing:
    """The values of a combination and of its control. Those of one key were taken on the same seed, step and images."""

    own: Mapping[Hashable, float]
    control: Mapping[Hashable, float]


@dataclass(frozen=True)
class Reading:
    """What all runs show by one metric."""

    metric: Metric | None
    results: Sequence[Result]
    ways: Mapping[str, str]
    """JSON of how the metric was taken, by combination; without those that have none."""
    pairings: Mapping[str, Pairing]
    """By combination; only where both train for the same number of steps, unless the sweep varies that."""
    remarks: Sequence[str]
    """Sentences on what could not be compared, and why."""


def read(sweep: Sweep, asked: str | None, controls: Mapping[str, str]) -> Reading:
    """The metric to compare by and every run's result; of `controls`, by combination, what it is compared with.

    A metric `asked` for that no run has leaves that by default, and a remark.
    """
    runs = [sweep.planned(name) for name in sweep.runs]
    states = {p.name: p.run.state if p.run.config_file.is_file() else "missing" for p in runs}
    steps = {name: c.config.train.steps for name, c in sweep.combinations.items()}
    ended: dict[str, list[Run]] = {name: [] for name in sweep.combinations}
    for one in runs:
        if states[one.name] == "finished" and _step(one.run) == steps[one.combination]:
            ended[one.combination].append(one.run)
    remarks = []
    try:
        metric, ways = choose(ended, asked, controls)
    except UserError as error:
        metric, ways = choose(ended, None, controls)
        remarks.append(str(error) + (f"; compared by {metric.key}" if metric else ""))
    families: dict[str, Family] = {name: (controls.get(name, name), steps[name]) for name in sweep.combinations}
    values = {p.name: series(p.run, metric, ways.get(p.combination)) for p in runs if states[p.name] != "missing"}
    ends = _ends(metric, {run.name: families[name] for name, own in ended.items() for run in own}, values)
    results = [
        _result(
            p, states[p.name], steps[p.combination], metric, values.get(p.name, {}), ends.get(families[p.combination])
        )
        for p in runs
    ]

    def taken(name: str, way: str | None) -> dict[Hashable, float]:
        """Of a combination's runs that count, those that were measured in this way."""
        found: dict[Hashable, float] = {}
        for result in results:
            if result.planned.combination != name or not result.ended:
                continue
            seed, at_end = result.planned.seed, metric is not None and metric.evaluated
            if way == ways.get(name):
                if result.last is not None:
                    aligned = at_end or ends.get(families[name]) is not None
                    found[seed, result.reals, None if aligned else result.last_step] = result.last
            elif (other := series(result.planned.run, metric, way).get(result.steps)) is not None:
                found[seed, other.reals, None] = other.value
        return found

    pairings = {
        name: Pairing(taken(name, ways.get(name)), taken(control, ways.get(name)))
        for name, control in controls.items()
        if steps[name] == steps[control] or "train.steps" in sweep.keys
    }
    remarks += _remarks(sweep, metric, results, ways, controls, pairings)
    remarks += [
        f"{metric.key} is compared at step {end} of {of}, the last at which all runs of {sweep.label(name)} and of what is "
        "compared with it have it"
        for (name, of), end in ends.items()
        if metric is not None and end is not None and end != of
    ]
    return Reading(metric, results, ways, pairings, remarks)


# ---- which metric, and how it was taken


def choose(
    runs: Mapping[str, Sequence[Run]], asked: str | None, controls: Mapping[str, str] | None = None
) -> tuple[Metric | None, dict[str, str]]:
    """The metric asked for, or the one that most of these runs have, the most telling among such; and the way of taking
    it that each combination is compared by. `runs` are by combination, and finished.

    `asked` may leave out the extractor, as in `kid`. UserError if no run has it.
    """
    found = {name: [_measured(run) for run in own] for name, own in runs.items()}
    known = {metric for own in found.values() for run in own for metric, _ in run}
    ways = {metric: _ways(metric, found, controls or {}) for metric in known}
    have = {
        metric: sum((metric, ways[metric].get(name)) in run for name, own in found.items() for run in own)
        for metric in known
    }

    def order(metric: Metric) -> tuple[Any, ...]:
        return -have[metric], *_rank(metric), metric.key

    if asked is not None and known:
        wanted = [m for m in known if asked == m.key] or [
            m for m in known if asked in (m.key.removeprefix("eval/"), base(m.key)[0]) and not m.key.endswith(REFERENCE)
        ]
        if not wanted:
            names = [m.key for m in sorted(known, key=lambda m: (_rank(m), m.key))]
            raise UserError(f"--metric: no run has '{asked}'{nearest(asked, names)}; there are {', '.join(names)}")
    elif not (wanted := [m for m in known if _rank(m)[0] < len(FIRST)]):
        wanted = [m for key in LAST_RESORT if (m := Metric(key)) in known][:1]
    metric = min(wanted, key=order, default=None)
    return metric, ways[metric] if metric is not None else {}


def _measured(run: Run) -> set[tuple[Metric, str]]:
    """All that a run's metrics hold, and its evaluations at its end, each with the way in which it was taken."""
    keys = {key for row in run.metrics() for key, value in row.items() if key != "step" and _is_number(value)}
    config = run.config()
    return {(Metric(key), _quick_way(config, key)) for key in keys} | {
        (Metric(key, True), _way(record))
        for record in run.evaluations()
        if record.get("step") == _step(run)
        for key, value in record.get("metrics", {}).items()
        if _is_number(value)
    }


def _ways(
    metric: Metric, found: Mapping[str, Sequence[set[tuple[Metric, str]]]], controls: Mapping[str, str]
) -> dict[str, str]:
    """For each combination that has the metric: of the ways in which it was taken there, the one that most runs of all
    that is compared with the same control have; the average of weights rather than the raw."""
    own = {name: Counter(way for run in runs for m, way in run if m == metric) for name, runs in found.items()}
    families: dict[str, Counter[str]] = {}
    every: Counter[str] = Counter()
    for name, ways in own.items():
        families.setdefault(controls.get(name, name), Counter()).update(ways)
        every.update(ways)

    def order(name: str, way: str) -> tuple[Any, ...]:
        return families[controls.get(name, name)][way], own[name][way], every[way], '"ema"' in way, way

    return {name: max(ways, key=lambda way: order(name, way)) for name, ways in own.items() if ways}


def _rank(metric: Metric) -> tuple[int, bool, int]:
    """The first is the most telling: evaluations before measurements in training, Inception before other extractors."""
    place, other_extractor = rank(metric.key)
    if metric.key.endswith(REFERENCE) or not (metric.evaluated or metric.key.startswith("eval/")):
        place = len(FIRST)
    return place, not metric.evaluated, other_extractor


def _way(record: Mapping[str, Any]) -> str:
    return json.dumps([record.get("weights", "ema"), poolable(record.get("settings", {}))], sort_keys=True)


def _quick_way(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(quick_settings(config, key), sort_keys=True) if key.startswith("eval/") else ""


# ---- what each run reached


def series(run: Run, metric: Metric | None, way: str | None) -> dict[int, Value]:
    """The metric's finite values by step, as far as they were taken in this way."""
    if metric is None or way is None:
        return {}
    if metric.evaluated:
        records = [(r, r.get("metrics", {}).get(metric.key)) for r in run.evaluations() if _way(r) == way]
        return {int(r["step"]): Value(float(value), reals_of(r)) for r, value in records if _is_number(value)}
    if _quick_way(run.config(), metric.key) != way:
        return {}
    rows = [(row["step"], row.get(metric.key)) for row in run.metrics()]
    return {step: Value(float(value)) for step, value in rows if _is_number(value)}


def _ends(
    metric: Metric | None, ended: Mapping[str, Family], values: Mapping[str, Mapping[int, Value]]
) -> dict[Family, int | None]:
    """The step at which runs are compared, by what they are compared with: the last that all of them have.

    None where they have none in common. What is evaluated counts at the run's end alone, and is not looked at here.
    """
    if metric is None or metric.evaluated:
        return {}
    common: dict[Family, set[int]] = {}
    for name, family in ended.items():
        if own := set(values[name]):
            common[family] = common.get(family, own) & own
    return {family: max(steps, default=None) for family, steps in common.items()}


def _result(
    planned: Planned, state: str, steps: int, metric: Metric | None, values: Mapping[int, Value], end: int | None
) -> Result:
    """`end`: the step whose value is to be the last; None for the last there is, of what is evaluated at the run's end."""
    run = planned.run
    if state == "missing":
        return Result(planned, state, 0, steps, None, None, None, None, None, False, None, None)
    rows, status = run.metrics(), run.status()
    step = _step(run)
    speeds = [row["time/images_per_second"] for row in rows if _is_number(row.get("time/images_per_second"))]
    best_step = None
    if values and metric is not None and metric.better is not None:
        best_step = (min if metric.better == "lower" else max)(values, key=lambda step: values[step].value)
    at = max(values, default=None)
    if state == "finished" and metric is not None:
        at = step if metric.evaluated else end if end in values else at
    last = values.get(at) if at is not None else None
    message = status.get("message")
    return Result(
        planned,
        state,
        step,
        steps,
        last.value if last is not None else None,
        at if last is not None else None,
        last.reals if last is not None else None,
        values[best_step].value if best_step is not None else None,
        best_step,
        state == "finished" and collapsed(rows),
        median(speeds) if speeds else None,
        str(message) if message else None,
    )


def _step(run: Run) -> int:
    return int(run.status().get("step") or 0)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- what is not compared


def _remarks(
    sweep: Sweep,
    metric: Metric | None,
    results: Sequence[Result],
    ways: Mapping[str, str],
    controls: Mapping[str, str],
    pairings: Mapping[str, Pairing],
) -> list[str]:
    found = []
    steps = {r.planned.combination: r.steps for r in results}
    if behind := [r for r in results if r.state == "finished" and not r.ended]:
        runs = ", ".join(f"{r.planned.name} (at step {r.step} of {r.steps})" for r in behind)
        found.append(
            f"not counted, for they did not end where their combination does: {runs}; give all their seeds, and those that "
            "have fewer steps are trained on"
        )
    for name, control in controls.items():
        if name in steps and control in steps and name not in pairings:
            found.append(
                f"{sweep.label(name)} has {steps[name]} steps and {sweep.label(control)} {steps[control]}, so they are not "
                "compared; give the same --steps for both"
            )
    if metric is None:
        return found
    if len({ways[name] for name in steps if name in ways}) > 1:
        found.append(f"{metric.key} was not taken in the same way in all combinations; compare only those that were")
    for name, pairing in pairings.items():
        seeds = {key[0] for key in pairing.own} & {key[0] for key in pairing.control}  # type: ignore[index]
        if missing := len(seeds) - len(pairing.own.keys() & pairing.control.keys()):
            found.append(
                f"{missing} of {len(seeds)} seeds of {sweep.label(name)} and {sweep.label(controls[name])} are not compared: "
                f"{metric.key} was taken at other steps, or against other real images"
            )
        elif (
            pairing.own
            and not pairing.control
            and any(r.counts and r.planned.combination == controls[name] for r in results)
        ):
            found.append(
                f"{sweep.label(name)} is not compared with {sweep.label(controls[name])}: {metric.key} was taken in another way"
            )
    return found
