"""Whole sweeps: what they train, skip, resume and survive."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.commands import TINY, Background, fmrun, good, rows, status, steps, timeless
from support.sweeping import EVALUATED, Sweeping, good_sweep, sweep, swept

from fmrun.runs.folder import Run

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs"),
]

QUIET = (*TINY, "-s", "log.every=1", "-s", "eval.every=0")
FAST = (*QUIET, "--steps", "3", "--no-eval")
ENDLESS = (*QUIET, "--steps", "100000", "--no-eval")
WEIGHTS = ("--over", "feature_matching.weight=0,0.1")
NAMED = ("--name", "s")
S = Path("runs/s")


def runs_of(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def changed(folder: Path) -> dict[str, int]:
    return {name: (folder / name / "status.json").stat().st_mtime_ns for name in runs_of(folder)}


def all_made(run: Path) -> list[int]:
    return [row["step"] for row in rows(run)]


def test_a_sweep_from_beginning_to_end() -> None:
    grid = (*WEIGHTS, "--over", "feature_matching.match=mean,sample", "--seeds", "2")
    planned = [json.loads(line) for line in good("sweep", *FAST, *NAMED, *grid, "--plan").out.splitlines()]
    assert not Path("runs").exists()
    names = [one["name"] for one in planned]
    assert names == [
        f"{combination}_seed-{seed}"
        for seed in (0, 1)
        for combination in ("weight-0", "weight-0.1_match-mean", "weight-0.1_match-sample")
    ]
    assert planned[4]["argv"] == ["fmrun", "sweep", *FAST, *NAMED, *grid, "--item", "4"]

    done = good_sweep(*FAST, *NAMED, *grid, "--jobs", "2", "--json")
    assert [group["name"] for group in json.loads(done.out)["groups"]] == [name[:-7] for name in names[:3]]
    assert runs_of(S) == sorted(names)
    assert "(6 of 6 runs)" in done.err
    assert f"next: fmrun compare {S}/*_seed-* --html s.html" in done.err
    assert "a sweep: s; its runs: fmrun runs --runs-dir runs/s" in good("runs").err
    # what a run is called is also what it was trained with
    config = json.loads((S / "weight-0.1_match-sample_seed-1" / "config.json").read_text())
    matching = config["feature_matching"]
    assert (config["seed"], matching["weight"], matching["match"]) == (1, 0.1, "sample")

    before = changed(S)
    again = good("sweep", *FAST, *NAMED, *grid)
    assert "6 of 6 runs done already" in again.err
    assert changed(S) == before
    # a further value and seed, and more steps; what is there is not trained again
    grid = ("--over", "lambda_feature=0,1", "--over", "feature_matching.match=mean", "--seeds", "3")
    good_sweep(*FAST, *NAMED, *grid, "--jobs", "2")
    assert len(runs_of(S)) == 10
    assert {name: changed(S)[name] for name in names} == before
    good_sweep(*FAST, *NAMED, *WEIGHTS, "--over", "feature_matching.match=mean", "--seeds", "1", "--steps", "5")
    longer = {name for name in runs_of(S) if status(S / name)["step"] == 5}
    assert longer == {"weight-0_seed-0", "weight-0.1_match-mean_seed-0"}
    other = fmrun("sweep", *FAST, *NAMED, *WEIGHTS, "-s", "discriminator.norm=spectral")
    assert other.code == 2
    assert "is of discriminator.norm=batch, and this sweep is of discriminator.norm=spectral; give another" in other.err


def test_a_sweep_killed_in_the_middle_ends_with_the_same_runs() -> None:
    flags = (*QUIET, "--steps", "6", "-s", "checkpoint.every=2", "--no-eval", *WEIGHTS, "--seeds", "2")
    good_sweep(*flags, "--name", "alone")
    killed = Sweeping(*flags, *NAMED)
    second = S / "weight-0.1_seed-0"
    killed.until(lambda: steps(second))
    children = killed.children()
    os.killpg(killed.pid, signal.SIGKILL)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    killed.end()
    assert (Run(S / "weight-0_seed-0").state, len(runs_of(S))) == ("finished", 2)
    good_sweep(*flags, *NAMED)
    for name in runs_of(Path("runs/alone")):
        assert timeless(S / name) == timeless(Path("runs/alone") / name)


def test_one_signal_saves_and_stops_all() -> None:
    process = Sweeping(*ENDLESS, *WEIGHTS, "--seeds", "2", *NAMED, "--jobs", "2")
    process.until(lambda: len(list(S.glob("*/metrics.jsonl"))) == 2)
    process.signal(signal.SIGINT)
    done = process.end()
    assert done.code == 130
    assert "stopping: the runs are saved first" in done.err
    assert "to go on, give the same command again" in done.err
    assert [status(S / name)["state"] for name in runs_of(S)] == ["stopped", "stopped"]
    assert {name: steps(S / name)[-1] for name in runs_of(S)} == {n: status(S / n)["step"] for n in runs_of(S)}


def test_a_run_that_another_process_trains_is_waited_for() -> None:
    other = Background("train", *ENDLESS[:-1], "--name", "base_seed-0", "--runs-dir", S)
    other.until(lambda: (S / "base_seed-0/metrics.jsonl").exists())
    process = Sweeping(*QUIET, "--no-eval", *NAMED, "--seeds", "1", "--steps", "100000", "--item", "0")
    for _ in range(50):
        process.until(lambda: time.sleep(0.01) is None)
    assert Run(S / "base_seed-0").state == "running"
    other.signal(signal.SIGTERM)
    assert other.end().code == 143
    process.says("training: steps")
    process.signal(signal.SIGTERM)
    assert process.end().code == 143
    made = all_made(S / "base_seed-0")
    assert made == list(range(1, len(made) + 1))


def test_items() -> None:
    """As any engine calls them: by number or by the job array's own, twice at once, and after the end."""
    flags = (*FAST[:-1], *WEIGHTS, "--seeds", "1", *NAMED)
    Path(EVALUATED).write_text("0.1")
    pair = [Sweeping(*flags, "--item", "1") for _ in range(2)]
    assert [process.end().code for process in pair] == [0, 0]
    assert runs_of(S) == ["weight-0.1_seed-0"]
    assert all_made(S / "weight-0.1_seed-0") == [1, 2, 3]
    assert len(Run(S / "weight-0.1_seed-0").evaluations()) == 1
    done = sweep(*flags, "--item", env={"JOB_COMPLETION_INDEX": "0"})
    assert (done.code, done.out) == (0, "")
    assert runs_of(S) == ["weight-0.1_seed-0", "weight-0_seed-0"]
    before = changed(S)
    good("sweep", *flags, "--item", "0")
    assert changed(S) == before
    for arguments, words in (
        (
            ("--item",),
            "--item: give the number of the run, 0 to 1 (--plan lists them), or start it in a job array that",
        ),
        (("--item", "2"), "--item: give the number of the run, 0 to 1"),
        (("2",), "which run to train is given with --item 2"),
    ):
        refused = fmrun("sweep", *flags, *arguments)
        assert refused.code == 2
        assert words in refused.err


