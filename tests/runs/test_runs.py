"""Run folders: names, races, locks, status, metrics that survive a kill."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrun.runs import folder as runs
from fmrun.runs.folder import Run, all_runs, create, find, numbered
from fmrun.runtime.errors import SaveError, UserError

CONFIG = {"seed": 1, "train": {"steps": 5}}


@pytest.fixture(autouse=True)
def quick_environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "environment" not in request.node.name:
        monkeypatch.setattr(runs, "environment", lambda: {"python": "3"})


def new(folder: Path, name: str | None = None) -> Run:
    return create(folder, name, "dcgan-fm", CONFIG, ["fmrun", "train"])


def test_run_explains_itself(tmp_path: Path) -> None:
    run = new(tmp_path / "deep" / "runs")
    assert run.name == "dcgan-fm-001"
    assert run.config() == CONFIG
    assert run.env() == {"command": ["fmrun", "train"], "preset": "dcgan-fm", "python": "3"}
    assert run.samples.is_dir()
    assert run.checkpoints.is_dir()
    assert run.status()["pid"] == os.getpid()


def test_numbers_go_up_and_are_not_reused(tmp_path: Path) -> None:
    assert [new(tmp_path).name for _ in range(3)] == ["dcgan-fm-001", "dcgan-fm-002", "dcgan-fm-003"]
    (tmp_path / "dcgan-fm-1000").mkdir()
    assert new(tmp_path).name == "dcgan-fm-1001"
    assert create(tmp_path, None, "my presets/x y.toml", CONFIG, []).name == "my-presets-x-y.toml-001"


def _make(folder: Path, _: int) -> str:
    runs.environment = lambda: {}
    return create(folder, None, "p", CONFIG, []).name


def test_processes_started_together_get_different_names(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.starmap(_make, [(tmp_path, i) for i in range(40)], chunksize=1)
    assert sorted(names) == [f"p-{i:03d}" for i in range(1, 41)]


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a b", "ä", "x" * 101, "a\n", "../up"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        new(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_existing_run_is_refused_and_untouched(tmp_path: Path) -> None:
    run = new(tmp_path, "a.b-C_1")
    run.append_metrics({"step": 1})
    with pytest.raises(UserError, match=r"already exists.*--name.*fmrun resume a\.b-C_1"):
        new(tmp_path, "a.b-C_1")
    assert run.metrics() == [{"step": 1}]


def test_runs_dir_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        new(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot make a run in .*; make it writable or give another --runs-dir"):
        new(tmp_path / "file" / "below")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied; make it writable"):
        new(tmp_path / "other")


def test_failed_start_leaves_no_half_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_atomic", refuse)
    with pytest.raises(SaveError, match="No space left"):
        new(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_kill_while_a_run_is_made_does_not_take_its_name(tmp_path: Path) -> None:
    """Killed at each write to the disk in turn, until the run is there."""
    sync = os.fsync

    def make(folder: Path, left: int) -> None:
        def fsync(file: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(file)

        os.fsync = fsync  # type: ignore[assignment]
        runs.create(folder, "x", "p", {}, [], texts={"code/generator/a.py": b""})

    for writes in range(1, 30):
        folder = tmp_path / str(writes)
        process = multiprocessing.get_context("fork").Process(target=make, args=(folder, writes))
        process.start()
        process.join()
        killed = process.exitcode
        assert killed in (0, -signal.SIGKILL)
        if (folder / "x").exists():
            assert {p.name for p in (folder / "x").iterdir()} == {
                *("config.json", "env.json", "status.json", "samples", "checkpoints", "code"),
            }
        else:
            assert all_runs(folder) == []
            assert numbered(folder, "p").name == "p-001"
            assert new(folder, "x").name == "x"
        assert [run.name for run in all_runs(folder)] == ["x"]
        if not killed:
            break
    assert writes > 8


def test_what_a_power_cut_must_leave_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))))
    run = new(tmp_path / "deep" / "runs", "x")
    assert synced[:2] == [tmp_path, tmp_path / "deep"]
    assert synced[-1] == tmp_path / "deep" / "runs"
    run.append_metrics({"step": 1})
    assert synced[-1] == run.metrics_file


def test_a_name_given_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that both found the name free."""
    first = new(tmp_path, "x")
    monkeypatch.setattr(runs, "check_new", lambda *_: None)
    with pytest.raises(UserError, match="run x already exists"):
        new(tmp_path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert first.config() == CONFIG


def test_find(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no runs in .* yet; `fmrun train` makes one"):
        find(tmp_path / "none", None)
    with pytest.raises(UserError, match="has no runs yet"):
        find(tmp_path, "x")
    first, second = new(tmp_path, "zebra"), new(tmp_path, "ant")
    (tmp_path / "not-a-run").mkdir()
    assert [r.name for r in all_runs(tmp_path)] == ["zebra", "ant"]
    assert find(tmp_path, None) == second
    first.write_status(state="running")
    assert find(tmp_path, None) == second
    assert find(tmp_path, "zebra") == first
    assert find(tmp_path / "elsewhere", str(first.path)).name == "zebra"
    with pytest.raises(UserError, match="did you mean 'zebra'"):
        find(tmp_path, "zebar")
    with pytest.raises(UserError, match="`fmrun runs` lists them"):
        find(tmp_path, "not-a-run")


def test_listing_runs_needs_no_torch() -> None:
    heavy = {"torch", "numpy", "pydantic", "rich"}
    code = f"import sys, fmrun.runs.folder; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_status_merges(tmp_path: Path) -> None:
    run = new(tmp_path)
    started = run.status()["started"]
    run.write_status(state="stopped", step=4, message="a sentence", best={"step": 2})
    run.write_status(exit_code=143)
    status = run.status()
    assert (status["started"], status["step"], status["exit_code"]) == (started, 4, 143)
    assert status["updated"] > started
    assert run.state == "stopped"
    run.status_file.write_text("{")
    assert run.status() == {}
    assert run.state == "unknown"


def test_lock_and_interrupted(tmp_path: Path) -> None:
    run = new(tmp_path)
    assert run.state == "interrupted"
    with run.lock():
        assert run.state == "running"
        with (
            pytest.raises(UserError, match=f"{run.name} is being trained by process {os.getpid()};"),
            run.lock(),
        ):
            pass
    assert run.state == "interrupted"
    with pytest.raises(RuntimeError, match="boom"), run.lock():
        raise RuntimeError("boom")
    with run.lock():
        pass


def test_lock_dies_with_its_process_even_if_a_worker_outlives_it(tmp_path: Path) -> None:
    run = new(tmp_path)
    script = (
        "import os, sys, time; from pathlib import Path; from fmrun.runs.folder import Run\n"
        "with Run(Path(sys.argv[1])).lock():\n"
        "    worker = os.fork()\n"
        "    if worker: print(worker, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        assert run.state == "running"
        with pytest.raises(UserError, match=f"by process {process.pid};"), run.lock():
            pass
        process.kill()
        process.wait()
        assert run.state == "interrupted"
        with run.lock():
            pass
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_metrics_are_valid_json(tmp_path: Path) -> None:
    run = new(tmp_path)
    assert run.metrics() == []
    run.append_metrics({"step": 1, "loss/d": torch.tensor(0.5), "loss/g": math.nan, "fm/x": -math.inf, "note": "x"})
    (line,) = run.metrics_file.read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss/d": 0.5, "loss/g": None, "fm/x": None, "note": "x"} == run.metrics()[0]
    with pytest.raises(TypeError):
        run.append_metrics({"step": 2, "loss": [1]})


def test_full_disk_is_a_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    run = new(tmp_path)
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(SaveError, match=r"metrics\.jsonl: No space left on device"):
        run.append_metrics({"step": 1})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(last=st.integers(0, 12), cut=st.integers(0, 14), torn=st.integers(0, 40))
def test_cut_back_then_on_again_equals_never_stopped(tmp_path: Path, last: int, cut: int, torn: int) -> None:
    run = Run(tmp_path)
    run.metrics_file.unlink(missing_ok=True)
    for step in range(1, last + 1):
        run.append_metrics({"step": step, "loss/d": step / 3})
    whole = run.metrics_file.read_bytes() if last else b""
    if last:
        run.metrics_file.write_bytes(whole[: len(whole) - torn] if torn < len(whole) else b"")
    survived = [row["step"] for row in run.metrics()]
    run.cut_back(cut)
    kept = [row["step"] for row in run.metrics()]
    assert kept == [step for step in survived if step <= cut]
    for step in range(len(kept) + 1, last + 1):
        run.append_metrics({"step": step, "loss/d": step / 3})
    assert (run.metrics_file.read_bytes() if last else b"") == whole


def test_cut_back_removes_later_samples_only(tmp_path: Path) -> None:
    run = new(tmp_path)
    for name in (
        "step-00000010.png",
        "step-00000020.png",
        "step-00000021.png",
        "step-00000030-raw.png",
        "mine.png",
    ):
        (run.samples / name).write_bytes(b"")
    run.cut_back(20)
    assert sorted(p.name for p in run.samples.iterdir()) == [
        "mine.png",
        "step-00000010.png",
        "step-00000020.png",
    ]
    assert not run.metrics_file.exists()


def test_environment_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = runs.environment()
    assert facts["torch"] == torch.__version__
    assert {
        "fmrun",
        "git",
        "python",
        "torchvision",
        "numpy",
        "safetensors",
        "processor",
        "gpus",
        "host",
    } <= set(facts)
    assert json.loads(json.dumps(facts)) == facts
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert runs.environment()["git"] is None


def test_environment_names_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a branch, packed, detached, and in a folder below."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    Path("a").write_text("1")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], check=True, capture_output=True, text=True).stdout.strip()

    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-qm", "x"]):
        git(*command)
    revision = git("rev-parse", "HEAD")
    assert runs.environment()["git"] == revision
    git("pack-refs", "--all")
    assert runs.environment()["git"] == revision
    git("checkout", "-q", "--detach")
    assert runs.environment()["git"] == revision
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    assert runs.environment()["git"] == revision


def test_environment_of_a_foreign_repository_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git itself would run what the repository's own configuration names, to see whether files have changed."""
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("1")
    for command in (["init", "-q"], ["add", "a"]):
        subprocess.run(["git", *command], check=True)
    for key, value in (("core.fsmonitor", "touch RUN; false"), ("filter.x.clean", "touch RUN; cat")):
        subprocess.run(["git", "config", key, value], check=True)
    Path(".git/info").mkdir(exist_ok=True)
    Path(".git/info/attributes").write_text("* filter=x\n")
    Path("a").write_text("22")
    runs.environment()
    assert not Path("RUN").exists()
    Path(".git/HEAD").unlink()
    os.mkfifo(".git/HEAD")
    assert runs.environment()["git"] is None


def test_evaluations_replace_their_like_and_go_with_the_steps_cut_off(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "a", "p", {}, [])
    assert run.evaluations() == []
    settings = {"extractor": "inception", "num": 500}
    for step, value in ((20, 2.0), (10, 1.0), (20, 3.0)):
        run.add_evaluation({"step": step, "weights": "ema", "settings": settings, "metrics": {"kid": value}})
    run.add_evaluation({"step": 20, "weights": "raw", "settings": settings, "metrics": {"kid": 4.0}})
    assert [(r["step"], r["weights"], r["metrics"]["kid"]) for r in run.evaluations()] == [
        (10, "ema", 1.0),
        (20, "ema", 3.0),
        (20, "raw", 4.0),
    ]
    run.cut_back(10)
    assert [r["step"] for r in run.evaluations()] == [10]


def test_evaluations_added_at_once_are_all_kept(tmp_path: Path) -> None:
    run = new(tmp_path, "run")
    records = [{"step": step, "weights": "ema", "settings": {}, "metrics": {"kid": 1.0}} for step in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run.add_evaluation, records))
    assert [r["step"] for r in run.evaluations()] == list(range(12))
