"""A comparison in the terminal: the verdict, scores, differences of configs."""

from __future__ import annotations

from collections.abc import Sequence

from ..measures import measure, show, show_interval
from ..report import escape, format_table
from ..tables import fitted
from .cautions import behind
from .columns import Column, Score
from .comparison import Comparison
from .configs import short_fields, show_value
from .groups import Group
from .speed import STEADY
from .verdict import against, show_p, verdict

FIELDS = 12
"""Fields shown of configs that differ in more."""


def text(comparison: Comparison) -> str:
    """All that `fmrun compare` prints for a reader; lines are as long as they need to be, and tables fit into a terminal
    wherever they can."""
    found = verdict(comparison)
    parts = [escape(part) for part in (found.sentence, found.detail) if part]
    parts += [_scores(comparison)]
    if (pairs := paired_rows(comparison)) is not None:
        parts.append(f"{format_table(pairs[0], pairs[1])}\n{pairs[2]}")
    if comparison.shown_differences:
        parts.append(_differences(comparison))
    if found.reasons:
        parts.append("\n".join(f"- {escape(reason)}" for reason in found.reasons))
    return "\n\n".join(["\n".join(parts[:2]) if found.detail else parts[0], *parts[(2 if found.detail else 1) :]])


PAIRED = "by {}, over the same seeds: positive is better, p after Holm's correction"


def paired_rows(comparison: Comparison) -> tuple[list[str], list[list[str]], str] | None:
    """Every group against the control or else the best: heads, a row for each, and what they are. None where seeds do not
    pair."""
    found = against(comparison)
    if found is None or comparison.column is None:
        return None
    anchor, margins = found
    key = comparison.column.key
    rows = []
    for place, margin in margins.items():
        interval = margin.interval
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        span = f"{show(key, interval.low)} to {show(key, interval.high)}"
        name = comparison.groups[place].name
        rows.append([name, str(interval.count), f"{show(key, interval.mean)}", span, show_p(margin.p)])
    name = comparison.groups[anchor].name
    return [f"against {name}", "seeds", "better by", "95 % interval", "p"], rows, PAIRED.format(comparison.column.label)


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


def speed_note(comparison: Comparison) -> str | None:
    """What images per second are, and why there is no cost of a step where speeds varied too much to tell."""
    spreads = [g.speed_spread for g in comparison.groups if g.speed_spread is not None]
    if not spreads:
        return None
    told = "images/s: median over training, as run"
    withheld = comparison.control is not None and any(g.step_cost is None for g in comparison.groups)
    if withheld and max(spreads) > STEADY:
        told += (
            f"; of one setting it varied {max(spreads):.2g}-fold, so that it does not say what a step costs: "
            "`fmrun bench` measures that"
        )
    return told


def levels(columns: Sequence[Column]) -> list[tuple[str, list[float | None]]]:
    """Rows of what scores are held against, for these columns: real images, and bicubic upscaling, where there are such."""
    rows = [
        ("(real images)", [column.floor for column in columns]),
        ("(bicubic)", [column.reference for column in columns]),
    ]
    return [(name, values) for name, values in rows if any(value is not None for value in values)]


