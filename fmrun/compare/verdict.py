"""Which group is better, by how much, how sure that is, and what may be the cause: in words."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from ..intervals import TWO_SEEDS, Interval, Paired, holm, paired
from ..measures import measure, show
from ..report import counted
from .cautions import DATA
from .columns import Column, Score
from .comparison import Comparison
from .configs import show_value
from .groups import Group


@dataclass(frozen=True)
class Margin:
    """How much better one group is than another by the column that decides; positive is better."""

    other: int
    """Place of the other group."""
    difference: float
    relative: float | None
    """Of the other's value; None for decibels and where that value is not positive."""
    interval: Interval | None
    """Of the difference over the seeds that both have, two or more; positive is better."""
    p: float | None
    """That seeds alone make such a difference, corrected by Holm for the number of groups compared with this one."""

    @property
    def certain(self) -> bool:
        if self.interval is None or self.interval.low is None or self.interval.low <= 0:
            return False
        return self.p is None or self.p < 0.05


@dataclass(frozen=True)
class Verdict:
    """What a reader should take away."""

    winner: str | None
    """The group with the best value; whether that means anything, `certain` says. None where two are level."""
    against: str | None
    """The group it is compared with: the control, or else the next best."""
    certain: bool
    """Whether the 95 % interval of the difference, over the same seeds, leaves zero out, and the corrected p is below 0.05."""
    margins: tuple[Margin, ...]
    """Against `against` first, then against the next best if that is another."""
    sentence: str
    detail: str
    reasons: tuple[str, ...]

    @property
    def beats_all(self) -> bool:
        """Whether the winner is better for certain than the control and than the next best."""
        return self.winner is not None and all(margin.certain for margin in self.margins)


def verdict(comparison: Comparison) -> Verdict:
    """The winner by the column that decides, and what may have made it win."""
    column = comparison.column
    if column is None:
        some = " ".join(group.members[0].name for group in comparison.groups[:3])
        return _undecided(
            "Nothing yet says which run is better.",
            f"None was evaluated, and losses cannot be compared between runs. To measure them: fmrun eval {some}",
            comparison,
        )
    scores = column.scores(comparison.by)
    ranked = comparison.ranking
    names = [group.name for group in comparison.groups]
    if len(names) == 1:
        score = scores[0]
        told = f"{column.label} is {_value(column, score, True)}." if score else f"It has no {column.label}."
        return _undecided(
            f"{names[0]}: one experiment on {counted(len(comparison.groups[0].members), 'seed')}.", told, comparison
        )
    if not comparison.alike:
        return _undecided("These runs have no measure in common, so none is better.", _apart(comparison), comparison)
    if len(ranked) < 2:
        missing = ", ".join(name for name, score in zip(names, scores, strict=True) if score is None)
        return _undecided(
            "Nothing yet says which run is better.", f"{column.label} is missing for {missing}.", comparison
        )
    first, control = ranked[0], comparison.control
    others = [ranked[1]]
    if control is not None and control != first and scores[control] is not None:
        others = list(dict.fromkeys([control, ranked[1]]))
    anchor = control if control is not None and scores[control] is not None else first
    p_values = _adjusted(comparison, column, anchor)
    margins = tuple(
        _margin(
            comparison,
            column,
            first,
            other,
            p_values[first if anchor == other else other] if anchor in (first, other) else None,
        )
        for other in others
    )
    return Verdict(
        None if level(column, scores[first], scores[others[0]]) else names[first],
        names[others[0]],
        margins[0].certain,
        margins,
        _sentence(comparison, column, first, margins[0]),
        _detail(comparison, column, first, margins),
        tuple(_reasons(comparison, column, first, others[0])),
    )


def against(comparison: Comparison) -> tuple[int, dict[int, Margin]] | None:
    """Over the seeds that pair, every group against the control, or else against the best: its place, and by place of the
    others, the best first, how much better they are (or worse, where that is negative). None where fewer than two pair."""
    column, ranked = comparison.column, comparison.ranking
    if column is None or not comparison.alike or len(ranked) < 2:
        return None
    anchor = comparison.control if comparison.control in ranked else ranked[0]
    assert anchor is not None
    p_values = _adjusted(comparison, column, anchor)
    found = {i: _margin(comparison, column, i, anchor, p_values[i]) for i in ranked if i != anchor}
    found = {i: margin for i, margin in found.items() if margin.interval is not None}
    return (anchor, found) if len(found) > 1 else None


