"""Runs read into plain data: groups over seeds, differences of configs, scores last and best, curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import UserError, nearest
from ..health import Health
from ..measures import REFERENCE, TELLING, measure, poolable, rank
from ..runs import Run
from .columns import Column, columns_of, headline_of
from .configs import Difference, differences, flatten, group_names, grouped, matches_features
from .curves import Curve, Series, is_finite, mean, mean_curve, series, tail_mean

FAILED = ("diverged", "failed")
"""States of runs whose scores do not count: what they reached is no result of the experiment."""

SAVED = ("finished", "stopped")
"""States of runs that have a checkpoint of their own step, unless somebody removed it."""

UNFINISHED = ("running", "interrupted", "stopped", "unknown")

DATA = ("data.path", "data.image_size", "data.scale", "data.channels", "data.lr_path")
"""Fields in which runs must agree to learn the same, beside those of the degradation that act."""

DEGRADATION = "data.degradation."

MACHINE = ("processor", "gpus", "cores", "threads")
"""What of env.json must be equal for speeds to be compared."""


@dataclass(frozen=True)
class Member:
    """One run."""

    name: str
    path: str
    seed: int
    state: str
    step: int
    steps: int
    message: str | None
    """What ended it, if something did."""
    remarks: tuple[tuple[int, str], ...]
    """(step, sentence): what the rules of `health` have to say about its metrics."""

    @property
    def failed(self) -> bool:
        return self.state in FAILED


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    members: tuple[Member, ...]
    matches_features: bool
    control: bool
    """Whether the others are compared with this one."""
    share: float | None
    """Gradient of feature matching relative to the adversarial one, mean over the last half of training."""
    diversity: float | None
    """Of generated images relative to real ones, mean over the last quarter of training."""
    images_per_second: float | None
    """Median over training."""
    step_cost: float | None
    """Time per step relative to the control's; None where there is none, or on another machine."""

    @property
    def failures(self) -> int:
        return sum(member.failed for member in self.members)


@dataclass(frozen=True)
class Comparison:
    """All there is to know about runs side by side."""

    task: str
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    columns: tuple[Column, ...]
    headline: int | None
    """Place of the column that decides; None where nothing was measured that could."""
    by: str
    """`last` or `best`: which value of it."""
    curves: tuple[Curve, ...]
    """The most telling first; `telling` of them."""
    telling: int
    warnings: tuple[str, ...]

    @property
    def column(self) -> Column | None:
        return None if self.headline is None else self.columns[self.headline]

    @property
    def ranking(self) -> tuple[int, ...]:
        """Places of the groups by the column that decides, the best first; without those that have no score."""
        return () if self.column is None else self.column.ranking(self.by)

    @property
    def order(self) -> tuple[int, ...]:
        """Places of all groups as a reader wants them: by rank, then those without a score."""
        return (*self.ranking, *(i for i in range(len(self.groups)) if i not in self.ranking))

    @property
    def shown_differences(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if not d.folded)

    @property
    def control(self) -> int | None:
        return next((i for i, group in enumerate(self.groups) if group.control), None)


def compare(
    runs: Sequence[Run], *, metric: str | None = None, by: str = "last", control: str | None = None
) -> Comparison:
    """Read these runs. `metric` names the measure that decides, `by` (`last` or `best`) which of its values, `control` the
    group, or a run of it, that the others are compared with: by default the only one without feature matching.

    UserError for fewer than two runs, for runs of different tasks, and for a metric or control that is not there.
    """
    if len({run.path.resolve() for run in runs}) < 2:
        raise UserError("a comparison needs two runs or more; `fmrun runs` lists them")
    runs = list({run.path.resolve(): run for run in runs}.values())
    configs = [run.config() for run in runs]
    _one_task(runs, configs)
    names = _distinct(runs)
    places = grouped(configs)
    members = [_member(run, name, config) for run, name, config in zip(runs, names, configs, strict=True)]
    rows = [series(run.metrics()) for run in runs]
    labels = group_names([[(names[i], members[i].seed) for i in group] for group in places])
    heads = [configs[group[0]] for group in places]
    chosen = _control(control, labels, [[names[i] for i in group] for group in places], heads)
    machines = [json.dumps([run.env().get(key) for key in MACHINE]) for run in runs]
    speeds = [_median(rows[i].get("time/images_per_second", {})) for i in range(len(runs))]
    made_by = {f"fmrun {env.get('fmrun')} and torch {env.get('torch')}" for run in runs if (env := run.env())}
    groups = []
    for place, group in enumerate(places):
        groups.append(
            Group(
                labels[place],
                tuple(members[i] for i in group),
                matches_features(heads[place]),
                place == chosen,
                mean(tail_mean(rows[i].get("fm/share", {}), 0.5) for i in group),
                mean(tail_mean(rows[i].get("health/diversity", {})) for i in group),
                mean(speeds[i] for i in group),
                None if chosen is None else _cost(place, chosen, places, heads, speeds, machines),
            )
        )
    columns = columns_of(runs, names, [member.failed for member in members], configs, rows, places)
    headline = headline_of(columns, by, metric, names)
    decisive = None if headline is None else columns[headline]
    curves, telling = _curves(runs, rows, places, decisive)
    return Comparison(
        task=str(configs[0].get("task", "generate")),
        groups=tuple(groups),
        differences=differences(heads),
        columns=columns,
        headline=headline,
        by=by,
        curves=curves,
        telling=telling,
        warnings=tuple(_warnings(groups, heads, machines, sorted(made_by), columns, decisive)),
    )


