"""Figures of a comparison: what is in sight on their axes, and files that are the same for the same input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from fmrun.compare.figures import Interval, Line, curves, dots, encode

NAN = math.nan


def line(*means: float, half: float = NAN) -> Line:
    return "a", np.array([(10 * i, v, v - half, v + half) for i, v in enumerate(means, 1)]), 0


def y_axis(figure: Figure) -> tuple[str, float, float]:
    return figure.axes[0].get_yscale(), *figure.axes[0].get_ylim()


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    ("means", "scale"), [((0.001, 1.0), "log"), ((0.5, 1.0), "linear"), ((0.0, 0.01, 1.0), "linear")]
)
def test_positive_values_over_decades_take_a_logarithmic_axis(means: tuple[float, ...], scale: str) -> None:
    found, low, high = y_axis(curves([line(*means)], "loss"))
    assert found == scale
    assert low < min(means) < max(means) < high


@pytest.mark.parametrize(
    ("drawn", "within"),
    [
        (line(*(1 + 0.01 * (i % 10) for i in range(200)), 9.0), (0.8, 1.3)),  # an outlier
        (line(10.0, 11.0, half=500.0), (8, 13)),  # an interval over two seeds
        (line(2.0, 2.0), (1.8, 2.2)),
        (line(0.0), (-1.2, 1.2)),
    ],
)
def test_a_curve_fills_its_axis_whatever_lies_far_off(drawn: Line, within: tuple[float, float]) -> None:
    _, low, high = y_axis(curves([drawn], "loss"))
    assert within[0] < low < high < within[1]


def test_a_long_curve_is_averaged_and_a_short_one_marked_at_each_point() -> None:
    long, short = (
        figure.axes[0].lines[0] for figure in (curves([line(*np.linspace(0, 1, n))], "a") for n in (1000, 4))
    )
    assert len(long.get_xdata()) == 120
    assert np.mean(long.get_ydata()) == pytest.approx(0.5, abs=0.02)
    assert (len(short.get_xdata()), short.get_markevery()) == (4, 1)


def test_an_axis_of_intervals_holds_every_seed_and_levels_that_are_near() -> None:
    rows = [Interval("a", 0.013, 0.010, 0.016, [0.011, 0.015]), Interval("b", 0.016, -9.0, 9.0, [0.015, 0.017], 1)]
    figure = dots(rows, "KID", [(0.010, "near"), (-1.0, "far")])
    low, high = figure.axes[0].get_xlim()
    assert low < 0.010 < 0.017 < high < 0.03
    assert words(figure) == ["near"]


def test_a_single_seed_has_neither_interval_nor_dots() -> None:
    assert len(dots([Interval("a", 1.0, None, None, [1.0])], "KID").axes[0].lines) == 1


def test_names_are_text_whatever_is_in_them() -> None:
    names = ["$a_b$ <i>", "多", "a-name-that-is-too-long-for-one-line-of-a-legend-of-this-kind"]
    rows = [Interval(name, 1.0, None, None, [], i) for i, name in enumerate(names)]
    lines = [(name, line(1.0, 2.0)[1], 1) for name in names]
    for figure in (dots(rows, "KID"), curves(lines, "loss")):
        text = encode(figure, "svg").decode()
        assert "$a_b$ &lt;i&gt;" in text
        assert "多" in text
        assert "<i>" not in text
        assert encode(figure, "png")  # without a warning


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_the_same_figure_is_the_same_file(kind: str) -> None:
    one, two = (encode(curves([line(1.0, 2.0, half=0.1)], "loss", [(1.5, "level")]), kind) for _ in range(2))
    assert one == two
    assert b"Date" not in one


def test_styles_of_nine_groups_can_be_told_apart() -> None:
    lines = curves([(str(style), line(1.0, 2.0)[1], style) for style in range(9)], "loss").axes[0].lines
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 9