def show_p(p: float | None) -> str:
    return "-" if p is None else "below 0.001" if p < 0.001 else f"{p:.2g}"


def _apart(comparison: Comparison) -> str:
    """Why no measure of some groups says anything of others."""
    groups, columns = comparison.groups, [c for c in comparison.columns if c.better is not None]
    data = [d.field for d in comparison.shown_differences if d.field in DATA]
    told = [f"they learn from different data ({', '.join(data)})"] if data else []
    same = [
        [c for c in columns if (c.key, c.source) == (key, source)]
        for key, source in {(c.key, c.source): 0 for c in columns}
    ]
    taken = next((own for own in same if len(own) > 1), None)
    if taken is None:
        told.append("different things were measured")
    else:
        settings = [{"weights": c.weights, **c.settings} for c in taken]
        fields = dict.fromkeys(key for own in settings for key in own)
        how = [key for key in fields if any(own.get(key) != settings[0].get(key) for own in settings)]
        told.append(f"{measure(taken[0].key).label} was measured in different ways ({', '.join(how)})")
    sentence = ", and ".join(told)
    alike = (
        "" if data else f" To measure them alike: fmrun eval {' '.join(group.members[0].name for group in groups[:3])}"
    )
    return f"{sentence[0].upper()}{sentence[1:]}.{alike}"


def _undecided(sentence: str, detail: str, comparison: Comparison) -> Verdict:
    return Verdict(None, None, False, (), sentence, detail, ())


def _margin(comparison: Comparison, column: Column, one: int, other: int, p: float | None) -> Margin:
    scores = column.scores(comparison.by)
    a, b = scores[one], scores[other]
    assert a is not None
    assert b is not None
    sign = -1 if column.better == "lower" else 1
    difference = sign * (a.mean - b.mean)
    relative = difference / b.mean if b.mean > 0 and column.unit != "dB" else None
    found = _paired(comparison, column, one, other)
    interval = found.difference if found is not None and found.difference.count > 1 else None
    return Margin(other, difference, relative, interval, p)


def _paired(comparison: Comparison, column: Column, one: int, other: int) -> Paired | None:
    """The first group against the other on the seeds they share, where both were measured against the same real images and,
    but for best values, at the same step; positive where it is better."""
    sign = -1 if column.better == "lower" else 1
    mine, theirs = (_by_seed(comparison, column, place, sign) for place in (one, other))
    return paired(mine, theirs)


def _by_seed(comparison: Comparison, column: Column, place: int, sign: int) -> dict[Hashable, float]:
    score = column.scores(comparison.by)[place]
    values = {} if score is None else score.runs
    reals = {} if score is None else score.reals
    members = [m for m in comparison.groups[place].members if m.name in values]
    at = {name: step if comparison.by == "last" else None for name, (_, step) in values.items()}
    return {(m.seed, reals[m.name], at[m.name]): sign * values[m.name][0] for m in members}


def _adjusted(comparison: Comparison, column: Column, anchor: int) -> dict[int, float | None]:
    """Holm's p-value of every group against one of them."""
    others = [i for i in column.ranking(comparison.by) if i != anchor]
    found = [_paired(comparison, column, i, anchor) for i in others]
    return dict(zip(others, holm([f.p if f is not None else None for f in found]), strict=True))


def _value(column: Column, score: Score | None, interval: bool = False) -> str:
    if score is None:
        return "not measured"
    text = show(column.key, score.mean)
    if interval and score.low is not None and score.high is not None:
        text += f" (95 % interval {show(column.key, score.low)} to {show(column.key, score.high)})"
    return f"{text} {column.unit}".rstrip()


def level(column: Column, one: Score | None, other: Score | None) -> bool:
    """Whether two scores are the same in all digits that are shown."""
    return one is not None and other is not None and show(column.key, one.mean) == show(column.key, other.mean)


def _sentence(comparison: Comparison, column: Column, first: int, margin: Margin) -> str:
    scores, name = column.scores(comparison.by), comparison.groups[first].name
    other = comparison.groups[margin.other].name
    how = (
        f"{100 * margin.relative:.2g} % {column.better}"
        if margin.relative is not None
        else f"{show(column.key, margin.difference)} {column.unit}".rstrip() + f" {column.better}"
    )
    if level(column, scores[first], scores[margin.other]):
        return f"{name} and {other} are level: {column.label} {_value(column, scores[first])}."
    values = f"{_value(column, scores[first])} against {_value(column, scores[margin.other])}"
    what = f"{column.label} {values}, {how}."
    if margin.certain:
        return f"{name} beats {other}: {what}"
    if margin.interval is not None and margin.interval.mean < 0:
        return f"{name} is ahead of {other}, but not on the seeds that both have: {what}"
    if margin.interval is not None:
        return f"{name} is ahead of {other}, but it could be chance: {what}"
    return f"{name} is ahead of {other}: {what}"


