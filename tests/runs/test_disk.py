"""A disk that refuses: what was saved stays, the message says so, and nothing crashes on top of it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import SMALL, TINY, Done, finish, fmrun, good, saved, status, steps, train, write_folder

from fmrun.data import grid
from fmrun.runs import folder as runs
from fmrun.runtime import files
from fmrun.train import run as training

pytestmark = pytest.mark.usefixtures("workplace")


def mounted(place: Path, size: int) -> bool:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def disk(workplace: Path) -> Iterator[Path]:
    """A disk of its own of 600 kB: room for a few checkpoints of the tiny nets (110 kB each)."""
    place = workplace / "disk"
    if not mounted(place, 600):
        pytest.skip("needs root and tmpfs, to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def refused(done: Done) -> str:
    """The one sentence of a command that met a bad disk."""
    assert done.code not in (0, 3)
    assert "Traceback" not in done.err
    assert "bug" not in done.err
    (error,) = done.errors
    return error


def fill(disk: Path, leaving: int) -> None:
    space = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(space.f_bavail * space.f_bsize - leaving, 0)))


MANY = ("-s", "checkpoint.every=2", "-s", "checkpoint.keep_last=100", "-s", "log.every=2")


def test_a_full_disk_during_a_save(disk: Path) -> None:
    done = fmrun("train", *TINY, "--runs-dir", "disk", "--name", "run", "--steps", "100", *MANY)
    error = refused(done)
    assert "cannot save the checkpoint of step" in error
    assert "No space left on device" in error
    run = disk / "run"
    kept = steps(run)
    assert kept
    assert "then `fmrun resume run`" in error
    for step in kept:
        saved(run, step)  # verifies every byte
    assert not list(run.rglob("*.tmp"))
    assert status(run)["state"] in ("running", "failed")
    assert "run" in good("runs", "--runs-dir", "disk").out

    # pictures go elsewhere; and with room it goes on
    good("sample", "run", "--runs-dir", "disk", "--num", "1", "--out", "picture.png")
    more = ("-s", "checkpoint.keep_last=1")
    for step in kept[:-1]:
        (run / "checkpoints" / f"step-{step:08d}.safetensors").unlink()
    good("resume", "run", "--runs-dir", "disk", "--steps", str(kept[-1] + 4), *more)
    assert steps(run) == [kept[-1] + 4]


def test_a_disk_full_from_the_start(disk: Path) -> None:
    fill(disk, 0)
    error = refused(fmrun("train", *TINY, "--runs-dir", "disk", "--name", "run", "--steps", "2"))
    assert "No space left on device" in error
    assert "--runs-dir" in error or "free space" in error
    assert not (disk / "run").exists()


def test_a_full_disk_for_metrics_and_pictures(disk: Path) -> None:
    """Everything but the checkpoint before is refused; the run can still be resumed."""
    train("--runs-dir", "disk", "--name", "run", "--steps", "2", "-s", "log.tensorboard=true")
    fill(disk, 0)
    error = refused(fmrun("resume", "run", "--runs-dir", "disk", "--steps", "8", "-s", "log.every=1"))
    assert "cannot write disk/run/" in error
    assert "No space left on device" in error
    assert "free space" in error
    error = refused(fmrun("sample", "run", "--runs-dir", "disk"))
    assert "cannot write disk/run/samples/" in error
    (disk / "ballast").unlink()
    good("resume", "run", "--runs-dir", "disk", "--steps", "8")


@pytest.mark.parametrize("what", ["metrics.jsonl", "step-00000004.png", "status.json"])
def test_any_other_file_that_cannot_be_written(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above without a disk to fill: each kind of file refuses in turn, in the middle of a run."""
    train("--name", "run", "--steps", "2")
    before = saved(Path("runs/run"), 2)
    write = files.write_atomic

    def full(path: Path, *parts: bytes) -> None:
        # the status is written at the start as well
        if path.name == what != "metrics.jsonl" and (what != "status.json" or b'"step": 4' in bytes(parts[0])):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *parts)

    def full_append(run: runs.Run, row: dict[str, object]) -> None:
        with files.saving(run.metrics_file):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for module in (runs, grid, training):
            patch.setattr(module, "write_atomic", full)
        if what == "metrics.jsonl":
            patch.setattr(runs.Run, "append_metrics", full_append)
        error = refused(fmrun("resume", "run", "--steps", "8", "-s", "log.every=4", "-s", "log.sample_every=4"))
    assert f"cannot write runs/run/{'samples/' * what.endswith('.png')}{what}: No space left on device" in error
    if what != "status.json":
        assert status(Path("runs/run"))["state"] == "failed"
        assert status(Path("runs/run"))["exit_code"] == 1
        assert status(Path("runs/run"))["message"] in error
    assert saved(Path("runs/run"), 2).meta == before.meta
    good("resume", "run", "--steps", "8")


def test_a_read_only_disk(disk: Path) -> None:
    train("--runs-dir", "disk", "--name", "run", "--steps", "2")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    error = refused(fmrun("train", *TINY, "--runs-dir", "disk", "--steps", "2"))
    assert "cannot make a run in disk: Read-only file system" in error
    assert "--runs-dir" in error
    error = refused(fmrun("resume", "run", "--runs-dir", "disk", "--steps", "4"))
    assert "cannot write to disk/run: Read-only file system" in error
    assert "make it writable" in error
    error = refused(fmrun("sample", "run", "--runs-dir", "disk", "--num", "1"))
    assert "cannot write disk/run/samples/" in error
    good("sample", "run", "--runs-dir", "disk", "--num", "1", "--out", "here.png")
    assert "finished" in good("runs", "--runs-dir", "disk").out


def test_shared_memory_that_is_too_small_is_one_sentence() -> None:
    """As in a container, which has 64 MB of it by default."""
    small = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    write_folder(Path("pictures"), count=40, size=128, channels=3)
    flags = ("--data", "pictures", "-s", "data.image_size=128", "-s", "data.cache=none", "-s", "data.workers=2")
    command = [*small, sys.executable, "-m", "fmrun", "train", *SMALL, *flags, "--batch-size", "32", "--name", "small"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = finish(subprocess.Popen(command, text=True, **pipes), 60)
    assert done.code == 2
    assert "Traceback" not in done.err
    (error,) = done.errors
    assert "No space left on device" in error
    assert "-s data.workers=0, or give it more room: docker run --shm-size=8g" in error
