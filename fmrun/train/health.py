"""Is this run going well? Rules over the rows of metrics.jsonl, each one sentence that says what is wrong and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median

Row = dict[str, float]
"""A row of metrics.jsonl."""
Rule = Callable[[Sequence[Row]], str | None]

NO_EFFECT = 0.01
TOO_STRONG = 10.0
ASTRAY = 2.0
"""Factor by which a balanced share may be off."""
COLLAPSED = 0.35
"""Diversity of samples relative to real images."""
TIME_TO_VARY = 40
"""Read-outs after which samples ought to vary."""
QUIET = 10
"""Read-outs for which a sentence is not repeated."""


def _recent(rows: Sequence[Row], key: str, count: int) -> list[float]:
    values = [row[key] for row in rows[-count:] if isinstance(row.get(key), int | float)]
    return [v for v in values if math.isfinite(v)]


def share_sentence(
    share: float, weight: float, compared: str = "the adversarial one", balanced: bool = False
) -> str | None:
    """What a gradient share means, where lambda (`weight`) is off by orders of magnitude, or, `balanced`, where the share
    is not what lambda asks for."""
    if math.isnan(share) or share <= 0:
        return None
    if balanced:
        if weight == 0 or 1 / ASTRAY < share / weight < ASTRAY:
            return None
        return (
            f"the gradient of feature matching is {100 * share:.2g} % of {compared}, where λ asks for {100 * weight:.3g} %: "
            "either the statistic sees next to nothing on these layers (fmrun probe-layers tells), or the gradients change "
            "faster than they are measured (-s feature_matching.measure_every=1 measures each step)"
        )
    if share < NO_EFFECT:
        return (
            f"feature matching has no effect: its gradient is {100 * share:.2g} % of {compared}, so a run with "
            f"it is a run without it; --lambda-feature {_round(weight * 0.1 / share)} would give 10 %, or use "
            "--balance gradient"
        )
    if share > TOO_STRONG:
        return (
            f"feature matching drowns the other losses: its gradient is {share:.2g} times {compared}; "
            f"--lambda-feature {_round(weight * 0.1 / share)} would give 10 %, or use --balance gradient"
        )
    return None


def _round(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _share(rows: Sequence[Row], balanced: bool = False) -> str | None:
    shares, weights = _recent(rows, "fm/share", 3), _recent(rows, "fm/lambda", 3)
    if len(shares) < 3 or len(set(weights)) != 1:  # still ramping
        return None
    compared = "the adversarial one" if "loss/g_adv" in rows[-1] else "that of the generator's other losses"
    return share_sentence(fmean(shares), weights[0], compared, balanced)


def collapsed(rows: Sequence[Row]) -> bool:
    """Whether the last samples vary far less than real images do, and did vary more or have had time to."""
    values = _recent(rows, "health/diversity", 3)
    if len(values) < 3 or fmean(values) >= COLLAPSED:
        return False
    past = _recent(rows[:-3], "health/diversity", len(rows))[-TIME_TO_VARY:]
    lost = len(past) >= 5 and fmean(values) < 0.7 * max(past)
    return lost or len(past) == TIME_TO_VARY  # still learning to vary is no loss


def _collapse(rows: Sequence[Row]) -> str | None:
    if collapsed(rows):
        values = _recent(rows, "health/diversity", 3)
        return (
            f"samples are losing diversity: they vary {100 * fmean(values):.0f} % as much as real images; try a smaller "
            "learning rate for the generator (-s optim.generator.lr=1e-4) or a larger --batch-size"
        )
    return None


def _spike(rows: Sequence[Row]) -> str | None:
    values = _recent(rows, "loss/d", 21)
    if len(values) >= 8 and values[-1] > 1.0 and values[-1] > 3 * median(values[:-1]):
        return (
            f"the discriminator's loss has jumped to {values[-1]:.3g} from about {median(values[:-1]):.3g}; if it stays "
            "there, halve -s optim.discriminator.lr or add -s losses.gan.r1=1"
        )
    return None


def _too_strong(rows: Sequence[Row]) -> str | None:
    losses = _recent(rows, "loss/d", 5)
    real, fake = _recent(rows, "health/d_real", 5), _recent(rows, "health/d_fake", 5)
    if len(losses) == 5 and 0 <= fmean(losses) < 0.05 and fmean(real) - fmean(fake) > 8:
        return (
            "the discriminator tells every generated image from a real one, so its gradient says little; try "
            "-s losses.gan.r1=1, -s train.augment=translation,cutout or a smaller -s optim.discriminator.lr"
        )
    return None


def _rising(rows: Sequence[Row]) -> str | None:
    values = _recent(rows, "fm/distance", 30)
    if len(values) == 30 and min(values) > 0 and fmean(values[-10:]) > 2 * fmean(values[:10]):
        return (
            "the feature-matching distance should fall and has doubled; the discriminator moves faster than the "
            "generator can follow: try a smaller -s optim.discriminator.lr or a larger --lambda-feature"
        )
    return None


RULES: dict[str, Rule] = {
    "share": _share,
    "collapse": _collapse,
    "spike": _spike,
    "too strong": _too_strong,
    "rising": _rising,
}


class Health:
    """Reads row after row and says at most one thing at a time, each only once in a while. `balanced`: whether lambda is
    the gradient share that the run asks for."""

    def __init__(self, rows: Sequence[Row] = (), balanced: bool = False):
        self.rows = list(rows)
        self._rules: dict[str, Rule] = {**RULES, "share": partial(_share, balanced=balanced)}
        self._said: dict[str, int] = {}

    def read(self, row: Row) -> str | None:
        """Take in a row; the first sentence that applies and has not been said lately, or None."""
        self.rows.append(row)
        for name, rule in self._rules.items():
            if len(self.rows) - self._said.get(name, -QUIET) >= QUIET and (sentence := rule(self.rows)):
                self._said[name] = len(self.rows)
                return sentence
        return None
