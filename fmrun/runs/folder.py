"""Run folders: `runs/NAME/{config.json, env.json, status.json, metrics.jsonl, samples/, checkpoints/}`.

Imports no torch: listing runs, and completing their names, must be quick.
"""

import errno
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import SupportsFloat

from ..config import files as config_files
from ..runtime.environment import environment
from ..runtime.errors import SaveError, UserError, nearest, reading
from ..runtime.files import Json, exclusive, make_folder, saving, sync_folder, to_json, write_atomic
from ..runtime.report import counted, warn_once

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


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

    def config(self) -> Json:
        """The resolved config as it was written."""
        if not (config := config_files.read_settings(self.config_file)):
            raise UserError(f"cannot read {self.config_file}: it is empty")
        return config

    def env(self) -> Json:
        """Command, preset and `environment()` at the start, as far as they can be read."""
        from . import records

        return records.read_record(self.env_file, records.Env, lenient=True)

    def code(self) -> dict[str, Json]:
        """What `trust.record` noted of nets of the user's own, by section."""
        from . import records

        noted: dict[str, Json] = records.read_record(self.env_file, records.Env).get("code", {})
        return noted

    def status(self) -> Json:
        """The fields of `write_status`, as far as they can be read."""
        from . import records

        return records.read_record(self.status_file, records.Status, lenient=True)

    def write_status(self, **fields: object) -> None:
        """Replace these fields of the status and keep the others. `updated` is always set; `state="running"`
        also sets `pid` and `host`. States: running, finished, stopped, diverged, failed. `saved` is the step of the last
        checkpoint."""
        status = {**self.status(), **fields, "updated": _now()}
        if fields.get("state") == "running":
            status |= {"pid": os.getpid(), "host": platform.node()}
        with saving(self.status_file):
            write_atomic(self.status_file, to_json(status))

    def try_status(self, **fields: object) -> None:
        """`write_status`, on the way out of a failure: a disk that refuses must not hide what happened."""
        with suppress(SaveError):
            self.write_status(**fields)

    @property
    def state(self) -> str:
        """The status's state; `interrupted` where it says running and no process holds the run, as after a
        kill; `unknown` where there is none."""
        state = self.status().get("state") or "unknown"
        return "interrupted" if state == "running" and not self._is_locked() else state

    @property
    def has_saved(self) -> bool:
        """Whether a checkpoint was ever written, as the status has it."""
        from . import records

        status = records.read_record(self.status_file, records.Status)
        return status.get("saved") is not None or status.get("state") in ("finished", "stopped")

    def no_checkpoint(self) -> UserError:
        """Why there is no checkpoint to use, and what to do."""
        if self.has_saved:
            return UserError(
                f"the checkpoints of run {self.name} are gone from {self.checkpoints}; put them back, or start a new run "
                "with `fmrun train`"
            )
        return UserError(f"run {self.name} has no checkpoint yet; `{self.command('resume')}` trains it on")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run while training it; a second process is refused with a UserError. The lock goes
        with the process, however that ends."""
        refusal = f"run {self.name} is being trained by process {{}}; wait for it to end, or stop it first"
        with exclusive(self.lock_file, refusal):
            yield

    def _is_locked(self) -> bool:
        """Whether a process holds the run; also where that cannot be tried, as in a folder that may only be read."""
        from filelock import FileLock

        if not self.lock_file.exists():
            return False
        try:
            with FileLock(self.lock_file, timeout=0):
                return False
        except OSError:  # filelock's Timeout is one
            return True

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add one flat row (numbers, 0-dim tensors, strings, None) as a line of JSON; NaN and infinities
        become null. It is on the disk before a checkpoint of its step is. Raises SaveError when the disk refuses."""
        line = json.dumps({key: _json_number(value) for key, value in row.items()}).encode() + b"\n"
        with saving(self.metrics_file), open(self.metrics_file, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[Json]:
        """All rows that can be read."""
        return [row for _, row in self._rows()]

    def evaluations(self) -> list[Json]:
        """What `add_evaluation` was given, in the order of their steps."""
        from . import records

        try:
            kept: list[Json] = records.read_record(self.evaluations_file, records.Evaluations).get("evaluations", [])
        except UserError as error:
            raise UserError(f"{error}; move it away, and evaluate again with `{self.command('eval')}`") from None
        return kept

    def add_evaluation(self, record: Mapping[str, object]) -> None:
        """Keep what one evaluation found: `step`, `weights` (ema or raw), `metrics` (name to number), `floor` (the same
        of real images against real ones), `settings` (all that makes two evaluations comparable: data, number of
        images, extractor, resolution, resize filter, …), `default` (whether that is as `fmrun eval` measures without options). Replaces an older one of the same step, weights and settings."""
        what = ("step", "weights", "settings")

        def replace(records: list[Json]) -> list[Json]:
            kept = [r for r in records if any(r.get(key) != record.get(key) for key in what)]
            return sorted([*kept, dict(record)], key=lambda r: int(r["step"]))

        self._change_evaluations(replace)

    def _change_evaluations(self, change: Callable[[list[Json]], list[Json]]) -> None:
        """Two commands that add at once would each forget what the other found."""
        refusal = f"process {{}} holds {self.evaluations_file}; wait for it to end, or stop it first"
        with exclusive(self.path / ".evaluations.lock", refusal, patience=60), saving(self.evaluations_file):
            write_atomic(self.evaluations_file, to_json({"evaluations": change(self.evaluations())}))

    def cut_back(self, step: int) -> None:
        """Forget what was recorded after `step`: rows of metrics, evaluations and sample grids. TensorBoard's
        files are cut by `report.TensorBoard(after=step)`."""
        if self.metrics_file.exists():
            kept = (line.rstrip() + b"\n" for line, row in self._rows() if row["step"] <= step)
            with saving(self.metrics_file):
                write_atomic(self.metrics_file, *kept)
        if any(int(r["step"]) > step for r in self.evaluations()):
            self._change_evaluations(lambda records: [r for r in records if int(r["step"]) <= step])
        for path in self.samples.glob("step-*"):
            number = re.match(r"step-(\d+)", path.name)
            if number and int(number[1]) > step:
                path.unlink(missing_ok=True)

    def _rows(self) -> list[tuple[bytes, Json]]:
        """Each line with its row. Lines that cannot be read are counted and said; of a last one that a kill tore, nothing."""
        if not self.metrics_file.exists():
            return []
        with reading(self.metrics_file):
            lines = self.metrics_file.read_bytes().split(b"\n")
        rows = []
        unreadable = 0
        for line in filter(bytes.strip, lines):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append((line, row))
            else:
                unreadable += line is not lines[-1]
        if unreadable:
            warn_once(f"{self.metrics_file}: {counted(unreadable, 'line')} cannot be read and will be ignored")
        return rows


def create(
    runs_dir: Path,
    name: str | None,
    preset: str,
    config: Mapping[str, object],
    command: Sequence[str],
    code: Mapping[str, object] | None = None,
    texts: Mapping[str, bytes] | None = None,
    job: str | None = None,
) -> Run:
    """Make the folder of a new run: `name`, or `preset`-001, -002, … Two processes never get the same one.

    `code` and `texts` are what `trust.record` notes of nets of the user's own; `job` is `World.job`.
    """
    check_new(runs_dir, name)
    draft = Run(runs_dir / f".{name or 'run'}.{secrets.token_hex(8)}.tmp")
    try:
        make_folder(runs_dir)
        draft.path.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot make a run in {runs_dir}: {error.strerror}; make it writable or give another --runs-dir"
        ) from error
    try:
        facts: Json = {"command": list(command), "preset": preset, **environment()}
        facts |= {name: noted for name, noted in (("code", code), ("job", job)) if noted}
        with saving(runs_dir):
            draft.samples.mkdir()
            draft.checkpoints.mkdir()
            for place, text in (texts or {}).items():
                make_folder((draft.path / place).parent)
                write_atomic(draft.path / place, text)
            write_atomic(draft.env_file, to_json(facts))
            draft.write_status(state="running", step=0, started=_now())
            write_atomic(draft.config_file, to_json(config))
            return Run(_place(draft.path, runs_dir, name, preset))
    except BaseException:
        shutil.rmtree(draft.path, ignore_errors=True)
        raise


