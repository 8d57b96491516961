"""Folders of image pairs: matched, checked whole before the first step, kept in RAM where they fit."""

from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config.degradation import DegradationConfig
from ..errors import UserError
from .filters import bicubic_down
from .folder import (
    Choice,
    Entry,
    Progress,
    _each,
    _header,
    _keep,
    _names,
    _report,
    _threads,
    refuse_unknown,
    skip_hint,
)
from .pair_set import Pairs
from .pixels import GREY_16, SMALLEST_SIDE, UNREADABLE, BadImage, Header, content
from .places import few
from .shelf import Files, Packed, Shelf, decode_upright, middle, to_array

SCALES = (1, 2, 3, 4)


class Place(NamedTuple):
    """A folder, and the setting that named it."""

    field: str
    root: Path


def open_pair_folder(
    high: Place,
    low: Place | None,
    *,
    scale: int,
    patch: int | None,
    channels: int | None,
    cache: str,
    degradation: DegradationConfig,
    progress: Progress | None = None,
    leave_out: tuple[str, ...] = (),
    choice: Choice = Choice.REFUSE,
) -> Pairs:
    """All pairs under two folders, or those made of the images under one.

    Every file is decoded once here; `UserError` names all that cannot be used.

    Args:
        high, low: where the images lie; without `low`, `degradation` makes them.
        scale: factor between them.
        patch: the smallest high-resolution side that will do, or `None` for whole images.
        channels: 1, 3, 4, or `None`: 1 where all images are grey, else 3.
        cache: `data.cache`.
        degradation: used without `low`.
        progress: told (images decoded, images in all).
        leave_out: names of high-resolution files that are not looked at, nor their partners, to which `choice` may add
            those of pairs that cannot be read.
    """
    problems: list[str] = []
    if choice is not Choice.SETTLED:
        refuse_unknown(high.field, high.root, leave_out)
    sides = _match(problems, high, low, scale, leave_out)
    if not sides[0].names:
        raise UserError(f"{high.field}: no image in '{high.root}' is left that could be read: copy them again")
    for side in sides:
        side.read_headers()
    known = [header for side in sides for header in side.headers if header]
    chosen = channels or (1 if all(header.grey for header in known) else 3)
    made = low is None and degradation.kind == "bicubic"
    multiple = scale if low is None else 1

    for k, side in enumerate(sides):
        side.fit(multiple, 1 if k else SMALLEST_SIDE)
    counts = [int(side.sizes.prod(axis=1).sum()) for side in sides]
    needed = chosen * (sum(counts) + (counts[0] // scale**2 if made else 0))
    keep = not problems and not any(side.bad for side in sides) and _keep(high.field, needed, cache)
    small: Packed | None = None
    if keep and made:
        small = Packed.empty(sides[0].stems, sides[0].sizes // scale, chosen)

    before = 0
    for side in sides:
        total = len(side.names) * len(sides)
        told = _shifted(progress, before, total) if progress else None
        side.decode(chosen, multiple, keep, partial(_shrink, small, scale) if small else None, told)
        before += len(side.names)

    lost = {sides[0].names[i] for side in sides for i, problem in side.bad.items() if problem.kind in UNREADABLE}
    if choice is Choice.SKIP and lost:
        return open_pair_folder(
            high,
            low,
            scale=scale,
            patch=patch,
            channels=channels,
            cache=cache,
            degradation=degradation,
            progress=progress,
            leave_out=tuple(sorted({*leave_out, *lost})),
        )
    problems += [side.report(choice) for side in sides if side.bad]
    problems += _mismatches(sides, scale, channels)
    if patch is not None:
        problems += _too_small(sides[0], patch, scale)
    if problems:
        raise UserError("; ".join(problems))
    marks = [
        " ".join(f"{side.entries[i].name} {side.entries[i].sha256}" for side in sides)
        for i in range(len(sides[0].names))
    ]
    files = [tuple((side.entries[i].name, side.entries[i].size) for side in sides) for i in range(len(sides[0].names))]
    lows = sides[1].shelf(chosen) if low else small
    made_by = None if low else degradation
    return Pairs(str(high.root), sides[0].shelf(chosen), lows, scale, made_by, marks, files, leave_out)


class _Side:
    """The high- or the low-resolution images: `names` are files in the order of the pairs."""

    def __init__(self, place: Place, names: list[str], in_folder: int) -> None:
        self.place = place
        self.names = names
        self.stems = [_stem(name) for name in names]
        self.in_folder = in_folder
        self.headers: list[Header | None] = []
        self.sizes = np.zeros((0, 2), dtype=np.int64)
        self.bad: dict[int, BadImage] = {}
        self.packed: Packed | None = None
        self.entries: dict[int, Entry] = {}
        """Of the files decoded."""

    def read_headers(self) -> None:
        found = _each(lambda i: _header(self.place.root / self.names[i]), len(self.names), _threads())
        self.headers = [None if isinstance(header, BadImage) else header for header in found]
        self.bad = {i: header for i, header in enumerate(found) if isinstance(header, BadImage)}

    def fit(self, multiple: int, smallest: int) -> None:
        """Sizes in whole multiples of `multiple`; sides less than `smallest` are bad."""
        for i, h in enumerate(self.headers):
            if h and min(h.height, h.width) < smallest:
                self.bad[i] = BadImage("tiny")
        sizes = [(h.height, h.width) if h else (0, 0) for h in self.headers]
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2) // multiple * multiple

    def decode(
        self,
        channels: int,
        multiple: int,
        keep: bool,
        also: Callable[[int, np.ndarray], None] | None,
        progress: Progress | None,
    ) -> None:
        """Decode every file, to keep it or to see that it can be; `also` gets each image."""
        if keep:
            self.packed = Packed.empty(self.stems, self.sizes, channels)

        def one(i: int) -> BadImage | None:
            if i in self.bad:
                return None
            try:
                path = self.place.root / self.names[i]
                data = content(path)
                self.entries[i] = Entry.of(self.names[i], data)
                image = decode_upright(path, data)
                size = (image.height // multiple * multiple, image.width // multiple * multiple)
                self.sizes[i] = size  # a header may not know that the image lies on its side
                if self.packed is None and image.mode not in GREY_16:  # of those, values may be out of range
                    return None
                if size != (image.height, image.width):
                    top, left = middle(image.height, image.width, size)
                    image = image.crop((left, top, left + size[1], top + size[0]))
                pixels = to_array(image, channels)
            except BadImage as problem:
                return problem
            if self.packed is not None:
                self.packed.view(i)[:] = pixels
                if also:
                    also(i, pixels)
            return None

        found = _each(one, len(self.names), _threads(), progress)
        self.bad |= {i: problem for i, problem in enumerate(found) if problem}

    def shelf(self, channels: int) -> Shelf:
        if self.packed is not None:
            return self.packed
        entries = [self.entries[i] for i in range(len(self.names))]
        return Files(self.stems, self.sizes, channels, self.place.root, entries)

    def report(self, choice: Choice) -> str:
        bad = {self.names[i]: problem for i, problem in self.bad.items()}
        report = _report(self.place.field, self.place.root, self.in_folder, bad, [], 0, "exact")
        return report + skip_hint(bad, choice)


def _match(problems: list[str], high: Place, low: Place | None, scale: int, leave_out: tuple[str, ...]) -> list[_Side]:
    """One side, or both in the order of the pairs; what has no partner goes to `problems`."""
    without = set(leave_out)
    names = [name for name in _names(high.field, high.root) if name not in without]
    if low is None:
        return [_Side(high, names, len(names))]
    kept = {_stem(name) for name in names}
    gone = {_stem(name) for name in leave_out} - kept
    partners = [name for name in _names(low.field, low.root) if _partner(name, kept | gone, scale) not in gone]
    for place, found in ((high, names), (low, partners)):
        stems = Counter(_stem(name) for name in found)
        twice = [name for name in found if stems[_stem(name)] > 1]
        if twice:
            problems.append(
                f"{place.field}: files in '{place.root}' differ in nothing but their ending ({few(twice)}), "
                "so remove all but one of each"
            )
    by_stem = {_stem(name): name for name in names}
    matched: dict[str, str] = {}
    alone = []
    for name in partners:
        hit = _partner(name, kept, scale)
        if hit in by_stem and hit not in matched:
            matched[hit] = name
        else:
            alone.append(name)
    for field, found, single, root, other in (
        (low.field, names, [name for stem, name in by_stem.items() if stem not in matched], high.root, low.root),
        (high.field, partners, alone, low.root, high.root),
    ):
        if single:
            problems.append(
                f"{field}: {len(single)} of {len(found)} images in '{root}' have no partner of the same name in "
                f"'{other}' ({few(single)}), so add or remove them"
            )
    common = [stem for stem in by_stem if stem in matched]
    if not common and problems:
        raise UserError("; ".join(problems))
    return [
        _Side(high, [by_stem[stem] for stem in common], len(names)),
        _Side(low, [matched[stem] for stem in common], len(partners)),
    ]


def _partner(name: str, known: Collection[str], scale: int) -> str:
    """What a high-resolution file that belongs to the low-resolution one is called, without its ending."""
    stem = _stem(name)
    # DIV2K and its like call the halved 0001.png 0001x2.png
    return stem if stem in known else stem.removesuffix(f"x{scale}")


def _mismatches(sides: list[_Side], scale: int, channels: int | None) -> list[str]:
    """What is wrong with pairs of images that are each in order."""
    if len(sides) == 1:
        return []
    high, low = sides
    both = [i for i in range(len(high.names)) if i not in high.bad and i not in low.bad]
    sentences = []
    odd = [i for i in both if (high.sizes[i] != scale * low.sizes[i]).any()]
    if odd:
        shown = [f"{high.stems[i]} {_size(high.sizes[i])} from {_size(low.sizes[i])}" for i in odd]
        true = {s for s in SCALES if all((high.sizes[i] == s * low.sizes[i]).all() for i in both)}
        fix = f"set -s data.scale={true.pop()}" if true else f"make each HR side {scale} times its LR side"
        sentences.append(f"data.scale: {len(odd)} of {len(both)} pairs are not ×{scale} ({few(shown)}), so {fix}")
    if channels is None:
        mixed = [high.names[i] for i in both if _grey(high, i) != _grey(low, i)]
        if mixed:
            sentences.append(
                f"{low.place.field}: {len(mixed)} of {len(both)} pairs are grey on one side and in colour on the other "
                f"({few(mixed)}), so convert one of them or set -s data.channels=3"
            )
    return sentences


def _too_small(high: _Side, patch: int, scale: int) -> list[str]:
    good = [i for i in range(len(high.names)) if i not in high.bad]
    small = [i for i in good if high.sizes[i].min() < patch]
    if not small:
        return []
    shown = [f"{high.names[i]} {_size(high.sizes[i])}" for i in small]
    step = 8 * scale
    fits = int(min(high.sizes[i].min() for i in small)) // step * step
    fix = f"set -s data.patch_size={fits} or remove them" if fits >= 32 else "remove them"
    return [
        f"{high.place.field}: {len(small)} of {len(good)} images are smaller than data.patch_size {patch} "
        f"({few(shown)}), so {fix}"
    ]


def _grey(side: _Side, index: int) -> bool:
    header = side.headers[index]
    return header is not None and header.grey


def _size(size: np.ndarray) -> str:
    return f"{size[1]}×{size[0]}"


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _shrink(small: Packed, scale: int, index: int, pixels: np.ndarray) -> None:
    small.sizes[index] = [side // scale for side in pixels.shape[:2]]
    small.view(index)[:] = bicubic_down(pixels, scale)


def _shifted(progress: Progress, by: int, total: int) -> Progress:
    return lambda done, _: progress(by + done, total)
