"""The engine against what `compare` found at commit 2a4cefe in made-up runs (`compare_runs/`; the script that made them is in the
history beside them), scipy's tests, textbooks and chance."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats
from support.made_runs import nested

from fmrun.compare.comparison import compare
from fmrun.compare.measurements import FAILED, holm, over_seeds, paired_differences, read_table, student
from fmrun.runs.folder import Run

HERE = Path(__file__).parents[1] / "compare_runs"
MADE = json.loads((HERE / "runs.json").read_text())
GOLDEN = json.loads((HERE / "golden.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for made in MADE["runs"]:
        run = Run(folder / made["name"])
        run.path.mkdir()
        run.config_file.write_text(json.dumps(nested(made["set"], MADE["configs"][made["task"]])))
        run.env_file.write_text(json.dumps(made["env"]))
        run.status_file.write_text(json.dumps(made["status"]))
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in made["rows"]))
        run.evaluations_file.write_text(json.dumps({"evaluations": made["evaluations"]}))
    return folder


def numbers(tree: Any) -> Any:
    """Numbers within 1e-12; all else as it is."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [numbers(value) for value in tree]
    return pytest.approx(tree, rel=1e-12, abs=1e-12) if isinstance(tree, float) else tree


def plain(tree: Any) -> Any:
    return json.loads(json.dumps(tree, default=vars))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: " ".join(map(str, golden["asked"].values())))
def test_all_numbers_are_those_of_before(folder: Path, golden: dict[str, Any]) -> None:
    asked = dict(golden["asked"])
    groups = asked.pop("groups")
    names = [made["name"] for made in MADE["runs"]]
    found = compare([Run(folder / name) for name in names if name.rpartition("-seed")[0] in groups], **asked)
    column, ranking = found.column, found.ranking
    assert column is not None
    assert found.headline == golden["decides"]
    anchor = golden["anchor"]
    sign = 1 if column.better == "higher" else -1
    against: list[tuple[int, Any]] = []
    for place in ranking:
        pair = [found.groups[i].name for i in (place, anchor)]
        if place != anchor:
            row = paired_differences(column.rows[found.by], pair, found.by == "last").iloc[0]
            against += [(place, row)] if row["count"] else []
    adjusted = holm([row.p for _, row in against])
    for (place, row), corrected, pair in zip(against, adjusted, golden["pairs"], strict=True):
        ends = sorted((sign * row.low, sign * row.high)) if row["count"] > 1 else [None, None]
        mine = {"mean": sign * row["mean"], "low": ends[0], "high": ends[1], "count": int(row["count"])}
        assert (place, mine) == (pair["group"], numbers(pair["difference"]))
        p, holms = (None if np.isnan(value) else value for value in (row.p, corrected))
        assert [p, holms] == numbers([pair["p"], pair["holm"]])
    if "columns" not in golden:
        return
    typical = [[g.typical["fm/share"], g.typical["health/diversity"]] for g in found.groups]
    mine = [
        [g.name, [m.name for m in g.members], g.control, *own] for g, own in zip(found.groups, typical, strict=True)
    ]
    assert mine == numbers([group[:5] for group in golden["groups"]])  # speed was a median
    for own, before in zip(found.columns, golden["columns"], strict=True):
        del before["newest"]
        for score in (score for by in ("last", "best") for score in before[by] if score is not None):
            del score["reals"]
        assert {key: plain(getattr(own, key)) for key in before} == numbers(before)
    assert list(found.curves) == list(dict(golden["curves"]))
    points = {key: p.astype(object).where(p.notna(), None) for key, p in found.curves.items()}
    shown = ["step", "mean", "low", "high", "count"]
    mine = {
        key: [p.loc[p.group == g.name, shown].to_numpy().tolist() for g in found.groups] for key, p in points.items()
    }
    assert mine == numbers(dict(golden["curves"]))


def test_the_table_goes_through_csv_unchanged(folder: Path, tmp_path: Path) -> None:
    table = compare([Run(path) for path in sorted(folder.iterdir()) if not path.name.startswith("sr-")]).measurements
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table.csv"), table)
    assert set(table.source) == {"eval", "training"}
    assert set(table.state) == {"finished", "stopped", "diverged", "interrupted"}
    assert "diverged" in FAILED