def test_what_diverges_or_fails_leaves_the_others_alone() -> None:
    flags = (*FAST, *NAMED, "--over", "optim.generator.lr=2e-4,1e30", "--lambda-feature", "0.1", "--seeds", "1")
    done = good_sweep(*flags)
    assert "lr-1e+30_seed-0 diverged" in done.err.replace("lr-1e-30", "lr-1e+30")
    assert {status(S / name)["state"] for name in runs_of(S)} == {"finished", "diverged"}
    before = changed(S)
    assert "2 of 2 runs done already" in good("sweep", *flags).err  # it would diverge again
    assert fmrun("sweep", *flags, "--item", "1").code == 3
    assert changed(S) == before
    # one that cannot be made is named, and tried again by the next command
    more = (*FAST, "--name", "u", *WEIGHTS, "--seeds", "1")
    blocking = Path("runs/u/weight-0_seed-0")
    blocking.mkdir(parents=True)
    failed = sweep(*more)
    assert failed.code == 1
    assert "warning: weight-0_seed-0 failed: run weight-0_seed-0 already exists" in failed.err
    assert status(Path("runs/u/weight-0.1_seed-0"))["state"] == "finished"
    blocking.rmdir()
    assert sweep(*more).code == 0


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ("feature_matching.wieght=0,1", "'feature_matching.wieght'; did you mean 'feature_matching.weight'"),
        ("feature_matching.match=mean,middle", "feature_matching.match is 'middle'"),
        ("feature_matching.layers=[block1],[block9]", "layers-block9: "),  # seen only with nets built
    ],
)
def test_every_combination_is_checked_before_anything_is_trained(over: str, words: str) -> None:
    done = sweep(*FAST, "--over", over, "--seeds", "2")
    assert done.code == 2, done.err
    (error,) = done.errors
    assert words in error
    assert not Path("runs").exists()


def test_a_name_that_is_taken_is_refused() -> None:
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/config.json").write_text("{}")
    assert "there is a run of this name" in fmrun("sweep", *FAST, "--name", "run", *WEIGHTS).err
    assert "not a name for a sweep" in fmrun("sweep", *FAST, "--name", "a b", *WEIGHTS).err
    Path("file").write_text("")
    assert "--runs-dir file is not a folder" in fmrun("sweep", *FAST, *WEIGHTS, "--runs-dir", "file").err


def test_runs_are_evaluated_and_compared_by_it() -> None:
    flags = (*FAST[:-1], *NAMED, *WEIGHTS, "--seeds", "3")
    asked = sweep(*flags, "--eval")
    assert asked.code == 1
    assert "weight-0_seed-0 failed: there are no weights here" in asked.err
    assert "weight-0_seed-0 is not evaluated: there are no weights here" in good_sweep(*flags).err
    Path(EVALUATED).write_text("0.1 + 0.01 * seed - 0.5 * fm['weight'] - 0.001 * seed * fm['weight']")
    found = swept(*flags)
    assert found["metric"] == "kid"
    assert [group["control"] for group in found["groups"]] == [True, False]
    assert found["verdict"]["winner"] == "weight-0.1"