def _one_task(runs: Sequence[Run], configs: Sequence[Mapping[str, Any]]) -> None:
    first: dict[str, Run] = {}
    for run, config in zip(runs, configs, strict=True):
        first.setdefault(str(config.get("task", "generate")), run)
    if len(first) > 1:
        told = " and ".join(f"{run.name} ({task})" for task, run in first.items())
        raise UserError(f"{told} learn different tasks and have no measure in common; compare runs of one task")


def _distinct(runs: Sequence[Run]) -> list[str]:
    """The runs' names; with their folder where two have the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _member(run: Run, name: str, config: Mapping[str, Any]) -> Member:
    status, health, rows = run.status(), Health(), run.metrics()
    remarks = tuple((row["step"], sentence) for row in rows if (sentence := health.read(row)))
    return Member(
        name,
        str(run.path),
        int(config.get("seed", 0)),
        run.state,
        int(status.get("step") or 0),
        int(config.get("train", {}).get("steps", 0)),
        status.get("message"),
        remarks,
    )


def _control(
    asked: str | None, labels: Sequence[str], names: Sequence[Sequence[str]], heads: Sequence[Mapping[str, Any]]
) -> int | None:
    if asked is not None:
        found = next((i for i, label in enumerate(labels) if asked == label or asked in names[i]), None)
        if found is None:
            known = [*labels, *(name for group in names for name in group)]
            raise UserError(f"--control {asked}: no run or group here is called so{nearest(asked, known)}")
        return found
    plain = [i for i, head in enumerate(heads) if not matches_features(head)]
    return plain[0] if len(plain) == 1 and len(heads) > 1 else None


def _median(values: Series) -> float | None:
    return median(list(values.values())[1:] or values.values()) if values else None


def _cost(
    place: int,
    control: int,
    places: Sequence[Sequence[int]],
    heads: Sequence[Mapping[str, Any]],
    speeds: Sequence[float | None],
    machines: Sequence[str],
) -> float | None:
    """Time per step relative to the control's."""
    if len({machines[i] for i in (*places[place], *places[control])}) > 1:
        return None

    def seconds(group: int) -> float | None:
        batch = heads[group].get("train", {}).get("batch_size")
        speed = mean(speeds[i] for i in places[group])
        return batch / speed if batch and speed else None

    own, theirs = seconds(place), seconds(control)
    return own / theirs if own and theirs else None


# ---- curves


def _curves(
    runs: Sequence[Run],
    rows: Sequence[dict[str, Series]],
    places: Sequence[Sequence[int]],
    decisive: Column | None,
) -> tuple[tuple[Curve, ...], int]:
    """All curves, the telling ones first, and how many these are."""
    found = list(rows)
    if decisive is not None and decisive.source == "eval":
        found = [{**own, decisive.key: _evaluated(run, decisive)} for run, own in zip(runs, rows, strict=True)]
    keys = dict.fromkeys(key for own in found for key, values in own.items() if len(values) > 1)
    for key in [key for key in keys if key.endswith(REFERENCE)]:
        del keys[key]
    first = [
        k
        for k in (*([decisive.key] if decisive else []), *sorted((k for k in keys if _evaluates(k)), key=rank))
        if k in keys
    ]
    first = list(dict.fromkeys([*first[:3], *(key for key in TELLING if key in keys)]))
    rest = [key for key in keys if key not in first]
    curves = tuple(
        Curve(key, tuple(mean_curve([found[i].get(key, {}) for i in group]) for group in places))
        for key in (*first, *rest)
    )
    return curves, len(first)


def _evaluates(key: str) -> bool:
    return key.startswith("eval/") and measure(key).better is not None and rank(key) < rank("eval/overfit")


def _evaluated(run: Run, column: Column) -> Series:
    same = [
        r
        for r in run.evaluations()
        if poolable(r.get("settings", {})) == column.settings and r.get("weights", "ema") == column.weights
    ]
    values = {int(r["step"]): r.get("metrics", {}).get(column.key) for r in same}
    return {step: float(value) for step, value in values.items() if is_finite(value)}


# ---- what to beware of


