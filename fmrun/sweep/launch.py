"""Where the processes of a sweep's runs live: on this machine, on Slurm, on Ray. Each launcher takes jobs, `fmrun sweep …
--item N`, and gives each back when it has ended; how its run stands is read from its folder."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from ..runtime.errors import UserError
from ..runtime.files import make_folder
from ..runtime.report import divert_prints
from .item import Item

POLL = 0.1
GPUS, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Job:
    """A run in a process of its own. It is pickled for the machine that trains it."""

    argv: tuple[str, ...]
    """Of fmrun."""
    log: Path
    """Where it speaks."""
    item: Item = field(repr=False)
    cwd: Path = field(default_factory=Path.cwd)

    def why(self) -> str:
        """Why the run is not at its end: what its process said last, or where to look."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else f"see {self.log}"


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

    def run(self, job: Job, env: Mapping[str, str]) -> None:
        """Start it, in a session of its own: a Ctrl-C reaches it once, by way of `stop`; and wait for its end."""
        if self.signal:
            return
        make_folder(job.log.parent)
        with open(job.log, "ab", buffering=0) as out:
            out.write(f"$ fmrun {' '.join(job.argv)}\n".encode())
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fmrun", *job.argv],
                stdin=subprocess.DEVNULL,
                stdout=out.fileno(),
                stderr=out.fileno(),
                env={**os.environ, **env},
                cwd=job.cwd,
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


# ---- this machine


def local(jobs: Sequence[Job], children: Children, at_a_time: int, gpus: int) -> Iterator[Job]:
    """So many processes at a time, which share the cores; with several GPUs each has one to itself, in turn."""
    named = [gpu.strip() for gpu in os.environ.get(GPUS, "").split(",") if gpu.strip()]
    named = named[:gpus] or [str(gpu) for gpu in range(gpus)]
    threads = str(max(1, cores() // at_a_time))
    shared = {THREADS: threads} if at_a_time > 1 and THREADS not in os.environ else {}
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for slot in range(at_a_time):
        slots.put({**shared, **({GPUS: named[slot % gpus]} if gpus > 1 else {})})

    def in_slot(job: Job) -> None:
        env = slots.get()
        try:
            children.run(job, env)
        finally:
            slots.put(env)

    with ThreadPoolExecutor(at_a_time) as pool:
        ends = {pool.submit(in_slot, job): job for job in jobs}
        for end in as_completed(ends):
            end.result()
            yield ends[end]


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- Slurm


class SlurmJob:
    """A job as submitit calls it."""

    def __init__(self, job: Job) -> None:
        self.job, self.children = job, Children()

    def __call__(self) -> None:
        self.children.run(self.job, {})

    def checkpoint(self) -> Any:
        """Called by submitit on a timeout or preemption: save, and go back into the queue."""
        from submitit.helpers import DelayedSubmission

        self.children.stop(signal.SIGTERM)
        while any(process.poll() is None for process in self.children.alive):
            time.sleep(POLL)
        return DelayedSubmission(SlurmJob(self.job))


def slurm(
    jobs: Sequence[Job],
    children: Children,
    folder: Path,
    at_a_time: int | None,
    options: Mapping[str, Any],
    cluster: str = "slurm",
) -> Iterator[Job]:
    """One job array of submitit's, of which `at_a_time` run at once. What jobs return is a pickle, and never read."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise UserError('--launcher slurm needs an extra package: pip install "fmrun[slurm]"') from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "--launcher slurm: there is no sbatch here; start the sweep on a machine that submits to the cluster"
        )
    executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=1000)
    known = executor._typed_parameters()
    settings = {key if key in known or key.startswith("slurm_") else f"slurm_{key}": v for key, v in options.items()}
    parallel = {} if at_a_time is None else {"slurm_array_parallelism": at_a_time}
    try:
        executor.update_parameters(**{"timeout_min": 24 * 60, **parallel, **settings, "name": "fmrun"})
        with executor.batch():
            submitted = [executor.submit(SlurmJob(job)) for job in jobs]
    except (FailedJobError, NameError, AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"--slurm: {' '.join(str(error).split())}; change what the scheduler is asked for, e.g. --slurm partition=NAME"
        ) from None
    waiting = dict(zip(submitted, jobs, strict=True))
    while waiting and not children.signal:
        for job in [job for job in waiting if job.done()]:
            yield waiting.pop(job)
        time.sleep(POLL)
    for job in waiting:
        job.cancel(check=False)
    while any(job.item.run.state == "running" for job in waiting.values()):
        time.sleep(POLL)


# ---- Ray


def on_ray(jobs: Sequence[Job], children: Children, cpus: float, gpus: float | None) -> Iterator[Job]:
    """Each job a task on the cluster at RAY_ADDRESS, or else on one that is started here. A task whose machine is lost is
    done again on another, where it goes on from the run's last checkpoint."""
    try:
        import ray
    except ImportError:
        raise UserError('--launcher ray needs an extra package: pip install "fmrun[ray]"') from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    divert_prints()  # Ray tells of lost machines on stdout
    imports = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
    ray.init(runtime_env=imports, log_to_driver=False, logging_level=logging.WARNING)
    try:
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=10)(_task)
        env = {name: value for name, value in os.environ.items() if name != GPUS and not name.startswith("RAY_")}
        waiting = {task.remote(job, env): job for job in jobs}
        cancelled = False
        with children.watching():  # again: Ray has taken SIGTERM
            while waiting:
                if children.signal and not cancelled:
                    cancelled = True
                    for ref in waiting:
                        ray.cancel(ref)
                for ref in ray.wait(list(waiting), timeout=POLL)[0]:
                    yield waiting.pop(ref)
    finally:
        ray.shutdown()


def _task(job: Job, env: Mapping[str, str]) -> None:
    Children().run(job, env)
