"""A comparison as one HTML file that needs nothing else, and its figures as files for a paper."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .. import __version__
from ..config.tables import TASKS
from ..measures import Measure, measure
from ..report import Reporter
from ..runs import make_folder, saving, write_atomic
from . import figures, table
from .columns import Column, Point
from .comparison import Comparison
from .verdict import verdict

if TYPE_CHECKING:
    import torch

    from .pictures import Picture


def write(
    comparison: Comparison, path: Path, *, seed: int, device: torch.device, report: Reporter, trust_code: bool = False
) -> None:
    """Write the page, whole or not at all. Raises SaveError when the disk refuses."""
    from .pictures import pictures  # with torch, which takes seconds

    text = page(comparison, pictures(comparison, seed=seed, device=device, report=report, trust_code=trust_code))
    with saving(path):
        make_folder(path.parent)
        write_atomic(path, text.encode())


def write_figures(comparison: Comparison, folder: Path) -> None:
    """Each figure as PDF and PNG, with its legend. Raises SaveError when the disk refuses."""
    drawn = [("intervals", figure) for figure in _intervals(comparison, 480)]
    drawn += [(key, figure) for key, figure in _curves(comparison, legend=True)]
    with saving(folder):
        make_folder(folder)
        for name, figure in drawn:
            for kind in ("pdf", "png"):
                file = folder / f"{re.sub('[^a-zA-Z0-9_.-]+', '-', name)}.{kind}"
                write_atomic(file, figures.encode(figure, kind))


def page(comparison: Comparison, drawn: Sequence[Picture] = ()) -> str:
    """The whole page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    telling = {curve.key for curve in comparison.curves[: comparison.telling]}
    swatches = [_inline(figures.swatch(style)) for style in _styles(comparison)]
    return environment.get_template("page.html.j2").render(
        c=comparison,
        verdict=verdict(comparison),
        samples_of=TASKS[comparison.task].samples_of,
        palette=list(zip(figures.COLOURS, figures.DARK, strict=True)),
        swatches=dict(zip((group.name for group in comparison.groups), swatches, strict=True)),
        pictures=[(p.group, p.caption, base64.b64encode(p.png).decode()) for p in drawn],
        settings=table.settings(comparison),
        scores=table.scores(comparison),
        pairs=table.pairs(comparison),
        intervals=[_inline(figure) for width in (820, 400) for figure in _intervals(comparison, width)],
        curves=[(key in telling, measure(key), _inline(figure)) for key, figure in _curves(comparison, legend=False)],
        version=__version__,
    )


def _inline(figure: Figure) -> Markup:
    return Markup(figures.inline(figure))  # matplotlib escapes what it writes


def _styles(comparison: Comparison) -> list[int]:
    """Of each group: the control's is 0, the others follow in the order in which they were given, whatever their scores."""
    others = itertools.count(1)
    return [0 if group.control else next(others) for group in comparison.groups]


def _levels(column: Column) -> list[tuple[float, str]]:
    """What its scores are held against."""
    known = [(column.floor, "real against real"), (column.reference, "bicubic")]
    return [(value, name) for value, name in known if value is not None]


def _intervals(comparison: Comparison, width: float) -> Iterator[Figure]:
    """The scores that decide over their seeds, where there are any that can be compared."""
    column, styles = comparison.column, _styles(comparison)
    if column is not None and comparison.alike and comparison.ranking:
        scores = [(i, score) for i in comparison.ranking if (score := column.scores(comparison.by)[i]) is not None]
        rows = [
            figures.Row(comparison.groups[i].name, s.mean, s.low, s.high, [v for v, _ in s.runs.values()], styles[i])
            for i, s in scores
        ]
        label = f"{_label(column)} ({column.better} is better)"
        yield figures.dots(rows, label, _levels(column), width)


def _curves(comparison: Comparison, *, legend: bool) -> Iterator[tuple[str, Figure]]:
    """By key; without what is the same throughout."""
    column, styles = comparison.column, _styles(comparison)
    for curve in comparison.curves:
        known = measure(curve.key)
        scale = [1, *[100 if known.unit == "%" else 1] * 3]  # of step, mean, low, high
        lines = [
            (comparison.groups[i].name, np.array([_banded(p) for p in curve.groups[i]], float) * scale, styles[i])
            for i in comparison.order
            if curve.groups[i]
        ]
        levels = _levels(column) if column is not None and column.key == curve.key else []
        if len({mean for _, points, _ in lines for mean in points[:, 1]}) > 1:
            quick = ", in training" if curve.key.startswith("eval/") else ""
            yield curve.key, figures.curves(lines, _label(known, quick), levels, legend)


def _label(known: Column | Measure, more: str = "") -> str:
    return f"{known.label}{more}{', ' if known.unit else ''}{known.unit}"


def _banded(point: Point) -> Sequence[float | None]:
    """Without an interval of two seeds: it would be ten times as wide as what a curve is about."""
    return point[:4] if point.count > 2 else (*point[:2], None, None)