# ---- statistics


def frame(**values: list[float]) -> pd.DataFrame:
    """Rows as of one step, a group for each list, by seed."""
    rows = [(seed, "", 1, group, value) for group, own in values.items() for seed, value in enumerate(own)]
    return pd.DataFrame(rows, columns=["seed", "reals", "step", "group", "value"])


def test_student_s_sleep_data() -> None:
    """Student 1908: hours of sleep gained by ten patients under either of two drugs; t = -4.0621, as every textbook has it."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    row = paired_differences(frame(first=first, second=second), ["first", "second"], True).iloc[0]
    assert (row["mean"], row.low, row.high) == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=1e-6)
    assert row.p == pytest.approx(0.002833, abs=1e-6)
    test = stats.ttest_rel(first, second)
    bounds = test.confidence_interval(0.95)
    assert (row.p, row.low, row.high) == pytest.approx((test.pvalue, bounds.low, bounds.high))


def test_only_seeds_of_both_measured_against_the_same_images_pair() -> None:
    rows = frame(a=[1.0, 5.0, 9.0], b=[0.5, 4.0])
    assert paired_differences(rows, ["a", "b"], True)["count"].tolist() == [2]
    rows.loc[1, "reals"] = "others"
    found = paired_differences(rows, ["a", "b"], True).iloc[0]
    assert found["count"] == 1
    assert np.isnan([found.p, found.low]).all()
    rows["step"] = range(len(rows))
    assert paired_differences(rows, ["a", "b"], True)["count"].tolist() == [0]
    assert paired_differences(rows, ["a", "b"], False)["count"].tolist() == [1]


def test_values_without_spread() -> None:
    found = over_seeds(pd.DataFrame({"zero": [0.0, 0.0], "one": [1.0, 1.0], "single": [3.0, np.nan]}))
    assert found.loc["zero", "p"] == 1
    assert found.loc["one"].to_dict() == {"mean": 1, "count": 2, "p": 0, "low": 1, "high": 1}
    assert np.isnan(found.loc["single", ["low", "high", "p"]].astype(float)).all()


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # by hand: 4·.005, 3·.01, 2·.03, then not below it
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # R's p.adjust
        ([0.6, np.nan, 0.5], [1.0, np.nan, 1.0]),
        ([], []),
    ],
)
def test_holm(raw: list[float], adjusted: list[float]) -> None:
    assert holm(raw) == pytest.approx(np.array(adjusted), nan_ok=True)
    assert holm([raw, raw]) == pytest.approx(np.array([adjusted, adjusted]), nan_ok=True)


# ---- false findings, where all groups are the same


def all_pairs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """p of every pair of groups, corrected, (repetitions, pairs), of values (repetitions, groups, seeds)."""
    pairs = np.array(list(combinations(range(values.shape[1]), 2)))
    apart = values[:, pairs[:, 0]] - values[:, pairs[:, 1]]
    count = apart.shape[-1]
    return holm(student(apart.mean(-1), apart.std(-1, ddof=1) / np.sqrt(count), count)[1])


@pytest.mark.parametrize("groups", [3, 4, 6])
@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("between", [0.0, 3.0], ids=["seeds do not matter", "seeds matter"])
def test_without_a_control_false_positives_stay_below_one_in_twenty(groups: int, seeds: int, between: float) -> None:
    """Any pair at all, so the best against any other too. As if the best had been chosen before, with p corrected over its
    own comparisons alone, it is 6 to 10 %."""
    rng = np.random.default_rng([groups, seeds, int(between)])
    values = rng.normal(size=(20_000, groups, seeds)) + between * rng.normal(size=(20_000, 1, seeds))
    assert (all_pairs(values) < 0.05).any(axis=1).mean() <= 0.055


def test_the_simulation_corrects_as_the_engine_does() -> None:
    values = np.random.default_rng(0).normal(size=(1, 4, 5))
    names = list("abcd")
    rows = frame(**{name: list(own) for name, own in zip(names, values[0], strict=True)})
    assert paired_differences(rows, names, True)["holm"].to_numpy() == pytest.approx(all_pairs(values)[0])
