"""Where the process of a run lives: on this machine, or on a cluster through submitit."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError

CLUSTERS = {"slurm": "slurm", "submitit": "local"}
"""Launchers other than `local`, and what submitit calls them. Its own local executor is there to try a submission."""


@dataclass(frozen=True)
class Task:
    """One run's command. Also what is pickled for a cluster, so it holds text only."""

    name: str
    train: tuple[str, ...]
    resume: tuple[str, ...]
    """Instead of `train`, once there is a run."""
    run: str
    """The run's folder."""
    log: str

    @property
    def exit_file(self) -> Path:
        """Where a job on a cluster leaves its exit code. (submitit's own result is a pickle, which is never read: whoever
        sends a sweep's folder could have made it.)"""
        return Path(self.log).with_suffix(".exit")

    def command(self) -> list[str]:
        """As things stand now: a job that waited for hours, or was put back into the queue, finds out itself."""
        exists = (Path(self.run) / "config.json").is_file()
        return [sys.executable, "-P", "-m", "fmrun", *(self.resume if exists else self.train)]


class Handle(Protocol):
    """A process somewhere."""

    def poll(self) -> int | None:
        """Its exit code (a signal's number below zero), None while it lives."""

    def stop(self) -> None:
        """Ask it to save and stop; a second time, to go at once."""


class Launcher(Protocol):
    """Starts tasks, at most `slots` at a time."""

    slots: int
    stays: bool
    """Whether what was started outlives the sweep's command."""

    def start(self, tasks: Sequence[tuple[Task, Mapping[str, str]]]) -> Sequence[Handle]:
        """Each with what its environment has besides this process's own; no more than there are free slots."""


def cores() -> int:
    """Processor cores this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- this machine


class Local:
    """Processes on this machine; with several GPUs each has one to itself, in turn."""

    stays = False

    def __init__(self, jobs: int, gpus: int) -> None:
        self.slots = jobs
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self._gpus = [g.strip() for g in named.split(",") if g.strip()][:gpus] or [str(i) for i in range(gpus)]
        self._busy: dict[int, _Process] = {}

    def start(self, tasks: Sequence[tuple[Task, Mapping[str, str]]]) -> "list[_Process]":
        return [self._start(task, env) for task, env in tasks]

    def _start(self, task: Task, env: Mapping[str, str]) -> "_Process":
        slot = next(i for i in range(self.slots) if i not in self._busy or self._busy[i].poll() is not None)
        env = {**os.environ, **env}
        if len(self._gpus) > 1:
            env["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        self._busy[slot] = spawn(task, env)
        return self._busy[slot]


class _Process:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self) -> int:
        return self.process.wait()


def with_fmrun(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports this fmrun, also where it is not installed."""
    here = str(Path(__file__).parents[2])
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, (env.get("PYTHONPATH"), here)))}


def spawn(task: Task, env: Mapping[str, str]) -> _Process:
    """Start the task's command, all it says going to its log.

    In a session of its own: a Ctrl-C reaches it once, through the sweep, for a second signal would abort it.
    """
    command = task.command()
    with open(task.log, "ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        prepared: dict[str, Any] = {} if os.name == "nt" else {"preexec_fn": _Prepare(os.getpid())}
        return _Process(
            subprocess.Popen(
                command,
                env=with_fmrun(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name != "nt",
                **prepared,
            )
        )


class _Prepare:
    """Runs in the child, before its command does."""

    DEATH_SIGNAL = 1
    """PR_SET_PDEATHSIG of <linux/prctl.h>."""

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def __call__(self) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends it to the whole job, and submitit answers it
        if self.prctl is not None:  # save and stop when the sweep is gone, even if that was killed
            self.prctl(self.DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != self.parent:  # it went before the kernel was told
                os._exit(128 + signal.SIGTERM)


# ---- a cluster


class Job:
    """A task as submitit calls it on the machine where it runs: pickled, hence no more than text."""

    def __init__(self, task: Task, env: Mapping[str, str]) -> None:
        self.task, self.env = task, dict(env)
        self._process: _Process | None = None

    def __call__(self) -> int:
        self._process = spawn(self.task, {**os.environ, **self.env})
        try:
            code = self._process.wait()
            self.task.exit_file.write_text(str(code))
            return code
        except BaseException:
            self._process.stop()
            self._process.wait()
            raise

    def checkpoint(self) -> Any:
        """Called by submitit on a timeout or preemption: save, and go back into the queue."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.stop()
            self._process.wait()
        return DelayedSubmission(Job(self.task, self.env))


class Submitit:
    """Jobs that submitit submits, all at once; `jobs` limits how many run at a time."""

    def __init__(self, cluster: str, folder: Path, jobs: int | None, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError('--launcher needs an extra package: pip install "fmrun[slurm]"') from None
        name = CLUSTERS[cluster]
        if name == "slurm" and shutil.which("sbatch") is None:
            raise UserError(
                "--launcher slurm: there is no sbatch here; start the sweep on a machine that submits to the cluster"
            )
        self.slots = sys.maxsize if name == "slurm" else jobs or 1
        self.stays = name == "slurm"
        self.executor = submitit.AutoExecutor(folder=folder, cluster=name)
        settings = {**self._named(options), "name": "fmrun"}
        settings.setdefault("timeout_min", 24 * 60)
        if jobs is not None and self.stays:
            settings.setdefault("slurm_array_parallelism", jobs)
        try:
            self.executor.update_parameters(**settings)
        except (NameError, AssertionError, TypeError, ValueError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from None

    def _named(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options by the names that submitit has for them: what is not common to its executors is Slurm's."""
        shared = self.executor._typed_parameters()
        return {key if key in shared or key.startswith("slurm_") else f"slurm_{key}": v for key, v in options.items()}

    def start(self, tasks: Sequence[tuple[Task, Mapping[str, str]]]) -> "list[_Submitted]":
        """As one array, which a scheduler takes better than single jobs."""
        from submitit.core.utils import FailedJobError

        try:
            with self.executor.batch():
                for task, _ in tasks:
                    task.exit_file.unlink(missing_ok=True)
                jobs = [self.executor.submit(Job(task, env)) for task, env in tasks]
        except FailedJobError as error:
            raise UserError(
                f"the scheduler takes no job: {' '.join(str(error).split())}; change what it is asked for with --slurm, "
                "e.g. --slurm partition=NAME --slurm timeout_min=60"
            ) from None
        return [_Submitted(job, task) for job, (task, _) in zip(jobs, tasks, strict=True)]

    def again(self, job_id: str, task: Task) -> "_Submitted":
        """A job that an earlier command submitted."""
        return _Submitted(self.executor._executor.job_class(self.executor.folder, job_id), task)


class _Submitted:
    def __init__(self, job: Any, task: Task) -> None:
        self.job, self.task = job, task

    @property
    def job_id(self) -> str:
        return str(self.job.job_id)

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return int(self.task.exit_file.read_text())
        except (OSError, ValueError):  # cancelled, out of time, out of memory: what the run left says how far it came
            return 1

    def stop(self) -> None:
        self.job.cancel()
