"""Sweeps in processes of their own whose runs are forked off them, for torch takes seconds to import."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import commands
from support.commands import Background, Done

from fmrun.__main__ import main
from fmrun.cli import sweep as command
from fmrun.runs.folder import Run
from fmrun.runtime.errors import UserError
from fmrun.sweep import launch, preflight

EVALUATED = "KID.txt"
"""Where this file is, `eval` finds what it says for each run; without it, it has no weights to look with."""


class Forked:
    """In the place of `subprocess.Popen`: the command runs in a fork of this process."""

    def __init__(self, command: list[str], *, stdout: int, env: dict[str, str], cwd: Path, **_: Any) -> None:
        self.returncode: int | None = None
        if (pid := os.fork()) == 0:
            _run(command[command.index("fmrun") + 1 :], stdout, env, cwd)
        self.pid = pid

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


def _run(arguments: list[str], out: int, env: dict[str, str], cwd: Path) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        for number in launch.Children.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        os.dup2(out, 2)
        os.dup2(2, 1)
        sys.argv = ["fmrun", *arguments]
        main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    finally:
        os._exit(code)


CALL = command.call


def call(context: Any, arguments: list[str]) -> int:
    """A command that an item needs; of `fmrun eval` what it leaves, a KID that depends on the run's seed and weight."""
    if arguments[0] != "eval":
        return CALL(context, arguments)
    if not Path(EVALUATED).exists():
        raise UserError("there are no weights here")
    run = Run(Path(arguments[arguments.index("--runs-dir") + 1]) / arguments[1])
    config = run.config()
    kid = float(eval(Path(EVALUATED).read_text(), {"seed": config["seed"], "fm": config["feature_matching"]}))
    record = {"step": run.status()["step"], "weights": "ema", "default": True, "settings": {"num": 8}}
    run.add_evaluation({**record, "metrics": {"kid": kid}, "floor": {}})
    return 0


def _child(argv: list[str], *rest: Any) -> None:
    # what one thread imports while another forks stays locked in the fork for good
    import filelock  # noqa: F401

    import fmrun.runs.records
    import fmrun.train.run  # noqa: F401

    launch.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=None)  # type: ignore[assignment]
    command.call = call
    preflight.get_context = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment]
    os.setpgid(0, 0)
    commands._child(argv, *rest)


class Sweeping(Background):
    """`fmrun sweep …` in a process group of its own."""

    target = staticmethod(_child)

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        super().__init__("sweep", *arguments, env=env)


def sweep(*arguments: str | Path, env: dict[str, str] | None = None) -> Done:
    return Sweeping(*arguments, env=env).end(120)


def good_sweep(*arguments: str | Path) -> Done:
    done = sweep(*arguments)
    assert done.code == 0, done.err
    return done


def swept(*arguments: str | Path) -> dict[str, Any]:
    """What `--json` prints."""
    return json.loads(good_sweep(*arguments, "--json").out)
