"""Run folders: `runs/NAME/{config.json, env.json, status.json, metrics.jsonl, samples/, checkpoints/}`.

Imports no torch: listing runs, and completing their names, must be quick.
"""

import errno
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from .environment import environment
from .errors import SaveError, UserError, nearest

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def write_atomic(path: Path, *parts: bytes | memoryview, mode: int = 0o666) -> None:
    """Replace `path` by these bytes, wholly or not at all; a power cut leaves the old or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def command(self, name: str) -> str:
        """`fmrun NAME RUN`, as it has to be typed to find this run again."""
        folder = self.path.parent
        return f"fmrun {name} {self.name}" + (f" --runs-dir {folder}" if folder != Path("runs") else "")

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def env_file(self) -> Path:
        return self.path / "env.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    def config(self) -> dict[str, Any]:
        """The resolved config as it was written."""
        try:
            return json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.config_file}: {error}") from error

    def env(self) -> dict[str, Any]:
        """Command, preset and `environment()` at the start; empty where missing or damaged."""
        return _json_or_empty(self.env_file)

    def status(self) -> dict[str, Any]:
        """The fields of `write_status`; empty where missing or damaged."""
        return _json_or_empty(self.status_file)

    def write_status(self, **fields: Any) -> None:
        """Replace these fields of the status and keep the others. `updated` is always set; `state="running"`
        also sets `pid` and `host`. States: running, finished, stopped, diverged, failed."""
        status = {**self.status(), **fields, "updated": _now()}
        if fields.get("state") == "running":
            status |= {"pid": os.getpid(), "host": platform.node()}
        with saving(self.status_file):
            write_atomic(self.status_file, to_json(status))

    def try_status(self, **fields: Any) -> None:
        """`write_status`, on the way out of a failure: a disk that refuses must not hide what happened."""
        with suppress(SaveError):
            self.write_status(**fields)

    @property
    def state(self) -> str:
        """The status's state; `interrupted` where it says running and no process holds the run, as after a
        kill; `unknown` where there is none."""
        state = self.status().get("state", "unknown")
        return "interrupted" if state == "running" and not self._is_locked() else state

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run while training it; a second process is refused with a UserError. The lock goes
        with the process, however that ends."""
        refusal = f"run {self.name} is being trained by process {{}}; wait for it to end, or stop it first"
        with exclusive(self.lock_file, refusal):
            yield

    def _is_locked(self) -> bool:
        if fcntl is None:
            return True
        try:
            with open(self.lock_file, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one flat row (numbers, 0-dim tensors, strings, None) as a line of JSON; NaN and infinities
        become null. Raises SaveError when the disk refuses."""
        line = json.dumps({key: _json_number(value) for key, value in row.items()}).encode() + b"\n"
        with saving(self.metrics_file), open(self.metrics_file, "a+b") as file:
            if file.tell() and not _ends_line(file):
                line = b"\n" + line
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, without what a kill tore."""
        return [row for _, row in self._rows()]

    def evaluations(self) -> list[dict[str, Any]]:
        """What `add_evaluation` was given, in the order of their steps; empty where missing or damaged."""
        return list(_json_or_empty(self.evaluations_file).get("evaluations", []))

    def add_evaluation(self, record: Mapping[str, Any]) -> None:
        """Keep what one evaluation found: `step`, `weights` (ema or raw), `metrics` (name to number), `floor` (the same
        of real images against real ones), `settings` (all that makes two evaluations comparable: data, number of
        images, extractor, resolution, resize filter, …), `default` (whether that is as `fmrun eval` measures without options). Replaces an older one of the same step, weights and settings."""
        what = ("step", "weights", "settings")
        same = [record.get(key) for key in what]
        with self._rewriting_evaluations():
            kept = [r for r in self.evaluations() if [r.get(key) for key in what] != same]
            self._write_evaluations(sorted([*kept, dict(record)], key=lambda r: int(r["step"])))

    def _rewriting_evaluations(self) -> AbstractContextManager[None]:
        """Two commands that add at once would each forget what the other found."""
        refusal = f"process {{}} holds {self.evaluations_file}; wait for it to end, or stop it first"
        return exclusive(self.path / ".evaluations.lock", refusal, patience=60)

    def _write_evaluations(self, records: Sequence[Mapping[str, Any]]) -> None:
        with saving(self.evaluations_file):
            write_atomic(self.evaluations_file, to_json({"evaluations": records}))

    def cut_back(self, step: int) -> None:
        """Forget what was recorded after `step`: rows of metrics, evaluations and sample grids. TensorBoard's
        files are cut by `report.TensorBoard(after=step)`."""
        if self.metrics_file.exists():
            kept = (line.rstrip() + b"\n" for line, row in self._rows() if row["step"] <= step)
            with saving(self.metrics_file):
                write_atomic(self.metrics_file, *kept)
        if any(int(r["step"]) > step for r in self.evaluations()):
            with self._rewriting_evaluations():
                self._write_evaluations([r for r in self.evaluations() if int(r["step"]) <= step])
        for path in self.samples.glob("step-*"):
            number = re.match(r"step-(\d+)", path.name)
            if number and int(number[1]) > step:
                path.unlink(missing_ok=True)

    def _rows(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.metrics_file.exists():
            return
        for line in self.metrics_file.read_bytes().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield line, row


@contextmanager
def exclusive(lock: Path, refusal: str, patience: float = 0.3) -> Iterator[None]:
    """Hold the file `lock`. Where another process does for `patience` seconds, a UserError: `refusal`, its `{}` being that
    process's id."""
    try:
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to {lock.parent}: {error.strerror}; make it writable") from error
    with file:
        if not _try_lock(file, patience):
            file.seek(0)
            raise UserError(refusal.format(file.read().strip() or "unknown"))
        if fcntl is not None:  # a data worker must not keep the lock alive after its parent was killed
            os.register_at_fork(after_in_child=file.close)
        with suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def create(
    runs_dir: Path,
    name: str | None,
    preset: str,
    config: Mapping[str, Any],
    command: Sequence[str],
    code: Mapping[str, Any] | None = None,
    texts: Mapping[str, bytes] | None = None,
    job: str | None = None,
) -> Run:
    """Make the folder of a new run: `name`, or `preset`-001, -002, … Two processes never get the same one.

    `code` and `texts` are what `trust.record` notes of nets of the user's own; `job` is `World.job`.
    """
    if name is not None:
        check_name(runs_dir, name)
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        run = Run(_make_named(runs_dir, name) if name else _make_numbered(runs_dir, preset))
    except (FileExistsError, NotADirectoryError) as error:
        raise _no_folder(runs_dir) from error
    except OSError as error:
        raise UserError(
            f"cannot make a run in {runs_dir}: {error.strerror}; make it writable or give another --runs-dir"
        ) from error
    try:
        run.samples.mkdir()
        run.checkpoints.mkdir()
        # The config comes last: a folder without one is not a run.
        facts = {"command": list(command), "preset": preset, **environment(), "code": code or {}, "job": job}
        with saving(run.path):
            for place, text in (texts or {}).items():
                (run.path / place).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(run.path / place, text)
            write_atomic(run.env_file, to_json(facts))
            run.write_status(state="running", step=0, started=_now())
            write_atomic(run.config_file, to_json(config))
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def check_new(runs_dir: Path, name: str | None) -> None:
    """UserError unless a run may be made there, under that name if it is given: it is one, and no run's yet."""
    try:
        runs_dir.exists()
    except OSError as error:  # a name too long, or a folder on the way that is closed
        raise UserError(f"--runs-dir {runs_dir}: {error.strerror}; give another --runs-dir") from error
    if runs_dir.exists() and not runs_dir.is_dir():
        raise _no_folder(runs_dir)
    if name is not None:
        check_name(runs_dir, name)


def check_name(runs_dir: Path, name: str) -> None:
    """UserError unless a run may be called so."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name '{name}' is not a name for a run: at most 100 letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    if (runs_dir / name).exists():
        raise _taken(runs_dir, name)


def _no_folder(runs_dir: Path) -> UserError:
    return UserError(f"--runs-dir {runs_dir} is not a folder; give another --runs-dir")


def _taken(runs_dir: Path, name: str) -> UserError:
    return UserError(
        f"run {name} already exists in {runs_dir}; give another --name, or continue it with `fmrun resume {name}`"
    )


def _make_named(runs_dir: Path, name: str) -> Path:
    path = runs_dir / name
    try:
        path.mkdir()
    except FileExistsError:
        raise _taken(runs_dir, name) from None
    return path


def _make_numbered(runs_dir: Path, preset: str) -> Path:
    while True:
        path = numbered(runs_dir, preset)
        with suppress(FileExistsError):
            path.mkdir()
            return path


def numbered(runs_dir: Path, preset: str) -> Path:
    """`preset`-001, or the first number above those there are."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", preset).strip(".-")[:90] or "run"
    there = runs_dir.iterdir() if runs_dir.is_dir() else []
    taken = [int(m[1]) for p in there if (m := re.fullmatch(re.escape(stem) + r"-(\d+)", p.name))]
    return runs_dir / f"{stem}-{max(taken, default=0) + 1:03d}"


def find(runs_dir: Path, name: str | None) -> Run:
    """The run called `name` (or lying at the path `name`); without a name the newest by start."""
    known = all_runs(runs_dir)
    if name is None:
        if not known:
            raise UserError(f"there are no runs in {runs_dir} yet; `fmrun train` makes one")
        return known[-1]
    for path in (runs_dir / name, Path(name)):
        if (path / "config.json").is_file():
            return Run(path)
    if not known:
        raise UserError(f"there is no run '{name}': {runs_dir} has no runs yet; `fmrun train` makes one")
    hint = nearest(name, [run.name for run in known])
    raise UserError(f"there is no run '{name}' in {runs_dir}{hint or '; `fmrun runs` lists them'}")


def of_job(runs_dir: Path, name: str | None, job: str | None) -> Run | None:
    """The run, of this name if it is given, that processes of the same launch have begun (`World.job`), if any."""
    runs = [] if job is None else all_runs(runs_dir) if name is None else [Run(runs_dir / name)]
    return next((run for run in runs if run.env().get("job") == job), None)


def all_runs(runs_dir: Path) -> list[Run]:
    """The runs in a folder, the one started last at the end."""
    try:
        runs = [Run(path) for path in runs_dir.iterdir() if (path / "config.json").is_file()]
    except OSError:
        return []
    return sorted(runs, key=lambda run: (str(run.status().get("started", "")), run.name))


@contextmanager
def saving(what: Path) -> Iterator[None]:
    """Turns an OSError of the block, which writes `what`, into a SaveError."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot write {what}: {error.strerror or error}; free space or check the disk") from error


def _try_lock(file: IO[str], patience: float) -> bool:
    if fcntl is None:
        return True
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.03)  # it may be `Run.state` looking
        except OSError:
            return True  # a file system without locks


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _json_number(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    return number if math.isfinite(number := float(value)) else None


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
