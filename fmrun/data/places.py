"""Paths of the config, before anything is read from them. Imports no torch, so that a wrong one is answered at once."""

import os
from pathlib import Path

from ..config.data import DataConfig
from ..config.tables import SOURCES, TASKS
from ..runtime.errors import UserError, neighbour

PATHS = ("path", "valid_path", "lr_path", "valid_lr_path")
"""Fields of `data` that name images."""

NAMED = 5
"""So many files are named; the rest are counted."""


def located(data: DataConfig, task: str) -> DataConfig:
    """The section with paths that mean the same in every folder. Links in them stay links."""
    paths = {name: path for name in PATHS if (path := getattr(data, name)) is not None and not is_named(path, task)}
    if any(
        is_named(path, task) and not path.lower().startswith("bundled:") for path in (data.path, data.valid_path or "")
    ):
        paths["root"] = data.root
    return data.model_copy(update={name: path if "://" in path else _absolute(path) for name, path in paths.items()})


def _absolute(path: str) -> str:
    try:
        whole = str(Path(path).expanduser().absolute())
        short = os.path.abspath(whole)
        # after a link, `..` is not the folder before it
        return short if os.path.realpath(short) == os.path.realpath(whole) else whole
    except (OSError, ValueError, RuntimeError):  # nothing is there, as will be said
        return path


def refuse_missing(data: DataConfig, task: str, way_out: str = "") -> None:
    """UserError naming every path at which there is nothing, and the `way_out` where that is not to write another."""
    paths = {name: path for name in PATHS if (path := getattr(data, name)) is not None}
    reasons = {name: missing(path, task) for name, path in paths.items() if not is_named(path, task)}
    problems = [f"data.{name}: '{paths[name]}' {why}" for name, why in reasons.items() if why]
    if problems:
        raise UserError("; ".join(problems) + way_out)


def few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def is_named(path: str, task: str) -> bool:
    """Whether `path` is the name of a data set and no path."""
    source, colon, _ = path.lower().partition(":")
    return bool(colon) and source in SOURCES and task in SOURCES[source].tasks


def missing(path: str, task: str) -> str | None:
    """Why nothing can be read at `path`, and what to do: the second half of a sentence. None if something is there."""
    advice = TASKS[task].data
    try:
        Path(path).expanduser().stat()
    except PermissionError:
        return "is not readable: give yourself permission (chmod u+r)"
    except FileNotFoundError:
        if "://" in path:
            return "is an address: download the images and give their folder"
        return f"does not exist{neighbour(Path(path).expanduser()) or f': give {advice}'}"
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        return f"cannot be read ({getattr(error, 'strerror', None) or error}): give {advice}"
    return None
