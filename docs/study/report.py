"""Write docs/study.md and its figures from runs.json, stacked.json and cost.json: python docs/study/report.py"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from fmrun.intervals import Interval, Paired, holm, mean_interval, paired, smallest_effect

HERE = Path(__file__).parent
ORDER = ["plain", "raw λ", "sample", "mean", "moments", "mmd", "sliced"]
CONTROL = "plain"
NAMES = {
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "modes": "kinds",
    "modes_kl": "KL of kinds",
}
DIGITS = {"fid": 1, "modes": 1}
RISING = {"precision", "recall", "coverage", "modes"}


class Study:
    """The runs of the JSON, by condition and seed."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.last = str(data["steps"])
        extractor = data["evaluation"]["extractor"]
        self.suffix = "" if extractor == "inception" else f"_{extractor}"
        self.title = "KID" if not self.suffix else f"KID-{extractor}"
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        for run in data["runs"]:
            self.runs.setdefault(run["condition"], {})[run["seed"]] = run
        self.conditions = sorted(self.runs, key=self._place)

    @staticmethod
    def _place(condition: str) -> tuple[bool, float, int]:
        match, _, strength = condition.partition(", ")
        kind = "raw λ" if strength.startswith("raw") else match
        return (
            condition != CONTROL,
            0.0 if kind in (CONTROL, "raw λ") else float(strength.split()[-1]),
            ORDER.index(kind),
        )

    def key(self, metric: str) -> str:
        return metric if metric.startswith("modes") else metric + self.suffix

    def values(self, condition: str, metric: str, step: str | None = None) -> dict[int, float]:
        """By seed, of finished runs."""
        found = {}
        for seed, run in self.runs[condition].items():
            scores = run["scores"].get(step or self.last)
            if run["state"] == "finished" and scores is not None:
                found[seed] = scores[self.key(metric)]
        return found

    def best(self, condition: str) -> dict[int, float]:
        """The lowest KID among a run's evaluated checkpoints, by seed."""
        return {
            seed: min(scores[self.key("kid")] for scores in run["scores"].values())
            for seed, run in self.runs[condition].items()
            if run["state"] == "finished"
        }

    @property
    def names(self) -> dict[str, str]:
        """Scores of the table besides KID; kinds only where their number tells runs apart."""
        kinds = {v for c in self.conditions for v in self.values(c, "modes").values()}
        return {key: name for key, name in NAMES.items() if key != "modes" or len(kinds) > 1}

    def against_control(self, metric: str = "kid") -> dict[str, tuple[Paired, float | None]]:
        """Difference from the control on the same seeds (of KID × 1000), with Holm's p."""
        scale = 1000 if metric == "kid" else 1
        control = {seed: scale * v for seed, v in self.values(CONTROL, metric).items()}
        pairs = {}
        for condition in self.conditions:
            own = {seed: scale * v for seed, v in self.values(condition, metric).items()}
            if condition != CONTROL and (pair := paired(own, control)) is not None:
                pairs[condition] = pair
        adjusted = holm([pair.p for pair in pairs.values()])
        return {name: (pair, p) for (name, pair), p in zip(pairs.items(), adjusted, strict=True)}


LEAST = 3
"""Seeds that an interval is shown from: with two it is ten times as wide as what it is about."""


def interval(found: Interval, digits: int = 2) -> str:
    half = f" ± {(found.high - found.mean):.{digits}f}" if found.high is not None and found.count >= LEAST else ""
    return f"{found.mean:.{digits}f}{half}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main_table(study: Study, cost: dict[str, float]) -> str:
    against = study.against_control()
    rows = []
    for condition in study.conditions:
        kid = mean_interval([1000 * v for v in study.values(condition, "kid").values()])
        pair = against.get(condition)
        shares = [run["share"] for run in study.runs[condition].values() if run["share"] is not None]
        rows.append(
            [
                condition,
                str(kid.count),
                f"{sum(shares) / len(shares):.2g}" if shares else "0",
                interval(kid),
                interval(pair[0].difference) if pair else "",
                f"{pair[1]:.2g}" if pair and pair[1] is not None else "",
                *(
                    interval(mean_interval(list(study.values(condition, m).values())), DIGITS.get(m, 3))
                    for m in study.names
                ),
                f"{cost[condition.split(',')[0]]:.2f}",
            ]
        )
    floor = study.data["floor"]
    rows.append(
        ["*real images*", "", "", f"{1000 * floor[study.key('kid')]:.2f}", "", ""]
        + [f"{floor[study.key(m)]:.{DIGITS.get(m, 3)}f}" for m in study.names]
        + [""]
    )
    names = [
        f"FID-{study.data['evaluation']['extractor']}" if n == "FID" and study.suffix else n
        for n in study.names.values()
    ]
    head = ["condition", "seeds", "measured share", f"{study.title} × 1000", "difference from plain", "p (Holm)"]
    return table([*head, *names, "cost of a step"], rows)