def _warnings(
    groups: Sequence[Group],
    heads: Sequence[Mapping[str, Any]],
    machines: Sequence[str],
    made_by: Sequence[str],
    columns: Sequence[Column],
    headline: Column | None,
) -> list[str]:
    found = []
    learned = [_learned(flatten(head)) for head in heads]
    fields = dict.fromkeys(field for flat in learned for field in flat)
    differing = [field for field in fields if any(flat.get(field) != learned[0].get(field) for flat in learned)]
    if "data.degradation.kind" in differing:
        differing = [field for field in differing if field in (*DATA, "data.degradation.kind")]
    if differing:
        found.append(
            f"the runs learn from different data ({', '.join(differing)}): their measures say little about each other"
        )
    for group in groups:
        states: dict[str, list[Member]] = {}
        for member in group.members:
            states.setdefault(member.state, []).append(member)
        for state, members in states.items():
            if state in FAILED:
                who = (
                    f"{len(members)} of the {len(group.members)} runs of {group.name}"
                    if len(group.members) > 1
                    else group.name
                )
                found.append(f"{who} {state} at step {', '.join(str(m.step) for m in members)} and does not count")
            elif state in UNFINISHED:
                found += [
                    f"{m.name} is {state} at step {m.step} of {m.steps}: what it shows is not its end" for m in members
                ]
    if len(made_by) > 1:
        found.append(
            f"the runs were trained by different versions ({', '.join(made_by)}), which may differ in more than is seen here"
        )
    if len(set(machines)) > 1:
        found.append("the runs were trained on different machines: their speeds are not comparable")
    found += _stale(groups, columns, headline)
    split = {c.key for c in columns if sum(other.key == c.key and other.source == c.source for other in columns) > 1}
    if split:
        names = ", ".join(sorted(split))
        found.append(f"{names}: measured in more than one way (images, data, weights), each in a column of its own")
    return found


def _learned(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What a run learns from, as far as its config says."""
    own = {field: flat.get(field) for field in DATA}
    if flat.get("task") != "upscale" or own["data.lr_path"] is not None:
        return own
    degradation = {key: value for key, value in flat.items() if key.startswith(DEGRADATION)}
    if degradation.get(f"{DEGRADATION}kind") != "chain":
        return own | {key: value for key, value in degradation.items() if key == f"{DEGRADATION}kind"}
    idle = f"{DEGRADATION}second." if degradation.get(f"{DEGRADATION}passes") == 1 else "\0"
    return own | {key: value for key, value in degradation.items() if not key.startswith(idle)}


def behind(groups: Sequence[Group], columns: Sequence[Column]) -> dict[str, tuple[int, int]]:
    """Runs whose newest score in these columns is older than they are: name to the step of that score and the run's own."""
    newest: dict[str, int] = {}
    for score in (score for column in columns for score in column.last if score is not None):
        for name, (_, step) in score.runs.items():
            newest[name] = max(step, newest.get(name, 0))
    members = (member for group in groups for member in group.members)
    return {m.name: (newest[m.name], m.step) for m in members if newest.get(m.name, m.step) < m.step}


def _stale(groups: Sequence[Group], columns: Sequence[Column], headline: Column | None) -> Iterator[str]:
    """Runs that went on after they were evaluated. Of those that train, or were killed, it is said that they are not at
    their end, and a checkpoint of that step there may be none."""
    evaluated = [column for column in columns if column.source == "eval"]
    found = behind(groups, [headline] if headline in evaluated else evaluated)
    alike: dict[tuple[int, int], list[Member]] = {}
    for member in (member for group in groups for member in group.members):
        if member.name in found and member.state in SAVED:
            alike.setdefault(found[member.name], []).append(member)
    for (scored, now), members in alike.items():
        who = " ".join(member.name for member in members)
        subject, had = (f"run {who} was", "has") if len(members) == 1 else (f"runs {who} were", "have")
        (folder, *others) = {Path(member.path).parent for member in members}
        there = "" if others or folder.resolve() == Path("runs").resolve() else f" --runs-dir {folder}"
        yield f"{subject} scored at step {scored} and {had} gone on to {now}: fmrun eval {who}{there}"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain data; keys stay as they are from version to version:

    `task`, `by`, `headline` (index into `columns`, or null), `warnings`;
    `verdict`: `winner`, `against`, `certain`, `margins` (`other`, an index into `groups`, `difference`, `relative`,
    `interval`, `p`), `sentence`, `detail`, `reasons` (see `verdict.Verdict`);
    `groups`: `name`, `control`, `matches_features`, `share`, `diversity`, `images_per_second`, `step_cost`, `members`
    (`name`, `path`, `seed`, `state`, `step`, `steps`, `message`, `remarks`);
    `differences`: `field`, and one a group `values` and `acts`, and `folded`;
    `columns`: `key`, `label`, `better`, `unit`, `about`, `source`, `weights`, `settings`, `floor`, `reference`, and one a
    group `last` and `best` (`mean`, `low`, `high`, `count`, `runs`: name to [value, step], `reals`: name to which real
    images; or null);
    `curves`: `key`, and one a group `groups`, a list of points (`step`, `mean`, `low`, `high`, `count`); the first
    `telling` of them tell the most.
    """
    from .verdict import verdict

    return {**asdict(comparison), "verdict": asdict(verdict(comparison))}
