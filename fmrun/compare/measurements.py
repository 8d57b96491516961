"""All measurements of runs as one long table, and what they say over seeds.

A column of a comparison is a filter of the table, the last common step a groupby, pairing a pivot over seeds. Intervals and
tests are Student's: the values of a group over seeds are taken to be independent and roughly normal. Seeds pair: two runs
of one seed share data order, latents and initial weights, so their difference varies less than they do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..metrics.measures import REALS, REFERENCE, base
from ..runs.folder import Run
from ..runtime.errors import reading
from .configs import flat_fields

COLUMNS = [
    *("run", "seed", "group", "state", "metric", "source", "weights", "settings", "reals", "step", "value", "floor")
]
"""Of the table. `source`: `eval` (evaluations.json) or `training` (metrics.jsonl). `settings`: JSON of how it was measured.
`reals`: which real images it is against, where noted. `floor`: what real images score. What bicubic upscaling scores is a
metric of its own, with the ending `_bicubic`."""

WAY = ["metric", "source", "weights", "settings"]
"""What is equal in all that is compared. `reals` is not in it: with `data.valid_fraction` each seed holds out its own."""

FAILED = ("diverged", "failed")
"""States of runs whose scores do not count: what they reached is no result of the experiment."""

QUICK = re.compile(r"task|data\.(path|image_size|scale|fit|valid_path|valid_fraction)")
"""Fields that two measurements during training must share to be compared, beside the number of images."""


def measurements(
    runs: Sequence[Run],
    names: Sequence[str],
    groups: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:
    """The table of these runs; a row is one finite number. `names` and `groups` are what each run and its group is called."""
    rows: list[tuple[Any, ...]] = []
    for run, name, group, config in zip(runs, names, groups, configs, strict=True):
        who = (name, int(config.get("seed", 0)), group, run.state)
        rows += [(*who, *measured) for measured in (*_evaluated(run), *_in_training(run, flat_fields(config)))]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"seed": int, "step": int, "value": float, "floor": float})
    return table.drop_duplicates(["run", *WAY, "step"], keep="last", ignore_index=True)


def read_table(file: Path) -> pd.DataFrame:
    """The table as `fmrun compare --csv` wrote it."""
    with reading(file):
        return pd.read_csv(file, dtype={"reals": str}, keep_default_na=False, na_values={"value": "", "floor": ""})


def _evaluated(run: Run) -> Iterator[tuple[Any, ...]]:
    for record in run.evaluations():
        settings, step = dict(record.get("settings", {})), int(record["step"])
        reals = str(settings.pop(REALS, None) or "")
        how = ("eval", str(record.get("weights", "ema")), json.dumps(settings, sort_keys=True), reals, step)
        floors = record.get("floor", {})
        for key, value in record.get("metrics", {}).items():
            if is_finite(value):
                yield key, *how, float(value), float(floors[key]) if is_finite(floors.get(key)) else math.nan
        for key, value in record.get("bicubic", {}).items():
            if is_finite(value):
                yield f"{key}{REFERENCE}", *how, float(value), math.nan


def _in_training(run: Run, config: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    settings: dict[str, str] = {}
    for row in run.metrics():
        for key, value in row.items():
            if key != "step" and is_finite(value):
                how = settings.get(key) or settings.setdefault(key, json.dumps(_quick_settings(config, key)))
                yield key, "training", "ema", how, "", row["step"], float(value), math.nan


def _quick_settings(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The fields of a flat config that two measurements of `key` in training must share to be compared."""
    if not key.startswith("eval/"):
        return {}
    num = "eval.kid_num" if base(key)[0] == "kid" else "eval.num"
    fields = {field: value for field, value in config.items() if QUICK.fullmatch(field)} | {num: config.get(num)}
    return dict(sorted(fields.items()))


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- which rows count


def last_step(rows: pd.DataFrame) -> int | None:
    """The last step that all of these runs have; of the finished ones alone where they are of two groups, so that a run
    that has just begun does not take the others back to its beginning."""
    finished = rows[rows.state == "finished"]
    counted = finished if finished.group.nunique() > 1 else rows
    have = counted.groupby("step").run.nunique()
    return max(have.index[have == counted.run.nunique()], default=None)


def at_last(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `last_step`; where there is none, each run's own last."""
    step = last_step(rows)
    return rows[rows.step == step] if step is not None else rows.loc[rows.groupby("run").step.idxmax()]


def at_best(rows: pd.DataFrame, better: str) -> pd.DataFrame:
    """Each run's best row, the first of equal ones."""
    values = rows.groupby("run").value
    return rows.loc[values.idxmin() if better == "lower" else values.idxmax()]


def tail_mean(table: pd.DataFrame, metric: str, fraction: float) -> pd.Series[float]:
    """By group: the mean over the last part of each run's read-outs, which vary too much one by one, and over runs."""
    values = table[table.metric == metric].groupby(["group", "run"]).value
    return (
        values.apply(lambda read_outs: read_outs.tail(max(1, round(fraction * len(read_outs)))).mean())
        .groupby("group")
        .mean()
    )


# ---- statistics over seeds


def over_seeds(values: Any) -> pd.DataFrame:
    """Of each group of a groupby, or column of a frame: its mean, Student's 95 % interval `low` to `high` (NaN for a single
    value), `count`, and the two-sided `p` of the hypothesis that the true mean is zero (as `scipy.stats.ttest_1samp`)."""
    summary = pd.DataFrame({"mean": values.mean(), "count": values.count()})
    half, summary["p"] = student(summary["mean"], values.sem(), summary["count"])
    return summary.assign(low=summary["mean"] - half, high=summary["mean"] + half)


def student(mean: ArrayLike, sem: ArrayLike, count: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Half of the 95 % interval t(n-1) · s / √n, and p; values without spread have p = 0, or 1 where they are zero."""
    mean, sem, free = np.abs(mean), np.asarray(sem), np.asarray(count) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(mean / sem, free)
    return stats.t.ppf(0.975, free) * sem, np.where((sem == 0) & (mean == 0), 1.0, p)


def paired_differences(
    rows: pd.DataFrame, groups: Sequence[str], same_step: bool = True, control: str | None = None
) -> pd.DataFrame:
    """Every pair of groups, first minus second, over the seeds that both have, measured against the same real images and,
    `same_step`, at the same step: `over_seeds`, indexed by (first, second), with `holm`, p corrected over all pairs, or of
    pairs with the `control` over these: which group would be best was not known before, which is the control was."""
    wide = rows.pivot(index=["seed", "reals", *["step"] * same_step], columns="group", values="value")
    pairs: dict[Hashable, Any] = {(a, b): wide[a] - wide[b] for a, b in combinations(groups, 2)}
    compared = over_seeds(pd.DataFrame(pairs))
    compared["holm"] = holm(compared.p)
    against = [control in pair for pair in compared.index]
    compared.loc[against, "holm"] = holm(compared.p[against])
    return compared


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values along the last axis: compared with alpha, they keep the chance of any false finding among all
    comparisons below alpha, however these depend on each other (Holm 1979). NaN, a comparison that was not tested, does not
    count. The k-th smallest (from 0) of m becomes max over j <= k of min(1, (m - j) · p_j)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=-1)
    left = np.sum(~np.isnan(p), axis=-1, keepdims=True) - np.arange(p.shape[-1])
    steps = np.minimum(1, np.maximum.accumulate(left * np.take_along_axis(p, order, -1), axis=-1))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, steps, -1)
    return adjusted
