"""What a sweep's runs show, from runs whose figures are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fmrun import runs
from fmrun.errors import UserError
from fmrun.presets import Override
from fmrun.runs import Run
from fmrun.sweep import grid, table
from fmrun.sweep.plan import Sweep
from fmrun.sweep.results import Metric, choose

OVERS = ("feature_matching.weight=0,0.1,1",)

KIDS = {
    "weight-0": (0.110, 0.120, 0.130, 0.125, 0.118),
    "weight-0.1": (0.101, 0.108, 0.122, 0.116, 0.107),
    "weight-1": (0.150, 0.110, 0.160, 0.090, 0.140),
}


@pytest.fixture(autouse=True)
def quick_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "environment", lambda: {"threads": 1})


def swept(folder: Path, *overs: str, seeds: int = 5, steps: int = 10) -> Sweep:
    parsed = [grid.parse_over(text) for text in overs or OVERS]
    sweep = Sweep(folder / "s")
    length = [Override("--steps", "train.steps", str(steps))] if "train.steps" not in {o.key for o in parsed} else []
    sweep.add(grid.combinations("dcgan-fm", None, length, parsed), [o.key for o in parsed], range(seeds))
    return sweep


def made(sweep: Sweep, name: str, state: str = "finished", rows: Any = (), kid: float | None = None) -> Run:
    combination, seed = sweep.runs[name]
    run = runs.create(sweep.folder, name, "p", {**sweep.settings(combination), "seed": seed}, [])
    run.write_status(state=state, step=10, steps=10, message="it broke" if state == "failed" else None)
    for row in rows:
        run.append_metrics(row)
    if kid is not None:
        run.add_evaluation(
            {"step": 10, "weights": "ema", "settings": {"num": 500}, "metrics": {"kid": kid, "fid": 9.0}}
        )
    return run


def with_kids(sweep: Sweep) -> Sweep:
    for name, kids in KIDS.items():
        for seed, kid in enumerate(kids):
            made(sweep, f"{name}_seed-{seed}", kid=kid, rows=[{"step": 10, "time/images_per_second": 100.0 + seed}])
    return sweep


def rows_of(comparison: table.Comparison) -> dict[str, table.Row]:
    return {row.name: row for row in comparison.rows}


def test_means_differences_and_corrections_are_scipy_s(tmp_path: Path) -> None:
    comparison = table.compare(with_kids(swept(tmp_path)))
    assert comparison.metric is not None
    assert (comparison.metric.key, comparison.comparisons) == ("kid", 2)
    found = rows_of(comparison)
    raw = {n: stats.ttest_rel(KIDS[n], KIDS["weight-0"]) for n in ("weight-0.1", "weight-1")}
    for name, test in raw.items():
        row = found[name]
        assert row.last is not None
        assert row.against is not None
        bounds = stats.t.interval(0.95, 4, stats.tmean(KIDS[name]), stats.sem(KIDS[name]))
        assert (row.last.low, row.last.high) == pytest.approx(bounds)
        assert row.against.paired.p == pytest.approx(test.pvalue)
        assert row.against.control == "weight-0"
        assert row.images_per_second == 102
    first, second = (found[n].against for n in ("weight-0.1", "weight-1"))
    assert first is not None
    assert second is not None
    assert first.p_holm == pytest.approx(2 * raw["weight-0.1"].pvalue)
    assert second.p_holm == pytest.approx(raw["weight-1"].pvalue)
    assert (first.differs, second.differs) == (True, False)
    # the smallest effect is that of the strictest step: 5 % / 2
    delta = first.smallest / (stats.tstd(first.paired.differences) / 5**0.5)  # type: ignore[operator]
    critical = stats.t.ppf(1 - 0.05 / 4, 4)
    assert stats.nct.sf(critical, 4, delta) == pytest.approx(0.8, abs=1e-5)

    words = table.sentences(comparison)
    assert words[0].startswith("weight=0.1 is better by 0.0098 in kid than weight=0 (p = ")
    assert words[1].startswith("with 5 seeds a true difference is found 4 times in 5 from 0.0")
    text = table.text(comparison)
    assert "control" in text.splitlines()[2]
    assert "*" in text.splitlines()[3]


def test_failures_are_counted_and_not_averaged(tmp_path: Path) -> None:
    sweep = swept(tmp_path, seeds=5)
    collapse = [{"step": s, "health/diversity": 0.9 if s < 8 else 0.1, "loss/g": 1.0} for s in range(11)]
    made(sweep, "weight-0_seed-0", kid=0.2, rows=collapse)
    made(sweep, "weight-0_seed-1", kid=0.4)
    made(sweep, "weight-0_seed-2", state="diverged", kid=77.0)
    made(sweep, "weight-0_seed-3", state="failed", kid=77.0)
    made(sweep, "weight-0.1_seed-1", kid=0.1)
    made(sweep, "weight-0.1_seed-2", kid=0.1)
    found = rows_of(table.compare(sweep))
    control, matched, absent = found["weight-0"], found["weight-0.1"], found["weight-1"]
    assert control.last is not None
    assert (control.last.mean, control.last.count) == (pytest.approx(0.3), 2)
    assert (control.count("diverged"), control.collapsed, control.count("failed"), control.count("missing")) == (
        1,
        1,
        1,
        1,
    )
    assert matched.against is not None  # one seed in common
    assert matched.against.paired.differences == pytest.approx([-0.3])
    assert (matched.against.p_holm, matched.against.smallest) == (None, None)
    assert (absent.last, absent.against, absent.images_per_second) == (None, None, None)
    data = table.to_json(table.compare(sweep), {"x": "why"})
    shown = next(row for row in data["combinations"] if row["name"] == "weight-0")
    assert (shown["finished"], shown["diverged"], shown["collapsed"], shown["open"]) == (2, 1, 1, 2)
    assert {run["state"] for run in shown["runs"]} == {"finished", "diverged", "failed", "missing"}
    assert shown["runs"][3]["message"] == "it broke"
    assert data["failures"] == {"x": "why"}


def test_nothing_finished_is_no_table_of_nothing(tmp_path: Path) -> None:
    comparison = table.compare(swept(tmp_path))
    assert comparison.metric is None
    assert table.sentences(comparison) == ["no run has come to its end yet, so there is nothing to compare"]
    assert len(table.text(comparison).splitlines()) == 5


def test_last_and_best_are_both_there(tmp_path: Path) -> None:
    sweep = swept(tmp_path, seeds=1)
    for name, values in (("weight-0", (5.0, 1.0, 3.0)), ("weight-1", (4.0, 6.0, 2.0))):
        rows = [{"step": 5 * i, "eval/kid_mobilenet_v2": v, "eval/psnr_y": 10 * v} for i, v in enumerate(values)]
        made(sweep, f"{name}_seed-0", rows=rows)
    low, high = (rows_of(table.compare(sweep, key)) for key in ("eval/kid_mobilenet_v2", "eval/psnr_y"))
    one = low["weight-0"].results[0]
    assert (one.last, one.best, one.best_step) == (3.0, 1.0, 5)
    two = high["weight-0"].results[0]
    assert (two.last, two.best, two.best_step) == (30.0, 50.0, 0)


def test_the_most_telling_metric_is_chosen(tmp_path: Path) -> None:
    sweep = swept(tmp_path, seeds=2)
    run = made(sweep, "weight-0_seed-0", rows=[{"step": 1, "loss/g": 1.0, "loss/g_adv": 2.0, "eval/overfit": 0.0}])

    def chosen() -> str:
        found, _ = choose({"a": [run]}, None)
        assert found is not None
        return found.key

    assert chosen() == "loss/g_adv"
    run.append_metrics({"step": 2, "eval/psnr_y_bicubic": 30.0, "eval/ssim_y": 0.5})
    assert chosen() == "eval/ssim_y"
    run.append_metrics({"step": 3, "eval/kid_mobilenet_v2": 0.5})
    assert chosen() == "eval/kid_mobilenet_v2"
    run.add_evaluation({"step": 10, "settings": {}, "metrics": {"kid_mobilenet_v2": 0.5, "fid_mobilenet_v2": 1.0}})
    assert chosen() == "kid_mobilenet_v2"
    run.add_evaluation({"step": 10, "settings": {"extractor": "inception"}, "metrics": {"kid": 0.5}})
    assert chosen() == "kid"
    with pytest.raises(UserError, match="no run has 'fdi'"):
        choose({"a": [run]}, "fdi")


def test_only_scores_taken_in_the_same_way_are_compared(tmp_path: Path) -> None:
    sweep = with_kids(swept(tmp_path))
    odd = Run(sweep.folder / "weight-0_seed-0")
    odd.add_evaluation({"step": 10, "weights": "ema", "settings": {"num": 9}, "metrics": {"kid": 50.0}})
    odd.add_evaluation({"step": 10, "weights": "raw", "settings": {"num": 500}, "metrics": {"kid": 60.0}})
    assert rows_of(table.compare(sweep))["weight-0"].results[0].last == 0.110


@pytest.mark.parametrize(
    ("key", "better"),
    [
        ("kid_mobilenet_v2", "lower"),
        ("eval/psnr_y", "higher"),
        ("recall", "higher"),
        ("health/diversity", "higher"),
        ("loss/g_adv", None),
        ("health/d_real", None),
        ("eval/d_valid", None),
        ("modes", "higher"),
        ("eval/kid_mobilenet_v2", "lower"),
        ("modes_kl", "lower"),
        ("health/g_grad_norm", None),
        ("fm/share", None),
    ],
)
def test_which_way_is_better(key: str, better: str | None) -> None:
    assert Metric(key).better == better


def test_several_controls_are_each_compared_with_their_own(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "feature_matching.weight=0,1", "train.batch_size=8,16", seeds=2)
    values = {"weight-0_batch-size-8": 1.0, "weight-0_batch-size-16": 2.0, "weight-1_batch-size-8": 1.5}
    for name, value in {**values, "weight-1_batch-size-16": 1.0}.items():
        for seed in range(2):
            made(sweep, f"{name}_seed-{seed}", kid=value + 0.1 * seed)
    found = rows_of(table.compare(sweep))
    differences = {n: r.against.paired.difference.mean for n, r in found.items() if r.against}
    words = table.sentences(table.compare(sweep))
    assert any(s.startswith("two seeds tell a difference from chance only where") for s in words)
    assert not any("4 times in 5" in s for s in words)
    assert "inf" not in table.text(table.compare(sweep))
    heads, _, *lines = table.text(table.compare(sweep)).splitlines()
    at = heads.index("visible from")
    assert {line[at : at + len("visible from")].strip() for line in lines} == {"-"}
    assert differences == {"weight-1_batch-size-8": pytest.approx(0.5), "weight-1_batch-size-16": pytest.approx(-1.0)}
    assert [row.name for row in table.compare(sweep).rows][:2] == ["weight-0_batch-size-8", "weight-0_batch-size-16"]


def test_overrides_of_a_sweep_reach_every_combination(tmp_path: Path) -> None:
    parsed = [grid.parse_over(OVERS[0])]
    found = grid.combinations("dcgan", None, [Override("--steps", "train.steps", "7")], parsed)
    assert {c.config.train.steps for c in found} == {7}


def evaluated(kid: float, /, step: int = 10, weights: str = "ema", key: str = "kid", **settings: Any) -> dict[str, Any]:
    return {"step": step, "weights": weights, "settings": {"num": 500} | settings, "metrics": {key: kid}}


def test_seeds_that_hold_out_their_own_images_are_all_compared(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "feature_matching.weight=0,0.1", seeds=4)
    for name, kids in KIDS.items():
        for seed, kid in enumerate(kids[:4] if name in sweep.combinations else ()):
            odd = (name, seed) == ("weight-0.1", 3)  # its data changed since
            made(sweep, f"{name}_seed-{seed}").add_evaluation(evaluated(kid, reals_sha256="x" if odd else str(seed)))
    comparison = table.compare(sweep)
    control, matched = comparison.rows
    assert control.last is not None
    assert matched.last is not None
    assert (control.last.count, matched.last.count) == (4, 4)
    assert matched.against is not None
    expected = [a - b for a, b in zip(KIDS["weight-0.1"][:3], KIDS["weight-0"][:3], strict=True)]
    assert list(matched.against.paired.differences) == pytest.approx(expected)
    assert not comparison.ways_differ
    assert any(s.startswith("1 of 4 seeds of weight=0.1 and weight=0 are not compared") for s in comparison.remarks)


def test_one_run_with_a_more_telling_score_does_not_take_over(tmp_path: Path) -> None:
    sweep = swept(tmp_path, seeds=2)
    for name in sweep.runs:
        made(sweep, name).add_evaluation(evaluated(0.5, key="kid_mobilenet_v2", extractor="mobilenet_v2"))
    Run(sweep.folder / "weight-0_seed-0").add_evaluation(evaluated(0.4, extractor="inception"))
    comparison = table.compare(sweep)
    assert comparison.metric == Metric("kid_mobilenet_v2", True)
    assert all(row.last is not None and row.last.count == 2 for row in comparison.rows)


def test_a_metric_may_be_asked_for_without_its_extractor_and_a_wrong_one_loses_no_table(tmp_path: Path) -> None:
    sweep = swept(tmp_path, seeds=2)
    for name in sweep.runs:
        run = made(sweep, name, rows=[{"step": 10, "eval/psnr_y": 20.0, "eval/psnr_y_bicubic": 19.0}])
        run.add_evaluation(evaluated(0.5, key="kid_mobilenet_v2"))
    assert table.compare(sweep, "kid").metric == Metric("kid_mobilenet_v2", True)
    assert table.compare(sweep, "psnr_y").metric == Metric("eval/psnr_y")
    wrong = table.compare(sweep, "kdi")
    assert wrong.metric == Metric("kid_mobilenet_v2", True)
    assert table.sentences(wrong)[0].startswith("--metric: no run has 'kdi'; ")
    assert table.sentences(wrong)[0].endswith("; compared by kid_mobilenet_v2")


def test_runs_and_combinations_of_other_steps_are_not_mixed(tmp_path: Path) -> None:
    sweep = swept(tmp_path, seeds=2)
    for name in sweep.runs:
        made(sweep, name, kid=0.5)
    longer = Override("--steps", "train.steps", "20")
    found = grid.combinations("dcgan-fm", None, [longer], [grid.parse_over("feature_matching.weight=0,0.1")])
    sweep.add(found, [], [0])
    for name, kid in (("weight-0_seed-0", 0.3), ("weight-0.1_seed-0", 0.2)):
        run = Run(sweep.folder / name)
        run.write_status(state="finished", step=20, steps=20)
        run.add_evaluation(evaluated(kid, step=20))
    comparison = table.compare(sweep)
    control, matched, left = (rows_of(comparison)[name] for name in ("weight-0", "weight-0.1", "weight-1"))
    assert [
        (row.steps, row.last and row.last.mean, row.last and row.last.count, row.open) for row in comparison.rows
    ] == [
        (20, 0.3, 1, 1),
        (20, 0.2, 1, 1),
        (10, 0.5, 2, 0),
    ]
    assert matched.against is not None
    assert matched.against.paired.differences == pytest.approx([-0.1])
    assert (control.against, left.against) == (None, None)
    said = table.sentences(comparison)
    assert "weight-0_seed-1 (at step 10 of 20), weight-0.1_seed-1 (at step 10 of 20)" in said[0]
    assert said[1].startswith("weight=1 has 10 steps and weight=0 20, so they are not compared")
    assert "steps" in table.text(comparison).splitlines()[0].split()


def test_a_score_of_an_earlier_step_is_not_that_of_the_end(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "feature_matching.weight=0,1", seeds=2)
    for name in sweep.runs:
        made(sweep, name).add_evaluation(evaluated(0.9, step=5))
    for name in list(sweep.runs)[:3]:
        Run(sweep.folder / name).add_evaluation(evaluated(0.5))
    lasts = [(r.last, r.best) for row in table.compare(sweep).rows for r in row.results]
    assert sorted(lasts, key=str) == [(0.5, 0.5)] * 3 + [(None, 0.9)]


def test_steps_may_be_what_a_sweep_varies(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "train.steps=10,20", seeds=2)
    for name, (combination, _) in sweep.runs.items():
        steps = sweep.combinations[combination].config.train.steps
        run = made(sweep, name)
        run.write_status(state="finished", step=steps, steps=steps)
        run.add_evaluation(evaluated(1 / steps, step=steps))
    row = rows_of(table.compare(sweep, None, "steps-10"))["steps-20"]
    assert row.against is not None
    assert row.against.paired.differences == pytest.approx([-0.05, -0.05])


def test_measurements_in_training_are_compared_at_a_step_that_all_have(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "feature_matching.weight=0,1", seeds=2)
    for name, (combination, seed) in sweep.runs.items():
        steps = (4, 8) if combination == "weight-0" else (4, 8, 10)  # measured less often
        made(sweep, name, rows=[{"step": s, "eval/kid_mobilenet_v2": s + 0.1 * seed} for s in steps])
    comparison = table.compare(sweep)
    row = rows_of(comparison)["weight-1"]
    assert row.against is not None
    assert row.against.paired.differences == (0.0, 0.0)
    assert [(r.last, r.last_step) for r in row.results] == [(8.0, 8), (8.1, 8)]
    assert any("eval/kid_mobilenet_v2 is compared at step 8 of 10" in s for s in table.sentences(comparison))


def test_a_step_that_is_not_shared_is_not_compared(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "feature_matching.weight=0,1", seeds=2)
    for name, (combination, _) in sweep.runs.items():
        made(sweep, name, rows=[{"step": 9 if combination == "weight-0" else 10, "eval/kid_mobilenet_v2": 0.5}])
    comparison = table.compare(sweep)
    assert rows_of(comparison)["weight-1"].against is None
    assert any(s.startswith("2 of 2 seeds of weight=1 and weight=0 are not compared") for s in comparison.remarks)


def test_ways_of_measuring_need_be_equal_only_within_a_pair(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "feature_matching.weight=0,1", "train.batch_size=8,16", seeds=2)
    for name, (combination, seed) in sweep.runs.items():
        size = 16 if combination.endswith("16") else 8
        kid = size + combination.startswith("weight-1") + 0.1 * seed
        made(sweep, name).add_evaluation(evaluated(kid, resolution=size))
    comparison = table.compare(sweep)
    found = rows_of(comparison)
    assert all(row.last is not None and row.last.count == 2 for row in comparison.rows)
    for name in ("weight-1_batch-size-8", "weight-1_batch-size-16"):
        against = found[name].against
        assert against is not None
        assert against.paired.differences == pytest.approx([1, 1])
    assert "kid (ways differ)" in table.text(comparison).splitlines()[0]
    one = table.compare(sweep, None, "weight-0_batch-size-8")
    assert {name for name, row in rows_of(one).items() if row.against} == {"weight-1_batch-size-8"}
    assert sum("kid was taken in another way" in sentence for sentence in one.remarks) == 2
