"""One run of a sweep, from where it stands to its end: what every launcher does, and `fmrun sweep --item N`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ..data.places import located
from ..errors import BAD_INPUT, DIVERGED, INTERNAL, OK, UserError
from ..presets import FREE_ON_RESUME, flatten, from_json, render
from ..runs import Run, make_folder
from .grid import Combination, without_matching

POLL = 0.1
THREADS = "OMP_NUM_THREADS"

DECIDED_BY_DATA = ("data.channels",)
"""What a run writes into its config otherwise than it was asked for, once it has seen its images."""


@dataclass(frozen=True)
class Item:
    """One run of a sweep. It is pickled for the machine that trains it."""

    folder: Path
    """The sweep's, absolute."""
    combination: Combination
    seed: int
    evaluate: bool | None
    """None: an evaluation that fails is no failure."""
    trust_code: bool
    cwd: Path = field(default_factory=Path.cwd)

    @property
    def name(self) -> str:
        return f"{self.combination.name}_seed-{self.seed}"

    @property
    def run(self) -> Run:
        return Run(self.folder / self.name)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def state(self) -> str:
        """`new`, `running` (by whatever process), `finished` and `diverged`, of which nothing is left to be trained, or
        `open`."""
        if not self.run.config_file.is_file():
            return "new"
        state = self.run.state
        if state == "finished" and int(self.run.status().get("step", 0)) < self.combination.config.train.steps:
            return "open"
        return state if state in ("running", "finished", "diverged") else "open"

    @property
    def done(self) -> bool:
        """Whether nothing is left to be done."""
        state = self.state
        return state == "diverged" or (state == "finished" and (self.evaluate is False or self.evaluated))

    @property
    def command(self) -> tuple[str, ...]:
        """What brings it further: `train`, `resume` with what may change in a run and is otherwise now, or `eval`."""
        config, state = self.combination.config, self.state
        where = ("--runs-dir", str(self.folder), *(("--trust-code",) if self.trust_code else ()))
        if state == "new":
            return ("train", *self.combination.train, "--seed", str(self.seed), "--name", self.name, *where)
        if state == "finished":
            return ("eval", self.name, "--device", config.device, *where)
        then, now = flatten(from_json(self.run.config())), flatten(config)
        free = [key for key in now if key.startswith(FREE_ON_RESUME) and key != "device" and now[key] != then.get(key)]
        return ("resume", self.name, *(part for key in free for part in ("-s", render(key, now[key]))), *where)

    @property
    def evaluated(self) -> bool:
        """Whether its end has the scores that `eval` gives: those of raw weights or of other images are not."""
        step = self.run.status().get("step")
        return any(
            record.get("step") == step and record.get("weights") == "ema" and record.get("default") is True
            for record in self.run.evaluations()
        )

    def refuse_another(self) -> None:
        """UserError where the run that lies there is of another experiment."""
        if not self.run.config_file.is_file():
            return
        there, here = from_json(self.run.config()), self.combination.config.model_copy(update={"seed": self.seed})
        here = here.model_copy(update={"data": located(here.data, here.task)})
        then, now = flatten(without_matching(there)), flatten(without_matching(here))
        for key in dict.fromkeys((*then, *now)):
            if key not in DECIDED_BY_DATA and not key.startswith(FREE_ON_RESUME) and then.get(key) != now.get(key):
                was, is_ = (render(key, flat[key]) if key in flat else f"no {key}" for flat in (then, now))
                raise UserError(
                    f"run {self.name} in {self.folder} is of {was}, and this sweep is of {is_}; give another "
                    f"--name, or vary {key} with --over"
                )

    def why(self) -> str:
        """Why it is not at its end: what it said last, or how it ended."""
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0) :]
            if said := [line.removeprefix("error: ") for line in last if line.startswith("error: ")]:
                return said[-1]
        state = self.run.state if self.run.config_file.is_file() else "not started"
        return f"it is {state}; see {self.log}"


class Children:
    """The processes that this one has started; a signal that stops this one is passed on to them."""

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n))

    def __init__(self) -> None:
        self.signal = 0
        self.alive: set[subprocess.Popen[bytes]] = set()

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Ask all of them to save and stop; a second time, to go at once."""
        if self.signal and not self.alive:
            os._exit(128 + number)
        first, self.signal = not self.signal, number
        for process in list(self.alive):
            process.terminate()
        if first:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping: the runs are saved first\n")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, signals that stop are answered by `stop`; not SIGHUP under nohup."""
        caught = [s for s in self.SIGNALS if s.name != "SIGHUP" or signal.getsignal(s) != signal.SIG_IGN]
        before = {s: signal.signal(s, self.stop) for s in caught}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def run(self, command: Sequence[str], log: Path | None, env: Mapping[str, str], cwd: Path) -> int:
        """The exit code of this command of fmrun, which runs in a session of its own: a Ctrl-C reaches it once, by way of
        `stop`. What it says goes to the file `log`, or else to stderr."""
        if self.signal:
            return 128 + self.signal
        with ExitStack() as opened:
            out = 2
            if log is not None:
                file = opened.enter_context(open(log, "ab", buffering=0))
                file.write(f"$ fmrun {' '.join(command)}\n".encode())
                out = file.fileno()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fmrun.sweep.child", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        self.alive.add(process)
        try:
            if self.signal:  # it came while the process was started
                process.terminate()
            while process.poll() is None:  # a wait would hold up handlers and Ray's cancelling
                time.sleep(POLL)
        finally:
            if process.returncode is None:
                process.terminate()
                process.wait()
            self.alive.discard(process)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode


def work(item: Item, children: Children, log: Path | None, env: Mapping[str, str]) -> int:
    """Train or resume the run, or wait while another process does, and evaluate it; the exit code of what ended it.

    `env` is added to the environment, and `log` where its processes speak, as in `Children.run`.
    """
    if log is not None:
        make_folder(log.parent)
    while not item.done:
        state = item.state
        if children.signal:
            return 128 + children.signal
        if state == "running":
            time.sleep(POLL)
            continue
        # with another number of threads a run is not the same to the bit
        threads = item.run.env().get("threads") if state != "new" else None
        own = {} if threads is None else {THREADS: str(threads)}
        code = children.run(item.command, log, {**os.environ, **env, **own}, item.cwd)
        if state == "finished":  # the evaluation
            return code if item.evaluate or code > 128 else OK
        if code not in (OK, BAD_INPUT) or item.state == state:  # else it is trained, or another process was faster
            return code or INTERNAL
    return DIVERGED if item.state == "diverged" else OK
