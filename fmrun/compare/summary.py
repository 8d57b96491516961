"""All scores in figures: tables that a page shows without scrolling sideways, what decides first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..measures import measure, show
from ..report import counted
from .cautions import behind
from .columns import Column, Score
from .groups import Group
from .markup import View, _, name_of, score_of, table, taken
from .table import levels, own_scores, speed_note, state

MOST = 6
"""Columns of a table beside the names: as many as a window of 1,280 px shows."""

NOTHING = '<span class="quiet">–</span>'


@dataclass(frozen=True)
class Cells:
    """A column of the page."""

    head: str
    values: Sequence[str]
    """HTML."""
    about: str = ""


def summary(view: View) -> str:
    """The section of the page."""
    comparison = view.comparison
    names = [_named(view, i) for i in view.order]
    if comparison.alike:
        columns, beside = _scores(view)
        names += [f'<span class="quiet">{_(name.strip("()"))}</span>' for name in beside]
    else:
        columns = [Cells(label, [_own(row[i]) for i in view.order]) for label, row in own_scores(comparison)]
    if not columns:
        return ""
    tables = math.ceil(len(columns) / MOST)
    size = math.ceil(len(columns) / tables)
    parts = []
    for start in range(0, len(columns), size):
        part = columns[start : start + size]
        rows = [[name, *cells] for name, *cells in zip(names, *(column.values for column in part), strict=True)]
        parts.append(table("cards", ["run", *(c.head for c in part)], rows, ["", *(c.about for c in part)]))
    note = speed_note(comparison) if any(column.head == "images/s" for column in columns) else None
    words = f'<p class="quiet">{_(note)}.</p>' if note is not None else ""
    return f"<section><h2>Summary</h2>{''.join(parts)}{words}</section>"


def _scores(view: View) -> tuple[list[Cells], list[str]]:
    """Columns, and the names of the rows below those of the groups: what scores are held against."""
    comparison = view.comparison
    groups = [comparison.groups[i] for i in view.order]
    order = sorted(range(len(comparison.columns)), key=lambda i: i != comparison.headline)
    deciding = [comparison.columns[i] for i in order if comparison.columns[i].better is not None]
    beside = levels(deciding)
    found: list[Cells] = []

    def add(
        head: str, values: Sequence[str | None], about: str = "", held_against: Sequence[float | None] = ()
    ) -> None:
        if any(value is not None for value in values):
            below = [NOTHING] * len(beside)
            if held_against:
                below = [NOTHING if v is None else show(column.key, v) for v in held_against]
            found.append(Cells(head, [*(NOTHING if value is None else value for value in values), *below], about))

    for i, column in enumerate(deciding):
        dated = column.dated or bool(column.source == "eval" and behind(groups, [column]))
        unit = f" {column.unit}" if column.unit else ""
        add(
            f"{column.label}{unit} {'↓' if column.better == 'lower' else '↑'}",
            _marked(view, column, column.last, dated),
            f"{column.about} {taken(column)}.",
            [values[i] for _, values in beside],
        )
        if column.has_better:
            add("best", _marked(view, column, column.best, True), "Of all steps measured.")
    add("share", [None if g.share is None else show("fm/share", g.share) for g in groups], measure("fm/share").about)
    add(
        "diversity",
        [None if g.diversity is None else show("health/diversity", g.diversity) for g in groups],
        measure("health/diversity").about,
    )
    add(
        "time per step",
        [None if g.step_cost is None else f"{g.step_cost:.2f}×" for g in groups],
        "Relative to the control.",
    )
    if any(g.step_cost is None for g in groups):
        add(
            "images/s",
            [None if g.images_per_second is None else f"{g.images_per_second:,.0f}" for g in groups],
            "Median over training, as run.",
        )
    return found, [name for name, _ in beside]


def _marked(view: View, column: Column, scores: Sequence[Score | None], dated: bool) -> list[str | None]:
    """A cell for each group; those with the best value stand out, unless all have it."""
    means = [score.mean for score in scores if score is not None]
    best = (min if column.better == "lower" else max)(means, default=None)
    cells: list[str | None] = []
    for score in (scores[i] for i in view.order):
        if score is None:
            cells.append(None)
            continue
        text = _with_step(column, score) if dated else score_of(column, score)
        cells.append(f"<strong>{text}</strong>" if score.mean == best and min(means) < max(means) else text)
    return cells


def _with_step(column: Column, score: Score) -> str:
    steps = score.steps
    return f"{score_of(column, score)} <small>step {steps[0]:,}{f' to {steps[-1]:,}' if len(steps) > 1 else ''}</small>"


def _own(found: tuple[Column, Score] | None) -> str:
    """A score that none is compared with, and what it is held against."""
    if found is None:
        return NOTHING
    column, score = found
    level = next(((w, v) for w, v in (("real", column.floor), ("bicubic", column.reference)) if v is not None), None)
    told = f" <small>{level[0]} {show(column.key, level[1])}</small>" if level is not None else ""
    return _with_step(column, score) + told


def _named(view: View, place: int) -> str:
    groups = view.comparison.groups
    seeds = len(groups[place].members)
    told = f' <small class="quiet">{counted(seeds, "seed")}</small>' if any(len(g.members) > 1 for g in groups) else ""
    return name_of(view, place) + told + _state(groups[place])


def _state(group: Group) -> str:
    told = state(group)
    return "" if told == "finished" else f'<span class="badge bad">{_(told)}</span>'
