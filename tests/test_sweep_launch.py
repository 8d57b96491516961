"""Where runs live: this machine, its GPUs and threads, and submitit."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, good, status, steps
from fmrun.sweep.display import Display, Line
from fmrun.sweep.plan import Planned, Sweep
from fmrun.sweep.work import Stop, Worker, reason
from sweeping import Job, Sweeping, good_sweep

from fmrun import runs
from fmrun.errors import UserError
from fmrun.report import Reporter
from fmrun.sweep import grid, launch, preflight

S = Path("runs/s")

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no POSIX processes"),
]


class Fake:
    """A process that ends when it is polled for the second time, or stopped."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.polls, self.stops = code, 0, 0

    def poll(self) -> int | None:
        self.polls += 1
        return self.code if self.polls > 1 or self.stops else None

    def stop(self) -> None:
        self.stops += 1


class Lasting(Fake):
    """A process that lives until it is stopped."""

    def poll(self) -> int | None:
        return self.code if self.stops else None


class Launcher:
    """Notes what it is given; each run leaves a status."""

    stays = False

    def __init__(self, slots: int = 2, code: int = 0) -> None:
        self.slots, self.code = slots, code
        self.started: list[tuple[launch.Task, Mapping[str, str]]] = []

    def start(self, tasks: Sequence[tuple[launch.Task, Mapping[str, str]]]) -> list[Fake]:
        self.started += tasks
        return [Fake(self.code) for _ in tasks]


def planned(seeds: int = 2) -> tuple[Sweep, list[Planned]]:
    over = grid.parse_over("feature_matching.weight=0,1")
    sweep = Sweep(S)
    found = sweep.add(grid.combinations("dcgan-fm", None, [], [over]), [over.key], range(seeds))
    S.mkdir(parents=True)
    sweep.write(["fmrun", "sweep"])
    return sweep, found


def worker(sweep: Sweep, launcher: Any, **options: Any) -> Worker:
    options = {"preset": None, "evaluate": False, "share_cores": True} | options
    return Worker(sweep, launcher, Reporter(stream=io.StringIO()), **options)


# ---- commands and environments


