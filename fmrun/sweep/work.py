"""From the first run of a sweep to the last. Each is a process of its own: what becomes of one leaves the others alone."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from .. import records
from ..errors import BAD_INPUT, DIVERGED, INTERNAL, OK
from ..report import Reporter, counted
from ..runs import saving, to_json, write_atomic
from .display import Display, Line
from .launch import Handle, Launcher, Submitit, Task, cores
from .plan import Planned, Sweep, changed_settings, standing

POLL = 0.05
THREADS = "OMP_NUM_THREADS"


@dataclass
class Work:
    """One process that is wanted, and later lives."""

    planned: Planned
    task: Task
    evaluates: bool = False
    handle: Handle | None = None
    since: float = 0.0


@dataclass
class Outcome:
    """How it ended."""

    failures: dict[str, str] = field(default_factory=dict)
    """Runs that did not come to an end, and why. A run that diverged did: that is a result."""
    signal: int = 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else INTERNAL if self.failures else OK


class Stop:
    """Signals that stop the sweep; the second one at once."""

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n))

    def __init__(self) -> None:
        self.signal = self.count = 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal, self.count = number, self.count + 1

    @contextmanager
    def watching(self) -> Iterator["Stop"]:
        ignored = [s for s in self.SIGNALS if s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN]  # nohup
        before = {s: signal.signal(s, self._receive) for s in self.SIGNALS if s not in ignored}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


class Worker:
    """Takes the runs of a sweep from where they stand to their end."""

    def __init__(
        self,
        sweep: Sweep,
        launcher: Launcher,
        report: Reporter,
        *,
        preset: str | None,
        evaluate: bool | None,
        share_cores: bool,
        trust_code: bool = False,
    ) -> None:
        """`evaluate` None: as long as that works. `share_cores`: the processes compute on the same cores. `trust_code`: as
        the user typed it, the processes are given it too."""
        self.sweep, self.launcher, self.report = sweep, launcher, report
        self.preset, self.evaluate = preset, evaluate
        self.share_cores = share_cores
        self.always = ["--trust-code"] if trust_code else []
        self.outcome = Outcome()
        self.pending: deque[Work] = deque()
        self.running: list[Work] = []
        self.elsewhere: list[Work] = []
        self.done: set[str] = set()
        self._took: list[float] = []

    def work(self, planned: Sequence[Planned], stop: Stop) -> Outcome:
        """Train, resume and evaluate what is wanted; skip what is there."""
        display = Display(self.report, len(planned))
        for one in planned:
            self._sort(one)
        skipped, going = len(self.done), len(self.elsewhere)
        if skipped:
            self.report.note(f"{skipped} of {counted(len(planned), 'run')} done already")
        if going:
            by = (
                "run is being trained by another process and is"
                if going == 1
                else "runs are being trained by others and are"
            )
            self.report.note(f"{going} {by} waited for")
        self._adopt()
        with display.on():
            while self.pending or self.running or self.elsewhere:
                if stop.signal:
                    self._stop(stop)
                    break
                self._start()
                if not self._look(display):
                    time.sleep(POLL)
                display.show(self._lines, len(self.done), len(self.outcome.failures), self._left())
        return self.outcome

    # ---- what is to be done

    def _sort(self, planned: Planned) -> None:
        """Put a run where it belongs as it stands now."""
        config = self.sweep.combinations[planned.combination].config
        stands = standing(planned, config)
        if stands == "elsewhere":
            self.elsewhere.append(Work(planned, self._task(planned)))
        elif stands in ("finished", "diverged"):
            self._finished(planned, stands)
        else:
            self.pending.append(Work(planned, self._task(planned)))

    def _task(self, planned: Planned) -> Task:
        run, folder = planned.run, ["--runs-dir", str(self.sweep.folder), *self.always]
        preset = ["--preset", self.preset] if self.preset is not None else []
        config = self.sweep.config_file(planned.combination)
        train = ["train", *preset, "--config", str(config), "--seed", str(planned.seed), "--name", run.name, *folder]
        resume = ["resume", run.name, *folder]
        if run.config_file.is_file():
            for setting in changed_settings(run, self.sweep.combinations[planned.combination].config):
                resume += ["-s", setting]
        return Task(run.name, tuple(train), tuple(resume), str(run.path), str(self.sweep.log_file(run.name)))

    def _evaluation(self, planned: Planned) -> Work:
        run = planned.run
        device = self.sweep.combinations[planned.combination].config.device
        command = ("eval", run.name, "--runs-dir", str(self.sweep.folder), "--device", device, "--json", *self.always)
        task = Task(run.name, command, command, str(run.path), str(self.sweep.log_file(run.name)))
        return Work(planned, task, evaluates=True)

    def _finished(self, planned: Planned, state: str) -> None:
        if state == "finished" and self.evaluate is not False and not _evaluated(planned):
            self.pending.appendleft(self._evaluation(planned))
        else:
            self.done.add(planned.name)

    def _environment(self, work: Work) -> dict[str, str]:
        """A run goes on with as many threads as it began with: with others it would not be the same to the bit."""
        began = work.planned.run.env().get("threads") if work.planned.run.config_file.is_file() else None
        if began is not None:
            return {THREADS: str(began)}
        if self.share_cores and THREADS not in os.environ:
            return {THREADS: str(max(1, cores() // self.launcher.slots))}
        return {}

    # ---- what is going on

    def _start(self) -> None:
        free = self.launcher.slots - len(self.running)
        chosen = [self.pending.popleft() for _ in range(min(free, len(self.pending)))]
        if not chosen:
            return
        handles = self.launcher.start([(work.task, self._environment(work)) for work in chosen])
        for work, handle in zip(chosen, handles, strict=True):
            work.handle, work.since = handle, time.monotonic()
            self.running.append(work)
            if not work.evaluates:
                self._say(work.planned, "resumes" if work.planned.run.config_file.is_file() else "starts")
        self._remember()

    def _look(self, display: Display) -> bool:
        """Take note of what has ended; whether anything has."""
        ended = [(work, code) for work in self.running if work.handle and (code := work.handle.poll()) is not None]
        for work, code in ended:
            self.running.remove(work)
            self._end(work, code, display)
        back = [work for work in self.elsewhere if work.planned.run.state != "running"]
        for work in back:
            self.elsewhere.remove(work)
            self._sort(work.planned)
        return bool(ended or back)

    def _end(self, work: Work, code: int, display: Display) -> None:
        planned, name = work.planned, work.planned.name
        if work.evaluates:
            self._end_evaluation(work, code)
        elif code == OK:
            self._took.append(time.monotonic() - work.since)
            self._finished(planned, "finished")
        elif code == DIVERGED or planned.run.state == "diverged":
            self.done.add(name)
        else:
            self.outcome.failures[name] = reason(planned, code, Path(work.task.log))
        so_far = display.summary(len(self.done), len(self.outcome.failures), self._left())
        if name in self.outcome.failures:
            self.report.warn(f"{name} failed: {self.outcome.failures[name]} ({so_far})")
        elif name in self.done:
            diverged = planned.run.state == "diverged"
            self._say(planned, f"{'diverged' if diverged else 'is done'} ({so_far})")

    def _end_evaluation(self, work: Work, code: int) -> None:
        if code == OK or self.evaluate is False:
            self.done.add(work.planned.name)
            return
        why = reason(work.planned, code, Path(work.task.log))
        if self.evaluate:
            self.outcome.failures[work.planned.name] = f"evaluation: {why}"
            return
        self.report.warn(f"runs are not evaluated: {why}; the same command does it once that is mended")
        self.evaluate = False
        self.done.add(work.planned.name)
        for other in [w for w in self.pending if w.evaluates]:
            self.pending.remove(other)
            self.done.add(other.planned.name)

    def _stop(self, stop: Stop) -> None:
        """Ask what runs to save and stop, and wait for it; a second signal asks again, which ends it at once."""
        self.outcome.signal = stop.signal
        if self.launcher.stays and self.running:
            jobs = " ".join(getattr(work.handle, "job_id", "") for work in self.running)
            self.report.note(f"the jobs go on, and the same command follows them; to end them: scancel {jobs}")
            return
        asked = 0
        while any(work.handle and work.handle.poll() is None for work in self.running):
            if asked < stop.count:
                asked = stop.count
                if asked == 1:
                    self.report.note(f"stopping: {counted(len(self.running), 'run')} to be saved first")
                for work in self.running:
                    if work.handle:
                        work.handle.stop()
            time.sleep(POLL)

    # ---- jobs that outlive this command

    @property
    def _jobs_file(self) -> Path:
        return self.sweep.folder / "jobs.json"

    def _remember(self) -> None:
        """Keep the numbers of jobs on a cluster, so that none is submitted twice."""
        if self.launcher.stays:
            jobs = {work.planned.name: getattr(work.handle, "job_id", None) for work in self.running}
            with saving(self._jobs_file):
                write_atomic(self._jobs_file, to_json(jobs))

    def _adopt(self) -> None:
        """Follow the jobs that an earlier command submitted and that are not over."""
        if not (isinstance(self.launcher, Submitit) and self.launcher.stays):
            return
        jobs = records.read(self._jobs_file, records.Jobs)
        for waiting in (self.pending, self.elsewhere):
            for work in [w for w in waiting if w.planned.name in jobs]:
                handle = self.launcher.again(jobs[work.planned.name], work.task)
                if handle.poll() is None:
                    waiting.remove(work)
                    work.handle, work.since = handle, time.monotonic()
                    self.running.append(work)

    # ---- what is said

    def _say(self, planned: Planned, what: str) -> None:
        self.report.note(f"{planned.name} {what}")

    def _lines(self) -> list[Line]:
        now = time.monotonic()
        lines = []
        for work in self.running:
            status: dict[str, Any] = work.planned.run.status()
            at = f"step {status.get('step', 0)}/{status['steps']}" if "steps" in status else "starting"
            lines.append(Line(work.planned.name, "evaluation" if work.evaluates else at, now - work.since))
        return lines + [Line(work.planned.name, "trained by another process", 0.0) for work in self.elsewhere]

    def _left(self) -> float | None:
        """Seconds until all is done, were the rest as the runs so far."""
        rest = sum(not work.evaluates for work in (*self.pending, *self.running))
        if not self._took or self.launcher.stays:
            return None
        return sum(self._took) / len(self._took) * rest / self.launcher.slots


def _evaluated(planned: Planned) -> bool:
    """Whether there is what the sweep's own evaluation would give: scores of raw weights, or of other images than the other
    runs', are not."""
    step = planned.run.status().get("step")
    return any(
        record.get("step") == step and record.get("weights") == "ema" and record.get("default") is True
        for record in planned.run.evaluations()
    )


def reason(planned: Planned, code: int, log: Path) -> str:
    """Why a run's process ended: what it said itself, or the signal that killed it."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name}); the same command resumes it"
    if code > 128:
        return f"stopped by signal {code - 128}; the same command resumes it"
    said = ""
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        own = lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0) :]
        said = next((line.removeprefix("error: ") for line in reversed(own) if line.startswith("error: ")), "")
    kind = "" if code == BAD_INPUT else f" (exit code {code}; {log})"
    return (said or f"it ended with exit code {code}; see {log}") + (kind if said else "")
