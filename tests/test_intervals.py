"""Intervals and comparisons over seeds, against published examples and scipy's own test."""

import math
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fmrun.intervals import TWO_SEEDS, Interval, holm, mean_interval, paired, smallest_effect

NUMBERS = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))

# Student 1908: hours of sleep gained by ten patients under either of two drugs.
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def by_seed(values: tuple[float, ...]) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_interval_of_five_numbers_by_hand() -> None:
    """s² = 2.5, t(4, 97.5 %) = 2.7764."""
    found = mean_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found.count == 5
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-6)
    wider = mean_interval([1, 2, 3, 4, 5], level=0.99)
    assert wider.high == pytest.approx(3 + 4.604095 * math.sqrt(0.5), abs=1e-6)


def test_one_value_has_a_mean_and_no_interval() -> None:
    assert mean_interval([2.5]) == Interval(2.5, None, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_student_s_sleep_data() -> None:
    """t = -4.0621 with 9 degrees of freedom, as every textbook has it."""
    found = paired(by_seed(FIRST), by_seed(SECOND))
    assert found is not None
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    d = found.difference
    assert (d.mean, d.low, d.high) == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12))
def test_p_and_interval_equal_scipy_s(pairs: list[tuple[float, float]]) -> None:
    values, control = map(np.array, zip(*pairs, strict=True))
    found = paired(by_seed(tuple(values)), by_seed(tuple(control)))
    assert found is not None
    assert found.p is not None
    if np.ptp(values - control) < 1e-6:
        return  # scipy divides by the rounding error there
    theirs = stats.ttest_rel(values, control)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    bounds = theirs.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high), rel=1e-6, abs=1e-6)


def test_only_seeds_that_both_have_are_compared() -> None:
    found = paired({0: 1.0, 1: 5.0, 3: 9.0}, {3: 7.0, 2: 100.0, 0: 0.5})
    assert found is not None
    assert found.differences == (0.5, 2.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_single_pair_is_not_tested() -> None:
    found = paired({4: 3.0}, {4: 1.0})
    assert found is not None
    assert (found.p, found.difference) == (None, Interval(2.0, None, None, 1))


def test_differences_without_spread() -> None:
    same = paired({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0})
    shifted = paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert shifted is not None
    assert (same.p, shifted.p) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # by hand: 4·.005, 3·.01, 2·.03, then not below it
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # R's p.adjust
        ([0.6, None, 0.5], [1.0, None, 1.0]),
        ([None], [None]),
        ([], []),
    ],
)
def test_holm(raw: list[float | None], adjusted: list[float | None]) -> None:
    found = holm(raw)
    assert [p is None for p in found] == [p is None for p in adjusted]
    assert [p for p in found if p is not None] == pytest.approx([p for p in adjusted if p is not None])


def test_the_smallest_effect_is_the_textbook_s() -> None:
    """A medium effect, d = 0.5, wants 34 pairs for a power of 0.8 at 5 % (tables after Cohen 1988), and not 33."""
    for count, above in ((33, True), (34, False)):
        values = [(-1) ** i for i in range(count)]
        effect = smallest_effect(values)
        assert effect is not None
        assert (effect / stdev(values) > 0.5) == above


@pytest.mark.parametrize(("count", "alpha"), [(3, 0.05), (5, 0.05), (5, 0.05 / 6), (12, 0.01)])
def test_the_smallest_effect_has_the_power_that_scipy_gives_it(count: int, alpha: float) -> None:
    values = [float(i * i % 7) for i in range(count)]
    effect = smallest_effect(values, alpha, power=0.7)
    assert effect is not None
    delta = effect / stdev(values) * math.sqrt(count)
    critical = stats.t.ppf(1 - alpha / 2, count - 1)
    power = stats.nct.sf(critical, count - 1, delta) + stats.nct.cdf(-critical, count - 1, delta)
    assert power == pytest.approx(0.7, abs=1e-6)


def test_the_smallest_effect_of_two_seeds_is_found_by_trying() -> None:
    """Where scipy's own noncentral distribution gives NaN: simulated."""
    alpha, rng = 0.05 / 6, np.random.default_rng(0)
    effect = smallest_effect([0.0, 1.0], alpha)
    assert effect is not None
    samples = rng.normal(effect / stdev([0.0, 1.0]), 1.0, (200_000, 2))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < alpha) == pytest.approx(0.8, abs=0.005)


def test_the_smallest_effect_of_one_or_equal_differences() -> None:
    assert smallest_effect([1.0]) is None
    assert smallest_effect([1.0, 1.0, 1.0]) == 0


def test_what_is_said_of_two_seeds_is_true() -> None:
    found = mean_interval([1.0, 2.0])
    assert found.high is not None
    reach = (found.high - found.mean) / 0.5**0.5  # their standard deviation
    assert f"reaches {reach:.0f} of their standard deviations" in TWO_SEEDS
