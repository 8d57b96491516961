"""Runs read into plain data: groups over seeds, differences of configs, scores last and best, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError, nearest
from ..health import Health
from ..measures import REFERENCE, TELLING, measure, poolable, rank
from ..runs import Run
from .cautions import any_in_common, cautions
from .columns import Column, columns_of, headline_of
from .configs import Difference, differences, facts, group_names, grouped, matches_features
from .curves import Curve, Series, is_finite, mean, mean_curve, series, tail_mean
from .groups import Group, Member
from .speed import machine, speed, step_cost


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
    facts: tuple[str, ...] = ()
    """What all these runs are, in words."""

    @property
    def column(self) -> Column | None:
        return None if self.headline is None else self.columns[self.headline]

    @property
    def alike(self) -> bool:
        """Whether any measure tells two groups apart; else their scores stand for themselves."""
        return any_in_common(self.groups, self.columns)

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
    speeds = [
        speed([runs[i] for i in group], [rows[i].get("time/images_per_second", {}) for i in group], head)
        for group, head in zip(places, heads, strict=True)
    ]
    batches = [head.get("train", {}).get("batch_size") for head in heads]
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
                speeds[place].median,
                speeds[place].spread,
                None if chosen is None else step_cost(speeds[place], batches[place], speeds[chosen], batches[chosen]),
            )
        )
    columns = columns_of(runs, names, [member.state for member in members], configs, rows, places)
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
        warnings=tuple(cautions(groups, heads, list(map(machine, runs)), sorted(made_by), columns, decisive, by)),
        facts=facts(heads),
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
    balanced = config.get("feature_matching", {}).get("balance") == "gradient"
    status, health, rows = run.status(), Health(balanced=balanced), run.metrics()
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


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain data; keys stay as they are from version to version:

    `task`, `by`, `headline` (index into `columns`, or null), `warnings`, `facts` (what all runs are, in words);
    `verdict`: `winner`, `against`, `certain`, `margins` (`other`, an index into `groups`, `difference`, `relative`,
    `interval`, `p`), `sentence`, `detail`, `reasons` (see `verdict.Verdict`);
    `pairs`: every `group` against an `other` (both indices into `groups`), as a margin; empty where seeds do not pair;
    `groups`: `name`, `control`, `matches_features`, `share`, `diversity`, `images_per_second`,
    `speed_spread`, `step_cost`, `members`
    (`name`, `path`, `seed`, `state`, `step`, `steps`, `message`, `remarks`);
    `differences`: `field`, and one a group `values` and `acts`, and `folded`;
    `columns`: `key`, `label`, `better`, `unit`, `about`, `source`, `weights`, `settings`, `floor`, `reference`, `step` (of
    `last`, where all have one in common), `newest` (name to the last step measured), and one a
    group `last` and `best` (`mean`, `low`, `high`, `count`, `runs`: name to [value, step], `reals`: name to which real
    images; or null);
    `curves`: `key`, and one a group `groups`, a list of points (`step`, `mean`, `low`, `high`, `count`); the first
    `telling` of them tell the most.
    """
    from .verdict import against, verdict

    _, margins = against(comparison) or (None, {})
    pairs = [{"group": place, **asdict(margin)} for place, margin in margins.items()]
    return {**asdict(comparison), "verdict": asdict(verdict(comparison)), "pairs": pairs}
