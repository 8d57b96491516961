"""Which group is better, by how much, and how sure that is: in words."""

from __future__ import annotations

from dataclasses import dataclass

from ..metrics.measures import show_all
from .columns import Column
from .comparison import Comparison
from .measurements import paired_differences

ALPHA = 0.05


@dataclass(frozen=True)
class Margin:
    """How much better one group is than another over the `count` seeds that both have; positive is better."""

    mean: float
    low: float
    high: float
    count: int
    p: float
    """That seeds alone make such a difference, after Holm's correction: over the groups held against the control; without a
    control, or between two others, over all pairs of groups, for which is best was not known beforehand."""
    complete: bool
    """Whether neither group lost a seed."""

    @property
    def certain(self) -> bool:
        """Whether the first is better beyond chance: never where seeds were lost, for those that are left were not drawn."""
        return self.complete and self.low > 0 and self.p < ALPHA


@dataclass(frozen=True)
class Verdict:
    """What a reader should take away."""

    sentence: str
    detail: str = ""
    winner: str | None = None
    """The group with the best value; whether that means anything, `certain` says. None where two are level."""
    against: str | None = None
    """The group it is compared with: the control, or else the next best."""
    certain: bool = False


def margins(comparison: Comparison) -> dict[tuple[int, int], Margin]:
    """Of every two groups that share two seeds or more, in either order: how much the first is better."""
    column, ranked = comparison.column, comparison.ranking
    if column is None or len(ranked) < 2:
        return {}
    names, control = [group.name for group in comparison.groups], comparison.control
    held = names[control] if control in ranked and control is not None else None
    tests = paired_differences(column.rows[comparison.by], [names[i] for i in ranked], comparison.by == "last", held)
    sign = -1 if column.better == "lower" else 1
    margins = {}
    for row in tests[tests["count"] > 1].reset_index(names=["one", "other"]).to_dict("records"):
        one, other = names.index(row["one"]), names.index(row["other"])
        mean, (low, high) = sign * row["mean"], sorted((sign * row["low"], sign * row["high"]))
        complete = not (lost(comparison, one) or lost(comparison, other))
        margins[one, other] = Margin(mean, low, high, int(row["count"]), row["holm"], complete)
        margins[other, one] = Margin(-mean, -high, -low, int(row["count"]), row["holm"], complete)
    return margins


def against(comparison: Comparison) -> tuple[int | None, dict[int, Margin]]:
    """The control, or else the best, and by place of the others, best first, how much better (or worse) they are."""
    ranked = comparison.ranking
    anchor = comparison.control if comparison.control in ranked else next(iter(ranked), None)
    all_margins = margins(comparison)
    return anchor, {i: all_margins[i, anchor] for i in ranked if anchor is not None and (i, anchor) in all_margins}


def lost(comparison: Comparison, place: int) -> str:
    """In which runs a group's score is: `did not diverge (3 of 5)`, where others diverged or are unfinished; else empty."""
    group, column = comparison.groups[place], comparison.column
    score = None if column is None else column.scores(comparison.by)[place]
    if score is None:
        return ""
    have = score.runs if comparison.by == "last" else ()  # the best so far of an unfinished run is not its best
    gone = {member.state for member in group.members if member.state != "finished" and member.name not in have}
    if not gone:
        return ""
    what = {"diverged": "did not diverge", "failed": "did not fail"}
    words = dict.fromkeys(what.get(state, "is finished") for state in sorted(gone))
    return f"{' and '.join(words)} ({score.count} of {len(group.members)})"


def verdict(comparison: Comparison) -> Verdict:
    """The winner by the column that decides."""
    column, ranked, groups = comparison.column, comparison.ranking, comparison.groups
    if column is None or len(ranked) < min(2, len(groups)):
        what = "None was evaluated, and losses cannot be compared between runs."
        if column is not None:
            missing = ", ".join(group.name for i, group in enumerate(groups) if i not in ranked)
            what = f"{column.label} is missing for {missing}."
        command = f"fmrun eval {' '.join(group.members[0].name for group in groups[:3])}"
        return Verdict("Nothing yet says which run is better.", f"{what} To measure all in the same way: {command}")
    if len(groups) == 1:
        return Verdict(f"{groups[0].name}: one experiment on {len(groups[0].members)} seeds.")
    first, control = ranked[0], comparison.control
    other = control if control in ranked and control is not None and control != first else ranked[1]
    margin = margins(comparison).get((first, other))
    sentence, level = _sentence(comparison, column, first, other, margin)
    winner = None if level else groups[first].name
    certain = margin is not None and margin.certain
    return Verdict(sentence, _detail(comparison, column, other, margin), winner, groups[other].name, certain)


def _sentence(
    comparison: Comparison, column: Column, first: int, other: int, margin: Margin | None
) -> tuple[str, bool]:
    """The sentence, and whether both scores are the same in all digits that are shown."""
    one, two = (comparison.groups[i].name for i in (first, other))
    scores = column.scores(comparison.by)
    a, b = (score.mean for i in (first, other) if (score := scores[i]) is not None)
    better, worse, gap = show_all(column.key, [a, b, abs(a - b)])
    unit = f" {column.unit}" * bool(column.unit)
    if better == worse:
        return f"{one} and {two} are level: {column.label} {better}{unit}.", True
    much = f"{gap}{unit}" if column.unit == "dB" or b <= 0 else f"{100 * abs(a - b) / b:.2g} %"
    what = f"{column.label} {better}{unit} against {worse}{unit}, {much} {column.better}."
    if margin is not None and margin.certain:
        return f"{one} beats {two}: {what}", False
    where = [f"{who} {outcome}" for who, i in (("it", first), (two, other)) if (outcome := lost(comparison, i))]
    hedge = f" where {' and '.join(where)}" if where else ""
    if margin is not None and margin.mean < 0:
        hedge += ", but not on the seeds that both have"
    elif margin is not None and not (margin.low > 0 and margin.p < ALPHA):
        hedge += ", but it could be chance"
    return f"{one} is ahead of {two}{hedge}: {what}", False


def _detail(comparison: Comparison, column: Column, other: int, margin: Margin | None) -> str:
    if margin is None:
        return "They share fewer than two seeds measured at the same step against the same images, so what is chance is not known."
    how, sign = ("better", 1) if margin.mean >= 0 else ("worse", -1)
    ends = sorted((sign * margin.low, sign * margin.high))
    mean, low, high = show_all(column.key, [abs(margin.mean), *ends], [(ends[1] - ends[0]) / 2])
    holms = " after Holm's correction" if len(comparison.ranking) > 2 else ""
    difference = f"{how} than {comparison.groups[other].name} by {mean} (95 % interval {low} to {high}; p {show_p(margin.p)}{holms})"
    return f"Over the {margin.count} seeds that both have it is {difference}."


def show_p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.2g}"
