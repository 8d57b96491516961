"""What the keys of metrics.jsonl and of evaluations mean to a reader: name, unit, which way is better, how it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from ..config.tables import METRICS, MetricRow

FIRST = ("kid", "psnr_y", "fid", "lpips", "dists", "mobilenet", "ssim_y", "coverage", "recall", "density", "precision")
"""Which measure decides where several could."""

TELLING = ("fm/share", "fm/distance", "loss/d", "loss/g_adv", "health/diversity", "time/images_per_second")
"""Curves of training that are shown first, after those of evaluations."""

REALS = "reals_sha256"
"""The setting of an evaluation that says which real images it was against; with `data.valid_fraction` each seed holds
out its own, so that it tells seeds apart, and not ways of measuring."""

REFERENCE = "_bicubic"
"""Ending of the measures of what super-resolution has to beat."""


def base(name: str) -> tuple[str, str]:
    """The measure and what it was taken with: `("kid", "mobilenet_v2")` of `eval/kid_mobilenet_v2`."""
    if name in METRICS:
        return name, ""
    short = name.removeprefix("eval/")
    if short in METRICS:
        return short, ""
    stem = next((k for k in METRICS if "/" not in k and short.startswith(f"{k}_")), None)
    return (name, "") if stem is None else (stem, short[len(stem) + 1 :])


def metric(name: str) -> MetricRow:
    """What is known of a key of metrics.jsonl or a name of an evaluation; the key itself where nothing is."""
    stem, extra = base(name)
    known = METRICS.get(stem, MetricRow(name))
    extractor = "MobileNetV2" if extra == "mobilenet_v2" else extra or ("Inception" if known.of_features else "")
    return known._replace(label=f"{known.label} ({extractor})") if extractor else known


def rank(name: str) -> tuple[int, int]:
    """The place of a measure among those that could decide, the first the lowest; Inception before other extractors."""
    stem, extra = base(name)
    return (FIRST.index(stem) if stem in FIRST else len(FIRST)), int(bool(extra))


def decides(name: str) -> bool:
    """Whether it can say which run is better."""
    return base(name)[0] in FIRST


COLLAPSED = 0.05
"""Recall or coverage below which a high precision or density says nothing."""


def lone_precision(who: str, values: Mapping[str, float | None]) -> Iterator[str]:
    """What has to be said of scores, by name, that praise a generator which makes next to nothing of what there is: `who`
    is called so in the sentence."""
    for name, precision in values.items():
        stem, extra = base(name)
        if stem == "precision" and precision is not None and precision >= 0.5:
            others = {other: values.get(f"{other}_{extra}" if extra else other) for other in ("recall", "coverage")}
            low = [f"{o} is {v:.3g}" for o, v in others.items() if v is not None and v < COLLAPSED]
            if low:
                sentence = f"a precision of {precision:.3g} says nothing by itself where {' and '.join(low)}"
                yield f"{who}: {sentence}: one good image, made over and over, has it too"


def show_all(name: str, values: Sequence[float | None], halves: Sequence[float | None] = ()) -> list[str]:
    """Values of one measure, all with the same number of decimals; `-` for None. Where halves of intervals are given, that
    number shows two digits of a typical one."""
    known = metric(name)
    factor, unit = (100, " %") if known.unit == "%" else (1, "")
    sizes = [abs(v) * factor for v in halves if v] or [abs(v) * factor for v in values if v]
    digits = known.digits
    if digits is None:
        significant = 2 if any(halves) else 3
        digits = min(8, max(0, significant - 1 - math.floor(math.log10(median(sizes))))) if sizes else 0
    return ["-" if value is None else f"{factor * value:.{digits}f}{unit}" for value in values]
