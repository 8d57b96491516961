"""Figures of a comparison by matplotlib, from plain values: intervals with the single seeds, and curves over training."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

COLOURS = ("#59626d", "#0067a8", "#d24b00", "#00825e", "#b0458a", "#96690a", "#6650b0", "#2a8db8", "#7a4b2a")
"""By style; 0 is grey, for the control. Markers and dashes tell styles apart too."""

MARKERS, DASHES = "osD^vPX<>", ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))

LEVEL: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1, "linestyle": DASHES[2], "zorder": 1}

STYLE = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), "#d5d9dd"),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), "black"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **{"axes.grid": True, "axes.formatter.useoffset": False, "figure.constrained_layout.use": True},
    **{"font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"svg.fonttype": "none", "svg.hashsalt": "fmrun", "pdf.fonttype": 42, "savefig.dpi": 300},
}

WIDTH = 400
"""Of every figure, in points."""

Levels = Sequence[tuple[float, str]]
"""Values that the others are held against, each with its name: lines across."""


class Interval(NamedTuple):
    """A mean, the ends of its interval where it has one, the values of single seeds, and a style."""

    name: str
    mean: float
    low: float | None
    high: float | None
    seeds: Sequence[float]
    style: int = 0


Line = tuple[str, NDArray[np.float64], int]
"""A curve: its name, points (N, 4) of step, mean and the ends of its interval, NaN where there is none, and a style."""


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name: a reader's browser has it
        yield


def dots(rows: Sequence[Interval], label: str, levels: Levels = (), width: float = WIDTH) -> Figure:
    """Means with their intervals and below each the single seeds, the first row on top; `width` in points. An interval
    that would leave nothing else to see goes beyond the edge."""
    names = [textwrap.fill(row.name, int(width / 20)) for row in rows]
    heights = np.array([22 + 14 * (1 + name.count("\n")) for name in names])
    with _styled():
        figure = Figure((width / 72, (heights.sum() + 64) / 72))
        ax = figure.add_subplot()
        values = [value for row in rows for value in (row.mean, *row.seeds)]
        ends = [end for row in rows for end in (row.low, row.high) if end is not None]
        left, right = _limits(values, ends, [value for value, _ in levels])
        ys = np.cumsum(heights) - heights / 2
        for y, (_, mean, low, high, seeds, style) in zip(ys, rows, strict=True):
            look = _look(style) | {"linestyle": "none"}
            if low is not None and high is not None:
                ax.plot([low, high], [y, y], color=look["color"], linewidth=2.5, solid_capstyle="butt")
            ax.plot(mean, y, **look, markersize=8)
            if len(seeds) > 1:
                ax.plot(seeds, [y + 11] * len(seeds), **look | {"marker": "o"}, markersize=4, alpha=0.6)
        for value, name in levels:
            if left < value < right:
                ax.axvline(value, **LEVEL)
                ax.text(value, -4, name, ha="center")
        ax.set(xlim=(left, right), ylim=(heights.sum(), 0))
        ax.set_xlabel(textwrap.fill(label, int(width / 8)))
        ax.set_yticks(ys, names)
        ax.locator_params(axis="x", nbins=5)
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
    return figure


def curves(lines: Sequence[Line], label: str, levels: Levels = ()) -> Figure:
    """A line for each group over training, and a band where it has intervals. Of more than 120 points neighbours are
    averaged; positive values that span more than a factor of 10 take a logarithmic axis; outliers and ends of bands that
    would leave nothing else to see lie beyond it."""
    names = [textwrap.fill(name, 46) for name, _, _ in lines]
    rows = sum(1 + name.count("\n") for name in names)
    with _styled():
        figure = Figure((WIDTH / 72, (250 + 17 * rows) / 72))
        ax = figure.add_subplot()
        for _, points, style in lines:
            chunks = np.array_split(points, min(120, len(points)))
            step, mean, low, high = np.array([chunk.mean(axis=0) for chunk in chunks]).T
            ax.plot(step, mean, markevery=max(1, len(step) // 6), markersize=4.5, **_look(style))
            ax.fill_between(step, low, high, color=COLOURS[style % len(COLOURS)], alpha=0.15, linewidth=0)
        means, ends = (np.concatenate([points[:, i].ravel() for _, points, _ in lines]) for i in (1, slice(1, 4)))
        log = bool(means.min() > 0 and means.max() > 10 * means.min())

        def scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.log10(values[values > 0]) if log else values[np.isfinite(values)]

        held = scaled(np.array([value for value, _ in levels], float))
        limits = _limits(np.percentile(scaled(means), (1, 99)), scaled(ends), held)
        ax.set_yscale("log" if log else "linear")
        ax.set(ylim=np.power(10, limits) if log else limits, xlabel="training step")
        if log:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] - limits[0] < 3 else (1,)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_title("\n".join(textwrap.wrap(label, 40)))
        figure.legend(ax.lines, names, loc="outside lower left")
        for value, name in levels:
            ax.axhline(value, **LEVEL)
            ax.text(1, value, name, ha="right", va="bottom", transform=ax.get_yaxis_transform(), clip_on=True)
    return figure


def _look(style: int) -> dict[str, Any]:
    colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": DASHES[style % len(DASHES)]}


def _limits(values: Collection[float], ends: Collection[float], levels: Collection[float]) -> tuple[float, float]:
    """An axis that holds the values, the ends as far as they lie within one spread of the values, and levels that do."""
    spread = max(max(values) - min(values), 0.01 * max(map(abs, values))) or 1.0
    low, high = min(values) - spread, max(values) + spread
    points = [*values, *(min(max(end, low), high) for end in ends), *(level for level in levels if low < level < high)]
    return float(min(points) - 0.05 * spread), float(max(points) + 0.05 * spread)


def encode(figure: Figure, kind: str) -> bytes:
    """The figure as an `svg`, `pdf` or `png` file: the same bytes for the same figure."""
    dates = {"svg": dict.fromkeys(("Creator", "Date", "Format", "Type")), "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with _styled():
        figure.savefig(buffer, format=kind, metadata=dates.get(kind))
    return buffer.getvalue()
