"""A comparison in the terminal: the verdict, scores, differences of configs."""

from __future__ import annotations

from collections.abc import Sequence

from ..measures import show, show_interval
from ..report import format_table
from .cautions import behind
from .columns import Column, Score
from .comparison import Comparison
from .configs import short_fields, show_value
from .groups import Group
from .verdict import verdict

WIDTH = 80


def text(comparison: Comparison) -> str:
    """All that `fmrun compare` prints for a reader; lines are as long as they need to be, and tables no wider than 80
    columns where their columns can be put one below the other."""
    found = verdict(comparison)
    parts = [found.sentence, *([found.detail] if found.detail else [])]
    parts += [_scores(comparison)]
    if comparison.shown_differences:
        parts.append(_differences(comparison))
    if found.reasons:
        parts.append("\n".join(f"- {reason}" for reason in found.reasons))
    return "\n\n".join(["\n".join(parts[:2]) if found.detail else parts[0], *parts[(2 if found.detail else 1) :]])


def cell(column: Column, score: Score | None, steps: bool = False) -> str:
    """`0.0123 ±0.002`, with `@500` where the step is wanted; `-` where there is nothing."""
    if score is None:
        return "-"
    told, half = show_interval(column.key, score.mean, score.low, score.high)
    told += f" ±{half}" if half else ""
    if steps and score.steps:
        told += f" @{score.steps[0]}" if len(score.steps) == 1 else f" @{score.steps[0]}-{score.steps[-1]}"
    return told


def state(group: Group) -> str:
    """`finished`, or what is the matter with some: `1 of 5 diverged`."""
    states = [member.state for member in group.members]
    if len(set(states)) == 1:
        return states[0]
    odd = [s for s in dict.fromkeys(states) if s != "finished"]
    return ", ".join(f"{states.count(s)} of {len(states)} {s}" for s in odd)


def cost(group: Group) -> str:
    return "-" if group.step_cost is None else f"{group.step_cost:.2f}x"


def _scores(comparison: Comparison) -> str:
    """A table of groups; measures that make it wider than the terminal go into tables below."""
    groups = [comparison.groups[i] for i in comparison.order]

    def cells(column: Column, scores: Sequence[Score | None], steps: bool = False) -> list[str]:
        return [cell(column, scores[i], steps) for i in comparison.order]

    name = ("run", [f"{g.name} *" if g.control else g.name for g in groups])
    columns: list[tuple[str, list[str]]] = []
    if any(len(g.members) > 1 for g in groups):
        columns.append(("seeds", [str(len(g.members)) for g in groups]))
    if any(m.state != "finished" for g in groups for m in g.members):
        columns.append(("state", [state(g) for g in groups]))
    order = sorted(range(len(comparison.columns)), key=lambda i: i != comparison.headline)
    for column in (comparison.columns[i] for i in order):
        if column.better is None:
            continue
        late = bool(column.source == "eval" and behind(groups, [column]))
        columns.append((column.label, cells(column, column.last, steps=late)))
        if column.best != column.last:
            columns.append(("best", cells(column, column.best, steps=True)))
    columns += [
        ("share", ["-" if g.share is None else show("fm/share", g.share) for g in groups]),
        ("diversity", ["-" if g.diversity is None else show("health/diversity", g.diversity) for g in groups]),
        ("step cost", [cost(g) for g in groups]),
        ("images/s", ["-" if g.images_per_second is None else f"{g.images_per_second:.0f}" for g in groups]),
    ]
    columns = [(head, told) for head, told in columns if set(told) != {"-"}]
    notes = ["* what the others are compared with"] if any(g.control for g in groups) else []
    if any("±" in c for _, told in columns for c in told):
        notes.append("± half of the 95 % interval over seeds")
    return "\n".join([*_tables(name, columns), *notes])


def _tables(name: tuple[str, list[str]], columns: Sequence[tuple[str, list[str]]]) -> list[str]:
    """The columns in as few tables of at most `WIDTH` as hold them, an empty line between."""

    def width(head: str, cells: Sequence[str]) -> int:
        return max(map(len, (head, *cells)))

    tables: list[list[tuple[str, list[str]]]] = [[]]
    used = width(*name)
    for column in columns:
        if tables[-1] and used + 2 + width(*column) > WIDTH:
            tables.append([])
            used = width(*name)
        tables[-1].append(column)
        used += 2 + width(*column)
    made = []
    for table in tables:
        heads, cells = zip(name, *table, strict=True)
        made.append(format_table(heads, list(zip(*cells, strict=True))))
    return ["\n\n".join(made)]


def _differences(comparison: Comparison) -> str:
    """What differs in the configs, groups downwards or fields downwards, whichever is narrower."""
    shown = comparison.shown_differences
    names = [comparison.groups[i].name for i in comparison.order]
    values = [[show_value(d.values[i], d.acts[i]) for i in comparison.order] for d in shown]
    tall = format_table(("config", *names), [(d.field, *v) for d, v in zip(shown, values, strict=True)])
    flat = format_table(("config", *short_fields([d.field for d in shown])), list(zip(names, *values, strict=True)))
    narrow = min(tall, flat, key=lambda table: max(map(len, table.splitlines())))
    folded = len(comparison.differences) - len(shown)
    note = "\n· does not act there" if any("·" in v for row in values for v in row) else ""
    return narrow + note + (f"\n{folded} more differ without effect (--json lists them)" if folded else "")