def test_new_runs_are_trained_and_begun_ones_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "environment", lambda: {"threads": 3})
    monkeypatch.delenv("OMP_NUM_THREADS")
    sweep, found = planned(seeds=1)
    new, begun = found
    config = {**sweep.settings(begun.combination), "seed": 0}
    config["log"] = {**config["log"], "every": 7}
    runs.create(S, begun.name, "p", config, []).write_status(state="stopped", step=4)
    at = Launcher()
    assert worker(sweep, at, preset="dcgan-fm").work(found, Stop()).exit_code == 0
    (first, one), (second, other) = at.started
    file = f"{S}/configs/{new.combination}.json"
    run = ["--seed", "0", "--name", new.name, "--runs-dir", str(S)]
    assert first.command()[4:] == ["train", "--preset", "dcgan-fm", "--config", file, *run]
    assert second.command()[4:] == ["resume", begun.name, "--runs-dir", str(S), "-s", "log.every=50"]
    # fresh runs share the cores; one that goes on does so with as many threads as before
    assert one == {"OMP_NUM_THREADS": str(max(1, launch.cores() // 2))}
    assert other == {"OMP_NUM_THREADS": "3"}


def test_only_the_sweeps_own_evaluation_spares_a_run_another() -> None:
    sweep, found = planned(seeds=3)
    one = {"weights": "ema", "default": True, "settings": {}, "metrics": {"kid": 0.1}}
    steps = sweep.combinations[found[0].combination].config.train.steps
    records: list[dict[str, Any]] = [
        {"step": steps},
        {"step": steps, "weights": "raw", "default": False},
        {"step": steps, "default": False},  # --num 50
        {"step": steps - 1},
    ]
    for run, record in zip(found, records, strict=False):
        config = {**sweep.settings(run.combination), "seed": run.seed}
        made = runs.create(S, run.name, "p", config, [])
        made.write_status(state="finished", step=steps)
        made.add_evaluation(one | record)
    at = Launcher()
    worker(sweep, at, evaluate=True).work(found[: len(records)], Stop())
    assert sorted(task.command()[4:6] for task, _ in at.started) == sorted(["eval", f.name] for f in found[1:4])


def test_threads_that_were_chosen_stay_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    sweep, found = planned()
    at = Launcher()
    worker(sweep, at).work(found, Stop())
    assert all(env == {} for _, env in at.started)


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def note(task: launch.Task, env: Mapping[str, str]) -> Lasting:
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return Lasting()

    monkeypatch.setattr(launch, "spawn", note)
    task = launch.Task("t", (), (), "r", "l")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    launch.Local(4, 2).start([(task, {})] * 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launch.Local(2, 3).start([(task, {})] * 2)
    launch.Local(1, 1).start([(task, {})])
    assert seen == ["4", "6", "4", "6", "0", "1", None]


def test_a_slot_that_is_free_again_has_its_gpu_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[tuple[str, Lasting]] = []

    def note(task: launch.Task, env: Mapping[str, str]) -> Lasting:
        handles.append((env["CUDA_VISIBLE_DEVICES"], Lasting()))
        return handles[-1][1]

    monkeypatch.setattr(launch, "spawn", note)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    at, task = launch.Local(2, 2), launch.Task("t", (), (), "r", "l")
    at.start([(task, {}), (task, {})])
    handles[1][1].stop()
    at.start([(task, {})])
    assert [gpu for gpu, _ in handles] == ["0", "1", "1"]


# ---- ends


@pytest.mark.parametrize(
    ("code", "log", "words"),
    [
        (2, "$ a\nerror: old\n$ b\nerror: no such data\n", "no such data"),
        (1, "$ a\nTraceback\nerror: this is a bug\n", "this is a bug (exit code 1; "),
        (1, "$ a\nerror: of the last time\n$ b\n", "it ended with exit code 1; see "),
        (-9, "", "killed by signal 9 (SIGKILL); the same command resumes it"),
        (143, "", "stopped by signal 15"),
    ],
)
def test_why_a_run_failed(code: int, log: str, words: str) -> None:
    Path("log").write_text(log)
    assert reason(Planned("c", 0, runs.Run(Path("r"))), code, Path("log")).startswith(words)


def test_a_failure_is_named_and_the_rest_goes_on() -> None:
    sweep, found = planned()
    outcome = worker(sweep, Launcher(code=-9)).work(found, Stop())
    assert outcome.exit_code == 1
    assert list(outcome.failures) == [one.name for one in found]


def test_a_second_signal_asks_again() -> None:
    sweep, found = planned()

    class Stubborn(Fake):
        def poll(self) -> int | None:
            if self.stops == 1:
                stop.count = 2
            return 137 if self.stops == 2 else None

    class Stuck(Launcher):
        def start(self, tasks: Any) -> list[Fake]:
            made.extend(Stubborn() for _ in tasks)
            stop.signal, stop.count = signal.SIGINT, 1
            return list(made)

    made: list[Fake] = []
    stop = Stop()
    outcome = worker(sweep, Stuck()).work(found, stop)
    assert (outcome.exit_code, [fake.stops for fake in made]) == (130, [2, 2])


def test_the_check_names_the_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, _ = planned()
    configs = {name: sweep.settings(name) for name in sweep.combinations}
    configs["weight-1"]["feature_matching"]["layers"] = ["block9"]
    monkeypatch.setattr(preflight, "_ask", lambda arguments: (preflight.main(arguments), 0))
    with pytest.raises(UserError, match=r"weight-1: .*block9"):
        preflight.check(configs)
    monkeypatch.setattr(preflight, "_ask", lambda arguments: ("", -9))
    with pytest.raises(UserError, match=r"could not be checked: .* ended with -9"):
        preflight.check(configs)


LOUD = """
import os
from torch import nn
print("a net that says hello")
os.system("echo so does its helper")

class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.out = nn.Linear(100, 1024)

    def forward(self, z):
        print("{}")
        return self.out(z).view(-1, 1, 32, 32).tanh()
"""


def test_what_a_net_prints_is_no_part_of_the_check() -> None:
    """In a process of its own, as it is."""
    Path("loud.py").write_text(LOUD)
    sweep, _ = planned()
    content = sweep.settings("weight-0")
    content["generator"] = {"target": "loud:Net"}
    checked = preflight.check({"weight-0": {**content, "device": "cpu"}}, trust_code=True)
    assert checked == preflight.Machine("cpu", 0)


def test_elsewhere_needs_no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, _ = planned()
    content = {**sweep.settings("weight-0"), "device": "cuda", "precision": "fp16"}
    monkeypatch.setattr(preflight, "_ask", lambda arguments: (preflight.main(arguments), 0))
    assert preflight.check({"weight-0": content}, elsewhere=True) == preflight.Machine("cpu", 0)


# ---- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_table_and_a_file_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    for stream in (Terminal(), io.StringIO()):
        display = Display(Reporter(stream=stream), 5, clock=lambda: now[0])
        with display.on():
            for _ in range(50):
                display.show(lambda: [Line("weight-[b]0_seed-1", "step 3/9", 61)], 2, 1, 30)
        text = stream.getvalue()
        if isinstance(stream, Terminal):
            assert "weight-[b]0_seed-1" in text
            assert "1:01" in text
            assert text.count("2 of 5 runs done, 1 failed, ETA 0:30") <= 2  # not redrawn faster than it can be read
        else:
            assert text == ""


# ---- submitit


def test_options_of_the_scheduler_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--slurm: .*slurm_partitoin"):
        launch.Submitit("submitit", Path("jobs"), 1, {"partitoin": "gpu"})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch here"):
        launch.Submitit("slurm", Path("jobs"), 1, {})


def test_without_submitit_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'pip install "fmrun\[slurm\]"'):
        launch.Submitit("submitit", Path("jobs"), 1, {})


def test_a_job_that_is_preempted_saves_and_goes_back_into_the_queue() -> None:
    pytest.importorskip("submitit")
    flags = (*TINY, "--steps", "100000", "-s", "log.every=1", "--name", "r", "--runs-dir", "runs")
    task = launch.Task("r", ("train", *flags), ("resume", "r"), "runs/r", "log")
    process = Job(task)  # the job's own process, which has torch imported
    process.until(lambda: Path("runs/r/metrics.jsonl").exists())
    process.signal(signal.SIGUSR2)
    assert "resume r" in process.end().out
    assert status(Path("runs/r"))["state"] == "stopped"
    assert steps(Path("runs/r"))


def test_a_sweep_through_submitit_s_local_executor() -> None:
    """Real processes: what is pickled, what Python starts, what comes back."""
    pytest.importorskip("submitit")
    flags = (*TINY, "--steps", "2", "-s", "eval.every=0", "--no-eval", "--seeds", "1", "--name", "s")
    done = good_sweep(*flags, "--launcher", "submitit", "--slurm", "timeout_min=5")
    assert "1 of 1 run done" in done.err
    assert status(S / "base_seed-0")["state"] == "finished"
    assert list((S / "submitit").glob("*_submitted.pkl"))
    assert "finished 2 steps" in (S / "logs" / "base_seed-0.log").read_text()
    assert good("runs").err.count("a sweep: s; its runs: fmrun runs --runs-dir runs/s") == 1


SBATCH = """#!/bin/sh
echo "$@" >> {folder}/sbatch.txt
test -e {folder}/closed && echo "sbatch: error: invalid partition" >&2 && exit 1
echo "Submitted batch job 77"
"""

SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
echo "77_0|PENDING|x"
echo "77_1|PENDING|x"
"""


def test_jobs_on_slurm_are_submitted_once_and_followed(workplace: Path) -> None:
    """With a scheduler that only takes jobs: what it is asked for, and that asking again submits nothing."""
    pytest.importorskip("submitit")
    tools = workplace / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("sacct", SACCT), ("srun", "#!/bin/sh\n"), ("scancel", "#!/bin/sh\n")):
        (tools / name).write_text(text.format(folder=workplace) if name == "sbatch" else text)
        (tools / name).chmod(0o755)
    flags = (*TINY, "--no-eval", "--seeds", "2", "--name", "s", "--launcher", "slurm", "--jobs", "4")
    flags = (*flags, "--slurm", "partition=gpu", "--slurm", "gpus_per_node=1")
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for round_ in range(2):
        process = Sweeping(*flags, env=env)
        process.until(lambda: (S / "jobs.json").exists())
        if round_:
            process.says("2 runs")
            for _ in range(20):
                process.until(lambda: True)
        process.signal(signal.SIGINT)
        done = process.end()
        assert done.code == 130
        assert "the jobs go on, and the same command follows them; to end them: scancel 77_0 77_1" in done.err
    assert len((workplace / "sbatch.txt").read_text().splitlines()) == 1
    (script,) = (S / "submitit").glob("*_submission.sh")
    asked = script.read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--array=0-1%2", "--job-name=fmrun"):
        assert line in asked, asked
    (workplace / "closed").touch()
    (S / "jobs.json").unlink()
    refused = Sweeping(*flags, env=env).end()
    assert refused.code == 2
    assert "the scheduler takes no job: sbatch: error: invalid partition" in refused.errors[0]
    assert "--slurm timeout_min=60" in refused.errors[0]
