"""Files that are written whole or not at all, and locks."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import SaveError, UserError
from .report import to_json_text

Json = dict[str, Any]
"""What a file of JSON holds."""


@contextmanager
def saving(what: Path) -> Iterator[None]:
    """Turns an OSError of the block, which writes `what`, into a SaveError."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot write {what}: {error.strerror or error}; free space or check the disk") from error


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
    sync_folder(path.parent)


def clean(folder: Path) -> None:
    """Remove the temporary files of `write_atomic` whose process was killed."""
    for path in folder.glob(".*.tmp"):
        if (process := re.fullmatch(r"\..+\.\w+\.(\d+)\.tmp", path.name)) and not _is_alive(int(process[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 would end it
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing; a power cut leaves what was made."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(lock: Path, refusal: str, patience: float = 0.3) -> Iterator[None]:
    """Hold the file `lock`. Where another process does for `patience` seconds, a UserError: `refusal`, its `{}` being that
    process's id. The lock goes with the process, however that ends, also where its own children outlive it."""
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        held.acquire(timeout=patience)  # for a moment it may be `Run.state` that looks
    except Timeout:
        holder = lock.read_text(encoding="utf-8").strip()
        raise UserError(refusal.format(holder or "unknown")) from None
    except OSError as error:
        raise UserError(f"cannot write to {lock.parent}: {error.strerror}; make it writable") from error
    try:
        with suppress(OSError):
            lock.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        held.release()


def to_json(content: Mapping[str, Any]) -> bytes:
    return to_json_text(content).encode() + b"\n"