def curve_table(study: Study) -> str:
    steps = sorted({int(step) for runs in study.runs.values() for run in runs.values() for step in run["scores"]})
    rows = []
    for condition in study.conditions:
        means = [study.values(condition, "kid", str(step)) for step in steps]
        best = mean_interval([1000 * v for v in study.best(condition).values()])
        rows.append(
            [condition, *(f"{1000 * sum(m.values()) / len(m):.1f}" if m else "" for m in means), f"{best.mean:.1f}"]
        )
    return table(["condition", *(f"step {step}" for step in steps), "best"], rows)


def figure(study: Study) -> str:
    """Differences from the control with their intervals, as SVG."""
    against = study.against_control()
    ends = [v for pair, _ in against.values() for v in pair.differences]
    for pair, _ in against.values():
        if pair.difference.count >= LEAST:
            ends += [v for v in (pair.difference.low, pair.difference.high) if v is not None]
    reach = max(map(abs, [*ends, 1e-9]))
    left, right, row, top = 190, 690, 26, 34
    height = top + row * len(against) + 46
    middle, unit = (left + right) / 2, (right - left) / 2 / reach

    def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#333") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="720" height="{height}" fill="#fff"/>',
        text(middle - 8, 20, "← better than plain", "end", "#555"),
        text(middle + 8, 20, "worse →", "start", "#555"),
        f'<line x1="{middle}" x2="{middle}" y1="{top - 8}" y2="{height - 40}" stroke="#999"/>',
    ]
    for i, (name, (pair, _)) in enumerate(against.items()):
        y, found = top + row * i + row / 2, pair.difference
        parts.append(text(left - 12, y + 4, name, "end"))
        if found.low is not None and found.high is not None and found.count >= LEAST:
            colour = "#0072b2" if found.high < 0 else "#d55e00" if found.low > 0 else "#777"
            low, high = (middle + unit * v for v in (found.low, found.high))
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{middle + unit * found.mean:.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
        for value in pair.differences:
            parts.append(f'<circle cx="{middle + unit * value:.1f}" cy="{y}" r="2" fill="#000" fill-opacity="0.35"/>')
    for value in (-reach, 0.0, reach):
        parts.append(text(middle + unit * value, height - 24, f"{value:+.1f}" if value else "0", "middle", "#555"))
    parts.append(
        text(middle, height - 6, f"difference of {study.title} × 1000, mean and 95 % interval", "middle", "#555")
    )
    return "\n".join([*parts, "</svg>", ""])


def findings(study: Study) -> list[str]:
    """What the intervals say, in sentences; nothing is written here that is not computed."""
    against = study.against_control()
    better = [n for n, (pair, p) in against.items() if p is not None and p < 0.05 and pair.difference.mean < 0]
    worse = [n for n, (pair, p) in against.items() if p is not None and p < 0.05 and pair.difference.mean > 0]
    open_ = [n for n in against if n not in better and n not in worse]
    control = mean_interval([1000 * v for v in study.values(CONTROL, "kid").values()])
    count = len(against)
    seen = {n: smallest_effect(pair.differences, alpha=0.05 / count) for n, (pair, _) in against.items()}
    lines = []
    for names, words in ((better, "better"), (worse, "worse")):
        if names:
            lines.append(
                f"**Reliably {words} than plain**, after Holm's correction over {count} comparisons: {'; '.join(names)}."
            )
    if not better and not worse:
        lines.append(f"**No condition differs reliably from plain** after Holm's correction over {count} comparisons.")
    if open_:
        small = [v for n in open_ if (v := seen[n]) is not None and against[n][0].difference.count >= LEAST]
        shown = "cannot be said"
        if small:
            between = f"lies between {min(small):.1f} and {max(small):.1f}" if len(small) > 1 else f"is {small[0]:.0f}"
            shown = f"{between} (× 1000)"
        lines.append(
            f"**Not told from plain** by these seeds: {'; '.join(open_)}. With {LEAST} or more seeds, the smallest difference "
            f"that would have been found four times in five {shown}; plain itself scores {interval(control)}."
        )
    failed = [
        run for runs in study.runs.values() for run in runs.values() if run["state"] != "finished" or run["collapsed"]
    ]
    lines.append(
        "No run diverged, and none lost its diversity by the rule of `fmrun`'s health check."
        if not failed
        else "Diverged or collapsed: " + ", ".join(run["name"] for run in failed) + "."
    )
    lines.append(others(study))
    kinds = [v for c in study.conditions for v in study.values(c, "modes").values()]
    if min(kinds) == max(kinds):
        lines.append(f"Every run makes all {kinds[0]:g} kinds of clothing.")
    else:
        control = mean_interval(list(study.values(CONTROL, "modes").values()))
        pairs = study.against_control("modes")
        told = [f"{name} {interval(pair.difference, 1)} ({p_text(p)})" for name, (pair, p) in pairs.items()]
        lines.append(f"Kinds made, of 1,000: plain {interval(control, 1)}. Differences from it: {'; '.join(told)}.")
    return lines


def others(study: Study) -> str:
    """Which scores besides KID differ from the control's."""
    found = []
    for metric, name in study.names.items():
        for condition, (pair, p) in study.against_control(metric).items():
            if p is not None and p < 0.05:
                better = (pair.difference.mean > 0) == (metric in RISING)
                change = f"{pair.difference.mean:+.{DIGITS.get(metric, 3)}f}"
                found.append(f"{name} of {condition} {change} ({'better' if better else 'worse'}, {p_text(p)})")
    if not found:
        return "No other score of the table differs reliably from plain, each corrected over its own comparisons."
    return f"Of the other scores, each corrected over its own comparisons: {'; '.join(found)}."


def p_text(p: float | None) -> str:
    return "no p" if p is None else f"p = {p:.2g}"


def setting(study: Study) -> dict[str, str]:
    data, how, where = study.data, study.data["evaluation"], study.data["environment"]
    seeds = [len(study.values(c, "kid")) for c in study.conditions]
    several = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else f"{max(seeds)}"
    return {
        "SETTING": (
            f"{data['data']}, {data['image_size']} px; DCGAN of width {data['width'][0]} and {data['width'][1]}, {data['norm']} "
            f"norm in the discriminator, batch {data['batch_size']}, {data['steps']} steps; matched layers: "
            f"{', '.join(map(str, data['layers']))}; torch {where['torch']} on {where['processor']}, {where['threads']} thread a run."
        ),
        "RUNS": f"{sum(seeds)} finished runs: {len(seeds)} conditions, {several} seeds each.",
        "EVALUATION": (
            f"{how['num']} generated images against {how['reals']} real ones of {how['data']}; extractor "
            f"{how['extractor']} at {how['resolution']} px (resize: {how['resize']}); KID from {how['kid_subsets']} "
            f"subsets of {how['kid_subset_size']}; the generator's moving average."
        ),
        "FINDINGS": "\n".join(f"* {line}" for line in findings(study)),
    }


def page(study: Study, stacked: Study, cost: dict[str, Any]) -> str:
    text = (HERE / "text.md").read_text(encoding="utf-8")
    values = {
        **setting(study),
        **{f"STACKED_{name}": value for name, value in setting(stacked).items()},
        "TABLE": main_table(study, cost["over_plain"]),
        "CURVES": curve_table(study),
        "STACKED_TABLE": main_table(stacked, cost["over_plain"]),
        "DISCUSSION": (HERE / "discussion.md").read_text(encoding="utf-8").strip(),
        "COST": f"median of {cost['rounds']} interleaved rounds on {cost['processor']}, one thread, load average {cost['load']:.1f}",
    }
    for name, value in values.items():
        assert f"{{{name}}}" in text, name
        text = text.replace(f"{{{name}}}", value)
    return text


def read(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def main() -> None:
    study, stacked = Study(read("runs.json")), Study(read("stacked.json"))
    (HERE.parent / "study.md").write_text(page(study, stacked, read("cost.json")), encoding="utf-8")
    (HERE.parent / "images" / "study.svg").write_text(figure(study), encoding="utf-8")


if __name__ == "__main__":
    main()
