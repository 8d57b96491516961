"""Decodes every file of a data set once before the first step: reports what is wrong, keeps what fits in memory."""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np

from ..config.data import DataConfig
from ..runtime.errors import UserError
from ..runtime.report import warn_once
from .files import BAD, GREY, UNREADABLE, BadImage, Entry, Middle, Progress, Square, content, converted, decode, each
from .memory import available_ram, gigabytes
from .places import few
from .store import Files, Images


@dataclass
class ScannedFile:
    """A decoded file: its size once it is shaped, and its pixels if they have been kept so far."""

    entry: Entry
    grey: bool
    size: tuple[int, int]
    """Height and width."""
    pixels: np.ndarray | None


@dataclass
class Side:
    """The files of one folder that a data set takes, in its order: `setting` named the folder, `shape` brings each to its
    size, `scanned` and `bad` are what `scan` finds by name, `sizes` the sizes of the images as they are."""

    setting: str
    root: Path
    names: list[str]
    shape: Square | Middle
    scanned: dict[str, ScannedFile] = field(default_factory=dict)
    bad: dict[str, BadImage] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def report(self, total: int, skip: bool) -> list[str]:
        """What is wrong with these of `total` files in the folder: a sentence, or none; `skip` is
        `data.skip_unreadable`."""
        by_kind: dict[str, list[str]] = defaultdict(list)
        for name, problem in self.bad.items():
            by_kind[problem.kind].append(f"{name} {problem.detail}".strip())
        wrong = dict(BAD)
        if "size" in by_kind and isinstance(self.shape, Square):
            what, fix = self.shape.remedy(self.sizes)
            wrong["size"] = what, f"so {fix}"
        clauses = [
            f"{wrong[kind][0]} ({few(sorted(by_kind[kind]))}), {wrong[kind][1]}" for kind in BAD if kind in by_kind
        ]
        if not skip and by_kind.keys() & set(UNREADABLE):
            clauses.append("or start a run that leaves out what cannot be read: -s data.skip_unreadable=true")
        where = f"{self.setting}: {len(self.bad)} of {total} images in '{self.root}'"
        return [f"{where} cannot be used: {'; '.join(clauses)}"] if self.bad else []

    def images(self, channels: int, keep: bool) -> Images:
        """Those of the scanned files, none of which is bad; pixels are let go of one by one as they are packed."""
        scanned = [self.scanned.pop(name) for name in self.names]
        sizes = np.array([file.size for file in scanned], np.int64)
        files = Files(self.root, self.shape, [file.entry for file in scanned])
        images = Images.room(str(self.root), channels, sizes, keep, files)
        for i, file in enumerate(scanned):
            if keep:
                assert file.pixels is not None
                images.view(i)[:] = file.pixels.reshape(*file.size, -1)  # grey becomes three equal channels
            file.pixels = None
        return images


def scan(
    sides: list[Side], config: DataConfig, channels: int | None, progress: Progress | None, more: float = 1.0
) -> tuple[int, bool]:
    """Decode the files of one side, or of the two sides of pairs; `bad` of each is what is wrong then.

    Returns the channels (`channels` None takes 1 where all images are grey, else 3) and whether decoded images are kept,
    which take `more` times their own size. With `config.skip_unreadable` the sides are afterwards without the files that
    cannot be read, and without their partners; which ones is said.
    """
    free = 0 if config.cache == "none" else available_ram()
    limit = free // 2 if config.cache == "auto" else free
    decoded_bytes, lock = 0, Lock()
    jobs = [(side, name) for side in sides for name in side.names]

    def one(k: int) -> None:
        nonlocal decoded_bytes
        side, name = jobs[k]
        try:
            data = content(side.root / name)
            image = decode(side.root / name, data)
            side.sizes.add(image.size)
            grey = image.mode in GREY
            pixels = np.asarray(side.shape(converted(image, channels or (1 if grey else 3))))
        except BadImage as problem:
            side.bad[name] = problem
            return
        with lock:
            decoded_bytes += pixels.nbytes
        entry = Entry(name, len(data), hashlib.sha256(data).hexdigest())
        side.scanned[name] = ScannedFile(entry, grey, pixels.shape[:2], pixels if decoded_bytes <= limit else None)

    each(one, len(jobs), progress)
    if config.skip_unreadable:
        _leave_out(sides)
    scanned = [file for side in sides for file in side.scanned.values()]
    chosen = channels or (1 if all(file.grey for file in scanned) else 3)
    needed = int(more * chosen * sum(math.prod(file.size) for file in scanned))
    if config.cache in ("ram", "device") and needed > limit and not any(side.bad for side in sides):
        raise UserError(
            f"{sides[0].setting}: the decoded images take {gigabytes(needed)} and {gigabytes(free)} of RAM is free: "
            "stream them with -s data.cache=none"
        )
    return chosen, 0 < needed <= limit and all(file.pixels is not None for file in scanned)


def _leave_out(sides: list[Side]) -> None:
    pairs = list(zip(*(side.names for side in sides), strict=True))
    lost = [
        names
        for names in pairs
        if any(n in side.bad and side.bad[n].kind in UNREADABLE for side, n in zip(sides, names, strict=True))
    ]
    if not lost:
        return
    if len(lost) == len(pairs):
        raise UserError(
            f"{sides[0].setting}: no image in '{sides[0].root}' is left that could be read: copy them again"
        )
    warn_once(
        f"data.skip_unreadable leaves out files that cannot be read: {len(lost)} in '{sides[0].root}' "
        f"({few(sorted(names[0] for names in lost))})"
    )
    for k, side in enumerate(sides):
        gone = {names[k] for names in lost}
        for name in gone:
            side.bad.pop(name, None)
            side.scanned.pop(name, None)
        side.names = [name for name in side.names if name not in gone]
