"""A folder of image files: found, checked whole before the first step, then read by index."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ..config.data import DataConfig
from ..errors import UserError, nearest
from ..report import counted, note_once
from .memory import available_ram, gigabytes
from .pixels import BAD, SUFFIXES, UNREADABLE, BadImage, Header, check_size, content, decode, quiet, read_header
from .places import few
from .source import Images, files_identity

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (images decoded so far, images in all)."""


class Choice(Enum):
    """What becomes of files that cannot be read."""

    REFUSE = "named, and how to skip them"
    SKIP = "left out"
    SETTLED = "named: which are left out was decided when the run started"


THUMBNAILS = ("@eaDir", "__MACOSX")
"""Folders that file servers and archivers leave beside images, besides hidden ones."""

LEGAL_SIZES: tuple[int, ...] = DataConfig.model_fields["image_size"].annotation.__args__  # type: ignore[union-attr]


@dataclass(frozen=True)
class Entry:
    """A file: its name relative to the folder, its size in bytes and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, data: bytes) -> "Entry":
        return cls(name, len(data), hashlib.sha256(data).hexdigest())


class FolderImages(Images):
    """Image files under `root`, decoded when read unless `pixels` holds them."""

    def __init__(
        self,
        root: Path,
        entries: list[Entry],
        channels: int,
        size: int,
        fit: str,
        pixels: torch.Tensor | None = None,
        left_out: tuple[str, ...] = (),
    ) -> None:
        super().__init__(str(root), channels, size, pixels=pixels)
        self.left_out = left_out
        self.root = root
        self.entries = entries
        self.fit = fit

    def __len__(self) -> int:
        return len(self.entries)

    def _decode(self, wanted: np.ndarray) -> torch.Tensor:
        out = torch.empty((len(wanted), self.channels, self.size, self.size), dtype=torch.uint8)
        names = [self.entries[i].name for i in wanted]
        threads = 1 if torch.utils.data.get_worker_info() else _threads()
        problems = _each(partial(self._into, out, names), len(names), threads)
        for name, problem in zip(names, problems, strict=True):
            if problem:
                what = BAD[problem.kind][0] or f"{problem.detail} px"
                raise UserError(
                    f"'{self.root / name}' was fine before the first step and is now unusable ({what}): "
                    "restore it, then continue with `fmrun resume`"
                )
        return out

    def _into(self, out: torch.Tensor, names: list[str], i: int) -> BadImage | None:
        try:
            out.numpy()[i] = decode(self.root / names[i], self.channels, self.size, self.fit)
        except BadImage as problem:
            return problem
        return None

    def take(self, indices: np.ndarray) -> "FolderImages":
        pixels = None if self.pixels is None else self.read(indices)
        entries = [self.entries[i] for i in indices]
        return FolderImages(self.root, entries, self.channels, self.size, self.fit, pixels, self.left_out)

    @cached_property
    def fingerprint(self) -> str:
        """Of names and contents: the same whether decoded or not."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\0{entry.sha256}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, int | str]:
        return files_identity(len(self), [(entry.name, entry.size) for entry in self.entries])


def open_folder(
    field: str,
    path: str,
    config: DataConfig,
    channels: int | None,
    progress: Progress | None = None,
    *,
    leave_out: tuple[str, ...] = (),
    choice: Choice = Choice.REFUSE,
) -> FolderImages:
    """All images under the folder `path`; every file is decoded once here, and `UserError` names all
    that cannot be used.

    They stay in RAM unless `config.cache` or their number forbids it. `field` is the setting named in errors.
    `leave_out` are names that are not looked at, to which `choice` may add those that cannot be read.
    """
    root = Path(path).expanduser()
    without = set(leave_out)
    if choice is not Choice.SETTLED:
        refuse_unknown(field, root, leave_out)
    names = [name for name in _names(field, root) if name not in without]
    size, fit = config.image_size, config.fit
    problems: dict[str, BadImage] = {}
    headers: dict[str, Header] = {}
    for name, found in zip(names, _each(lambda i: _header(root / names[i]), len(names), _threads()), strict=True):
        if isinstance(found, BadImage):
            problems[name] = found
            continue
        headers[name] = found
        try:
            check_size(found.width, found.height, size, fit)
        except BadImage as problem:
            problems[name] = problem
    asked, channels = channels, channels or (1 if all(header.grey for header in headers.values()) else 3)

    good = [name for name in names if name not in problems]
    pixels = None
    if not problems and _keep(field, len(names) * channels * size * size, config.cache):
        pixels = torch.empty((len(names), channels, size, size), dtype=torch.uint8)

    def check(i: int) -> BadImage | Entry:
        try:
            data = content(root / good[i])
            image = decode(root / good[i], channels, size, fit, data)
        except BadImage as problem:
            return problem
        if pixels is not None:
            pixels.numpy()[i] = image
        return Entry.of(good[i], data)

    checked = _each(check, len(good), _threads(), progress)
    problems |= {name: found for name, found in zip(good, checked, strict=True) if isinstance(found, BadImage)}
    if choice is Choice.SKIP and (lost := unreadable(problems)):
        leave_out = tuple(sorted({*leave_out, *lost}))
        return open_folder(field, path, config, asked, progress, leave_out=leave_out)
    if problems:
        report = _report(field, root, len(names), problems, list(headers.values()), size, fit)
        raise UserError(report + skip_hint(problems, choice))
    entries = [found for found in checked if isinstance(found, Entry)]
    return FolderImages(root, entries, channels, size, fit, pixels, leave_out)