def check_new(runs_dir: Path, name: str | None) -> None:
    """UserError unless a run may be made there, under that name if it is given: it is one, and no run's yet."""
    try:
        if runs_dir.exists() and not runs_dir.is_dir():
            raise UserError(f"--runs-dir {runs_dir} is not a folder; give another --runs-dir")
    except OSError as error:  # a name too long, or a folder on the way that is closed
        raise UserError(f"--runs-dir {runs_dir}: {error.strerror}; give another --runs-dir") from error
    if name is not None:
        check_spelling(name, "run")
        if (runs_dir / name).exists():
            raise _taken(runs_dir, name)


def check_spelling(name: str, what: str) -> None:
    """UserError unless the folder of a `what` may be called so."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name '{name}' is not a name for a {what}: at most 100 letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )


def _taken(runs_dir: Path, name: str) -> UserError:
    return UserError(
        f"run {name} already exists in {runs_dir}; give another --name, or continue it with `fmrun resume {name}`"
    )


def _place(draft: Path, runs_dir: Path, name: str | None, preset: str) -> Path:
    """Give a finished folder its name at once; one that another process has given meanwhile is not taken."""
    while True:
        path = runs_dir / name if name else numbered(runs_dir, preset)
        try:
            os.rename(draft, path)  # refused where there is a folder that is not empty, as a run's never is
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if name:
                raise _taken(runs_dir, name) from None
        else:
            sync_folder(runs_dir)
            return path


def numbered(runs_dir: Path, preset: str) -> Path:
    """`preset`-001, or the first number above those there are."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", preset).strip(".-")[:90] or "run"
    there = runs_dir.iterdir() if runs_dir.is_dir() else []
    taken = [int(m[1]) for p in there if (m := re.fullmatch(re.escape(stem) + r"-(\d+)", p.name))]
    return runs_dir / f"{stem}-{max(taken, default=0) + 1:03d}"


