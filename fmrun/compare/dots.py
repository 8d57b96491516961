"""Every group's score on one axis, which holds what scores are held against, and intervals as far as they leave anything
to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..measures import show
from .columns import Column, Score
from .markup import View, _, name_of, score_of, taken
from .plots import Scale, interval_row, tick_labels

NARROWEST = 0.05
"""An axis is at least this part of the largest value on it: less would make much of nothing where nothing else is known."""

WIDEST = 3.0
"""Intervals that would make an axis more than this many times as long leave it, with an arrow."""


def axis(column: Column, scores: Sequence[Score]) -> Scale:
    """An axis, in percents, for these scores: with every seed, with real images or bicubic upscaling where they were
    measured, and else with 0 where that is as good or as bad as can be."""
    values = [v for s in scores for v in (s.mean, *(value for value, _ in s.runs.values()))]
    levels = [v for v in (column.floor, column.reference) if v is not None]
    if not levels and column.unit != "dB" and all(v >= 0 for v in values):
        levels = [0.0]
    low, high = min(*values, *levels), max(*values, *levels)
    spread = max(high - low, NARROWEST * max(abs(low), abs(high))) or 1.0
    middle = (low + high) / 2
    low, high = min(low, middle - spread / 2), max(high, middle + spread / 2)
    ends = [v for s in scores for v in (s.low, s.high) if v is not None]
    room = (WIDEST - 1) / 2 * spread
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    return Scale(low - 0.03 * (high - low), high + 0.03 * (high - low), 0.0, 100.0)


def intervals(view: View) -> str:
    """The section of the page: the best first."""
    column = view.comparison.column
    if column is None or not view.comparison.ranking or not view.comparison.alike:
        return ""
    scores = column.scores(view.comparison.by)
    there = [(place, score) for place in view.comparison.ranking if (score := scores[place]) is not None]
    scale = axis(column, [score for _, score in there])
    control = view.comparison.control
    marked = None if control is None else scores[control]
    drawn = [(v, "floor") for v in (column.floor, column.reference) if v is not None]
    drawn += [(marked.mean, "level")] if marked is not None else []
    rows = []
    for place, score in there:
        seeds = [value for value, _ in score.runs.values()]
        plot = interval_row(scale, score.mean, score.low, score.high, seeds, drawn)
        rows.append(
            f'<li class="{view.colours[place]}"><span class="who">{name_of(view, place)}</span>{plot}'
            f'<span class="value">{score_of(column, score)}</span></li>'
        )
    ticks = scale.ticks(7)
    labels = "".join(
        f'<span style="left:{scale(tick):.2f}%">{_(label)}</span>'
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    )
    when = "at the last step measured" if view.comparison.by == "last" else "at each run's best step"
    if view.comparison.by == "last" and column.step is not None:
        when = f"at step {column.step:,}"
    key = _key(column, [score for _, score in there], scale, marked is not None)
    return (
        f'<section class="intervals"><h2>{_(column.label)}{_(f", {column.unit}" if column.unit else "")}'
        f' <small>{column.better} is better</small></h2><p class="quiet">{_(column.about)} {_(taken(column))}, {when}.</p>'
        f'<ol>{"".join(rows)}</ol><div class="scale" aria-hidden="true"><div>{labels}</div></div>'
        f'<p class="quiet key">{_(" · ".join(key))}</p></section>'
    )


def _key(column: Column, scores: Sequence[Score], scale: Scale, control: bool) -> Iterator[str]:
    if any(score.count > 1 for score in scores):
        yield "Large dots are means, small ones seeds, bars 95 % intervals"
    ends = [v for s in scores for v in (s.low, s.high) if v is not None]
    if any(not scale.low <= v <= scale.high for v in ends):
        yield "an arrow: the interval goes on beyond the axis, as its figures say"
    if control:
        yield "dashed: control"
    for level, what in ((column.floor, "real images against real ones"), (column.reference, "bicubic")):
        if level is not None:
            yield f"dotted: {what}, {show(column.key, level)}"
