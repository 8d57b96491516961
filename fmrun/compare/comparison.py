"""Runs read into plain data: groups over seeds, differences of configs, scores and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import pandas as pd

from ..errors import UserError, nearest
from ..health import Health
from ..runs import Run
from .cautions import cautions
from .columns import Column, Curve, columns_of, curves_of, headline, or_none
from .configs import Difference, differences, facts, group_names, grouped, matches_features
from .measurements import FAILED, measurements, tail_mean


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
    """Mean over the last half of training, as the runs were made: other work on the machine slows them."""


@dataclass(frozen=True)
class Comparison:
    """All there is to know about runs side by side. Places are those of `groups`."""

    task: str
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    columns: tuple[Column, ...]
    headline: int | None
    """Place of the column that decides; None where nothing was measured that could."""
    by: str
    """`last` or `best`: which value of it."""
    curves: tuple[Curve, ...]
    telling: int
    """How many of the curves, the first ones, tell the most."""
    facts: tuple[str, ...]
    """What all these runs are, in words."""
    measurements: pd.DataFrame = field(repr=False, compare=False)
    """The table of all measurements, see `measurements.COLUMNS`."""
    warnings: tuple[str, ...] = ()

    @property
    def column(self) -> Column | None:
        return None if self.headline is None else self.columns[self.headline]

    @property
    def alike(self) -> bool:
        """Whether the column that decides tells two groups apart."""
        return len(self.ranking) > 1

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


def compare(runs: Sequence[Run], metric: str | None = None, by: str = "last", control: str | None = None) -> Comparison:
    """Read these runs. `metric` names the measure that decides, `by` (`last` or `best`) which of its values, `control` the
    group, or a run of it, that the others are compared with: by default the only one without feature matching.

    UserError for fewer than two runs, for runs of different tasks, and for a metric or control that is not there.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())
    if len(runs) < 2:
        raise UserError("a comparison needs two runs or more; `fmrun runs` lists them")
    configs = [run.config() for run in runs]
    tasks = {str(config.get("task", "generate")): run.name for config, run in zip(configs, runs, strict=True)}
    if len(tasks) > 1:
        told = " and ".join(f"{name} ({task})" for task, name in tasks.items())
        raise UserError(f"{told} learn different tasks and have no measure in common; compare runs of one task")
    names = [run.name for run in runs]
    names = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
    places = grouped(configs)
    members = [[names[i] for i in group] for group in places]
    labels, heads = group_names(members), [configs[group[0]] for group in places]
    chosen = _control(control, labels, members, heads)
    label_of = {i: label for label, group in zip(labels, places, strict=True) for i in group}
    read_outs = [run.metrics() for run in runs]
    table = measurements(runs, names, [label_of[i] for i in range(len(runs))], configs, read_outs)
    tails = {"fm/share": 0.5, "health/diversity": 0.25, "time/images_per_second": 0.5}
    typical = [tail_mean(table, metric, part) for metric, part in tails.items()]
    groups = tuple(
        Group(
            label,
            tuple(_member(runs[i], names[i], configs[i], read_outs[i]) for i in group),
            matches_features(configs[group[0]]),
            label == chosen,
            *(or_none(values.get(label)) for values in typical),
        )
        for label, group in zip(labels, places, strict=True)
    )
    columns = columns_of(table, labels)
    deciding = headline(columns, by, metric, names)
    curves, telling = curves_of(table, labels, None if deciding is None else columns[deciding])
    task, apart, same = next(iter(tasks)), differences(heads), facts(heads)
    found = Comparison(task, groups, apart, columns, deciding, by, curves, telling, same, table)
    return replace(found, warnings=tuple(cautions(found, [run.env() for run in runs])))


def _member(run: Run, name: str, config: Mapping[str, Any], read_outs: Sequence[dict[str, Any]]) -> Member:
    health = Health(balanced=config.get("feature_matching", {}).get("balance") == "gradient")
    remarks = tuple((row["step"], sentence) for row in read_outs if (sentence := health.read(row)))
    status, steps = run.status(), int(config.get("train", {}).get("steps", 0))
    step, message = int(status.get("step") or 0), status.get("message")
    return Member(name, str(run.path), int(config.get("seed", 0)), run.state, step, steps, message, remarks)


def _control(
    asked: str | None, labels: Sequence[str], names: Sequence[Sequence[str]], heads: Sequence[Mapping[str, Any]]
) -> str | None:
    if asked is None:
        plain = [label for label, head in zip(labels, heads, strict=True) if not matches_features(head)]
        return plain[0] if len(plain) == 1 and len(heads) > 1 else None
    for label, own in zip(labels, names, strict=True):
        if asked == label or asked in own:
            return label
    known = [*labels, *(name for own in names for name in own)]
    raise UserError(f"--control {asked}: no run or group here is called so{nearest(asked, known)}")


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, by the names of the attributes of `Comparison` and of what it holds, without the table
    of measurements (`--csv`); and `metric` (key of the column that decides, or null), `control` (name or null), `order`
    (names, the best first), `verdict`, and `pairs`: every other group against the control, or else the best, as `group`,
    `other` and what `Margin` has."""
    from .verdict import against, verdict

    names, column = [group.name for group in comparison.groups], comparison.column
    anchor, margins = against(comparison)
    pairs = [{"group": names[place], "other": names[anchor or 0], **asdict(m)} for place, m in margins.items()]
    return _plain(comparison) | {
        "metric": None if column is None else column.key,
        "control": None if comparison.control is None else names[comparison.control],
        "order": [names[i] for i in comparison.order],
        "verdict": asdict(verdict(comparison)),
        "pairs": pairs,
    }


def _plain(value: Any) -> Any:
    """Data classes as dicts, without the tables in them; tuples, points of a curve among them, as lists."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    return list(map(_plain, value)) if isinstance(value, tuple) else value
