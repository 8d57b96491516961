"""Means over seeds and what may be concluded from them: intervals, paired comparisons, and what was too small to see.

All of it is Student's: the values of one combination over seeds are taken to be independent and roughly normal. Seeds
pair: two runs of one seed share data order, latents and initial weights, so their difference varies less than they do.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import special

TWO_SEEDS = (
    "two seeds tell a difference from chance only where it is many times what seeds differ by: the 95 % interval of two "
    "reaches 9 of their standard deviations to either side"
)
"""What there is to say of a comparison over two pairs: t(1, 0.975) / √2 = 8.98."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    low: float | None
    """None where there is no interval: of a single value."""
    high: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """A combination against its control on the seeds that both have."""

    difference: Interval
    """Of value - control."""
    p: float | None
    """Two-sided, of the hypothesis that the difference is zero; None for a single pair."""
    differences: tuple[float, ...]
    """One a seed, in the order of the first argument of `paired`."""

    @property
    def telling(self) -> bool:
        """Whether there are three pairs or more: of two, what could have been seen is so large that it tells nothing."""
        return len(self.differences) > 2


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean and Student's interval mean ± t(n-1) · s / √n that holds the true mean at this level, 0 < level < 1.

    One value has no interval. ValueError for none, or for one that is not finite.
    """
    _check(values)
    mean, n = fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(values: Mapping[Hashable, float], control: Mapping[Hashable, float], level: float = 0.95) -> Paired | None:
    """Values against their control, both by seed, on the seeds they share; None where they share none.

    The test is Student's on the differences (as `scipy.stats.ttest_rel`). Differences that are all the same have p = 0,
    or 1 where they are zero.
    """
    differences = tuple(float(value) - float(control[key]) for key, value in values.items() if key in control)
    if not differences:
        return None
    interval = mean_interval(differences, level)
    if len(differences) == 1:
        return Paired(interval, None, differences)
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return Paired(interval, float(interval.mean == 0), differences)
    t = abs(interval.mean) / error
    return Paired(interval, 2 * float(special.stdtr(len(differences) - 1, -t)), differences)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the order given: compared with alpha, they keep the chance of any false finding among
    all comparisons below alpha (Holm 1979). None, a comparison that was not tested, stays None and does not count.

    With the m p-values in ascending order, the k-th (from 0) becomes max over j <= k of min(1, (m - j) · p_j).
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = largest
    return adjusted


def smallest_effect(differences: Sequence[float], alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest true mean difference that a two-sided paired t-test at `alpha` finds with probability `power`, were
    the spread of differences the observed one; in the unit of the differences. None for fewer than two.

    It is δ · s / √n, where δ solves P(|T| > c) = power for T of the noncentral t distribution with n-1 degrees of freedom
    and noncentrality δ, and c = t(n-1, 1-alpha/2) (Cohen 1988, Statistical Power Analysis, 2nd edition, ch. 2). Over m
    comparisons that are corrected by Holm's method, alpha / m is its strictest step.
    """
    if len(differences) < 2:
        return None
    _check(differences)
    free = len(differences) - 1
    critical = float(special.stdtrit(free, 1 - alpha / 2))
    z, step = np.linspace(-9, 9, 4001, retstep=True)
    density = np.exp(-z * z / 2) * step / math.sqrt(2 * math.pi)

    def found(delta: float) -> float:
        # |T| > c where the sample's s, relative to the true one, falls below |z + δ| / c, z being the mean's normal
        # deviate; (n-1) s² is chi-squared. (scipy's nctdtr gives NaN for few seeds.)
        return float(density @ special.gammainc(free / 2, free * ((z + delta) / critical) ** 2 / 2))

    low, high = 0.0, 1.0
    while found(high) < power:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    return high * stdev(differences) / math.sqrt(len(differences))


def _check(values: Sequence[float]) -> None:
    if not values or not all(map(math.isfinite, values)):
        raise ValueError("an interval needs values, and finite ones")
