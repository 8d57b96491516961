"""Running fmrun's commands as a user would, most of them in this process, for torch takes seconds to import."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer.main
from PIL import Image
from torch import Tensor

from fmrun.__main__ import main
from fmrun.runs import checkpoint
from fmrun.runtime import report
from fmrun.tasks import generate

NETS = ("-s", "generator.width=4", "-s", "generator.latent_dim=8", "-s", "discriminator.width=4", "--device", "cpu")
"""Nets that train in milliseconds."""

SMALL = (*NETS, "--batch-size", "8", "-s", "log.sample_count=4")

TINY = (*SMALL, "--data", "images.npz", "-s", "data.image_size=28")
"""Small nets on the images of the fixture `workplace`."""


BARE = tuple(
    part for i, part in enumerate(TINY) if not any("width=" in p for p in TINY[i : i + 2]) or part == "--device"
)
"""TINY for nets of one's own, which have no width."""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("warning:")]


_command_line = functools.cache(typer.main.get_command)
"""Typer reads the signatures of all commands anew for each call, which takes as long as most commands here."""


def fmrun(*arguments: str | Path) -> Done:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["fmrun", *map(str, arguments)]
    report.warn_once.cache_clear()
    report.note_once.cache_clear()
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(typer.main, "get_command", _command_line),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def good(*arguments: str | Path) -> Done:
    """Run a command that has to work."""
    done = fmrun(*arguments)
    assert done.code == 0, done.err
    return done


def train(*arguments: str | Path) -> Done:
    """Train the tiny pair, which has to work; with nets of one's own in its place where there is a target."""
    own = any(".target=" in str(argument) for argument in arguments)
    return good("train", *(BARE if own else TINY), *arguments)


def spawn(*arguments: str | Path, module: tuple[str, ...] = ("-m", "fmrun"), **options: Any) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, *module, *map(str, arguments)], env=env, **options)


def finish(process: subprocess.Popen[str], seconds: float = 120) -> Done:
    """Wait for a process; a hang is a failure."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"did not end within {seconds} s; stderr: {err}") from None
    return Done(process.returncode, out, err)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait for `condition()`, while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


# Processes to be signalled and killed are forked off one that has torch imported.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        *(
            f"fmrun.{m}"
            for m in (
                "__main__",
                "cli",
                "train",
                "sample",
                "records",
                "compare.table",
                "sweep.launch",
                "sweep.preflight",
            )
        ),
        "filelock",
    ]
)


CALIBRATION_IMAGES = generate.CALIBRATION_IMAGES


def leave_out_what_takes_long(calibration_images: int = 64) -> None:
    """In this process nothing waits for the disk, for no test cuts the power, and batch norm is fitted on fewer images."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    generate.CALIBRATION_IMAGES = calibration_images


def _child(argv: list[str], folder: str, out: str, err: str, env: dict[str, str], calibration_images: int) -> None:
    leave_out_what_takes_long(calibration_images)
    os.chdir(folder)
    if env.pop("NOHUP", ""):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.environ.update(env)
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # what a process started from a shell would do
    sys.argv = ["fmrun", *argv]
    main()


_started: list[Any] = []


def end_all() -> None:
    """Kill what a failed test left running."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            process.kill()
            process.join()


class Background:
    """A command running in a process of its own, in the current folder."""

    target: Callable[..., None] = staticmethod(_child)

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        self._files = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        env = {"XDG_CONFIG_HOME": os.environ["XDG_CONFIG_HOME"], **(env or {})}
        files = map(str, self._files)
        given = ([*map(str, arguments)], os.getcwd(), *files, env, generate.CALIBRATION_IMAGES)
        self._process = _SERVER.Process(target=self.target, args=given)
        self._process.start()
        _started.append(self._process)

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def children(self) -> list[int]:
        """Processes it has started (Linux)."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(file.read_text().rpartition(")")[2].split()[1]) == self._process.pid:
                    found.append(int(file.parent.name))
        return found

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Wait for `condition()`, while the process lives."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.alive, f"ended early with {self._process.exitcode}: {self.err}"
            assert time.monotonic() < end, f"waited too long: {self.err}"
            time.sleep(0.005)

    def says(self, text: str) -> None:
        """Wait until it has said `text`."""
        self.until(lambda: text in self.err)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def end(self, seconds: float = 60) -> Done:
        """Wait for the end; a hang is a failure. A code below zero is the signal that killed it."""
        self._process.join(seconds)
        if self.alive:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"did not end within {seconds} s: {self.err}")
        out, err = (path.read_text() for path in self._files)
        for path in self._files:
            path.unlink()
        assert isinstance(self._process.exitcode, int)
        return Done(self._process.exitcode, out, err)

    def kill(self) -> Done:
        self._process.kill()
        return self.end()


# ---- what runs hold


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, every line of which has to be one."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path, *without: int) -> list[dict[str, Any]]:
    """Rows without how long things took, and without those of the steps `without`."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(run) if row["step"] not in without
    ]


def saved(run: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.read(checkpoint.path_of(run / "checkpoints", step))


def steps(run: Path) -> list[int]:
    """Steps of which there are checkpoints."""
    return checkpoint.steps(run / "checkpoints")


def forget(run: Path, after: int) -> None:
    """Leave a run as a kill would between two checkpoints: the later one is not there, all else is."""
    for step in steps(run):
        if step > after:
            checkpoint.path_of(run / "checkpoints", step).unlink()
    content = status(run) | {"state": "running", "step": after, "saved": after or None, "exit_code": None}
    (run / "status.json").write_text(json.dumps(content))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every tensor equal to the bit."""
    assert one.keys() == other.keys()
    differing = [
        name
        for name in one
        if one[name].dtype != other[name].dtype
        or one[name].shape != other[name].shape
        or bits(one[name]) != bits(other[name])
    ]
    assert not differing, f"{len(differing)} of {len(one)} tensors differ: {differing[:5]}"


def same_runs(one: Path, other: Path, step: int, *without: int) -> None:
    """The runs ended at `step` equal: tensors and sample grids by their bits, metrics as numbers."""
    same_tensors(saved(one, step).tensors, saved(other, step).tensors)
    assert timeless(one, *without) == timeless(other, *without)
    name = f"step-{step:08d}.png"
    assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes()


# ---- images


def noise_images(count: int, size: int = 28, channels: int = 1, seed: int = 0) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3)."""
    shape = (count, size, size) if channels == 1 else (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(path: Path, count: int = 40, size: int = 28, channels: int = 1, seed: int = 0) -> Path:
    np.savez(path, images=noise_images(count, size, channels, seed))
    return path


def write_folder(path: Path, count: int = 20, size: int = 28, channels: int = 1) -> Path:
    path.mkdir(parents=True)
    for i, image in enumerate(noise_images(count, size, channels)):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return path


def tiles(path: Path, count: int, columns: int, size: int = 28, gap: int = 2) -> list[np.ndarray]:
    """The images of a grid, in their order."""
    sheet = np.asarray(Image.open(path))
    places = ((gap + i // columns * (size + gap), gap + i % columns * (size + gap)) for i in range(count))
    return [sheet[top : top + size, left : left + size] for top, left in places]


def refused(done: Done, phrases: tuple[str, ...]) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert len(done.errors) == 1, done.err
    (line,) = done.errors
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) - len(done.warnings) == 1, done.err
    missing = [phrase for phrase in phrases if phrase not in line]
    assert not missing, f"{missing} not in: {line}"
    assert not Path("runs").exists() or not any(p.name.startswith("new") for p in Path("runs").iterdir())
