"""Every file of a data set looked at before the first step: sizes first, then decoded once, to be kept where they fit."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..config.data import DataConfig
from ..errors import UserError
from ..report import warn_once
from .files import (
    BAD,
    UNREADABLE,
    BadImage,
    Entry,
    Header,
    Middle,
    Progress,
    Square,
    content,
    converted,
    decode,
    each,
    read_header,
)
from .filters import bicubic_down
from .memory import available_ram, gigabytes
from .places import few
from .store import Files, Images

UNKNOWN = Header(0, 0, True)
"""Of a file that cannot be read; it leaves open whether there is colour."""


@dataclass
class Side:
    """The files of one folder that a data set takes, in its order.

    Attributes:
        setting: the one that named the folder.
        root: the folder.
        names: relative to it.
        shape: the size that each is brought to.
        shrink: what sides of small images are divided by that bicubic downsampling makes beside those that are kept.
        headers, sizes, bad: what has been found out; `bad` by the place in `names`.
        images, small: once they are decoded.
    """

    setting: str
    root: Path
    names: list[str]
    shape: Square | Middle
    shrink: int | None = None
    headers: list[Header] = field(init=False)
    sizes: np.ndarray = field(init=False)
    bad: dict[int, BadImage] = field(init=False)
    images: Images = field(init=False)
    small: Images | None = None

    def read_headers(self) -> None:
        """Find the size that each file has and is brought to."""
        self.headers, self.bad = [UNKNOWN] * len(self.names), {}
        self.sizes = np.zeros((len(self.names), 2), np.int64)

        def one(i: int) -> None:
            try:
                header = self.headers[i] = read_header(self.root / self.names[i])
                self.sizes[i] = self.shape.of(header.width, header.height)
            except BadImage as problem:
                self.bad[i] = problem

        each(one, len(self.names))

    @property
    def pixels(self) -> int:
        """Of all that would be kept."""
        count = int(self.sizes.prod(axis=1).sum())
        return count + (count // self.shrink**2 if self.shrink else 0)

    def decode(self, channels: int, keep: bool, progress: Progress) -> None:
        """Decode every file that is not known to be bad, to keep it or to see that it can be."""
        entries = [Entry(name, 0, "") for name in self.names]
        files = Files(self.root, self.shape, entries)
        images = self.images = Images.room(str(self.root), channels, self.sizes, keep, files)
        small = None
        shrink = self.shrink or 1
        if keep and self.shrink:
            small = self.small = Images.room(images.name, channels, self.sizes // shrink)

        def one(i: int) -> None:
            if i in self.bad:
                return
            path = self.root / self.names[i]
            try:
                data = content(path)
                image = self.shape(converted(decode(path, data), channels))
            except BadImage as problem:
                self.bad[i] = problem
                return
            entries[i] = Entry.of(self.names[i], data)
            self.sizes[i] = image.height, image.width  # a header does not say that the image lies on its side
            if keep:
                images.view(i)[:] = np.asarray(image).reshape(image.height, image.width, channels)
            if small is not None:
                small.sizes[i] = self.sizes[i] // shrink
                small.view(i)[:] = bicubic_down(images.view(i), shrink)

        each(one, len(self.names), progress)

    def report(self, total: int, skip: bool) -> list[str]:
        """What is wrong with these of `total` files in the folder: a sentence, or none; `skip` is
        `data.skip_unreadable`."""
        by_kind: dict[str, list[str]] = defaultdict(list)
        for i, problem in self.bad.items():
            by_kind[problem.kind].append(f"{self.names[i]} {problem.detail}".strip())
        wrong = dict(BAD)
        if "size" in by_kind and isinstance(self.shape, Square):
            what, fix = self.shape.remedy({header[:2] for header in self.headers if header != UNKNOWN})
            wrong["size"] = what, f"so {fix}"
        parts = [
            f"{wrong[kind][0]} ({few(sorted(by_kind[kind]))}), {wrong[kind][1]}" for kind in BAD if kind in by_kind
        ]
        if not skip and by_kind.keys() & set(UNREADABLE):
            parts.append("or start a run that leaves out what cannot be read: -s data.skip_unreadable=true")
        said = f"{self.setting}: {len(self.bad)} of {total} images in '{self.root}' cannot be used: {'; '.join(parts)}"
        return [said] if self.bad else []


def look_at(sides: list[Side], config: DataConfig, channels: int | None, progress: Progress | None) -> list[Side]:
    """Read and decode all files of one side, or of the two sides of pairs, in `bad` of which is what is wrong then.

    With `config.skip_unreadable` the sides that come back are without the files that cannot be read, nor their partners;
    which ones is said. `channels` None takes 1 where all images are grey, else 3. Images are kept in RAM unless
    `config.cache` or their number forbids it.
    """
    skipped: list[str] = []
    while True:
        for side in sides:
            side.read_headers()
        chosen = channels or (1 if all(header.grey for side in sides for header in side.headers) else 3)
        needed = chosen * sum(side.pixels for side in sides)
        keep = not any(side.bad for side in sides) and _fits(sides[0].setting, needed, config.cache)
        for k, side in enumerate(sides):
            count = len(side.names)

            def told(done: int, _: int, before: int = k * count, total: int = len(sides) * count) -> None:
                if progress:
                    progress(before + done, total)

            side.decode(chosen, keep, told)
        lost = {i for side in sides for i, problem in side.bad.items() if problem.kind in UNREADABLE}
        if not lost or not config.skip_unreadable:
            break
        skipped += [sides[0].names[i] for i in sorted(lost)]
        left = [i for i in range(len(sides[0].names)) if i not in lost]
        sides = [replace(side, names=[side.names[i] for i in left], small=None) for side in sides]
        if not sides[0].names:
            raise UserError(
                f"{sides[0].setting}: no image in '{sides[0].root}' is left that could be read: copy them again"
            )
    if skipped:
        warn_once(
            f"data.skip_unreadable leaves out files that cannot be read: {len(skipped)} in '{sides[0].root}' "
            f"({few(sorted(skipped))})"
        )
    return sides


def _fits(field: str, needed: int, cache: str) -> bool:
    """Whether decoded images of `needed` bytes stay in RAM."""
    if cache == "none":
        return False
    free = available_ram()
    if cache == "auto":
        return needed <= free // 2
    if needed > free:
        raise UserError(
            f"{field}: the decoded images take {gigabytes(needed)} and {gigabytes(free)} of RAM is free: "
            "stream them with -s data.cache=none"
        )
    return True
