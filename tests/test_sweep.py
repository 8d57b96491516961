"""Whole sweeps: what they train, skip, resume and survive, and that the table does not depend on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import TINY, Background, fmrun, good, status, steps
from sweeping import EVALUATED, Sweeping, good_sweep, sweep, swept

from fmrun.runs import Run

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs"),
]

FAST = (*TINY, "--steps", "3", "-s", "log.every=1", "-s", "eval.every=0", "--no-eval")
WEIGHTS = ("--over", "feature_matching.weight=0,0.1")
NAMED = ("--name", "s")
S = Path("runs/s")


def timeless(found: dict) -> dict:
    """A comparison without how long things took."""
    text = json.dumps(found)
    content = json.loads(text)
    for row in content["combinations"]:
        row.pop("images_per_second")
        for run in row["runs"]:
            run.pop("images_per_second")
    return content


def runs_of(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def test_a_sweep_from_beginning_to_end() -> None:
    grid = (*WEIGHTS, "--over", "feature_matching.match=mean,sample", "--seeds", "2")
    listed = json.loads(good_sweep(*FAST, *NAMED, *grid, "--dry-run", "--json").out)
    assert not Path("runs").exists()
    names = [run["run"] for run in listed["runs"]]
    assert names == [
        f"{combination}_seed-{seed}"
        for seed in (0, 1)
        for combination in ("weight-0", "weight-0.1_match-mean", "weight-0.1_match-sample")
    ]

    done = good_sweep(*FAST, *NAMED, *grid, "--jobs", "2", "--json")
    found = json.loads(done.out)
    assert runs_of(S) == sorted(names)
    assert "6 of 6 runs done" in done.err
    assert f"next: fmrun compare {S}/*_seed-* --html s.html" in done.err
    assert [run["name"] for run in json.loads(good("runs", "--runs-dir", S, "--json").out)]

    control, mean, sample = found["combinations"]
    assert (control["label"], mean["label"], sample["label"]) == (
        "weight=0",
        "weight=0.1 match=mean",
        "weight=0.1 match=sample",
    )
    assert (control["control"], control["against"]) == (True, None)
    assert found["comparisons"] == 2
    for row in found["combinations"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert row["last"]["count"] == 2
        assert row["images_per_second"] > 0
    seeds = [run["last"] for run in mean["runs"]], [run["last"] for run in control["runs"]]
    assert mean["against"]["differences"] == [one - other for one, other in zip(*seeds, strict=True)]
    # what a run is called is also what it was trained with
    config = json.loads((S / "weight-0.1_match-sample_seed-1" / "config.json").read_text())
    assert (config["seed"], config["feature_matching"]["weight"], config["feature_matching"]["match"]) == (
        1,
        0.1,
        "sample",
    )

    before = {run: (S / run / "status.json").stat().st_mtime_ns for run in names}
    again = good("sweep", *FAST, *NAMED, *grid)
    assert "6 of 6 runs done already" in again.err
    assert before == {run: (S / run / "status.json").stat().st_mtime_ns for run in names}
    for row in found["combinations"]:
        assert row["label"] in again.out


def test_a_sweep_killed_in_the_middle_ends_with_the_same_table() -> None:
    flags = (
        *TINY,
        "--steps",
        "6",
        "-s",
        "log.every=1",
        "-s",
        "eval.every=0",
        "-s",
        "checkpoint.every=2",
        "--no-eval",
        *WEIGHTS,
        "--seeds",
        "2",
    )
    alone = swept(*flags, "--name", "alone")
    killed = Sweeping(*flags, *NAMED)
    second = S / "weight-0.1_seed-0"
    killed.until(lambda: steps(second))
    children = killed.children()
    os.killpg(killed.pid, signal.SIGKILL)
    for child in children:  # the kernel has asked them to save; they do not get as far
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    killed.end()
    assert (Run(S / "weight-0_seed-0").state, len(runs_of(S))) == ("finished", 2)
    assert status(second)["state"] != "finished"

    found = swept(*flags, *NAMED)
    found["sweep"], found["path"] = alone["sweep"], alone["path"]
    assert timeless(found) == timeless(alone)


def test_a_second_sweep_of_one_name_is_refused_and_the_first_stops_cleanly() -> None:
    flags = (
        *TINY,
        "--steps",
        "100000",
        "-s",
        "log.every=1",
        "--no-eval",
        *WEIGHTS,
        "--seeds",
        "1",
        *NAMED,
        "--jobs",
        "2",
    )
    process = Sweeping(*flags)
    process.until(lambda: len(list(S.glob("*/metrics.jsonl"))) == 2)
    second = fmrun("sweep", *flags)
    assert second.code == 2
    assert f"sweep s is being run by process {process.pid}" in second.err
    os.kill(process.pid, signal.SIGINT)
    done = process.end()
    assert done.code == 130
    assert "to go on, give the same command again" in done.err
    assert [status(S / name)["state"] for name in runs_of(S)] == ["stopped", "stopped"]
    reached = {name: status(S / name)["step"] for name in runs_of(S)}
    assert {name: steps(S / name)[-1] for name in runs_of(S)} == reached


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to tell them")
def test_runs_whose_sweep_was_killed_save_and_stop() -> None:
    """The kernel tells them."""
    flags = (*TINY, "-s", "log.every=1", "--no-eval", *WEIGHTS, "--seeds", "1", *NAMED)
    process = Sweeping(*flags, "--steps", "100000")
    process.until(lambda: list(S.glob("*/metrics.jsonl")))
    (run,) = runs_of(S)
    process.kill()
    end = time.monotonic() + 30
    while status(S / run)["state"] == "running" and time.monotonic() < end:
        time.sleep(0.01)
    assert status(S / run)["state"] == "stopped"
    assert steps(S / run) == [status(S / run)["step"]]


def test_a_run_that_another_process_trains_is_waited_for() -> None:
    good_sweep(*FAST, *NAMED, *WEIGHTS, "--seeds", "1")
    other = Background("resume", "weight-0_seed-0", "--runs-dir", S, "--steps", "100000")
    other.says("training: steps 3")
    other.until(lambda: Run(S / "weight-0_seed-0").state == "running")
    process = Sweeping(*FAST, *NAMED, *WEIGHTS, "--seeds", "1")
    process.says("1 run is being trained by another process and is waited for")
    assert process.alive
    other.signal(signal.SIGTERM)
    assert other.end().code == 143
    assert "has already made" in process.end().err


def test_what_diverges_or_is_killed_leaves_the_others_alone() -> None:
    flags = (*FAST, *NAMED, "--over", "optim.generator.lr=2e-4,1e30", "--lambda-feature", "0.1", "--seeds", "1")
    done = good_sweep(*flags, "--json")
    fine, bad = sorted(json.loads(done.out)["combinations"], key=lambda row: row["diverged"])
    assert (fine["finished"], fine["diverged"], bad["finished"], bad["diverged"]) == (1, 0, 0, 1)
    assert bad["last"] is None
    assert "training diverged at step" in bad["runs"][0]["message"]
    assert "no combination is the control" in done.err
    again = good("sweep", *flags)  # it would diverge again
    assert "2 of 2 runs done already" in again.err

    # one that cannot be written to is tried, named, and tried again by the next command
    Path("runs/t/logs").mkdir(parents=True)
    more = (*FAST, "--name", "u", *WEIGHTS, "--seeds", "1")
    Path("runs/u/weight-0_seed-0").mkdir(parents=True)
    Path("runs/u/weight-0_seed-0/metrics.jsonl").write_text("{}")
    Path("runs/u/sweep.json").write_text('{"over": [], "seeds": [], "combinations": {}, "runs": {}}')
    failed = sweep(*more, "--json")
    assert failed.code == 1
    assert "already exists" in json.loads(failed.out)["failures"]["weight-0_seed-0"]
    assert "warning: run weight-0_seed-0 failed: run weight-0_seed-0 already exists" in failed.err
    assert status(Path("runs/u/weight-0.1_seed-0"))["state"] == "finished"
    shutil.rmtree("runs/u/weight-0_seed-0")
    assert sweep(*more).code == 0


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (
            "feature_matching.wieght=0,1",
            "there is no field 'feature_matching.wieght'; did you mean 'feature_matching.weight'",
        ),
        ("feature_matching.match=mean,middle", "feature_matching.match is 'middle'"),
        ("feature_matching.layers=[block1],[block9]", "block9"),  # seen only with nets built
        ("train.batch_size=8,3", "train.batch_size"),
    ],
)
def test_every_combination_is_checked_before_anything_is_trained(over: str, words: str) -> None:
    flags = ("-s", "train.accumulate=2") if "batch" in over else ()
    base = [flag for flag in FAST if flag not in ("--batch-size", "8")]
    arguments = (*base, *flags, "--over", over, "--seeds", "2")
    done = sweep(*arguments) if "block9" in over else fmrun("sweep", *arguments)
    assert done.code == 2, done.err
    (error,) = done.errors
    assert words in error
    assert not list(Path("runs").glob("*")) if Path("runs").exists() else True


def test_a_sweep_is_extended_and_never_mixed() -> None:
    good_sweep(*FAST, *NAMED, *WEIGHTS, "--seeds", "1")
    kept = (S / "weight-0.1_seed-0" / "status.json").read_bytes()
    # a further value, seed and field; what is there already keeps its name and is not trained again
    grid = ("--over", "lambda_feature=0,0.1", "--over", "feature_matching.match=mean,sample")
    found = swept(*FAST, *NAMED, *grid, "--seeds", "2")
    assert (S / "weight-0.1_seed-0" / "status.json").read_bytes() == kept
    names = {row["name"]: row["label"] for row in found["combinations"]}
    assert names == {
        "weight-0": "weight=0",
        "weight-0.1": "weight=0.1 match=mean",
        "weight-0.1_match-sample": "weight=0.1 match=sample",
    }
    assert all(row["last"]["count"] == 2 for row in found["combinations"])

    other = fmrun("sweep", *FAST, *NAMED, *WEIGHTS, "-s", "discriminator.norm=spectral")
    assert other.code == 2
    assert (
        "sweep s is of discriminator.norm=batch, and this is of discriminator.norm=spectral; give another --name"
        in other.err
    )
    shorter = fmrun("sweep", *FAST, *NAMED, *WEIGHTS, "--steps", "2")
    assert shorter.code == 2
    assert "trains 3 steps" in shorter.err

    longer = swept(*FAST, *NAMED, *WEIGHTS, "--seeds", "1", "--steps", "5")
    assert [status(S / f"{name}_seed-0")["step"] for name in ("weight-0", "weight-0.1", "weight-0.1_match-sample")] == [
        5,
        5,
        3,
    ]
    # the mean of 5 steps is not one of 5 and 3, and the combination that has 3 is no peer of those that have 5
    rows = {row["name"]: row for row in longer["combinations"]}
    assert {n: (r["steps"], r["finished"], r["open"], r["last"]["count"]) for n, r in rows.items()} == {
        "weight-0": (5, 1, 1, 1),
        "weight-0.1": (5, 1, 1, 1),
        "weight-0.1_match-sample": (3, 2, 0, 2),
    }
    assert [run["step"] for run in rows["weight-0"]["runs"]] == [5, 3]
    assert len(rows["weight-0.1"]["against"]["differences"]) == 1
    assert rows["weight-0.1_match-sample"]["against"] is None
    assert any("weight-0_seed-1 (at step 3 of 5)" in sentence for sentence in longer["remarks"])

    # and asked for as a whole, it is one again
    whole = swept(*FAST, *NAMED, *grid, "--seeds", "2", "--steps", "5")
    assert [row["last"]["count"] for row in whole["combinations"]] == [2, 2, 2]
    assert [row["against"] is None for row in whole["combinations"]] == [True, False, False]
    assert whole["remarks"] == []


def test_a_name_that_is_taken_is_refused() -> None:
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/config.json").write_text("{}")
    assert "there is a run of this name" in fmrun("sweep", *FAST, "--name", "run", *WEIGHTS).err
    Path("runs/stuff/inner").mkdir(parents=True)
    assert "is no sweep" in fmrun("sweep", *FAST, "--name", "stuff", *WEIGHTS).err
    Path("file").write_text("")
    assert "cannot make a sweep in file" in fmrun("sweep", *FAST, *WEIGHTS, "--runs-dir", "file").err
    assert "not a name for a sweep" in fmrun("sweep", *FAST, "--name", "a b", *WEIGHTS).err


def test_runs_are_evaluated_and_compared_by_it() -> None:
    flags = (*FAST[:-1], *NAMED, *WEIGHTS, "--seeds", "2")
    asked = sweep(*flags, "--eval")
    assert asked.code == 1
    assert "run weight-0_seed-0 failed: evaluation: " in asked.err
    without = good_sweep(*flags, "--json")
    assert "warning: runs are not evaluated: " in without.err
    assert json.loads(without.out)["metric"]["key"].startswith("loss/")
    assert "loss/g_adv is no measure of quality" in without.err

    Path(EVALUATED).write_text("0.1 + 0.01 * seed - 0.5 * fm['weight'] - 0.001 * seed * fm['weight']")
    done = good_sweep(*flags, "--json")
    found = json.loads(done.out)
    assert found["metric"] == {"key": "kid", "better": "lower"}
    control, matched = found["combinations"]
    assert [run["last"] for run in control["runs"]] == pytest.approx([0.1, 0.11])
    assert matched["against"]["difference"]["mean"] == pytest.approx(-0.05005)
    assert matched["against"]["p_holm"] < 0.01
    assert "weight=0.1 is better by 0.05005 in kid than weight=0" in done.err

    # from here on nothing is left to be trained
    other = json.loads(good("sweep", *flags, "--json", "--metric", "health/diversity").out)
    assert other["metric"] == {"key": "health/diversity", "better": "higher"}
    wrong = good("sweep", *flags, "--json", "--metric", "kdi")
    assert "--metric: no run has 'kdi'; did you mean 'kid'?" in wrong.err
    assert json.loads(wrong.out)["metric"]["key"] == "kid"
    chosen = json.loads(good("sweep", *flags, "--json", "--control", "weight-0.1").out)
    assert [row["against"] and row["against"]["control"] for row in chosen["combinations"]] == [None, "weight-0.1"]
    none = fmrun("sweep", *flags, "--control", "weight-0.2")
    assert "--control: there is no combination 'weight-0.2'; did you mean" in none.err
