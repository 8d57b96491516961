"""Write docs/study.md and its figure from the tables of `fmrun compare --csv`: python docs/study/report.py

Only what compares groups is computed, and by `compare`'s own functions; all else is text.md and discussion.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from fmrun.compare.columns import Column, Score, columns_of
from fmrun.compare.figures import Interval, dots, encode
from fmrun.compare.measurements import over_seeds, paired_differences, read_table, tail_mean
from fmrun.train.health import COLLAPSED

HERE = Path(__file__).parent
ORDER = ["plain", "raw-sample", "sample", "mean", "moments", "mmd", "sliced"]
CONTROL = "plain"
NAMES = {
    "kid_mobilenet_v2": "KID-mobilenet_v2 × 1000",
    "fid_mobilenet_v2": "FID-mobilenet_v2",
    "precision_mobilenet_v2": "precision",
    "recall_mobilenet_v2": "recall",
    "coverage_mobilenet_v2": "coverage",
    "modes": "modes",
    "modes_kl": "KL of modes",
}
DIGITS = {"kid_mobilenet_v2": 2, "fid_mobilenet_v2": 1, "modes": 1}


class Study:
    """A table of measurements, KID × 1000."""

    def __init__(self, file: Path):
        table = read_table(file)
        table.loc[table.metric.str.startswith("kid"), ["value", "floor"]] *= 1000
        self.groups = sorted(table.group.unique(), key=place)
        self.table = table
        columns = {column.key: column for column in columns_of(table, self.groups)}
        counts = {score.mean for score in columns["modes"].last if score is not None}
        self.columns = [columns[key] for key in NAMES if key != "modes" or len(counts) > 1]
        self.kid = self.columns[0]

    def against_control(self, column: Column) -> pd.DataFrame:
        """By group: its difference from the control over the same seeds, and p after Holm's correction."""
        found = paired_differences(column.rows["last"], self.groups, control=CONTROL).loc[CONTROL]
        return found.assign(mean=-found["mean"], low=-found.high, high=-found.low)


def place(group: str) -> tuple[bool, float, int]:
    kind, _, strength = group.rpartition("-")
    if group == CONTROL:
        return False, 0, 0
    return True, 0 if kind == "raw-sample" else float(strength), ORDER.index(kind)


def label(group: str) -> str:
    """`mean, share 0.1` of `mean-0.1`."""
    kind, _, strength = group.rpartition("-")
    if group == CONTROL:
        return group
    return f"{kind.removeprefix('raw-')}, {'raw λ' if kind.startswith('raw-') else 'share'} {strength}"


def interval(found: pd.Series | Score, digits: int) -> str:
    return f"{found['mean']:.{digits}f} ± {found['high'] - found['mean']:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def main_table(study: Study, cost: dict[str, float]) -> str:
    digits = [DIGITS.get(column.key, 3) for column in study.columns]
    means = [over_seeds(column.rows["last"].groupby("group").value) for column in study.columns]
    against, share = study.against_control(study.kid), tail_mean(study.table, "fm/share", 0.5)
    rows = []
    for group in study.groups:
        kid, *others = (interval(found.loc[group], d) for found, d in zip(means, digits, strict=True))
        pair = [interval(against.loc[group], 2), f"{against.holm[group]:.2g}"] if group != CONTROL else ["", ""]
        kind = label(group).split(",")[0]
        seeds = str(int(means[0].loc[group, "count"]))
        rows.append([label(group), seeds, f"{share.get(group, 0):.2g}", kid, *pair, *others, f"{cost[kind]:.2f}"])
    kid, *others = (f"{column.floor:.{d}f}" for column, d in zip(study.columns, digits, strict=True))
    rows.append(["*real images*", "", "", kid, "", "", *others, ""])
    kid, *others = (NAMES[column.key] for column in study.columns)
    head = ["condition", "seeds", "measured share", kid, "difference from plain", "p (Holm)", *others, "cost of a step"]
    return table(head, rows)


def curve_table(study: Study) -> str:
    means = study.kid.rows["all"].groupby(["group", "step"]).value.mean().unstack()
    best = over_seeds(study.kid.rows["best"].groupby("group").value)["mean"]
    rows = [[label(g), *(f"{v:.1f}" for v in means.loc[g]), f"{best[g]:.1f}"] for g in study.groups]
    return table(["condition", *(f"step {step}" for step in means), "best"], rows)