def refuse_unknown(field: str, root: Path, leave_out: tuple[str, ...]) -> None:
    """UserError for a file to leave out of the folder that `field` names where there is none of that name."""
    names = _names(field, root) if leave_out else []
    unknown = next((name for name in leave_out if name not in set(names)), None)
    if unknown is not None:
        option = field.replace("path", "leave_out")
        raise UserError(
            f"{option}: there is no image '{unknown}' in '{root}'{nearest(unknown, names) or ': leave it out'}"
        )


def unreadable(problems: Mapping[str, BadImage]) -> list[str]:
    """Names of the files that cannot be read at all."""
    return [name for name, problem in problems.items() if problem.kind in UNREADABLE]


def skip_hint(problems: Mapping[str, BadImage], choice: Choice) -> str:
    """What else can be done about files that cannot be read."""
    if not unreadable(problems) or choice is Choice.SKIP:
        return ""
    if choice is Choice.SETTLED:
        return "; what this run leaves out was settled when it started, so rather put them back as they were"
    return "; or leave out what cannot be read: -s data.skip_unreadable=true"


def size_fix(sizes: set[tuple[int, int]], size: int, fit: str) -> str:
    """What to add to the command when images of these sizes do not fit."""
    fixes = ["-s data.fit=crop"]
    width, height = next(iter(sizes))
    if len(sizes) == 1 and width == height and width in LEGAL_SIZES and width != size:
        fixes.append(f"-s data.image_size={width}")
    elif fit == "exact" and max(max(pair) for pair in sizes) < size:
        fixes.append("-s data.fit=pad")
    return "add " + " or ".join(fixes)


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


def _each(work: Callable[[int], T], count: int, threads: int, progress: Progress | None = None) -> list[T]:
    """`[work(0), …, work(count − 1)]`, by several threads: Pillow decodes outside the interpreter's lock."""
    span = max(1, min(64, count // (4 * threads)))
    starts = range(0, count, span)
    results: list[T] = []

    def some(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + span, count))]

    def collect(parts: Iterable[list[T]]) -> list[T]:
        for part in parts:
            results.extend(part)
            if progress:
                progress(len(results), count)
        return results

    with quiet():
        if threads == 1 or count <= span:
            return collect(map(some, starts))
        with ThreadPoolExecutor(threads) as pool:
            return collect(pool.map(some, starts))


def _names(field: str, root: Path) -> list[str]:
    """Relative names of all images under `root`, sorted; what is left out is said: other files, hidden ones, and
    folders of thumbnails. Linked folders are entered once."""
    names: list[str] = []
    passed: Counter[str] = Counter()
    others: list[str] = []
    seen: set[tuple[int, int]] = set()
    failures: list[str] = []

    def failed(error: OSError) -> None:
        failures.append(f"'{error.filename}' ({error.strerror})")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=failed):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        passed.update(f"{name} folder" for name in folders if _aside(name))
        folders[:] = sorted(name for name in folders if not _aside(name))
        passed["hidden file"] += sum(map(_aside, files))
        for file in files:
            if not _aside(file):
                image = file.lower().endswith(SUFFIXES)
                (names if image else others).append((Path(folder) / file).relative_to(root).as_posix())
    if failures:
        raise UserError(f"{field}: cannot list {few(failures)}: give yourself permission (chmod u+rx)")
    if names:
        endings = Counter(Path(name).suffix.lower() or "extensionless" for name in others)
        parts = [f"{count} {ending}" for ending, count in endings.most_common()]
        parts += [counted(count, what) for what, count in passed.most_common() if count]
        if parts:
            note_once(f"'{root}': {few(parts)} left out")
        return sorted(names)
    arrays = sorted(name for name in others if "ubyte" in name or name.endswith(".npz"))
    if arrays:
        best = next((name for name in arrays if "train" in name and "images" in name), arrays[0])
        raise UserError(f"{field}: '{root}' holds no image files but '{best}': give that file, {root / best}")
    what = f"no images, only other files ({few(sorted(others))})" if others else "no files"
    raise UserError(f"{field}: '{root}' holds {what}: give a folder with {', '.join(SUFFIXES)} files")


def _aside(name: str) -> bool:
    """Whether a file or folder of this name holds no images of the user's."""
    return name.startswith(".") or name in THUMBNAILS


def _header(path: Path) -> Header | BadImage:
    try:
        return read_header(path)
    except BadImage as problem:
        return problem


def _keep(field: str, needed: int, cache: str) -> bool:
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


def _report(
    field: str,
    root: Path,
    total: int,
    problems: dict[str, BadImage],
    headers: list[Header],
    size: int,
    fit: str,
) -> str:
    """One sentence that names everything wrong with the images of a folder."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name, problem in problems.items():
        by_kind[problem.kind].append(f"{name} {problem.detail}".strip())
    parts = []
    for kind in (kind for kind in BAD if kind in by_kind):
        what, fix = BAD[kind]
        if kind == "size":
            sizes = {(header.width, header.height) for header in headers}
            what = f"larger than {size}×{size}" if fit == "pad" else f"not {size}×{size}"
            fix = f"so {size_fix(sizes, size, fit)}"
        parts.append(f"{what} ({few(sorted(by_kind[kind]))}), {fix}")
    return f"{field}: {len(problems)} of {total} images in '{root}' cannot be used: " + "; ".join(parts)
