"""Axes and curves of a comparison: round ticks, what is in sight, and SVG that is well formed."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmrun.compare.columns import Column, Score
from fmrun.compare.curves import Point
from fmrun.compare.dots import axis
from fmrun.compare.plots import (
    HEIGHT,
    WIDTH,
    Scale,
    chart,
    interval_row,
    log_ticks,
    nice_ticks,
    tick_labels,
    value_range,
)


def line(*values: float, band: float | None = None, every: int = 10) -> tuple[Point, ...]:
    return tuple(
        Point(every * i, v, None if band is None else v - band, None if band is None else v + band, 1)
        for i, v in enumerate(values, 1)
    )


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1500, [0, 500, 1000, 1500]),
        (-0.003, 0.011, [0, 0.005, 0.01]),
        (17, 23, [18, 20, 22]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 4 if high != 1 else 5) == pytest.approx(ticks)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 9))
def test_ticks_lie_within_evenly_and_are_neither_few_nor_many(low: float, size: float, count: int) -> None:
    high = low + size
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high, count)
    assert all(low - 1e-6 * size <= t <= high + 1e-6 * size for t in ticks)
    assert 1 <= len(ticks) <= count + 1
    steps = [b - a for a, b in pairwise(ticks)]
    for step in steps:
        assert step == pytest.approx(steps[0], rel=1e-3)
        leading = step / 10 ** math.floor(math.log10(step * (1 + 1e-6)))
        assert min(abs(leading - m) for m in (1, 2, 5)) < 0.01


def test_logarithmic_ticks_are_powers_of_ten_and_what_lies_between() -> None:
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(1e-6, 1) == pytest.approx([10.0**k for k in range(-6, 1)])
    assert len(log_ticks(1e-30, 1)) <= 8


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 500, 1000], ["0", "500", "1000"]),
        ([0, 5000, 10000], ["0", "5k", "10k"]),
        ([0, 2500, 12500], ["0", "2.5k", "12.5k"]),
        ([0, 1e6, 2.5e6], ["0", "1M", "2.5M"]),
        ([0, 0.05, 0.1], ["0.00", "0.05", "0.10"]),
        ([0.001, 0.01, 0.1], ["0.001", "0.01", "0.1"]),
        ([2e-5, 4e-5], ["2e-05", "4e-05"]),
        ([31.491, 31.492], ["31.491", "31.492"]),
    ],
)
def test_labels_are_as_short_as_tells_ticks_apart(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


def test_a_scale_maps_its_ends() -> None:
    linear, log = Scale(2, 4, 100, 0), Scale(1, 100, 0, 10, log=True)
    assert (linear(2), linear(3), linear(4)) == (100, 50, 0)
    assert (log(1), log(10), log(100)) == (0, 5, 10)


def test_values_over_decades_take_a_logarithmic_axis() -> None:
    assert value_range([line(0.001, 1.0)]).log
    assert not value_range([line(0.5, 1.0)]).log
    assert not value_range([line(0.0, 0.001, 1.0)]).log
    assert value_range([line(0.1, 1.0)], log_from=4).log


def test_outliers_are_left_out_and_counted() -> None:
    usual = [1.0 + 0.01 * (i % 10) for i in range(200)]
    shown = value_range([line(*usual, 25.0)])
    assert shown.left_out == 1
    assert shown.high < 2
    assert value_range([line(*usual)]).left_out == 0


def test_a_wide_band_does_not_press_the_curves_together() -> None:
    shown = value_range([line(10.0, 11.0, band=500.0)])
    assert (shown.low, shown.high) == (pytest.approx(9, abs=0.3), pytest.approx(12, abs=0.3))


def test_a_chart_is_well_formed_and_within_its_frame() -> None:
    curves = [line(*(math.sin(i / 9) for i in range(60)), band=0.2), (), line(0.5)]
    text, shown = chart(curves, ["c0", "c1", "c2"], '<b>"loss" & more', lines=[(0.1, "<floor>"), (99.0, "far away")])
    svg = ElementTree.fromstring(text)
    assert svg.attrib["aria-label"] == '<b>"loss" & more over training steps'
    words = [e.text for e in svg.iter("text")]
    assert "<floor>" in words
    assert "far away" not in words
    assert {g.attrib["class"] for g in svg.iter("g")} == {"c0", "c2", "at"}
    assert [p.attrib["class"] for p in svg.iter("path")].count("band") == 1
    for tick in (e for e in svg.iter("text") if e.attrib["class"].startswith(("x", "y"))):
        assert 0 <= float(tick.attrib["x"]) <= WIDTH
        assert 0 <= float(tick.attrib["y"]) <= HEIGHT
    assert shown.low < -0.9 < 0.9 < shown.high


def test_curves_that_do_not_move_are_drawn_too() -> None:
    text, shown = chart([line(2.0, 2.0)], ["c1"], "flat")
    assert shown.low < 2 < shown.high
    assert "nan" not in text


def score(mean: float, half: float | None, *seeds: float) -> Score:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Score(mean, low, high, len(seeds), {str(i): (v, 1) for i, v in enumerate(seeds)}, {})


def column(*scores: Score, floor: float | None = None, reference: float | None = None, unit: str = "") -> Column:
    facts = ("kid", "KID", "lower", unit, "", "eval", "ema", {}, floor, reference, 1, {})
    return Column(*facts, scores, scores)  # type: ignore[arg-type]


def test_an_axis_holds_intervals_seeds_and_what_scores_are_held_against() -> None:
    scores = [score(0.0133, 0.0033, 0.011, 0.0156), score(0.0156, 0.0024, 0.014, 0.017)]
    shown = axis(column(*scores, floor=0.00004), scores)
    assert shown.low < 0.00004
    assert shown.high > 0.018
    # a difference of little does not fill it, for the floor is in sight
    assert shown(0.0156) - shown(0.0133) < 20


def test_without_a_floor_an_axis_has_nothing_in_sight_or_is_not_narrow() -> None:
    scores = [score(0.500, None, 0.5), score(0.501, None, 0.501)]
    assert axis(column(*scores), scores).low < 0
    scores = [score(34.30, None, 34.30), score(34.31, None, 34.31)]
    shown = axis(column(*scores, unit="dB"), scores)
    assert shown.high - shown.low > 1.7
    shown = axis(column(*scores, unit="dB", reference=33.1), scores)
    assert shown.low < 33.1


def test_an_interval_that_would_leave_nothing_to_see_ends_in_an_arrow() -> None:
    scores = [score(0.013, 0.002, 0.012, 0.014), score(0.016, 9.0, 0.015, 0.017)]
    shown = axis(column(*scores, floor=0.0), scores)
    assert shown.high - shown.low < 0.1

    def arrows(score: Score) -> int:
        text = interval_row(shown, score.mean, score.low, score.high, [], [])
        return sum(e.attrib.get("class") == "beyond" for e in ElementTree.fromstring(text).iter("svg"))

    assert [arrows(s) for s in scores] == [0, 2]


def test_of_few_points_each_is_marked() -> None:
    def dots(*values: float) -> int:
        text, _ = chart([line(*values)], ["c1"], "few")
        return sum(e.attrib.get("class") == "dot" for e in ElementTree.fromstring(text).iter("circle"))

    assert [dots(1.0), dots(1.0, 2.0), dots(1.0, 2.0, 3.0)] == [1, 2, 3]
    assert dots(*map(float, range(60))) == 0


def test_bands_that_go_on_beyond_an_axis_are_told() -> None:
    assert value_range([line(10.0, 11.0, band=500.0)]).cut
    assert not value_range([line(10.0, 11.0, band=0.1)]).cut


def test_a_row_of_intervals_is_well_formed() -> None:
    text = interval_row(Scale(0, 10, 0, 100), 5, 4, 6, [4.5, 5.5], [(1, "level")])
    svg = ElementTree.fromstring(text)
    bar = next(e for e in svg.iter("line") if e.attrib["class"] == "bar")
    assert (bar.attrib["x1"], bar.attrib["x2"]) == ("40.00%", "60.00%")
    assert sum(e.attrib["class"] == "seed" for e in svg.iter("circle")) == 2
