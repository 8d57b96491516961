"""Several processes under torchrun are one process on the same global batch."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.commands import (
    CALIBRATION_IMAGES,
    TINY,
    Background,
    finish,
    fmrun,
    free_port,
    good,
    rows,
    same_runs,
    saved,
    status,
    steps,
    wait_for,
)
from support.two_ranks import closeness, two

from fmrun.tasks import generate

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

RUNS = Path("runs")
SCRIPTS = Path(sys.executable).parent
LAUNCH = ("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")


def s(*settings: str) -> tuple[str, ...]:
    return tuple(part for setting in settings for part in ("-s", setting))


def launch(*arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """The command by two processes of torchrun's."""
    options = (*LAUNCH, free_port(), "--max-restarts", str(restarts), "--no-python")
    command = [SCRIPTS / "torchrun", *options, SCRIPTS / "fmrun", *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(launcher: int) -> dict[str, int]:
    """Process ids of torchrun's workers, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                found[variables["RANK"]] = int(folder.name)
    return found


def test_two_processes_are_one_in_float64() -> None:
    """Batch norm over the global batch, batch means, balance: 20 steps; and rank 0 alone writes and speaks."""
    flags = (*TINY, "--steps", "20", *s("precision=fp64", "log.every=4", "log.sample_every=10", "data.hflip=true"))
    done, other = two("train", *flags, "--name", "two")
    assert done.code == 0, done.err
    assert done.out == other.out == other.err == ""
    good("train", *flags, "--name", "one")
    closeness(RUNS / "one", RUNS / "two", 20, 1e-9)

    assert sorted(p.name for p in RUNS.iterdir()) == ["one", "two"]
    for said in ("run two in runs/two", "data: 40 images", "batch 8 over 2 processes", "finished 20 steps", "next: "):
        assert done.err.count(said) == 1, said
    assert status(RUNS / "two")["state"] == "finished"
    assert status(RUNS / "two")["exit_code"] == 0
    assert saved(RUNS / "two", 20).meta.machine["ranks"] == 2
    samples = [sorted(p.name for p in (RUNS / run / "samples").iterdir()) for run in ("one", "two")]
    assert samples[0] == samples[1]

    # one process goes on where two stopped, and says that it is not the same to the bit
    resumed = good("resume", "two", "--steps", "22")
    (warning,) = resumed.warnings
    assert "ranks: 2 then, 1 now" in warning
    good("resume", "one", "--steps", "22")
    closeness(RUNS / "one", RUNS / "two", 22, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        s(
            "feature_matching.match=moments",
            "losses.gan.r1=1",
            "losses.gan.penalty_every=2",
            "train.augment=color,translation,cutout",
        ),
        s(
            "feature_matching.match=mmd",
            "discriminator.norm=spectral",
            "losses.gan.type=r3gan",
            "losses.gan.r1=1",
            "losses.gan.r2=1",
            "optim.clip_grad_norm=1",
        ),
        s(
            "train.update=simultaneous",
            "feature_matching.match=coral",
            "losses.gan.r2=1",
            "losses.gan.penalty_every=2",
        ),
    ],
    ids=["moments", "mmd", "simultaneous"],
)
def test_two_processes_are_one_with(settings: tuple[str, ...]) -> None:
    flags = (*TINY, "--steps", "6", *s("precision=fp64", "log.every=3"), *settings)
    first, second = two("train", *flags, "--name", "two")
    assert first.code == 0, first.err
    assert second.err == ""
    good("train", *flags, "--name", "one")
    closeness(RUNS / "one", RUNS / "two", 6, 1e-9)


@pytest.mark.skipif(not (SCRIPTS / "fmrun").exists(), reason="fmrun is not installed as a script")
def test_the_first_step_in_float32_and_a_stop_of_torchrun() -> None:
    """Files called as standard modules in the current folder change nothing."""
    for module in ("random", "types", "queue", "yaml"):
        Path(f"{module}.py").write_text("raise SystemExit('imported from the current folder')")
    flags = (*TINY, *s("log.every=1", "checkpoint.every=1"))
    first, _ = two("train", *flags, "--steps", "1", "--name", "two")
    assert first.code == 0, first.err
    good("train", *flags, "--steps", "1", "--name", "one")
    one, other = rows(RUNS / "one")[0], rows(RUNS / "two")[0]
    for key in one:
        if key.startswith(("loss/", "fm/")):
            assert math.isclose(one[key], other[key], rel_tol=1e-4), key

    process = launch("resume", "two", "--steps", "1000000", *s("checkpoint.every=100000"))
    wait_for(lambda: len(rows(RUNS / "two")) >= 5, process)
    os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process)
    assert stopped.code != 0  # torchrun's own
    content = status(RUNS / "two")
    assert (content["state"], content["exit_code"]) == ("stopped", 143)
    assert steps(RUNS / "two")[-1] == content["step"]
    assert stopped.err.count("stopped and saved at step") == 1
    good("resume", "two", "--steps", str(content["step"] + 1))


RESTARTED = (*TINY, "--steps", "20", *s("log.every=5", "checkpoint.every=5"))


@pytest.mark.skipif(not (SCRIPTS / "fmrun").exists(), reason="fmrun is not installed as a script")
def test_torchrun_restarts_killed_processes_without_changing_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = launch("train", *RESTARTED, restarts=1)
    checkpoints = RUNS / "dcgan-fm-001"
    wait_for(lambda: steps(checkpoints), process)
    os.kill(ranks_of(process.pid)["1"], signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.err
    assert done.err.count("the processes were restarted; they go on with run dcgan-fm-001") == 1
    assert [run.name for run in RUNS.iterdir()] == ["dcgan-fm-001"]
    assert status(checkpoints)["state"] == "finished"
    monkeypatch.setattr(generate, "CALIBRATION_IMAGES", CALIBRATION_IMAGES)  # as torchrun's processes have it
    two("train", *RESTARTED, "--name", "whole")
    same_runs(RUNS / "whole", checkpoints, 20)


def test_a_batch_that_does_not_divide_is_one_sentence() -> None:
    done, other = two("train", *TINY, "--batch-size", "9", "--name", "odd")
    assert (done.code, other.err) == (2, "")
    assert done.out == ""
    (error,) = done.errors
    assert "train.batch_size is 9; 2 processes" in error
    assert "a multiple of 2, at least 4" in error
    assert len(done.err.splitlines()) == 1
    assert not RUNS.exists()


def test_a_launcher_of_one_process_is_no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fmrun("train", *TINY, "--steps", "1", "--name", "single").code == 0
    assert saved(RUNS / "single", 1).meta.machine["ranks"] == 1


LEFT_OVER = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_variables_left_over_from_a_launcher_are_one_sentence(rank: str) -> None:
    env = {**LEFT_OVER, "RANK": rank, "MASTER_PORT": free_port(), "FMRUN_RENDEZVOUS_TIMEOUT": "1"}
    done = Background("train", *TINY, "--name", "alone", env=env).end()
    (said,) = done.err.splitlines()
    assert done.code == 2
    assert (
        f"2 processes have met within 1 s; if their variables (WORLD_SIZE=2 RANK={rank} MASTER_ADDR=127.0.0.1" in said
    )
    assert "`unset WORLD_SIZE RANK MASTER_ADDR MASTER_PORT`" in said
    assert not RUNS.exists()


def test_a_port_that_is_taken_is_one_sentence() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = Background("train", *TINY, "--name", "taken", env={**LEFT_OVER, "MASTER_PORT": str(port)}).end()
    (said,) = done.err.splitlines()
    assert done.code == 2
    assert f"MASTER_PORT {port} is in use by another program; give all processes a free port" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"MASTER_PORT": "http"}, "the processes cannot find each other"),
        ({"MASTER_ADDR": ""}, "environment variable MASTER_ADDR expected, but not set"),
    ],
)
def test_launcher_variables_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], said: str
) -> None:
    for name, value in {**LEFT_OVER, "MASTER_PORT": free_port(), **wrong}.items():
        monkeypatch.setenv(name, value)
    done = fmrun("train", *TINY)
    (line,) = done.err.splitlines()
    assert done.code == 2
    assert said in line
    assert "or in one process after `unset WORLD_SIZE RANK" in line


def test_an_error_before_the_processes_meet_is_said_by_whoever_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LEFT_OVER, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for arguments in (("--preset", "nope"), ("--no-such-option",)):
        done = fmrun("train", *arguments)
        assert done.code == 2
        assert done.errors[0].startswith("error: process 1: ")
    # all that torchrun starts on a machine meet the same, and the first says it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert (fmrun("train", "--preset", "nope").code, fmrun("train", "--preset", "nope").err) == (2, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "nope" in fmrun("train", "--preset", "nope").errors[0]
