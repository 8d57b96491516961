"""A comparison as tables and as plain data: all that `fmrun compare` prints of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..metrics.measures import show_all
from ..runtime.report import escape
from ..runtime.table import Table
from .columns import Column, Score
from .comparison import TYPICAL, Comparison, Group
from .configs import IDLE
from .verdict import against, show_p, verdict


def text(comparison: Comparison) -> str:
    """Verdict, scores, differences between groups and between configs, as lines for a terminal."""
    outcome = verdict(comparison)
    parts = ["\n".join(escape(sentence) for sentence in (outcome.sentence, outcome.detail) if sentence)]
    parts += [table.text() for table in (score_table(comparison), pairs(comparison), settings(comparison)) if table]
    return "\n\n".join(parts)


def score_table(comparison: Comparison) -> Table:
    """A row per group, in `Comparison.order`, then what scores are held against: real images, bicubic upscaling."""
    groups = [comparison.groups[i] for i in comparison.order]
    deciding = [column for column in comparison.columns if column.better is not None]
    deciding.sort(key=lambda column: column is not comparison.column)
    floors, references = [c.floor for c in deciding], [c.reference for c in deciding]
    beside = {"(real images)": floors, "(bicubic)": references}
    beside = {name: values for name, values in beside.items() if any(value is not None for value in values)}
    names = [f"{g.name} *" if g.control else g.name for g in groups]
    columns: list[tuple[str, str, Sequence[str]]] = [("run", "l", [*names, *beside])]
    if any(len(g.members) > 1 for g in groups):
        columns.append(("seeds", "r", _seeds(comparison)))
    if any(m.state != "finished" for g in groups for m in g.members):
        columns.append(("state", "l", [state(g) for g in groups]))
    for place, column in enumerate(deciding):
        arrow, at = "↓" if column.better == "lower" else "↑", "" if column.step is None else f" @{column.step}"
        last, best = ([column.scores(by)[i] for i in comparison.order] for by in ("last", "best"))
        cells = _cells(column, last, column.step is None, [values[place] for values in beside.values()])
        columns.append((f"{column.label} {arrow}{at}", "r", cells))
        if column is comparison.column and any(
            one and two and one.mean != two.mean for one, two in zip(last, best, strict=True)
        ):
            columns.append(("best", "r", _cells(column, best, True)))
    for key, (name, _) in TYPICAL.items():
        columns.append((name, "r", show_all(key, [g.typical[key] for g in groups])))
    columns = [column for column in columns if set(column[2]) != {"-"}]
    notes = ["* what the others are compared with"] if comparison.control is not None else []
    if any("±" in cell for _, _, cells in columns for cell in cells):
        notes.append("± half of the 95 % interval over seeds")
    heads, sides, every = zip(*columns, strict=True)
    rows = zip(*([*own, *[""] * (len(groups) + len(beside) - len(own))] for own in every), strict=True)
    return Table(heads, list(rows), "".join(sides), notes)


def pairs(comparison: Comparison) -> Table | None:
    """Every group against the control, or else the best; None for fewer than two that share seeds with it."""
    column, (anchor, margins) = comparison.column, against(comparison)
    if column is None or anchor is None or len(margins) < 2:
        return None
    values = [value for m in margins.values() for value in (m.mean, m.low, m.high)]
    cells = show_all(column.key, values, [(m.high - m.low) / 2 for m in margins.values()])
    rows = [
        [comparison.groups[place].name, str(m.count), mean, f"{low} to {high}", show_p(m.p)]
        for (place, m), mean, low, high in zip(margins.items(), cells[::3], cells[1::3], cells[2::3], strict=True)
    ]
    family = "" if anchor == comparison.control else " over all pairs of groups"
    note = f"by {column.label}, over the same seeds: positive is better; p after Holm's correction{family}"
    name = comparison.groups[anchor].name
    return Table([f"against {name}", "seeds", "better by", "95 % interval", "p"], rows, "lrrrr", [note])


def settings(comparison: Comparison) -> Table | None:
    """What differs in the configs, a row per field."""
    if not comparison.differences:
        return None
    rows = [[field, *(values[i] for i in comparison.order)] for field, values in comparison.differences.items()]
    notes = [f"{IDLE} does not act there"] if any(IDLE in row for row in rows) else []
    names = [comparison.groups[i].name for i in comparison.order]
    return Table(["config", *names], rows, "l" * (1 + len(names)), notes)


def state(group: Group) -> str:
    """`finished`, or what is the matter with some: `1 of 5 diverged`."""
    states = [member.state for member in group.members]
    odd = [s for s in dict.fromkeys(states) if s != "finished"]
    return states[0] if len({*states}) == 1 else ", ".join(f"{states.count(s)} of {len(states)} {s}" for s in odd)


def _seeds(comparison: Comparison) -> list[str]:
    """Of each group's runs, how many count by the column that decides."""
    cells = []
    for i in comparison.order:
        score = None if comparison.column is None else comparison.column.scores(comparison.by)[i]
        count, runs = 0 if score is None else score.count, len(comparison.groups[i].members)
        cells.append(str(runs) if count == runs else f"{count} of {runs}")
    return cells


def _cells(
    column: Column, scores: Sequence[Score | None], steps: bool, beside: Sequence[float | None] = ()
) -> list[str]:
    """`0.0123 ±0.0020`, with `@500` where the step is wanted, then what is held against it; all with equal decimals."""
    halves = [None if s is None or s.low is None or s.high is None else (s.high - s.low) / 2 for s in scores]
    cells = show_all(column.key, [*(None if s is None else s.mean for s in scores), *beside], halves)
    for place, (score, half) in enumerate(zip(scores, show_all(column.key, halves, halves), strict=True)):
        at = sorted({step for _, step in score.runs.values()}) if score and steps else []
        cells[place] += (f" ±{half}" if half != "-" else "") + (
            f" @{'-'.join(map(str, at[:1] + at[1:][-1:]))}" if at else ""
        )
    return cells


def to_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data: attributes of `Comparison`, without curves and measurements (`--csv`), with the column
    that decides and groups by name; and `order` (the best first), `verdict`, and `pairs`: every other group against the
    control, or else the best, as `group`, `other` and what `Margin` has."""
    names, column = [group.name for group in comparison.groups], comparison.column
    anchor, margins = against(comparison)
    return {
        "task": comparison.task,
        "metric": None if column is None else column.key,
        "by": comparison.by,
        "control": None if comparison.control is None else names[comparison.control],
        "order": [names[i] for i in comparison.order],
        "verdict": asdict(verdict(comparison)),
        "pairs": [{"group": names[i], "other": names[anchor or 0], **asdict(m)} for i, m in margins.items()],
        "groups": list(map(asdict, comparison.groups)),
        "differences": comparison.differences,
        "columns": [{k: v for k, v in asdict(replace(c, rows={})).items() if k != "rows"} for c in comparison.columns],
        "warnings": comparison.warnings,
    }
