"""Curves and intervals as SVG text: axes whose ticks are round numbers, bands over seeds. Colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .curves import Point

WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40
"""Margins of the plot, for labels."""

LOG_RANGE = 30.0
"""Positive values that span more than this factor are drawn on a logarithmic axis."""

FEW = 8
"""Points of a curve that are each marked: they are measurements, and the line between them is none."""

OUTLYING = 3.0
"""An axis leaves out the outermost 2 % of values if they would make it this many times as long."""


@dataclass(frozen=True)
class Scale:
    """From values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, self.low * 1e-6)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)


STEPS = (1, 2, 5, 10)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten within [low, high], rising."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    wide = next(i for i, m in enumerate(STEPS) if m * power >= rough * (1 - 1e-9))
    for i in range(wide, -1, -1):
        step = STEPS[i] * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last >= first:  # a wide step may have no multiple in between
            break
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], low > 0; 2 and 5 times them too where there are few; every other where many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [m * 10.0**k for k in range(first, last + 1) for m in factors]
    inside = [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    return inside[:: math.ceil(len(inside) / 8)] if inside else [low, high]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """`500`, `1k`, `1.5k`, `0.05`, `2e-05`: as short as tells them apart, all with as many decimals as any needs."""
    largest = max((abs(t) for t in ticks), default=0.0)
    if largest >= 10_000:
        unit, letter = (1e6, "M") if largest >= 1e6 else (1e3, "k")
        return [f"{t / unit:.10g}{letter}" if t else "0" for t in ticks]
    smallest = min((abs(t) for t in ticks if t), default=1.0)
    if smallest < 1e-3 or len(ticks) < 2:
        return [f"{t:.3g}" for t in ticks]
    if largest / smallest > 50:
        return [f"{t:.10g}" for t in ticks]
    decimals = max(len(f"{t:.10g}".partition(".")[2]) for t in ticks)
    return [f"{t:.{decimals}f}" for t in ticks]


@dataclass(frozen=True)
class Range:
    """What an axis of values shows."""

    low: float
    high: float
    log: bool
    left_out: int
    """Values beyond it."""
    cut: bool = False
    """Whether a band goes on beyond it."""


def value_range(curves: Sequence[Sequence[Point]], lines: Sequence[float] = (), log_from: float = LOG_RANGE) -> Range:
    """An axis for these curves and, where they are near, horizontal lines. Bands lie in it as far as they reach no further
    beyond the means than the means reach among themselves: an interval over two seeds is often wider than all there is to
    see."""
    means = sorted(p.mean for curve in curves for p in curve)
    low, high = means[0], means[-1]
    bands = [v for curve in curves for p in curve for v in (p.low, p.high) if v is not None]

    def shown(low: float, high: float, log: bool, left_out: int) -> Range:
        return Range(low, high, log, left_out, any(not low <= v <= high for v in bands))

    if low > 0 and high / low > log_from:
        near = [v for v in lines if low / 3 < v < high * 3]
        room = (high / low) ** 0.04
        return shown(min([low, *near]) / room, max([high, *near]) * room, True, 0)
    left_out = 0
    inner = means[round(0.02 * (len(means) - 1))], means[round(0.98 * (len(means) - 1))]
    if inner[1] > inner[0] and high - low > OUTLYING * (inner[1] - inner[0]):
        room = 0.15 * (inner[1] - inner[0])
        low, high = max(low, inner[0] - room), min(high, inner[1] + room)
        left_out = sum(not low <= v <= high for v in means)
    spread = high - low
    low = max(min([low, *bands, *lines]), low - spread) if spread else low
    high = min(max([high, *bands, *lines]), high + spread) if spread else high
    if high - low < 1e-12 * max(abs(high), 1e-300) or high == low:
        room = abs(high) * 0.05 or 1.0
        return shown(low - room, high + room, False, 0)
    room = 0.04 * (high - low)
    floor = 0.0 if 0 <= low < 0.35 * high else low - room
    return shown(floor, high + room, False, left_out)


def chart(
    curves: Sequence[Sequence[Point]],
    classes: Sequence[str],
    label: str,
    *,
    lines: Sequence[tuple[float, str]] = (),
    show: Callable[[float], str] | None = None,
    log_from: float = LOG_RANGE,
) -> tuple[str, Range]:
    """An SVG of one curve a group over training steps, and what its axis shows. `classes` are the groups' CSS classes,
    `lines` horizontal ones with their names, `show` writes the values at the axis, which is logarithmic where positive values
    span more than `log_from`."""
    shown = value_range([c for c in curves if c], [value for value, _ in lines], log_from)
    x = Scale(min(c[0].step for c in curves if c), max(c[-1].step for c in curves if c), LEFT + 4, WIDTH - RIGHT - 4)
    y = Scale(shown.low, shown.high, HEIGHT - BOTTOM, TOP, shown.log)
    if x.low == x.high:
        x = Scale(x.low - 1, x.high + 1, x.start, x.end)
    name = escape(label, quote=True)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} over training steps" tabindex="0"'
        f' data-x="{x.low:g},{x.high:g},{x.start:g},{x.end:g}"'
        f' data-y="{y.low:.6g},{y.high:.6g},{y.start:g},{y.end:g},{int(y.log)}">'
    ]
    parts += [_axes(x, y, show)]
    inside = f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    # an inner SVG cuts off what lies beyond it, and needs no id as a clip path would
    parts.append(f'{inside} viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">')
    for value, what in lines:
        if not shown.low <= value <= shown.high:
            continue
        at = y(value)
        parts.append(f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="level" x="{WIDTH - RIGHT - 3}" y="{at - 4 if at > TOP + 16 else at + 13:.1f}">{escape(what)}</text>'
        )
    for curve, kind in zip(curves, classes, strict=True):
        parts.append(_curve(curve, kind, x, y))
    parts.append('</svg><g class="at"></g></svg>')
    return "".join(parts), shown


