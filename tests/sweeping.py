"""Sweeps in processes of their own whose runs are forked off them, for torch takes seconds to import."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import commands
from commands import Background, Done

from fmrun.__main__ import main
from fmrun.runs import Run
from fmrun.sweep import launch, preflight

EVALUATED = "KID.txt"
"""Where this file is, `eval` finds what it says for each run; without it, it has no weights to look with."""


class Forked:
    """A process as `launch.spawn` gives it."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def stop(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


def forked(task: launch.Task, env: Mapping[str, str]) -> Forked:
    """`launch.spawn`, except that the command runs in a fork of this process."""
    arguments, prepare = task.command()[4:], launch._Prepare(os.getpid())
    if (pid := os.fork()) != 0:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        prepare()
        for number in launch_signals():
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"$ fmrun {' '.join(arguments)}\n".encode())
        os.dup2(log, 1)
        os.dup2(log, 2)
        if arguments[0] == "eval" and Path(EVALUATED).exists():
            code = evaluate(Run(Path(task.run)))
        elif arguments[0] == "eval":
            os.write(2, b"error: there are no weights here\n")
            code = 2
        else:
            sys.argv = ["fmrun", *arguments]
            main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    finally:
        os._exit(code)


def launch_signals() -> Sequence[signal.Signals]:
    from fmrun.sweep.work import Stop

    return Stop.SIGNALS


def evaluate(run: Run) -> int:
    """What `fmrun eval` leaves: a KID that depends on the run's seed and weight."""
    config = run.config()
    kid = float(eval(Path(EVALUATED).read_text(), {"seed": config["seed"], "fm": config["feature_matching"]}))
    record = {
        "step": run.status()["step"],
        "weights": "ema",
        "default": True,
        "settings": {"num": 8},
        "metrics": {"kid": kid},
        "floor": {},
    }
    run.add_evaluation(record)
    return 0


def asked_in_a_fork(arguments: Sequence[str]) -> tuple[str, int]:
    """`preflight._ask` in a fork of this process."""
    with tempfile.TemporaryFile() as answer:
        if (pid := os.fork()) == 0:
            os.write(answer.fileno(), preflight.main(arguments).encode())
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer.seek(0)
        return answer.read().decode(), code


def _child(argv: list[str], *rest: Any) -> None:
    launch.spawn = forked  # type: ignore[assignment]
    preflight._ask = asked_in_a_fork
    os.setpgid(0, 0)
    commands._child(argv, *rest)


def _job(argv: list[str], *rest: Any) -> None:
    def run() -> None:
        content = json.loads(argv[0])
        task = launch.Task(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
        job = launch.Job(task, {})

        def interrupt(number: int, frame: Any) -> None:
            again = job.checkpoint()
            print(" ".join(again.function.task.command()), flush=True)
            os._exit(0)

        signal.signal(signal.SIGUSR2, interrupt)
        job()

    launch.spawn = forked  # type: ignore[assignment]
    commands.main = run
    commands._child(argv, *rest)


class Sweeping(Background):
    """`fmrun sweep …` in a process group of its own."""

    target = staticmethod(_child)

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        super().__init__("sweep", *arguments, env=env)


class Job(Background):
    """A job as a scheduler runs it; SIGUSR2 interrupts it as it does submitit's."""

    target = staticmethod(_job)

    def __init__(self, task: launch.Task) -> None:
        super().__init__(json.dumps(asdict(task)))


def sweep(*arguments: str | Path) -> Done:
    return Sweeping(*arguments).end(120)


def good_sweep(*arguments: str | Path) -> Done:
    done = sweep(*arguments)
    assert done.code == 0, done.err
    return done


def swept(*arguments: str | Path) -> dict[str, Any]:
    """What `--json` prints."""
    return json.loads(good_sweep(*arguments, "--json").out)
