"""Runs read into plain data: groups over seeds, differences of configs, scores and curves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from ..runs.folder import Run
from ..runtime.errors import UserError, nearest
from .columns import Column, columns_of, curves_of, headline, or_none
from .configs import differences, group_names, grouped, matches_features
from .measurements import FAILED, measurements, tail_mean

DATA = re.compile(r"data\.(path|image_size|scale|channels|lr_path|degradation\..*)")
"""Fields in which runs must agree to learn the same."""

TYPICAL = {
    "fm/share": ("share", 0.5),
    "health/diversity": ("diversity", 0.25),
    "time/images_per_second": ("images/s", 0.5),
}
"""Measures of training that are shown beside the scores, with their heading: means over that last part of each run's
read-outs. Images per second are as the runs were made: other work on the machine slows them."""


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

    @property
    def failed(self) -> bool:
        return self.state in FAILED


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    members: tuple[Member, ...]
    control: bool
    """Whether the others are compared with this one."""
    typical: Mapping[str, float | None]
    """By the keys of `TYPICAL`."""


@dataclass(frozen=True)
class Comparison:
    """All there is to know about runs side by side. Places are those of `groups`."""

    task: str
    groups: tuple[Group, ...]
    differences: Mapping[str, tuple[str, ...]]
    """Fields that differ, and what each group has."""
    columns: tuple[Column, ...]
    headline: int | None
    """Place of the column that decides; None where nothing was measured that could."""
    by: str
    """`last` or `best`: which value of it."""
    curves: Mapping[str, pd.DataFrame] = field(repr=False, compare=False)
    """By key, see `curves_of`."""
    measurements: pd.DataFrame = field(repr=False, compare=False)
    """The table of all measurements, see `measurements.COLUMNS`."""
    warnings: tuple[str, ...] = ()

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
        names_and_tasks = " and ".join(f"{name} ({task})" for task, name in tasks.items())
        raise UserError(
            f"{names_and_tasks} learn different tasks and have no measure in common; compare runs of one task"
        )
    names = [run.name for run in runs]
    names = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
    places = grouped(configs)
    labels = group_names([[names[i] for i in group] for group in places])
    heads = [configs[group[0]] for group in places]
    label_of = {i: label for label, group in zip(labels, places, strict=True) for i in group}
    table = measurements(runs, names, [label_of[i] for i in range(len(runs))], configs)
    typical = {key: tail_mean(table, key, part) for key, (_, part) in TYPICAL.items()}
    known = dict(zip(labels, labels, strict=True)) | {name: label_of[i] for i, name in enumerate(names)}
    if control is not None and control not in known:
        raise UserError(f"--control {control}: no run or group here is called so{nearest(control, list(known))}")
    plain = [label for label, head in zip(labels, heads, strict=True) if not matches_features(head)]
    anchor = known[control] if control is not None else plain[0] if len(plain) == 1 < len(labels) else None
    groups = tuple(
        Group(
            label,
            tuple(_member(runs[i], names[i], configs[i]) for i in group),
            label == anchor,
            {key: or_none(values.get(label)) for key, values in typical.items()},
        )
        for label, group in zip(labels, places, strict=True)
    )
    columns = columns_of(table, labels)
    deciding = headline(columns, by, metric, names)
    curves = curves_of(table, None if deciding is None else columns[deciding])
    comparison = Comparison(next(iter(tasks)), groups, differences(heads), columns, deciding, by, curves, table)
    return replace(comparison, warnings=tuple(_cautions(comparison, [run.env() for run in runs])))


def _member(run: Run, name: str, config: Mapping[str, Any]) -> Member:
    status, steps = run.status(), int(config.get("train", {}).get("steps", 0))
    step, message = int(status.get("step") or 0), status.get("message")
    return Member(name, str(run.path), int(config.get("seed", 0)), run.state, step, steps, message)


def _cautions(comparison: Comparison, environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader has to beware of, a sentence each; `environments` are env.json of the runs."""
    data = [field for field in comparison.differences if DATA.fullmatch(field)]
    if data:
        yield f"the runs learn from different data ({', '.join(data)}): their measures say little about each other"
    for group in comparison.groups:
        failed = [m for m in group.members if m.failed]
        if failed:
            states = " or ".join(dict.fromkeys(m.state for m in failed))
            steps = ", ".join(str(m.step) for m in failed)
            yield f"{len(failed)} of {len(group.members)} runs of {group.name} {states} (at step {steps}): not counted"
        for m in group.members:
            if not m.failed and m.state != "finished":
                yield f"{m.name} is {m.state} at step {m.step} of {m.steps}: what it shows is not its end"
    versions = sorted({f"fmrun {env.get('fmrun')} and torch {env.get('torch')}" for env in environments})
    if len(versions) > 1:
        yield f"the runs were trained by different versions ({', '.join(versions)}), which may differ in what they learn"
    column, ends = comparison.column, {m.step for group in comparison.groups for m in group.members if not m.failed}
    if (
        column is not None
        and comparison.by == "last"
        and column.step is not None
        and max(ends, default=0) > column.step
    ):
        yield f"{column.label} is compared at step {column.step}, the last at which all that count have it"