def _axes(x: Scale, y: Scale, show: Callable[[float], str] | None) -> str:
    parts = []
    ticks = y.ticks(4)
    for tick, label in zip(ticks, [show(t) for t in ticks] if show else tick_labels(ticks), strict=True):
        at = y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{at + 4:.1f}">{escape(label)}</text>')
    ticks = [t for t in x.ticks(5) if t == round(t)]
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        at = x(tick)
        end = " end" if at > WIDTH - RIGHT - 16 else ""
        parts.append(f'<path class="tick" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(
            f'<text class="x{end}" x="{WIDTH - 2 if end else at:.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(label)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="x name" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 5}">step</text>')
    return "".join(parts)


def _curve(points: Sequence[Point], kind: str, x: Scale, y: Scale) -> str:
    """A band where there are intervals, and a line, with a dot at each point where there are few."""
    if not points:
        return ""
    parts = [f'<g class="{kind}">']
    banded = [p for p in points if p.low is not None and p.high is not None]
    if len(banded) > 1:
        upper = "L".join(f"{x(p.step):.1f} {_kept(y(p.high or 0)):.1f}" for p in banded)
        lower = "L".join(f"{x(p.step):.1f} {_kept(y(p.low or 0)):.1f}" for p in reversed(banded))
        parts.append(f'<path class="band" d="M{upper}L{lower}Z"/>')
    if len(points) <= FEW:
        parts += [f'<circle class="dot" r="3.5" cx="{x(p.step):.1f}" cy="{_kept(y(p.mean)):.1f}"/>' for p in points]
    if len(points) > 1:
        parts.append(
            '<path class="line" d="M' + "L".join(f"{x(p.step):.1f} {_kept(y(p.mean)):.1f}" for p in points) + '"/>'
        )
    return "".join([*parts, "</g>"])


def _kept(pixel: float) -> float:
    """Near the plot: what is far outside is cut off anyway, and its digits are not worth their bytes."""
    return min(max(pixel, -HEIGHT), 2.0 * HEIGHT)


def interval_row(
    scale: Scale,
    mean: float,
    low: float | None,
    high: float | None,
    values: Sequence[float],
    levels: Sequence[tuple[float, str]],
) -> str:
    """One line of a plot of intervals, as wide as its place: values as dots, their mean and its interval, and vertical
    lines at `levels`, each with its CSS class. `scale` maps to percents; where the interval leaves it, an arrow says so."""

    def at(value: float) -> str:
        return f"{min(max(scale(value), 0.0), 100.0):.2f}%"

    parts = ['<svg class="interval" aria-hidden="true">']
    parts += [f'<line class="{kind}" x1="{at(v)}" x2="{at(v)}" y1="0" y2="100%"/>' for v, kind in levels]
    if low is not None and high is not None:
        parts.append(f'<line class="bar" x1="{at(low)}" x2="{at(high)}" y1="50%" y2="50%"/>')
        # a nested SVG moves the arrow to its place, which is a percentage
        arrows = ((low < scale.low, "0%", "M-2 -7L-10 0L-2 7Z"), (high > scale.high, "100%", "M2 -7L10 0L2 7Z"))
        parts += [
            f'<svg class="beyond" x="{x}" y="50%" width="1" height="1"><path d="{d}"/></svg>'
            for far, x, d in arrows
            if far
        ]
    if len(values) > 1:
        parts += [f'<circle class="seed" cx="{at(v)}" cy="50%" r="3"/>' for v in values]
    parts.append(f'<circle class="mean" cx="{at(mean)}" cy="50%" r="6"/>')
    return "".join([*parts, "</svg>"])
