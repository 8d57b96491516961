"""A comparison as one HTML file that needs nothing else, and its figures as files for a paper."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .. import __version__
from ..config.tables import TASKS, MetricRow
from ..metrics.measures import metric
from ..runtime.files import make_folder, saving, write_atomic
from ..runtime.report import Reporter
from . import figures, table
from .columns import Column
from .comparison import Comparison
from .verdict import verdict

if TYPE_CHECKING:
    import torch

    from .pictures import Picture


def write_page(
    comparison: Comparison, path: Path, *, device: torch.device, report: Reporter, trust_code: bool = False
) -> None:
    """Write the page, whole or not at all. Raises SaveError when the disk refuses."""
    from .pictures import pictures  # with torch, which takes seconds

    text = page(comparison, pictures(comparison, device=device, report=report, trust_code=trust_code))
    with saving(path):
        make_folder(path.parent)
        write_atomic(path, text.encode())


def write_figures(comparison: Comparison, folder: Path) -> None:
    """Each figure as PDF and PNG. Raises SaveError when the disk refuses."""
    with saving(folder):
        make_folder(folder)
        for name, figure in drawn(comparison):
            for kind in ("pdf", "png"):
                file = folder / f"{re.sub('[^a-zA-Z0-9_.-]+', '-', name)}.{kind}"
                write_atomic(file, figures.encode(figure, kind))


def page(comparison: Comparison, samples: Sequence[Picture] = ()) -> str:
    """The whole page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    drawings = {name: _inline(figure) for name, figure in drawn(comparison)}
    return environment.get_template("page.html.j2").render(
        c=comparison,
        verdict=verdict(comparison),
        samples_of=TASKS[comparison.task].samples_of,
        pictures=[(p.group, p.caption, base64.b64encode(p.png).decode()) for p in samples],
        settings=table.settings(comparison),
        scores=table.score_table(comparison),
        pairs=table.pairs(comparison),
        intervals=drawings.pop("intervals", None),
        curves=[(metric(key), figure) for key, figure in drawings.items()],
        version=__version__,
    )


def _inline(figure: Figure) -> Markup:
    text = figures.encode(figure, "svg").decode()
    return Markup(text[text.index("<svg") :])  # matplotlib escapes what it writes


def drawn(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """`intervals`, the scores that decide over their seeds, where two groups or more have one; and the curves by their key,
    without what is the same throughout. The control has style 0, the others follow in the order in which they were given."""
    column, groups, numbers = comparison.column, comparison.groups, itertools.count(1)
    styles = [0 if group.control else next(numbers) for group in groups]
    levels = [] if column is None else [(column.floor, "real against real"), (column.reference, "bicubic")]
    known = [(value, name) for value, name in levels if value is not None]
    if column is not None and len(comparison.ranking) > 1:
        scores = [(i, score) for i in comparison.ranking if (score := column.scores(comparison.by)[i]) is not None]
        rows = [
            figures.Interval(groups[i].name, s.mean, s.low, s.high, [v for v, _ in s.runs.values()], styles[i])
            for i, s in scores
        ]
        yield "intervals", figures.dots(rows, f"{_label(column)} ({column.better} is better)", known)
    for key, points in comparison.curves.items():
        about = metric(key)
        values = points[["step", "mean", "low", "high"]] * [1, *[100 if about.unit == "%" else 1] * 3]
        # the interval of two seeds would be ten times as wide as what a curve is about
        values.loc[points["count"] < 3, ["low", "high"]] = float("nan")
        by_group = [
            (groups[i].name, values[points.group == groups[i].name].to_numpy(float), styles[i])
            for i in comparison.order
        ]
        if points["mean"].nunique() > 1:
            quick = ", in training" if key.startswith("eval/") else ""
            decides = column is not None and column.key == key
            lines = [line for line in by_group if len(line[1])]
            yield key, figures.curves(lines, _label(about) + quick, known if decides else [])


def _label(known: Column | MetricRow) -> str:
    return f"{known.label}{', ' if known.unit else ''}{known.unit}"