def find(runs_dir: Path, name: str | None) -> Run:
    """The run called `name` (or lying at the path `name`); without a name the newest by start."""
    if name is None:
        if not (known := all_runs(runs_dir)):
            raise UserError(f"there are no runs in {runs_dir} yet; `fmrun train` makes one")
        return known[-1]
    for path in (runs_dir / name, Path(name)):
        with reading(path):
            if (path / "config.json").is_file():
                return Run(path)
    if not (names := run_names(runs_dir)):
        raise UserError(f"there is no run '{name}': {runs_dir} has no runs yet; `fmrun train` makes one")
    hint = nearest(name, names)
    raise UserError(f"there is no run '{name}' in {runs_dir}{hint or '; `fmrun runs` lists them'}")


def of_job(runs_dir: Path, name: str | None, job: str | None) -> Run | None:
    """The run, of this name if it is given, that processes of the same launch have begun (`World.job`), if any."""
    runs = [] if job is None else all_runs(runs_dir) if name is None else [Run(runs_dir / name)]
    return next((run for run in runs if run.env().get("job") == job), None)


def all_runs(runs_dir: Path) -> list[Run]:
    """The runs in a folder, the one started last at the end."""
    runs = [Run(runs_dir / name) for name in run_names(runs_dir)]
    return sorted(runs, key=lambda run: (run.status().get("started") or "", run.name))


def run_names(runs_dir: Path) -> list[str]:
    """The names of the runs in a folder, sorted; nothing but the folder is read."""
    try:
        return sorted(path.parent.name for path in runs_dir.glob("[!.]*/config.json") if path.is_file())
    except OSError:
        return []


def _json_number(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"no number: {value!r}")
    return number if math.isfinite(number := float(value)) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
