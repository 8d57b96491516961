"""The exceptions that reach a user as one sentence, and the exit codes that go with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OK = 0
INTERNAL = 1
BAD_INPUT = 2
DIVERGED = 3


class FmrunError(Exception):
    """Something the user can act on; its text is one sentence with the fix in it."""

    exit_code = INTERNAL
    everywhere: bool | None = None
    """Whether every process of the training raises it; if not, the one that does has to say so itself. None: the processes
    have not met yet."""


class UserError(FmrunError):
    """A bad config, argument or data."""

    exit_code = BAD_INPUT


class Diverged(FmrunError):
    """Training produced a non-finite update, which was kept out of every weight."""

    exit_code = DIVERGED


class SaveError(FmrunError):
    """A checkpoint or a log could not be written (full disk, lost mount, permissions)."""

    exit_code = INTERNAL


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Around the reading of a file that the user named: what its content does to its reader is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"cannot read {path}: it is nested too deeply") from error
    except MemoryError as error:
        raise UserError(f"cannot read {path}: it does not fit in memory") from error
    except UnicodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text; save it as UTF-8") from error


def nearest(word: str, known: list[str]) -> str:
    """`", did you mean 'x'?"` for the closest of `known`, or an empty string."""
    import difflib

    hits = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    match = next((k for k in known if hits and k.lower() == hits[0]), None)
    return f"; did you mean '{match}'?" if match else ""


def neighbour(path: Path, endings: tuple[str, ...] = ("",)) -> str:
    """`nearest` among what lies beside `path` and has one of these endings."""
    try:
        return nearest(
            path.name, sorted(other.name for other in path.parent.iterdir() if other.name.lower().endswith(endings))
        )
    except OSError:
        return ""
