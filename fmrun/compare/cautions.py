"""What a reader of a comparison has to beware of, a sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measures import lone_precision

if TYPE_CHECKING:
    from .comparison import Comparison

DATA = re.compile(r"data\.(path|image_size|scale|channels|lr_path|degradation\..*)")
"""Fields in which runs must agree to learn the same."""

MACHINE = ("processor", "gpus", "cores", "threads")


def cautions(comparison: Comparison, environments: list[Mapping[str, Any]]) -> Iterator[str]:
    """The sentences; `environments` are env.json of the runs."""
    data = [d.field for d in comparison.shown_differences if DATA.fullmatch(d.field)]
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
    if len({str([env.get(key) for key in MACHINE]) for env in environments}) > 1:
        yield "the runs were trained on different machines: their speeds are not comparable"
    yield from _measured(comparison)


def _measured(comparison: Comparison) -> Iterator[str]:
    for i, group in enumerate(comparison.groups):
        ways: dict[str, dict[str, float]] = {}
        for column in comparison.columns:
            if (score := column.last[i]) is not None:
                ways.setdefault(f"{column.source} {column.weights} {column.settings}", {})[column.key] = score.mean
        for values in ways.values():
            yield from lone_precision(group.name, values)
    evaluated = comparison.measurements.query("source == 'eval'").groupby("run").step.max()
    stale: dict[tuple[int, int, Path], list[str]] = {}
    for member in (member for group in comparison.groups for member in group.members):
        scored = int(evaluated.get(member.name, member.step))
        if member.state in ("finished", "stopped") and scored < member.step:  # others have no checkpoint of their end
            stale.setdefault((scored, member.step, Path(member.path).parent), []).append(member.name)
    for (scored, now, folder), names in stale.items():
        where = "" if folder.resolve() == Path("runs").resolve() else f" --runs-dir {folder}"
        who = " ".join(names)
        yield f"{who}: scored at step {scored}, trained on to step {now} since; to score the end: fmrun eval {who}{where}"
    deciding = comparison.column
    if deciding is not None and comparison.by == "last":
        if deciding.step is not None and deciding.rows["all"].step.max() > deciding.step:
            yield f"{deciding.label} is compared at step {deciding.step}, the last at which all that count have it"
        there = [(g, s) for g, s in zip(comparison.groups, deciding.last, strict=True) if s is not None]
        lacking = [m.name for g, s in there for m in g.members if not m.failed and m.name not in s.runs]
        if lacking:
            at = f" at step {deciding.step}" if deciding.step is not None else ""
            yield f"{', '.join(lacking)}: no {deciding.label}{at}; what is shown of it is without them"
    keys = [(c.key, c.source) for c in comparison.columns]
    split = sorted({key for key, source in keys if keys.count((key, source)) > 1})
    if split:
        yield f"{', '.join(split)}: measured in more than one way (images, data, weights), each in a column of its own"