def _scores(comparison: Comparison) -> str:
    """A table of groups, then of what they are held against."""
    groups = [comparison.groups[i] for i in comparison.order]
    if not comparison.alike:
        return _own_scores(comparison)
    order = sorted(range(len(comparison.columns)), key=lambda i: i != comparison.headline)
    deciding = [comparison.columns[i] for i in order if comparison.columns[i].better is not None]
    beside = levels(deciding)
    columns: list[tuple[str, list[str]]] = []

    def add(head: str, cells: Sequence[str], held_against: Sequence[str] = ()) -> None:
        if set(cells) != {"-"}:
            columns.append((head, [*cells, *(held_against or [""] * len(beside))]))

    if any(len(g.members) > 1 for g in groups):
        add("seeds", [str(len(g.members)) for g in groups])
    if any(m.state != "finished" for g in groups for m in g.members):
        add("state", [state(g) for g in groups])
    for i, column in enumerate(deciding):
        late = column.dated or bool(column.source == "eval" and behind(groups, [column]))
        against = [values[i] for _, values in beside]
        add(
            column.label,
            [cell(column, column.last[at], steps=late) for at in comparison.order],
            ["-" if value is None else show(column.key, value) for value in against],
        )
        if column.has_better:
            add("best", [cell(column, column.best[at], steps=True) for at in comparison.order])
    add("share", ["-" if g.share is None else show("fm/share", g.share) for g in groups])
    add("diversity", ["-" if g.diversity is None else show("health/diversity", g.diversity) for g in groups])
    add("step cost", [cost(g) for g in groups])
    add("images/s", ["-" if g.images_per_second is None else f"{g.images_per_second:.0f}" for g in groups])
    names = [*(f"{g.name} *" if g.control else g.name for g in groups), *(name for name, _ in beside)]
    notes = ["* what the others are compared with"] if any(g.control for g in groups) else []
    if any("±" in c for _, told in columns for c in told):
        notes.append("± half of the 95 % interval over seeds")
    if (note := speed_note(comparison)) is not None:
        notes.append(note)
    return "\n".join([fitted([("run", names)], columns), *notes])


def own_scores(comparison: Comparison) -> list[tuple[str, list[tuple[Column, Score] | None]]]:
    """Of groups that no measure has in common: for each measure its name and, one a group, the column in which that was
    measured by it, with its score there."""
    found: dict[tuple[str, str], list[tuple[Column, Score] | None]] = {}
    for column in comparison.columns:
        if column.better is None:
            continue
        row = found.setdefault((column.key, column.source), [None] * len(comparison.groups))
        for i, score in enumerate(column.scores(comparison.by)):
            if score is not None and row[i] is None:
                row[i] = column, score
    told = {measure(key).label: 0 for key, _ in found}
    for key, _ in found:
        told[measure(key).label] += 1
    return [
        (measure(key).label + (", in training" if source == "training" and told[measure(key).label] > 1 else ""), row)
        for (key, source), row in found.items()
    ]


def _own_scores(comparison: Comparison) -> str:
    """Each group by its own measures, with what its own real images or bicubic upscaling reach."""

    def told(found: tuple[Column, Score] | None) -> str:
        if found is None:
            return "-"
        column, score = found
        beside = next(
            ((w, v) for w, v in (("real", column.floor), ("bicubic", column.reference)) if v is not None), None
        )
        return cell(column, score, steps=True) + (f" ({beside[0]} {show(column.key, beside[1])})" if beside else "")

    names = [comparison.groups[i].name for i in comparison.order]
    columns = [(label, [told(row[i]) for i in comparison.order]) for label, row in own_scores(comparison)]
    states = [state(comparison.groups[i]) for i in comparison.order]
    if set(states) != {"finished"}:
        columns.insert(0, ("state", states))
    return fitted([("run", names)], columns)


def _differences(comparison: Comparison) -> str:
    """What differs in the configs, groups downwards or fields downwards, whichever is narrower."""
    every = comparison.shown_differences
    shown = every[:FIELDS]
    names = [comparison.groups[i].name for i in comparison.order]
    values = [[show_value(d.values[i], d.acts[i]) for i in comparison.order] for d in shown]
    tall = format_table(("config", *names), [(d.field, *v) for d, v in zip(shown, values, strict=True)])
    flat = format_table(("config", *short_fields([d.field for d in shown])), list(zip(names, *values, strict=True)))
    narrow = min(tall, flat, key=lambda table: max(map(len, table.splitlines())))
    if more := len(every) - len(shown):
        narrow += f"\n{more} more {'differs' if more == 1 else 'differ'} (--json lists them)"
    folded = len(comparison.differences) - len(every)
    note = "\n· does not act there" if any("·" in v for row in values for v in row) else ""
    return (
        narrow
        + note
        + (
            f"\n{folded} more {'differs' if folded == 1 else 'differ'} without effect (--json lists them)"
            if folded
            else ""
        )
    )
