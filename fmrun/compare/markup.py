"""Pieces of HTML that the sections of a page share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ..measures import EXTRACTORS, show_interval
from .columns import Column, Score
from .comparison import Comparison
from .verdict import Verdict

COLOURS = 8
"""Of groups in page.css; the control has its own."""


@dataclass(frozen=True)
class View:
    """A comparison and what the sections of its page share."""

    comparison: Comparison
    verdict: Verdict
    colours: tuple[str, ...]
    """CSS class of each group."""

    @property
    def order(self) -> tuple[int, ...]:
        return self.comparison.order


def _(text: object) -> str:
    return escape(str(text), quote=True)


def colours(comparison: Comparison) -> Iterator[str]:
    """The control is grey; the others take the colours in the order they were given, so that a run keeps its colour
    whatever the scores."""
    taken = 0
    for group in comparison.groups:
        if group.control:
            yield "c0"
        else:
            yield f"c{taken % COLOURS + 1}"
            taken += 1


def chip(view: View, place: int) -> str:
    return f'<i class="chip {view.colours[place]}"></i>'


def name_of(view: View, place: int) -> str:
    group = view.comparison.groups[place]
    badges = '<span class="badge">control</span>' if group.control else ""
    if view.verdict.winner == group.name and view.verdict.beats_all:
        badges += '<span class="badge won">best</span>'
    return f"{chip(view, place)}<b>{_(group.name)}</b>{badges}"


def table(kind: str, heads: Sequence[str], rows: Sequence[Sequence[str]], titles: Sequence[str] = ()) -> str:
    """A table whose cells are HTML, and heads text; on a phone each row is a card that names its cells."""
    tips = [*titles, *[""] * (len(heads) - len(titles))]
    top = "".join(
        f'<th title="{_(tip)}">{head_cell(head)}</th>' if tip else f"<th>{head_cell(head)}</th>"
        for head, tip in zip(heads, tips, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<th>{value}</th>" if i == 0 else f'<td data-name="{_(head)}"><span>{value}</span></td>'
            for i, (head, value) in enumerate(zip(heads, row, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    kind = f"{kind} many" if len(rows) > 3 else kind
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def head_cell(head: str) -> str:
    """What stands in brackets, the extractor, goes below."""
    found = re.fullmatch(r"(.+?) \((.+?)\)(.*)", head)
    return f"{_(found[1])}{_(found[3])}<br><small>{_(found[2])}</small>" if found else _(head)


def taken(column: Column) -> str:
    """How a column was measured, in words."""
    told = [f"{column.weights} weights"]
    names = {
        "num": "{} images",
        "eval.num": "at most {} held-out images",
        "eval.kid_num": "{} images",
        "extractor": "features of {}",
        "resolution": "{} px",
    }
    for field, words in names.items():
        if (value := column.settings.get(field)) is not None:
            shown = f"{value:,}" if isinstance(value, int) else EXTRACTORS.get(str(value), value)
            told.append((words.removesuffix("s") if value == 1 else words).format(shown))
    return ("Measured in training: " if column.source == "training" else "Measured by fmrun eval: ") + ", ".join(told)


def score_of(column: Column, score: Score | None) -> str:
    if score is None:
        return '<span class="quiet">–</span>'
    text, half = show_interval(column.key, score.mean, score.low, score.high)
    return f"{text} <small>± {half}</small>" if half else text
