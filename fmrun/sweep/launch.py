"""Where the processes of a sweep's runs live: on this machine, on Slurm, on Ray. Each launcher takes items and gives each
back when it has ended, with what went wrong with its process; how the run stands is read from its folder."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import FmrunError, UserError
from ..report import divert_prints
from .item import POLL, THREADS, Children, Item, work

GPUS = "CUDA_VISIBLE_DEVICES"

Ended = Iterator[tuple[Item, str]]


def attempt(item: Item, children: Children, env: Mapping[str, str]) -> str:
    """Work on the item, its log beside the run; what kept it from that."""
    try:
        work(item, children, item.log, env)
    except (FmrunError, OSError) as error:
        return str(error)
    return ""


# ---- this machine


def local(items: Sequence[Item], children: Children, jobs: int, gpus: int) -> Ended:
    """`jobs` processes at a time, which share the cores; with several GPUs each has one to itself, in turn."""
    named = [gpu.strip() for gpu in os.environ.get(GPUS, "").split(",") if gpu.strip()]
    named = named[:gpus] or [str(gpu) for gpu in range(gpus)]
    threads = {THREADS: str(max(1, cores() // jobs))} if jobs > 1 and THREADS not in os.environ else {}
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for slot in range(jobs):
        slots.put({**threads, **({GPUS: named[slot % gpus]} if gpus > 1 else {})})

    def in_slot(item: Item) -> str:
        env = slots.get()
        try:
            return attempt(item, children, env)
        finally:
            slots.put(env)

    with ThreadPoolExecutor(jobs) as pool:
        ends = {pool.submit(in_slot, item): item for item in items}
        for end in as_completed(ends):
            yield ends[end], end.result()


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- Slurm


class Job:
    """An item as submitit calls it in a job."""

    def __init__(self, item: Item) -> None:
        self.item, self.children = item, Children()

    def __call__(self) -> str:
        return attempt(self.item, self.children, {})

    def checkpoint(self) -> Any:
        """Called by submitit on a timeout or preemption: save, and go back into the queue."""
        from submitit.helpers import DelayedSubmission

        self.children.stop(signal.SIGTERM)
        while self.children.alive and self.item.run.state == "running":
            time.sleep(POLL)
        return DelayedSubmission(Job(self.item))


def slurm(
    items: Sequence[Item],
    children: Children,
    folder: Path,
    jobs: int | None,
    options: Mapping[str, Any],
    cluster: str = "slurm",
) -> Ended:
    """One job array of submitit's, of which `jobs` run at a time. What jobs return is a pickle, and never read."""
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
    parallel = {} if jobs is None else {"slurm_array_parallelism": jobs}
    try:
        executor.update_parameters(**{"timeout_min": 24 * 60, **parallel, **settings, "name": "fmrun"})
    except (NameError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
    try:
        with executor.batch():
            submitted = [executor.submit(Job(item)) for item in items]
    except FailedJobError as error:
        raise UserError(
            f"the scheduler takes no job: {' '.join(str(error).split())}; change what it is asked for with --slurm, "
            "e.g. --slurm partition=NAME --slurm timeout_min=60"
        ) from None
    waiting = dict(zip(submitted, items, strict=True))
    while waiting and not children.signal:
        for job in [job for job in waiting if job.done()]:
            yield waiting.pop(job), ""
        time.sleep(POLL)
    for job in waiting:
        job.cancel(check=False)
    while any(item.run.state == "running" for item in waiting.values()):
        time.sleep(POLL)


# ---- Ray


def on_ray(items: Sequence[Item], children: Children, cpus: float, gpus: float | None) -> Ended:
    """Each item a task on the cluster at RAY_ADDRESS, or else on one that is started here. A task whose machine is lost is
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
        waiting = {task.remote(item, env): item for item in items}
        cancelled = False
        with children.watching():  # again: Ray has taken SIGTERM
            while waiting:
                if children.signal and not cancelled:
                    cancelled = True
                    for ref in waiting:
                        ray.cancel(ref)
                for ref in ray.wait(list(waiting), timeout=POLL)[0]:
                    try:
                        said = ray.get(ref)
                    except ray.exceptions.RayError as error:
                        said = str(error).splitlines()[0]
                    yield waiting.pop(ref), said
    finally:
        ray.shutdown()


def _task(item: Item, env: Mapping[str, str]) -> str:
    return attempt(item, Children(), env)