def findings(study: Study) -> str:
    """What the tests say, in sentences; nothing is written here that is not computed."""
    against = study.against_control(study.kid)
    clear, count = against[against.holm < 0.05], f"after Holm's correction over {len(against)} comparisons"
    lines = []
    for found, words in ((clear[clear["mean"] < 0], "better"), (clear[clear["mean"] > 0], "worse")):
        if len(found):
            lines.append(f"**Reliably {words} than plain**, {count}: {'; '.join(map(label, found.index))}.")
    rest = [label(group) for group in against.index if group not in clear.index]
    if rest:
        control = over_seeds(study.kid.rows["last"].groupby("group").value).loc[CONTROL]
        told = f"plain itself scores {interval(control, 2)} (× 1000)"
        lines.append(f"**Not distinguishable from plain** by these seeds: {'; '.join(rest)}; {told}.")
    if (study.table.state == "finished").all() and tail_mean(study.table, "health/diversity", 1).min() > COLLAPSED:
        lines.append("No run diverged, and none lost its diversity.")
    others = []
    for column in study.columns[1:]:
        for group, row in study.against_control(column).iterrows():
            if row.holm < 0.05:
                how = "better" if (row["mean"] > 0) == (column.better == "higher") else "worse"
                change = f"{row['mean']:+.{DIGITS.get(column.key, 3)}f}"
                others.append(
                    f"{NAMES[column.key].split('-')[0]} of {label(group)} {change} ({how}, p = {row.holm:.2g})"
                )
    lines.append(
        f"Of the other scores, each corrected over its own comparisons: {'; '.join(others) or 'none differs'}."
    )
    modes = next((column for column in study.columns if column.key == "modes"), None)
    if modes is None:
        lines.append("Every run makes all 10 kinds of clothing.")
    else:
        plain = over_seeds(modes.rows["last"].groupby("group").value).loc[CONTROL]
        pairs = study.against_control(modes).iterrows()
        told = "; ".join(f"{label(group)} {interval(row, 1)} (p = {row.holm:.2g})" for group, row in pairs)
        lines.append(f"Modes made, of 1,000: plain {interval(plain, 1)}. Differences from it: {told}.")
    return "\n".join(f"* {line}" for line in lines)


def figure(study: Study) -> bytes:
    """Differences from the control with their intervals, single seeds as dots."""
    wide = study.kid.rows["last"].pivot(index="seed", columns="group", values="value")
    rows = []
    for group, row in study.against_control(study.kid).iterrows():
        style = 1 if row.high < 0 else 2 if row.low > 0 else 0
        seeds = (wide[group] - wide[CONTROL]).dropna().tolist()
        rows.append(Interval(label(group), *map(float, (row["mean"], row.low, row.high)), seeds, style))
    axis = "difference of KID-mobilenet_v2 × 1000 from plain (lower is better)"
    return encode(dots(rows, axis, [(0.0, "plain")], 620), "svg")


def main() -> None:
    study, stacked = Study(HERE / "fashion-mnist.csv"), Study(HERE / "stacked.csv")
    cost = json.loads((HERE / "cost.json").read_text(encoding="utf-8"))
    text = (HERE / "text.md").read_text(encoding="utf-8")
    for name, value in {
        "FINDINGS": findings(study),
        "TABLE": main_table(study, cost["over_plain"]),
        "CURVES": curve_table(study),
        "STACKED_FINDINGS": findings(stacked),
        "STACKED_TABLE": main_table(stacked, cost["over_plain"]),
        "DISCUSSION": (HERE / "discussion.md").read_text(encoding="utf-8").strip(),
        "COST": f"median of {cost['rounds']} interleaved rounds on {cost['processor']}, one thread, load average {cost['load']:.1f}",
    }.items():
        text = text.replace(f"{{{name}}}", value)
    (HERE.parent / "study.md").write_text(text, encoding="utf-8")
    (HERE.parent / "images" / "study.svg").write_bytes(figure(study))


if __name__ == "__main__":
    main()