def _detail(comparison: Comparison, column: Column, first: int, margins: tuple[Margin, ...]) -> str:
    found: list[str] = []
    for margin in margins:
        other = comparison.groups[margin.other].name
        if margin.interval is not None and margin.interval.low is not None and margin.interval.high is not None:
            worse = margin.interval.mean < 0
            ends = sorted(-v if worse else v for v in (margin.interval.low, margin.interval.high))
            low, high = (show(column.key, v) for v in ends)
            mean, corrected = show(column.key, abs(margin.interval.mean)), ""
            if margin.p is not None:
                corrected = f"; p {show_p(margin.p)}"
                corrected += " after Holm's correction" if len(comparison.ranking) > 2 else ""
            zero = ", which includes zero" if margin.interval.low <= 0 <= margin.interval.high else ""
            seeds = f"Over the {margin.interval.count} seeds that both have it" if not found else "It"
            how = f"{'worse' if worse else 'better'} than {other} by {mean}"
            found.append(f"{seeds} is {how} (95 % interval {low} to {high}{zero}{corrected}).")
    if not found:
        scores, against = column.scores(comparison.by), margins[0].other
        steps = sorted({step for i in (first, against) if (score := scores[i]) is not None for step in score.steps})
        if comparison.by == "last" and len(steps) > 1:
            return (
                f"They were measured at different steps ({', '.join(map(str, steps))}), so which is better after equal "
                "training is not known."
            )
        one, two = ({m.seed for m in comparison.groups[i].members} for i in (first, against))
        if len(one & two) > 1 and column.source == "eval":
            return (
                "Fewer than two seeds that they share are measured in both against the same real images, so how much of "
                "this is chance is not known."
            )
        return "They share fewer than two seeds, so how much of this is chance is not known."
    few = any(margin.interval is not None and margin.interval.count == 2 and not margin.certain for margin in margins)
    return " ".join(found) + (f" {TWO_SEEDS[0].upper()}{TWO_SEEDS[1:]}." if few else "")


def _reasons(comparison: Comparison, column: Column, first: int, other: int) -> Iterator[str]:
    """What sets the winner apart: causes perhaps, proofs of none."""
    groups = comparison.groups
    one, two = groups[first], groups[other]
    shown = [
        (d.field, show_value(d.values[first]), show_value(d.values[other]) if d.acts[other] else None)
        for d in comparison.shown_differences
        if d.acts[first]
    ]
    told = [f"{field} is {own}, not {theirs}" for field, own, theirs in shown if theirs is not None and own != theirs]
    told += [f"{field} is {own}" for field, own, theirs in shown if theirs is None]
    if told:
        yield f"In the config of {one.name} {', '.join(told)}."
    if one.matches_features and one.share is not None:
        yield (
            f"The feature-matching gradient of {one.name} was {show('fm/share', one.share)} of the adversarial one"
            + (f", that of {two.name} {show('fm/share', two.share)}" if two.share is not None else "")
            + "."
        )
    if one.step_cost is not None and two.step_cost is not None and two.step_cost > 0:
        yield _cost(one, two)
    if one.diversity is not None and two.diversity is not None and abs(one.diversity - two.diversity) >= 0.01:
        d1, d2 = (show("health/diversity", g.diversity) for g in (one, two) if g.diversity is not None)
        yield f"Images of {one.name} vary {d1} as much as real ones, those of {two.name} {d2}."
    best = column.ranking("best" if comparison.by == "last" else "last")
    if best and best[0] != first:
        which = "their best step" if comparison.by == "last" else "the last step"
        yield f"By {which} {groups[best[0]].name} is ahead."


def _cost(one: Group, two: Group) -> str:
    assert one.step_cost is not None
    assert two.step_cost is not None
    ratio = one.step_cost / two.step_cost
    if abs(ratio - 1) < 0.02:
        return f"A step of {one.name} takes as long as one of {two.name}."
    return f"A step of {one.name} takes {ratio:.2f} times as long as one of {two.name}."
