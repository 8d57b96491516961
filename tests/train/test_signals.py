"""Signals save and stop; a second one aborts."""

from __future__ import annotations

import json
import os
import pty
import signal
import time
from pathlib import Path

import pytest
from support.commands import (
    TINY,
    Background,
    free_port,
    good,
    rows,
    same_runs,
    saved,
    spawn,
    status,
    steps,
    wait_for,
    write_folder,
)

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no POSIX signals"),
]

LONG = ("train", *TINY, "--steps", "100000", "-s", "log.every=10", "-s", "checkpoint.every=100000")


def started(run: Path) -> bool:
    return (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_stops_and_resume_goes_on_exactly(number: signal.Signals, code: int) -> None:
    run = Path("runs/stopped")
    process = Background(*LONG, "--name", "stopped")
    process.until(lambda: started(run))
    process.signal(number)
    done = process.end()
    assert done.code == code
    assert done.out == ""
    assert not done.errors
    (reached,) = steps(run)
    assert f"stopped and saved at step {reached}; to go on: fmrun resume stopped" in done.err
    content = status(run)
    assert (content["state"], content["step"], content["exit_code"]) == ("stopped", reached, code)

    shown = json.loads(good("runs", "stopped", "--json").out)
    assert (shown["state"], shown["exit_code"]) == ("stopped", code)
    if number == signal.SIGTERM:  # from there to the same end as a run that was never stopped
        end = str(reached + 3)
        good("resume", "stopped", "--steps", end)
        good("train", *TINY, "--steps", end, "-s", "log.every=10", "--name", "whole")
        same_runs(Path("runs/whole"), run, reached + 3)


def test_a_second_signal_aborts_at_once() -> None:
    """The first is seen between two steps; a step that takes its time is not waited for after the second."""
    run = Path("runs/slow")
    process = Background(*LONG, "--name", "slow", "-s", "data.cache=none", "-s", "data.workers=0")
    process.until(lambda: started(run))
    process.signal(signal.SIGSTOP)  # both arrive before the next step ends
    process.signal(signal.SIGTERM)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGCONT)
    done = process.end(10)
    assert done.code in (130, 143)  # which of two waiting signals comes last is the system's choice
    assert steps(run) == []
    assert "stopped and saved" not in done.err
    assert "Traceback" not in done.err
    assert "interrupted" in good("runs").out
    assert "starts again at step 0" in good("resume", "slow", "--steps", "2").err


def test_a_second_signal_aborts_while_another_process_hangs() -> None:
    """The main thread waits in a collective's C code, where no handler of Python's runs."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    first, second = (Background(*LONG, "--name", "hung", env={**common, "RANK": rank}) for rank in "01")
    first.until(lambda: started(Path("runs/hung")))
    second.signal(signal.SIGSTOP)
    first.signal(signal.SIGTERM)
    first.signal(signal.SIGINT)
    assert first.end(20).code in (130, 143)  # which comes last is the system's choice
    second.kill()


def test_a_closed_terminal_saves_and_stops() -> None:
    run, (ours, theirs) = Path("runs/closed"), pty.openpty()
    process = spawn(
        *LONG,
        *("--name", "closed"),
        module=(
            "-c",
            "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from fmrun.__main__ import main; main()",
        ),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
    )
    os.close(theirs)
    wait_for(lambda: started(run), process)
    os.close(ours)
    assert process.wait(60) == 129
    assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 129)
    assert steps(run) == [status(run)["step"]]


def test_nohup_trains_on_when_the_terminal_is_closed() -> None:
    process = Background(*LONG, "--name", "kept", env={"NOHUP": "1"})
    process.until(lambda: started(Path("runs/kept")))
    reached = len(rows(Path("runs/kept")))
    process.signal(signal.SIGHUP)
    process.until(lambda: len(rows(Path("runs/kept"))) > reached + 3)
    process.kill()


def catches_interrupts(pid: int) -> bool:
    """Whether the process has a handler for SIGINT by now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) & 1 << (signal.SIGINT - 1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_while_the_data_is_read_leaves_nothing(number: signal.Signals, code: int) -> None:
    """Before there is anything to save, a signal just ends it."""
    picture = next(write_folder(Path("pictures"), count=1).iterdir())
    for i in range(10_000):  # seconds to read, however late the signal is
        picture.with_name(f"other-{i}.png").hardlink_to(picture)
    process = Background(*LONG, "--name", "early", "--data", "pictures")
    process.until(lambda: catches_interrupts(process.pid))  # a process that is still being made ignores them
    time.sleep(0.5)
    process.signal(number)
    done = process.end(20)
    assert done.code in (code, 128 + number)
    assert "Traceback" not in done.err
    assert not Path("runs/early").exists()


def test_a_signal_during_the_first_steps_saves() -> None:
    """From the moment there is a run folder's lock, nothing is lost."""
    run = Path("runs/first")
    process = Background(*LONG, "--name", "first")
    process.until(lambda: "feature matching: mean" in process.err)
    process.signal(signal.SIGTERM)
    done = process.end()
    assert done.code == 143
    assert saved(run, status(run)["step"]).step >= 1


def test_stopping_streams_leaves_no_worker_behind() -> None:
    write_folder(Path("pictures"), count=20)
    run = Path("runs/streamed")
    flags = ("--data", "pictures", "-s", "data.cache=none", "-s", "data.workers=2")
    process = Background(*LONG, *flags, "--name", "streamed")
    process.until(lambda: started(run))
    workers = process.children()
    assert len(workers) >= 2
    for worker in workers:  # as Ctrl-C and batch systems do, which signal every process
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.1)
    process.signal(signal.SIGINT)
    assert process.end().code == 130
    assert not [w for w in workers if Path(f"/proc/{w}").exists()]
    assert len(steps(run)) == 1
