"""What a reader of a comparison has to beware of, a sentence each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measures import lone_precision
from .columns import Column
from .configs import flatten
from .groups import FAILED, Group, Member

SAVED = ("finished", "stopped")
"""States of runs that have a checkpoint of their own step, unless somebody removed it."""

UNFINISHED = ("running", "interrupted", "stopped", "unknown")

DATA = ("data.path", "data.image_size", "data.scale", "data.channels", "data.lr_path")
"""Fields in which runs must agree to learn the same, beside those of the degradation that act."""

DEGRADATION = "data.degradation."


def cautions(
    groups: Sequence[Group],
    heads: Sequence[Mapping[str, Any]],
    machines: Sequence[str],
    made_by: Sequence[str],
    columns: Sequence[Column],
    headline: Column | None,
    by: str,
) -> list[str]:
    found = []
    alike = any_in_common(groups, columns)  # else the verdict says it all
    learned = [_learned(flatten(head)) for head in heads]
    fields = dict.fromkeys(field for flat in learned for field in flat)
    differing = [field for field in fields if any(flat.get(field) != learned[0].get(field) for flat in learned)]
    if "data.degradation.kind" in differing:
        differing = [field for field in differing if field in (*DATA, "data.degradation.kind")]
    if differing and alike:
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
                counts = "does not count" if len(members) == 1 else "do not count"
                found.append(f"{who} {state} at step {', '.join(str(m.step) for m in members)} and {counts}")
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
    found += _lone_precision(groups, columns)
    found += _stale(groups, columns, headline)
    if headline is not None and by == "last":
        found += _counted(groups, headline)
    split = {c.key for c in columns if sum(other.key == c.key and other.source == c.source for other in columns) > 1}
    if split and alike:
        names = ", ".join(sorted(split))
        found.append(f"{names}: measured in more than one way (images, data, weights), each in a column of its own")
    return found


def _lone_precision(groups: Sequence[Group], columns: Sequence[Column]) -> Iterator[str]:
    """Of groups whose precision is high and whose recall or coverage next to nothing, in the same way of measuring."""
    ways: dict[tuple[str, str, str], list[Column]] = {}
    for column in columns:
        settings = json.dumps(column.settings, sort_keys=True)
        ways.setdefault((column.source, column.weights, settings), []).append(column)
    for own in ways.values():
        for i, group in enumerate(groups):
            values = {column.key: score.mean for column in own if (score := column.last[i]) is not None}
            yield from lone_precision(group.name, values)


def any_in_common(groups: Sequence[Group], columns: Sequence[Column]) -> bool:
    """Whether any measure was taken in the same way of two groups; True where fewer than two were measured at all."""
    deciding = [column for column in columns if column.better is not None]
    measured = [any(column.last[i] is not None for column in deciding) for i in range(len(groups))]
    return sum(measured) < 2 or any(sum(score is not None for score in column.last) > 1 for column in deciding)


def _counted(groups: Sequence[Group], column: Column) -> Iterator[str]:
    """That a column is of an earlier step than some of its runs have, and which runs of a group that has a score have none."""
    if column.step is not None and max(column.newest.values()) > column.step:
        yield f"{column.label} is compared at step {column.step}, the last at which all that count have it"
    there = [(group, score) for group, score in zip(groups, column.last, strict=True) if score is not None]
    names = [m.name for group, score in there for m in group.members if not m.failed and m.name not in score.runs]
    if names:
        at = f" at step {column.step}" if column.step is not None else ""
        verb = "has" if len(names) == 1 else "have"
        yield f"{', '.join(names)} {verb} no {column.label}{at}: what is shown of it is without them"


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
    for name, step in (item for column in columns for item in column.newest.items()):
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
