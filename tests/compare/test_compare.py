"""Runs side by side: which are one experiment, what differs, which is better and how sure that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats
from support.commands import fmrun, good
from support.made_runs import MACHINE, SETTINGS, config, made_run, read_outs

from fmrun.compare.comparison import Comparison, compare
from fmrun.compare.configs import differences, experiment, group_names, grouped
from fmrun.compare.measurements import holm
from fmrun.compare.table import score_table, text, to_data
from fmrun.compare.verdict import margins, verdict
from fmrun.metrics.measures import metric
from fmrun.runs.folder import Run
from fmrun.runtime.errors import UserError

PLAIN = {"feature_matching__weight": 0.0}
MATCHED = {"feature_matching__weight": 0.1, "feature_matching__balance": "gradient"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def seeds(folder: Path, name: str, values: list[float], **fields: object) -> list[Run]:
    """A run a seed, with these KIDs at their end."""
    return [
        made_run(folder, f"{name}-seed{i}", kid={50: 2 * v, 100: v}, seed=i, **fields)  # type: ignore[arg-type]
        for i, v in enumerate(values)
    ]


# ---- configs


def test_runs_that_differ_in_their_seed_alone_are_one_group() -> None:
    configs = [config(seed=0), config(seed=1), config(optim__clip_grad_norm=1.0), config(seed=2)]
    assert grouped(configs) == [[0, 1, 3], [2]]


def test_a_seed_that_is_there_twice_is_no_second_sample() -> None:
    assert grouped([config(seed=0), config(seed=1), config(seed=0), config(seed=2)]) == [[0, 1, 3], [2]]


@pytest.mark.parametrize(
    "field", ["log__every", "checkpoint__every", "eval__num", "device", "data__workers", "threads"]
)
def test_what_is_not_the_experiment_makes_no_group(field: str) -> None:
    value = "cpu" if field == "device" else 7
    assert experiment(config(**{field: value})) == experiment(config())


@pytest.mark.parametrize("field", ["train__steps", "train__batch_size", "data__path", "generator__width"])
def test_what_is_the_experiment_does(field: str) -> None:
    assert experiment(config(**{field: 9})) != experiment(config())


def test_fields_that_an_older_version_did_not_have_make_no_difference() -> None:
    old = config(seed=1)
    del old["data"]["skip_unreadable"]
    assert grouped([config(seed=0), old]) == [[0, 1]]
    assert differences([config(), old]) == {}
    assert differences([config(data__skip_unreadable=True), old]) == {"data.skip_unreadable": ("true", "false")}


def test_settings_of_feature_matching_that_is_off_make_no_difference() -> None:
    off = [config(**PLAIN), config(**PLAIN, feature_matching__match="sample", feature_matching__ramp=5, seed=1)]
    assert grouped(off) == [[0, 1]]
    assert differences(off) == {}
    on = [config(**MATCHED, feature_matching__match=match) for match in ("mean", "sample")]
    assert grouped(on) == [[0], [1]]


def test_fields_that_differ_only_where_they_do_not_act_are_no_differences() -> None:
    assert differences([config(**PLAIN), config(**MATCHED), config(**MATCHED, feature_matching__match="sample")]) == {
        "feature_matching.weight": ("0", "0.1", "0.1"),
        "feature_matching.match": ("·", "mean", "sample"),
    }


def test_of_a_section_that_one_run_lacks_its_weight_is_the_difference() -> None:
    loss = {"weight": 0.5, "start_step": 0, "ramp": 0}
    assert differences([config(), config(losses__l1=loss)]) == {"losses.l1.weight": ("·", "0.5")}


def test_the_seed_and_equal_fields_are_no_differences() -> None:
    assert differences([config(seed=1), config(seed=2)]) == {}


@pytest.mark.parametrize(
    ("runs", "name"),
    [
        (["plain-seed0", "plain-seed1"], "plain"),
        (["mean-0.1-seed1", "mean-0.1-seed10"], "mean-0.1"),
        (["mean-0.1-0", "mean-0.1-1"], "mean-0.1"),
        (["weight=0.1_seed-0", "weight=0.1_seed-1"], "weight=0.1"),
        (["fm-s3", "fm-s4"], "fm"),
        (["dcgan-fm-001", "dcgan-fm-002"], "dcgan-fm"),
        (["left", "right"], "left"),
        (["alone-seed0"], "alone-seed0"),
    ],
)
def test_a_group_is_called_what_its_runs_have_in_common(runs: list[str], name: str) -> None:
    assert group_names([runs]) == [name]


def test_groups_of_the_same_name_take_that_of_a_run() -> None:
    assert group_names([["a-1", "a-2"], ["a-3", "a-4"]]) == ["a-1", "a-3"]


# ---- scores


def test_best_goes_by_direction_and_last_by_step(folder: Path) -> None:
    a = made_run(folder, "a", kid={10: 0.5, 60: 0.1, 100: 0.2}, **PLAIN)
    b = made_run(folder, "b", kid={10: 0.4, 100: 0.3}, **MATCHED)
    (column,) = compare([a, b]).columns
    assert [s and s.runs for s in column.last] == [{"a": (0.2, 100)}, {"b": (0.3, 100)}]
    assert [s and s.runs for s in column.best] == [{"a": (0.1, 60)}, {"b": (0.3, 100)}]
    assert (column.better, column.floor, column.label) == ("lower", 0.001, "KID (MobileNetV2)")


def test_more_is_better_of_psnr(folder: Path) -> None:
    rows = [{"step": s, "eval/psnr_y": v, "eval/psnr_y_bicubic": 30.0} for s, v in ((10, 31.0), (20, 33.0), (30, 32.0))]
    a = made_run(folder, "a", rows=rows, task="upscale")
    lower = [row | {"eval/psnr_y": row["eval/psnr_y"] - 1} for row in rows]
    b = made_run(folder, "b", rows=lower, task="upscale", generator__width=7)
    comparison = compare([a, b])
    column = comparison.column
    assert column is not None
    assert column.best[0] is not None
    assert column.best[0].runs == {"a": (33.0, 20)}
    assert column.reference == 30.0
    assert verdict(comparison).sentence == "a is ahead of b: PSNR-Y 32.00 dB against 31.00 dB, 1.00 dB higher."


def test_the_reference_of_an_evaluation_is_bicubic(folder: Path) -> None:
    runs = [made_run(folder, name, task="upscale", generator__width=w) for name, w in (("a", 4), ("b", 8))]
    for run in runs:
        settings = {"task": "upscale", "num": 2}
        record = {"step": 100, "weights": "ema", "settings": settings, "metrics": {"psnr_y": 33.0}, "floor": {}}
        run.add_evaluation(record | {"bicubic": {"psnr_y": 31.0}})
    column = compare(runs).column
    assert column is not None
    assert (column.key, column.reference, column.floor) == ("psnr_y", 31.0, None)


def test_what_was_measured_otherwise_is_another_column(folder: Path) -> None:
    a = made_run(folder, "a", kid={100: 0.2}, **PLAIN)
    b = made_run(folder, "b", kid={100: 0.1}, settings=SETTINGS | {"num": 500}, **MATCHED)
    comparison = compare([a, b])
    assert [column.label for column in comparison.columns] == [
        "KID (MobileNetV2), num 2000",
        "KID (MobileNetV2), num 500",
    ]
    assert all(None in column.last for column in comparison.columns)
    assert verdict(comparison).winner is None
    assert verdict(comparison).detail == (
        "KID (MobileNetV2), num 2000 is missing for b. To measure all in the same way: fmrun eval a b"
    )
    c = made_run(folder, "c", kid={100: 0.3}, **MATCHED, generator__width=9)
    assert [[s is None for s in column.last] for column in compare([a, b, c]).columns] == [
        [False, True, False],
        [True, False, True],
    ]


def test_seeds_that_hold_out_their_own_images_are_one_column_and_pair(folder: Path) -> None:
    def group(name: str, values: list[float], held_out: str, **fields: object) -> list[Run]:
        return [
            made_run(folder, f"{name}-seed{i}", kid={100: v}, settings=SETTINGS | {"reals_sha256": h}, seed=i, **fields)  # type: ignore[arg-type]
            for i, (v, h) in enumerate(zip(values, held_out, strict=True))
        ]

    plain = group("plain", [0.20, 0.22, 0.24], "abc", **PLAIN)
    comparison = compare([*plain, *group("mean", [0.10, 0.13, 0.14], "abc", **MATCHED)])
    (column,) = comparison.columns
    assert [s and s.count for s in column.last] == [3, 3]
    assert "reals_sha256" not in column.settings
    margin = margins(comparison)[1, 0]
    assert (margin.count, margin.mean) == (3, pytest.approx(0.29 / 3))

    # what one seed was measured against must be the same in both, or its difference says nothing
    other = compare([*plain, *group("odd", [0.10, 0.13, 0.14], "abx", **MATCHED, feature_matching__match="sample")])
    assert margins(other)[1, 0].count == 2
    none = compare([*plain, *group("none", [0.10, 0.13, 0.14], "xyz", **MATCHED, feature_matching__ramp=7)])
    assert margins(none) == {}
    assert "against the same images" in verdict(none).detail


def test_quick_measurements_of_unequal_image_counts_are_not_compared(folder: Path) -> None:
    rows = [row | {"eval/kid_mobilenet_v2": 0.5} for row in read_outs()]
    a = made_run(folder, "a", rows=rows, **PLAIN, eval__num=500)
    b = made_run(folder, "b", rows=[r | {"eval/psnr_y": 1.0} for r in rows], **MATCHED, eval__num=500)
    c = made_run(folder, "c", rows=[r | {"eval/psnr_y": 1.0} for r in rows], **MATCHED, eval__num=9, seed=1)
    assert [len([s for s in col.last if s]) for col in compare([a, b, c]).columns] == [2, 1, 1]


def test_a_plain_name_is_inceptions() -> None:
    assert metric("fid").label == "FID (Inception)"
    assert metric("fid_mobilenet_v2").label == "FID (MobileNetV2)"
    assert metric("eval/kid").label == "KID (Inception)"
    assert metric("psnr_y").label == "PSNR-Y"
    assert metric("modes").better == "higher"
    assert metric("modes_kl").better == "lower"
    assert metric("kidney/score").label == "kidney/score"


# ---- verdicts


def both(folder: Path, plain: list[float], matched: list[float]) -> Comparison:
    return compare([*seeds(folder, "plain", plain, **PLAIN), *seeds(folder, "matched", matched, **MATCHED)])


def test_a_difference_beyond_chance_is_a_win(folder: Path) -> None:
    comparison = both(folder, [0.20, 0.21, 0.22], [0.10, 0.115, 0.12])
    found = verdict(comparison)
    assert (found.winner, found.against, found.certain) == ("matched", "plain", True)
    assert found.sentence == "matched beats plain: KID (MobileNetV2) 0.112 against 0.210, 47 % lower."
    margin, pair = margins(comparison)[1, 0], stats.ttest_rel([0.20, 0.21, 0.22], [0.10, 0.115, 0.12])
    bounds = pair.confidence_interval(0.95)
    assert (margin.low, margin.high) == (pytest.approx(bounds.low), pytest.approx(bounds.high))
    assert margin.p == pytest.approx(pair.pvalue)
    assert margins(comparison)[0, 1].mean == -margin.mean


def test_a_difference_within_chance_is_none(folder: Path) -> None:
    found = verdict(both(folder, [0.20, 0.10, 0.15], [0.14, 0.14, 0.14]))
    assert (found.winner, found.certain) == ("matched", False)
    assert "could be chance" in found.sentence


def test_of_many_comparisons_the_p_value_is_corrected(folder: Path) -> None:
    plain, matched = [0.20, 0.21, 0.22, 0.20], [0.19, 0.195, 0.20, 0.196]
    alone = both(folder, plain, matched)
    more = [
        run
        for i, match in enumerate(("sample", "moments", "coral", "mmd", "sliced"))
        for run in seeds(
            folder,
            match,
            [v + 0.02 * (-1) ** j + 0.001 * i for j, v in enumerate(plain)],
            **MATCHED,
            feature_matching__match=match,
        )
    ]
    every = compare([Run(p) for p in sorted(folder.iterdir()) if Run(p) not in more] + more)
    one, many = verdict(alone), verdict(every)
    assert margins(every)[every.ranking[0], every.control or 0].p > margins(alone)[1, 0].p
    assert (one.winner, many.winner) == ("matched", "matched")
    assert one.certain
    assert not many.certain
    assert "Holm" in many.detail
    assert "Holm" not in one.detail


def test_without_a_control_the_best_was_not_chosen_before(folder: Path) -> None:
    """p is corrected over all three pairs, and with a control over the two that it is part of."""
    values = {"mean": [0.10, 0.112, 0.12], "sample": [0.13, 0.141, 0.14], "mmd": [0.14, 0.141, 0.155]}
    runs = [
        run
        for match, own in values.items()
        for run in seeds(folder, match, own, **MATCHED, feature_matching__match=match)
    ]
    best, other, last = values.values()
    raw = [stats.ttest_rel(a, b).pvalue for a, b in ((best, other), (best, last), (other, last))]
    found, controlled = compare(runs), compare(runs, control="sample")
    assert found.control is None
    assert margins(found)[0, 1].p == pytest.approx(holm(raw)[0])
    assert margins(controlled)[0, 1].p == pytest.approx(holm([raw[0], raw[2]])[0])
    assert margins(controlled)[0, 2].p == pytest.approx(holm(raw)[1])
    assert "p after Holm's correction over all pairs of groups" in text(found)
    assert "over all pairs" not in text(controlled)


def test_every_group_is_held_against_the_control_over_the_same_seeds(folder: Path) -> None:
    plain = [0.20, 0.21, 0.22]
    runs = [
        *seeds(folder, "plain", plain, **PLAIN),
        *seeds(folder, "good", [0.17, 0.172, 0.177], **MATCHED),
        *seeds(folder, "bad", [0.23, 0.26, 0.25, 0.9], **MATCHED, feature_matching__match="sample"),
    ]
    found = compare(runs)
    pairs = to_data(found)["pairs"]
    assert [(p["group"], p["other"], p["count"]) for p in pairs] == [("good", "plain", 3), ("bad", "plain", 3)]
    tests = [stats.ttest_rel([0.17, 0.172, 0.177], plain).pvalue, stats.ttest_rel([0.23, 0.26, 0.25], plain).pvalue]
    assert [pair["p"] for pair in pairs] == pytest.approx([2 * tests[0], tests[1]])
    told = text(found).split("against plain")[1].splitlines()[2:5]
    assert [line.split()[:3] for line in told[:2]] == [["good", "3", "0.037"], ["bad", "3", "-0.037"]]
    assert told[2].startswith("by KID (MobileNetV2), over the same seeds: positive is better")


def test_what_is_ahead_but_worse_on_the_seeds_of_both_is_said_to_be(folder: Path) -> None:
    runs = [
        *seeds(folder, "plain", [1.0, 1.01, 0.99], **PLAIN),
        *seeds(folder, "matched", [1.1, 1.112, 1.09, 0.2], **MATCHED),
    ]
    found = verdict(compare(runs))
    assert found.sentence.startswith("matched is ahead of plain, but not on the seeds that both have: ")
    assert found.detail.startswith(
        "Over the 3 seeds that both have it is worse than plain by 0.1007 (95 % interval 0.0978 to"
    )
    assert "zero" not in found.detail


def test_with_two_groups_the_lead_says_it_all(folder: Path) -> None:
    assert "against plain  seeds" not in text(both(folder, [0.20, 0.21], [0.17, 0.172]))


@pytest.mark.parametrize(
    ("state", "words"), [("diverged", "did not diverge"), ("failed", "did not fail"), ("stopped", "is finished")]
)
@pytest.mark.parametrize("loser", [False, True])
def test_where_seeds_were_lost_nothing_is_certain(folder: Path, state: str, words: str, loser: bool) -> None:
    plain, matched = [0.20, 0.21, 0.22, 0.21], [0.10, 0.115, 0.12, 0.11]
    runs = [*seeds(folder, "plain", plain, **PLAIN), *seeds(folder, "matched", matched, **MATCHED)]
    gone = runs[3] if loser else runs[7]
    gone.write_status(state=state)
    if state == "stopped":
        gone.evaluations_file.unlink()
    found = verdict(compare(runs))
    who = "plain" if loser else "it"
    assert found.sentence.startswith(f"matched is ahead of plain where {who} {words} (3 of 4): KID (MobileNetV2) 0.11")
    assert (found.winner, found.certain) == ("matched", False)
    assert sorted(row[1] for row in score_table(compare(runs)).rows if row[1]) == ["3 of 4", "4"]
    assert not any(pair["complete"] for pair in to_data(compare(runs))["pairs"])


def test_one_seed_each_is_ahead_and_no_more(folder: Path) -> None:
    found = verdict(both(folder, [0.2], [0.1]))
    assert found.sentence == "matched-seed0 is ahead of plain-seed0: KID (MobileNetV2) 0.100 against 0.200, 50 % lower."
    assert "not known" in found.detail
    assert not found.certain


def test_equal_scores_are_level(folder: Path) -> None:
    found = verdict(both(folder, [0.2], [0.2]))
    assert found.winner is None
    assert "level" in found.sentence


def test_without_evaluations_nobody_wins(folder: Path) -> None:
    a, b = made_run(folder, "a", **PLAIN), made_run(folder, "b", **MATCHED)
    found = verdict(compare([a, b]))
    assert found.winner is None
    assert "fmrun eval a b" in found.detail


def test_runs_that_measured_nothing_are_compared_by_their_configs(folder: Path) -> None:
    runs = [made_run(folder, "a", **PLAIN), made_run(folder, "b", **MATCHED)]
    for rows in ("", '{"step": 10, "loss/d": 1.0}\n', '{"step": 10, "loss/d": null}\n'):
        runs[0].metrics_file.write_text(rows)
        runs[1].metrics_file.write_text("")
        assert "feature_matching.weight" in text(compare(runs))


def test_by_best_another_may_win(folder: Path) -> None:
    a = made_run(folder, "a", kid={50: 0.05, 100: 0.3}, **PLAIN)
    b = made_run(folder, "b", kid={50: 0.4, 100: 0.1}, **MATCHED)
    last, best = verdict(compare([a, b])), verdict(compare([a, b], by="best"))
    assert (last.winner, best.winner) == ("b", "a")


def test_runs_of_different_versions_are_warned_of(folder: Path) -> None:
    a = made_run(folder, "a", env=MACHINE | {"fmrun": "1.0", "torch": "2.11"}, **PLAIN)
    b = made_run(folder, "b", env=MACHINE | {"fmrun": "1.0", "torch": "2.12"}, **MATCHED)
    (warning,) = compare([a, b]).warnings
    assert "different versions (fmrun 1.0 and torch 2.11, fmrun 1.0 and torch 2.12)" in warning


# ---- equal training


def test_runs_are_compared_at_the_last_step_that_all_have(folder: Path) -> None:
    def pair(name: str, ends: list[float], step: int, **fields: object) -> list[Run]:
        return [
            made_run(folder, f"{name}-seed{i}", kid={60: v, step: v / 2}, seed=i, **fields)  # type: ignore[arg-type]
            for i, v in enumerate(ends)
        ]

    plain, longer = pair("plain", [0.20, 0.21, 0.22], 100, **PLAIN), pair("longer", [0.30, 0.31, 0.33], 200, **MATCHED)
    comparison = compare([*plain, *longer])
    column, found = comparison.column, verdict(comparison)
    assert column is not None
    assert column.step == 60
    assert [s and s.mean for s in column.last] == [pytest.approx(0.21), pytest.approx(0.94 / 3)]
    assert (found.winner, found.certain) == ("plain", True)  # by their ends it would be the other
    assert "KID (MobileNetV2) is compared at step 60, the last at which all that count have it" in comparison.warnings
    assert "0.210 ±0.025" in good("compare", *(run.name for run in (*plain, *longer))).out


def test_what_has_no_step_in_common_is_not_paired(folder: Path) -> None:
    for name, step, fields in (("plain", 100, PLAIN), ("longer", 200, MATCHED)):
        for seed in range(3):
            made_run(folder, f"{name}-seed{seed}", kid={step: 0.1 + seed / 99}, seed=seed, **fields)  # type: ignore[arg-type]
    comparison = compare([Run(path) for path in sorted(folder.iterdir())])
    found = verdict(comparison)
    assert comparison.column is not None
    assert comparison.column.step is None
    assert margins(comparison) == {}
    assert "They share fewer than two seeds measured at the same step" in found.detail


def test_a_run_that_has_just_begun_does_not_take_the_others_back(folder: Path) -> None:
    rows = [row | {"eval/kid_mobilenet_v2": 1 / row["step"]} for row in read_outs()]
    runs = [made_run(folder, f"plain-seed{i}", rows=rows, seed=i, **PLAIN) for i in range(2)]
    runs += [made_run(folder, f"fm-seed{i}", rows=rows, seed=i, **MATCHED) for i in range(2)]
    begun = made_run(folder, "fm-seed2", rows=rows[:2], seed=2, state="running", **MATCHED)
    comparison = compare([*runs, begun])
    column = comparison.column
    assert column is not None
    assert column.step == 100
    assert [s and s.count for s in column.last] == [2, 2]
    assert [row[1] for row in score_table(comparison).rows if row[0].startswith("fm")] == ["2 of 3"]
    # where it is all there is of its setting, both are compared as they were then
    alone = compare([*runs[:2], begun]).column
    assert alone is not None
    assert alone.step == 20


# ---- runs that went wrong, and comparisons that cannot be


def test_a_diverged_run_is_marked_and_does_not_count(folder: Path) -> None:
    runs = [*seeds(folder, "plain", [0.2, 0.21, 0.22], **PLAIN), *seeds(folder, "matched", [0.1, 0.11, 9.0], **MATCHED)]
    runs[-1].write_status(state="diverged", message="training diverged")
    comparison = compare(runs)
    column = comparison.column
    assert column is not None
    assert column.last[1] is not None
    assert (column.last[1].count, column.last[1].mean) == (2, pytest.approx(0.105))
    assert any(
        "1 of 3 runs of matched diverged (at step 100): not counted" in warning for warning in comparison.warnings
    )
    done = good("compare", *(run.name for run in runs))
    assert "1 of 3 diverged" in done.out


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_an_unfinished_run_is_marked(folder: Path, state: str) -> None:
    made_run(folder, "a", **PLAIN, kid={100: 0.1})
    made_run(folder, "b", **MATCHED, kid={100: 0.2}, state=state)
    done = good("compare", "a", "b")
    word = "interrupted" if state == "running" else state
    assert done.warnings == [f"warning: b is {word} at step 100 of 2500: what it shows is not its end"]
    assert word in done.out


def test_runs_of_different_tasks_are_refused(folder: Path) -> None:
    made_run(folder, "a")
    made_run(folder, "b", task="upscale")
    done = fmrun("compare", "a", "b")
    assert done.code == 2
    assert done.errors == [
        "error: a (generate) and b (upscale) learn different tasks and have no measure in common; compare runs of one task"
    ]


def test_runs_on_different_data_are_warned_of(folder: Path) -> None:
    a, b = made_run(folder, "a"), made_run(folder, "b", data__path="elsewhere")
    assert any("different data (data.path)" in warning for warning in compare([a, b]).warnings)


@pytest.mark.parametrize(
    ("fields", "differing"),
    [
        ({"kind": "chain"}, "data.degradation.kind"),
        ({"kind": "chain", "first__blur__prob": 0.5}, "data.degradation.kind"),
        ({"first__blur__prob": 0.5}, None),
    ],
)
def test_runs_on_different_degradations_are_warned_of(
    folder: Path, fields: dict[str, object], differing: str | None
) -> None:
    own = {f"data__degradation__{key}": value for key, value in fields.items()}
    a, b = made_run(folder, "a", task="upscale"), made_run(folder, "b", task="upscale", **own)
    found = [warning for warning in compare([a, b]).warnings if "different data" in warning]
    assert len(found) == (differing is not None)
    assert all(f"({differing})" in warning for warning in found)


def test_chains_differ_in_the_passes_they_have(folder: Path) -> None:
    def chain(name: str, **own: object) -> Run:
        fields = {"kind": "chain", **own}
        return made_run(folder, name, task="upscale", **{f"data__degradation__{k}": v for k, v in fields.items()})

    whole, other = chain("whole"), chain("other", second__jpeg__prob=0.5)
    assert any("(data.degradation.second.jpeg.prob)" in w for w in compare([whole, other]).warnings)
    short, alike = chain("short", passes=1), chain("alike", passes=1, second__jpeg__prob=0.5)
    assert not any("different data" in w for w in compare([short, alike]).warnings)


def test_a_run_that_went_on_after_its_evaluation_is_warned_of(folder: Path) -> None:
    a = made_run(folder, "a", kid={50: 0.3, 60: 0.2}, **PLAIN)
    b = made_run(folder, "b", kid={60: 0.1, 100: 0.2}, **MATCHED)
    assert compare([a, b]).warnings == (
        "KID (MobileNetV2) is compared at step 60, the last at which all that count have it",
    )
    out = good("compare", "a", "b").out
    assert "KID (MobileNetV2) ↓ @60" in out
    a.add_evaluation(a.evaluations()[-1] | {"step": 100})
    assert compare([a, b]).warnings == ()
    assert "KID (MobileNetV2) ↓ @100" in good("compare", "a", "b").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs two runs or more"),
        (["a"], "needs two runs or more"),
        (["a", "a"], "needs two runs or more"),
        (["a", "c"], "there is no run 'c'"),
        (["a", "b", "--metric", "fid"], "they have kid_mobilenet_v2"),
        (["a", "b", "--control", "x"], "no run or group here is called so"),
        (["a", "b", "--html", "page.png"], "ends in .html"),
        (["a", "b", "--html", "runs"], "ends in .html"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, arguments: list[str], said: str) -> None:
    made_run(folder, "a", **PLAIN, kid={100: 0.1})
    made_run(folder, "b", **MATCHED, kid={100: 0.2})
    done = fmrun("compare", *arguments)
    assert done.code == 2
    assert len(done.errors) == 1
    assert said in done.errors[0]
    assert done.out == ""


def test_a_measure_without_a_better_way_cannot_decide(folder: Path) -> None:
    rows = [row | {"eval/d_fake": 1.0} for row in read_outs()]
    a, b = made_run(folder, "a", rows=rows, **PLAIN), made_run(folder, "b", rows=rows, **MATCHED)
    with pytest.raises(UserError, match="neither way of it is better"):
        compare([a, b], metric="d_fake")


# ---- what is printed


def test_what_scores_are_held_against_stands_in_the_table(folder: Path) -> None:
    made_run(folder, "a", kid={100: 0.2}, **PLAIN)
    made_run(folder, "b", kid={100: 0.1}, **MATCHED)
    lines = good("compare", "a", "b").out.splitlines()
    assert next(line for line in lines if line.startswith("(real images)")).split() == ["(real", "images)", "0.001"]
    rows = [{"step": s, "eval/psnr_y": 32.0, "eval/psnr_y_bicubic": 30.5} for s in (10, 20)]
    for name, width in (("c", 4), ("d", 8)):
        made_run(folder, name, rows=rows, task="upscale", generator__width=width)
    lines = good("compare", "c", "d").out.splitlines()
    assert next(line for line in lines if line.startswith("(bicubic)")).split() == ["(bicubic)", "30.50"]


def test_measures_that_make_a_table_too_wide_are_its_rows(folder: Path) -> None:
    for name, weight in (("plain", 0.0), ("matched", 0.1)):
        run = made_run(folder, name, feature_matching__weight=weight)
        names = [f"{stem}_mobilenet_v2" for stem in ("kid", "fid", "precision", "recall", "density", "coverage")]
        record = {"step": 100, "weights": "ema", "settings": SETTINGS, "metrics": dict.fromkeys(names, 0.5)}
        run.add_evaluation(record | {"floor": dict.fromkeys(names, 0.25)})
    out = good("compare", "plain", "matched").out
    table = out[out.index("run ") :].split("\n\n")[0].splitlines()
    assert table[0].split() == ["run", "plain", "*", "matched", "(real", "images)"]
    assert next(line for line in table if line.startswith("recall")).split()[-3:] == ["0.500", "0.500", "0.250"]
    assert max(map(len, table)) <= 80


def test_unlike_runs_stand_in_one_table_and_neither_is_better(folder: Path) -> None:
    shoes = SETTINGS | {"data": "shoes", "resolution": 64}
    made_run(folder, "a", kid={100: 0.2}, **PLAIN)
    made_run(folder, "b", kid={100: 0.1}, settings=shoes, data__path="shoes", data__image_size=64, **MATCHED)
    done = good("compare", "a", "b")
    assert any("different data (data.path, data.image_size)" in warning for warning in done.warnings)
    assert done.out.startswith("Nothing yet says which run is better.")
    assert "KID (MobileNetV2), data clothes, resolution 32 ↓ @100" in done.out


def test_a_run_that_was_not_measured_is_missing(folder: Path) -> None:
    a, b = made_run(folder, "a", kid={100: 0.2}, **PLAIN), made_run(folder, "b", **MATCHED)
    assert verdict(compare([a, b])).detail.startswith("KID (MobileNetV2) is missing for b.")


def test_the_table_names_groups_best_first_and_what_differs(folder: Path) -> None:
    runs = [*seeds(folder, "plain", [0.2, 0.21], **PLAIN), *seeds(folder, "matched", [0.1, 0.12], **MATCHED)]
    runs += seeds(folder, "sample", [0.3, 0.31], **MATCHED, feature_matching__match="sample")
    out = good("compare", *(run.name for run in runs)).out
    lines = out.splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("run "))
    assert lines[table + 2].startswith("matched ")
    assert lines[table + 3].startswith("plain * ")
    assert "· does not act there" in out
    assert all(len(line) <= 80 for line in lines if "  " in line)


def test_json_has_everything(folder: Path) -> None:
    runs = [*seeds(folder, "plain", [0.2, 0.21], **PLAIN), *seeds(folder, "matched", [0.1, 0.12], **MATCHED)]
    done = json.loads(good("compare", *(run.name for run in runs), "--json").out)
    assert set(done) == {
        *(
            "task",
            "by",
            "metric",
            "control",
            "order",
            "warnings",
            "verdict",
            "pairs",
            "groups",
            "differences",
            "columns",
        ),
    }
    assert (done["metric"], done["control"], done["order"]) == ("kid_mobilenet_v2", "plain", ["matched", "plain"])
    assert [g["name"] for g in done["groups"]] == ["plain", "matched"]
    (column,) = done["columns"]
    assert column["settings"] == SETTINGS
    assert column["last"][1]["runs"] == {"matched-seed0": [0.1, 100], "matched-seed1": [0.12, 100]}
    assert column["best"][1]["mean"] == pytest.approx(0.11)
    assert done["verdict"]["winner"] == "matched"
    assert [(pair["group"], pair["other"], pair["count"]) for pair in done["pairs"]] == [("matched", "plain", 2)]


def test_csv_is_the_table_of_all_measurements(folder: Path) -> None:
    runs = [*seeds(folder, "plain", [0.2, 0.21], **PLAIN), *seeds(folder, "matched", [0.1, 0.12], **MATCHED)]
    names = [run.name for run in runs]
    head, *lines = good("compare", *names, "--csv", "-").out.splitlines()
    assert head == "run,seed,group,state,metric,source,weights,settings,reals,step,value,floor"
    assert [line for line in lines if line.startswith("matched-seed1,1,matched,finished,kid_mobilenet_v2,eval,ema")]
    assert good("compare", *names, "--csv", "table.csv").out.startswith("matched ")
    assert Path("table.csv").read_text().splitlines() == [head, *lines]
    assert fmrun("compare", *names, "--csv", "-", "--json").code == 2


def test_runs_lie_where_they_are_said_to(folder: Path) -> None:
    made_run(folder.parent / "other", "a", **PLAIN, kid={100: 0.1})
    made_run(folder.parent / "other", "b", **MATCHED, kid={100: 0.2})
    assert "a is ahead of b" in good("compare", "a", "b", "--runs-dir", "other").out
