"""Each sentence of `health` comes when it should, and a healthy run hears none."""

import math

import pytest

from fmrun.train.health import QUIET, RULES, Health, share_sentence

HEALTHY = {
    "loss/d": 1.0,
    "loss/g": 1.1,
    "health/d_real": 1.0,
    "health/d_fake": -1.0,
    "health/diversity": 0.9,
    "fm/share": 0.1,
    "fm/lambda": 0.1,
    "fm/balance": 1.0,
    "fm/distance": 0.5,
}


def rows(count: int = 40, **series: list[float]) -> list[dict[str, float]]:
    """Healthy rows; each series replaces the last values of its key."""
    made = [{"step": i, **HEALTHY} for i in range(count)]
    for key, values in series.items():
        key = key.replace("__", "/")
        for row, value in zip(made[-len(values) :], values, strict=True):
            row[key] = value
    return made


ILL = {
    "share": ({"fm__share": [0.001] * 3}, "has no effect"),
    "collapse": ({"health__diversity": [0.2] * 10}, "losing diversity"),
    "spike": ({"loss__d": [9.0]}, "has jumped to 9 from about 1"),
    "too strong": (
        {"loss__d": [0.01] * 5, "health__d_real": [9.0] * 5, "health__d_fake": [-9.0] * 5},
        "tells every generated image",
    ),
    "rising": ({"fm__distance": [1.0] * 20 + [5.0] * 10}, "should fall and has doubled"),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_speaks_when_its_symptom_is_there_and_no_other_does(name):
    series, words = ILL[name]
    said = {rule: sentence for rule, check in RULES.items() if (sentence := check(rows(**series)))}
    assert list(said) == [name]
    assert words in said[name]
    assert "\n" not in said[name]


@pytest.mark.parametrize("name", RULES)
def test_a_healthy_run_hears_nothing(name):
    assert RULES[name](rows()) is None


@pytest.mark.parametrize("name", RULES)
def test_no_rule_warns_on_few_rows_missing_keys_or_non_finite_numbers(name):
    for series in ([], [{"step": 1}], rows(1), [{"step": i} for i in range(40)]):
        assert RULES[name](series) is None
    assert RULES[name]([dict.fromkeys(HEALTHY, math.nan) for _ in range(40)]) is None


def test_a_falling_distance_and_a_falling_loss_are_healthy():
    falling = [2.0 * 0.95**i for i in range(40)]
    assert Health(rows(fm__distance=falling, loss__d=falling)).read({"step": 40, **HEALTHY}) is None


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.001, r"--lambda-feature 10 would give 10 %"), (50.0, r"--lambda-feature 0\.0002 would give 10 %")],
)
def test_the_weight_that_is_recommended_gives_ten_per_cent(share, words):
    assert words.replace("\\", "") in share_sentence(share, 0.1)


@pytest.mark.parametrize("share", [0.01, 0.1, 10.0, math.nan, 0.0])
def test_a_share_in_range_or_unknown_needs_no_sentence(share):
    assert share_sentence(share, 0.1) is None


def test_a_sentence_is_not_repeated_at_every_read_out():
    health = Health(rows(health__diversity=[0.1] * 10))
    ill = {"step": 0, **HEALTHY, "health/diversity": 0.1}
    said = [i for i in range(3 * QUIET) if health.read(dict(ill))]
    assert said == [0, QUIET, 2 * QUIET]


def test_one_sentence_at_a_time_but_the_next_is_not_lost():
    health = Health(rows(health__diversity=[0.1] * 10))
    ill = {"step": 0, **HEALTHY, "health/diversity": 0.1, "loss/d": 9.0}
    first, second = health.read(dict(ill)), health.read(dict(ill))
    assert "diversity" in first
    assert "has jumped" in second


def test_a_small_share_that_was_asked_for_needs_no_sentence():
    """Balanced to the share asked for, or on its way up a ramp."""
    asked = rows(fm__share=[0.005] * 40, fm__lambda=[0.005] * 40)
    assert Health(asked, balanced=True).read(asked[-1]) is None
    other = rows(fm__lambda=[0.005] * 40)
    assert "where λ asks for 0.5 %" in (Health(other, balanced=True).read(other[-1]) or "")
    assert all(rule(rows(fm__share=[0.005] * 3, fm__lambda=[0.01, 0.02, 0.03])) is None for rule in RULES.values())


def test_a_wasserstein_critic_is_not_taken_for_one_that_knows_everything():
    ill = rows(loss__d=[-12.0] * 5, health__d_real=[6.0] * 5, health__d_fake=[-6.0] * 5)
    assert all(rule(ill) is None for rule in RULES.values())


def test_samples_that_are_still_learning_to_vary_are_not_losing_diversity():
    series = [0.1, 0.12, 0.14, 0.16, 0.19, 0.22, 0.24, 0.26, 0.28, 0.3]
    young = rows(10, health__diversity=series)
    assert RULES["collapse"](young) is None
    assert "losing diversity" in (RULES["collapse"](rows(10, health__diversity=series[::-1])) or "")
