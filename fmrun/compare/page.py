"""A comparison as one HTML file that needs nothing else, and its figures as files for a paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .. import __version__
from ..measures import measure
from ..report import Reporter
from ..runs import make_folder, saving, write_atomic
from ..tables import Table
from . import figures, table
from .comparison import Comparison
from .pictures import Picture, pictures
from .verdict import verdict


def write(
    comparison: Comparison,
    path: Path,
    *,
    seed: int,
    device: torch.device,
    report: Reporter,
    trust_code: bool = False,
) -> None:
    """Write the page, whole or not at all. Raises SaveError when the disk refuses."""
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
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    styles = dict(zip((group.name for group in comparison.groups), _styles(comparison), strict=True))
    telling = {curve.key for curve in comparison.curves[: comparison.telling]}
    return (
        Environment(loader=loader, **options)
        .get_template("page.html.j2")
        .render(
            c=comparison,
            verdict=verdict(comparison),
            colours=figures.COLOURS,
            dark=figures.DARK,
            swatches={name: _inline(figures.swatch(style)) for name, style in styles.items()},
            pictures=[(comparison.groups[p.place].name, p.caption, base64.b64encode(p.png).decode()) for p in drawn],
            settings=_settings(comparison),
            scores=table.scores(comparison),
            pairs=table.pairs(comparison),
            intervals=[_inline(figure) for width in (820, 400) for figure in _intervals(comparison, width)],
            curves=[
                (key in telling, measure(key), _inline(figure)) for key, figure in _curves(comparison, legend=False)
            ],
            version=__version__,
        )
    )


def _settings(comparison: Comparison) -> Table | None:
    """With a row per group where these are more than the fields."""
    fields = table.settings(comparison)
    if fields is None or len(fields.rows) >= len(comparison.groups):
        return fields
    header, *rows = zip(fields.header, *fields.rows, strict=True)
    return Table(header, rows, "l" * len(header), fields.notes)


def _inline(figure: Figure) -> Markup:
    return Markup(figures.inline(figure))  # matplotlib escapes what it writes


def _styles(comparison: Comparison) -> list[int]:
    """Of each group, the control's 0; by the order in which the runs were given, whatever their scores."""
    control = -1 if comparison.control is None else comparison.control
    return [(i - control) % (len(comparison.groups) + 1) for i in range(len(comparison.groups))]


def _levels(comparison: Comparison) -> list[tuple[float, str]]:
    """What the scores of the column that decides are held against."""
    column = comparison.column
    known = [] if column is None else [(column.floor, "real against real"), (column.reference, "bicubic")]
    return [(value, name) for value, name in known if value is not None]


def _intervals(comparison: Comparison, width: float) -> Iterator[Figure]:
    """The scores that decide over their seeds, where there are any that can be compared."""
    column, styles, rows = comparison.column, _styles(comparison), []
    if column is None or not comparison.alike:
        return
    for i in comparison.ranking:
        if (score := column.scores(comparison.by)[i]) is not None:
            seeds = [value for value, _ in score.runs.values()]
            rows.append(figures.Row(comparison.groups[i].name, score.mean, score.low, score.high, seeds, styles[i]))
    if rows:
        label = f"{column.label}{', ' if column.unit else ''}{column.unit} ({column.better} is better)"
        yield figures.dots(rows, label, _levels(comparison), width)


def _curves(comparison: Comparison, *, legend: bool) -> Iterator[tuple[str, Figure]]:
    """By key; without what is the same throughout."""
    styles = _styles(comparison)
    for curve in comparison.curves:
        if len({point.mean for points in curve.groups for point in points}) > 1:
            known, quick = measure(curve.key), ", in training" if curve.key.startswith("eval/") else ""
            decides = comparison.column is not None and comparison.column.key == curve.key
            lines = [
                figures.Line(comparison.groups[i].name, np.array([p[:4] for p in curve.groups[i]], float), styles[i])
                for i in comparison.order
                if curve.groups[i]
            ]
            label = f"{known.label}{quick}{', ' if known.unit else ''}{known.unit}"
            levels = _levels(comparison) if decides else ()
            yield curve.key, figures.curves(lines, label, levels, known.unit == "%", legend)
