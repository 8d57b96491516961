"""Where a sweep's runs live: this machine's GPUs, Slurm through submitit, Ray."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.commands import TINY, finish, rows, spawn, status, timeless
from support.sweeping import good_sweep

from fmrun.config.presets import parse_set
from fmrun.runtime.errors import UserError
from fmrun.sweep import grid, launch
from fmrun.sweep.item import Item
from fmrun.sweep.launch import Children, Job

S = Path("runs/s")
WEIGHTS = ("--over", "feature_matching.weight=0,0.1")
LONG = (*TINY, "-s", "log.every=1", "-s", "eval.every=0", "-s", "checkpoint.every=20", "--no-eval", "--seeds", "1")

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no POSIX processes"),
]


def jobs(count: int = 1, *settings: str) -> list[Job]:
    (only,) = grid.combinations("dcgan", None, [parse_set(text) for text in settings], [])
    items = [Item(S.absolute(), only, seed, False) for seed in range(count)]
    flags = ("--preset", "dcgan", *(part for text in settings for part in ("-s", text)), "--seeds", str(count))
    argv = ("sweep", *flags, "--name", "s", "--no-eval", "--item")
    return [Job((*argv, str(i)), S / "logs" / f"{i}.log", item) for i, item in enumerate(items)]


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def whole(run: Path, count: int) -> bool:
    """Every step once."""
    return [row["step"] for row in rows(run)] == list(range(1, count + 1))


@pytest.mark.parametrize(
    ("visible", "count", "gpus", "seen"),
    [("4, 6", 4, 2, ["4", "4", "6", "6"]), (None, 2, 3, ["0", "1"]), (None, 1, 1, [None]), ("5", 2, 0, [None, None])],
)
def test_gpus_and_cores_are_dealt_out(
    visible: str | None, count: int, gpus: int, seen: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv(launch.GPUS, visible) if visible else monkeypatch.delenv(launch.GPUS, raising=False)
    given: list[Mapping[str, str]] = []

    def note(children: Children, job: Job, env: Mapping[str, str]) -> None:
        given.append(env)
        until(lambda: len(given) >= count)

    monkeypatch.setattr(Children, "run", note)
    assert len(list(launch.local(jobs(count), Children(), count, gpus))) == count
    assert sorted((env.get(launch.GPUS) for env in given), key=str) == seen
    threads = str(max(1, launch.cores() // count)) if count > 1 else None
    assert {env.get("OMP_NUM_THREADS") for env in given} == {threads}


# ---- submitit


def test_what_slurm_cannot_do_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(options: Mapping[str, Any], cluster: str = "slurm") -> None:
        next(launch.slurm(jobs(), Children(), S / "submitit", None, options, cluster))

    with pytest.raises(UserError, match=r"--slurm: .*slurm_partitoin"):
        start({"partitoin": "gpu"}, "local")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch here"):
        start({})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'pip install "fmrun\[slurm\]"'):
        start({})


SBATCH = """#!/bin/sh
test -e closed && echo "sbatch: error: invalid partition" >&2 && exit 1
echo "Submitted batch job 77"
"""


def test_what_slurm_is_asked_for(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scheduler that only takes jobs, and results in the folder that someone sent."""
    pytest.importorskip("submitit")

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch PWNED",)

    tools, folder = workplace / "bin", workplace / "submitit"
    tools.mkdir()
    folder.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "sacct": "#!/bin/sh\n",
        "srun": "#!/bin/sh\n",
        "scancel": "#!/bin/sh\n",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    for place in range(2):
        (folder / f"77_{place}_0_result.pkl").write_bytes(pickle.dumps(Evil()))
    options = {"partition": "gpu", "gpus_per_node": 1}
    given = jobs(2)
    assert list(launch.slurm(given, Children(), folder, 2, options)) == given
    assert not Path("PWNED").exists()
    (script,) = folder.glob("*_submission.sh")
    asked = script.read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--array=0-1%2", "--job-name=fmrun"):
        assert line in asked, asked
    Path("closed").touch()
    with pytest.raises(
        UserError, match=r"--slurm: sbatch: error: invalid partition; change what the scheduler is asked for"
    ):
        list(launch.slurm(given, Children(), folder, 2, options))


def test_a_job_that_is_preempted_saves_and_goes_on_from_the_queue() -> None:
    """Through submitit's own local executor: real processes, which it starts, signals and starts again."""
    pytest.importorskip("submitit")
    nets = ("generator.width=4", "discriminator.width=4", "data.path=images.npz", "device=cpu")
    (job,) = jobs(1, *nets, "train.steps=200", "log.every=1", "eval.every=0", "train.batch_size=8")
    item = job.item
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(lambda: list(launch.slurm([job], Children(), S / "submitit", None, {}, "local")))
        until(lambda: item.run.metrics_file.exists() or end.done())
        os.kill(parent(status(item.run.path)["pid"]), signal.SIGUSR2)  # the job
        assert end.result(180) == [job]
    assert item.state == "finished"
    assert whole(item.run.path, 200)
    said = job.log.read_text()
    assert re.search(r"stopped and saved at step \d+", said)
    assert said.count("$ fmrun sweep") == 2


# ---- Ray


def test_runs_of_a_lost_machine_go_on_elsewhere() -> None:
    """A cluster of two machines with place for one run each; one of them is lost while it trains."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    def trains(run: Path, node: Any) -> bool:
        raylet = node.all_processes["raylet"][0].process.pid
        environment = Path(f"/proc/{status(run)['pid']}/environ")
        return environment.exists() and f"RAY_RAYLET_PID={raylet}" in environment.read_text().split("\0")

    place = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**place, "include_dashboard": False})
    try:
        lost = cluster.add_node(**place)
        flags = (*LONG, *WEIGHTS, "--steps", "200")
        process = spawn("sweep", *flags, "--name", "s", "--launcher", "ray", env={"RAY_ADDRESS": cluster.address})
        until(lambda: any(trains(file.parent, lost) for file in S.glob("*/metrics.jsonl")))
        (run,) = (file.parent for file in S.glob("*/metrics.jsonl") if trains(file.parent, lost))
        trainer = status(run)["pid"]
        os.kill(trainer, signal.SIGSTOP)
        worker = parent(trainer)
        cluster.remove_node(lost, allow_graceful=False)
        until(lambda: not Path(f"/proc/{worker}").exists())
        with suppress(ProcessLookupError):
            os.kill(trainer, signal.SIGKILL)  # all processes of a lost machine are gone
        done = finish(process, 240)
    finally:
        cluster.shutdown()
    assert done.code == 0, done.err
    alone = good_sweep(*flags, "--name", "alone")
    names = ("weight-0_seed-0", "weight-0.1_seed-0")
    logs = "".join((S / "logs" / f"{name}.log").read_text() for name in names)
    assert logs.count("$ fmrun sweep") == 3
    for name in names:
        assert whole(S / name, 200)
        assert timeless(S / name) == timeless(Path("runs/alone") / name)
    speed = re.compile(r"(?m)(  [\d.]+x)?  +\d+$|^images/s.*$|  (step cost  )?images/s$|-+$")
    assert speed.sub("", done.out) == speed.sub("", alone.out)
