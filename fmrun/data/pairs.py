"""Pairs of a low- and a high-resolution image, of two folders or made of one: matched by name, checked, and read."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..config.data import DataConfig
from ..config.degradation import DegradationConfig
from ..errors import UserError, nearest
from ..rng import numpy_generator
from .check import Side, scan
from .degrade import BICUBIC_MARGIN, MARGIN, Recipe, degrade, recipe
from .files import SMALLEST_SIDE, Middle, Progress, each, find
from .filters import bicubic_down
from .memory import available_ram
from .places import few, missing
from .sources import is_bundled, open_splits
from .store import Images, Window, files_identity

BUNDLED = {"photographs": Path(__file__).parent / "bundled" / "photos"}
SCALES = (1, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class Pairs:
    """N pairs, uint8; the high-resolution image is `scale` times the other, exactly.

    Attributes:
        name: what the data are called.
        high: high-resolution images.
        low: low-resolution images, or `None` if they are made from `high` when read.
        scale: factor between them.
        degradation: how `low` is, or was, made, or `None` if it came as files.
    """

    name: str
    high: Images
    low: Images | None
    scale: int
    degradation: DegradationConfig | None
    _degraded: dict[int, np.ndarray] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.high)

    @property
    def names(self) -> list[str]:
        """Of the high-resolution files, without their endings."""
        assert self.high.files is not None
        return [_stem(entry.name) for entry in self.high.files.entries]

    @property
    def channels(self) -> int:
        return self.high.channels

    @property
    def low_sizes(self) -> np.ndarray:
        """Heights and widths of the low-resolution images, int64 `(N, 2)`."""
        return self.high.sizes // self.scale

    @property
    def made_by(self) -> str:
        """Where low-resolution images come from: `files`, `bicubic` or `chain`."""
        return "files" if self.degradation is None else self.degradation.kind

    @property
    def random(self) -> bool:
        """Whether a patch is degraded anew each time."""
        return self.made_by == "chain"

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded and in RAM already."""
        return self.high.in_memory and (self.random or (self.low is not None and self.low.in_memory))

    @property
    def nbytes(self) -> int:
        """Size of all images decoded."""
        return self.high.nbytes + (self.low.nbytes if self.low is not None else 0)

    @property
    def factors(self) -> tuple[int, int]:
        """From low-resolution pixels to those of each side."""
        return 1, self.scale

    @property
    def stores(self) -> tuple[Images, ...]:
        """The images of each side, where both are kept."""
        assert self.low is not None
        return self.low, self.high

    def cut(self, index: int, windows: Sequence[Window], recipes: Sequence[Recipe | None]) -> list[list[np.ndarray]]:
        """Of each side of one pair of images, which is decoded once for all of them, the parts `(h, w, C)` in these
        low-resolution windows; `recipes` are what random degradations do to them."""
        scale = self.scale
        if self.low is not None:
            return [self.low.windows(index, windows), self.high.windows(index, [w.times(scale) for w in windows])]
        outer = [self._with_margin(index, window) for window in windows]
        wides = self.high.windows(index, [window.times(scale) for window in outer])
        inner = [Window(w.top - o.top, w.left - o.left, w.height, w.width) for w, o in zip(windows, outer, strict=True)]
        lows = [degrade(wide, steps, scale) for wide, steps in zip(wides, recipes, strict=True)]
        return [
            [window.of(low) for window, low in zip(inner, lows, strict=True)],
            [window.times(scale).of(wide) for window, wide in zip(inner, wides, strict=True)],
        ]

    def _with_margin(self, index: int, window: Window) -> Window:
        """A low-resolution window and what its degradation needs around it, as far as there is any."""
        margin = MARGIN if self.random else BICUBIC_MARGIN
        height, width = self.low_sizes[index].tolist()
        top, left = max(0, window.top - margin), max(0, window.left - margin)
        bottom = min(height, window.top + window.height + margin)
        right = min(width, window.left + window.width + margin)
        return Window(top, left, bottom - top, right - left)

    def recipe(self, rng: np.random.Generator) -> Recipe | None:
        """The steps from a high- to a low-resolution image, where they are random."""
        return recipe(self.degradation, rng) if self.degradation is not None and self.random else None

    def whole(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair of whole images for validation, uint8 `(C, h, w)` and `(C, scale · h, scale · w)`.

        A random degradation depends on `index` alone: it is the same in every run, whatever its seed. Its
        result is kept in RAM where those of all images fit.
        """
        high = self.high.whole(index)
        low = self._degraded.get(index) if self.low is None else self.low.whole(index)
        if low is None:
            low = degrade(high, self.recipe(numpy_generator(0, "degrade-valid", index)), self.scale)
            if self.high.nbytes // self.scale**2 <= available_ram() // 4:
                self._degraded[index] = low
        planes = (np.ascontiguousarray(image.transpose(2, 0, 1)) for image in (low, high))
        return torch.from_numpy(next(planes)), torch.from_numpy(next(planes))

    def take(self, indices: np.ndarray) -> "Pairs":
        """These pairs, in this order."""
        return replace(self, high=self.high.take(indices), low=self.low and self.low.take(indices))

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that changes when the data do, however they are kept."""
        digest = hashlib.sha256()
        for files in self._files():
            mark = " ".join(f"{entry.name} {entry.sha256}" for entry in files)
            digest.update(f"{mark}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, int | str]:
        """What copying the files to another place does not change, as `Images.identity`."""
        return files_identity(len(self), [entry for files in self._files() for entry in files])

    def _files(self) -> list[tuple]:
        """The files of each pair."""
        sides = [images.files.entries for images in (self.high, self.low) if images is not None and images.files]
        return list(zip(*sides, strict=True))


def open_pairs(
    config: DataConfig, seed: int, progress: Progress | None = None, trained: bool = True
) -> tuple[Pairs, Pairs | None]:
    """Training and validation pairs (or `None`), checked whole: `UserError` names all that cannot be used.

    Low-resolution files belong to the high-resolution ones of the same relative names up to the ending (`0001x2.png` also
    belongs to `0001.png` at scale 2). Images without partners are cut to their middle, whose sides are multiples of the
    scale. Without `data.valid_path` the bundled validation photographs serve where `data.path` is bundled, else
    `data.valid_fraction` of the pairs, which depends on `seed`. `trained`: whether the training images have to be as large
    as a patch. `progress` is told (images decoded, images in all) of each folder.
    """
    problems: list[str] = []
    if trained and config.patch_size % config.scale:
        problems.append(
            f"data.patch_size: {config.patch_size} is no multiple of data.scale {config.scale}: set it to one"
        )
    if config.lr_path is not None and config.valid_path is not None and config.valid_lr_path is None:
        problems.append("data.valid_lr_path: the LR images of data.valid_path are missing: give their folder")
    if config.valid_lr_path is not None and config.valid_path is None:
        problems.append("data.valid_path: the HR images of data.valid_lr_path are missing: give their folder")

    def opened(field: str, path: str, split: str, channels: int | None) -> Pairs:
        places = [(field, _folder(field, path, split))]
        low_path = config.lr_path if split == "train" else config.valid_lr_path
        if low_path is not None:
            low_field = field.replace("path", "lr_path")
            places.append((low_field, _folder(low_field, low_path, split)))
        patch = config.patch_size if trained and split == "train" else 0
        return replace(_open(places, config, channels, patch, progress), name=path)

    return open_splits(config, seed, opened, problems, least=1)


def _folder(field: str, path: str, split: str) -> Path:
    """The folder that `path` names."""
    if is_bundled(path) and "lr_path" not in field:
        name = path.partition(":")[2]
        if name not in BUNDLED:
            known = list(BUNDLED)
            raise UserError(f"{field}: '{path}' is not among bundled:{', '.join(known)}{nearest(name, known)}")
        return BUNDLED[name] / split
    if why := missing(path, "upscale"):
        raise UserError(f"{field}: '{path}' {why}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{field}: '{path}' is a file: give a folder of images")
    return root


def _open(
    places: list[tuple[str, Path]], config: DataConfig, channels: int | None, patch: int, progress: Progress | None
) -> Pairs:
    """The pairs of the high-resolution folder, and of the other where there is one; `patch` is the smallest side that
    will do."""
    problems: list[str] = []
    scale, paired = config.scale, len(places) == 2
    bicubic = not paired and config.degradation.kind == "bicubic"
    found = [find(*place) for place in places]
    totals = [len(names) for names in found]
    if paired:
        found = _matched(problems, places, found, scale)
    shapes = (Middle(1 if paired else scale, SMALLEST_SIDE), Middle(1, 1))
    sides = [Side(*place, names, shape) for place, names, shape in zip(places, found, shapes, strict=False)]
    chosen, keep = scan(sides, config, channels, progress, more=1 + 1 / scale**2 if bicubic else 1)
    for side, total in zip(sides, totals, strict=True):
        problems += side.report(total, config.skip_unreadable)
    if paired:
        problems += _mismatches(sides[0], sides[1], scale, channels)
    problems += _too_small(sides[0], patch, scale)
    if problems:
        raise UserError("; ".join(problems))
    high, *others = (side.images(chosen, keep) for side in sides)
    low = others[0] if others else None
    if bicubic and keep:
        low = Images.room(high.name, chosen, high.sizes // scale)
        views = [low.view(i) for i in range(len(low))]

        def shrink(i: int) -> None:
            views[i][:] = bicubic_down(high.view(i), scale)

        each(shrink, len(views))
    return Pairs(high.name, high, low, scale, None if paired else config.degradation)


def _matched(
    problems: list[str], places: list[tuple[str, Path]], found: list[list[str]], scale: int
) -> list[list[str]]:
    """The names of both sides in the order of the pairs; what has no partner goes to `problems`."""
    for (setting, root), names in zip(places, found, strict=True):
        stems = Counter(map(_stem, names))
        twice = [name for name in names if stems[_stem(name)] > 1]
        if twice:
            problems.append(
                f"{setting}: files in '{root}' differ in nothing but their ending ({few(twice)}), so remove all but one of each"
            )
    by_stem = {_stem(name): name for name in found[0]}
    matched: dict[str, str] = {}
    alone = []
    for name in found[1]:
        hit = _partner(name, by_stem, scale)
        if hit in by_stem and hit not in matched:
            matched[hit] = name
        else:
            alone.append(name)
    singles = [name for stem, name in by_stem.items() if stem not in matched], alone
    for k, names in enumerate(singles):
        if names:
            problems.append(
                f"{places[1 - k][0]}: {len(names)} of {len(found[k])} images in '{places[k][1]}' have no partner of the same "
                f"name in '{places[1 - k][1]}' ({few(names)}), so add or remove them"
            )
    common = [stem for stem in by_stem if stem in matched]
    if not common:
        raise UserError("; ".join(problems))
    return [[by_stem[stem] for stem in common], [matched[stem] for stem in common]]


def _partner(name: str, known: Collection[str], scale: int) -> str:
    """What a high-resolution file that belongs to the low-resolution one is called, without its ending."""
    stem = _stem(name)
    # DIV2K and its like call the halved 0001.png 0001x2.png
    return stem if stem in known else stem.removesuffix(f"x{scale}")


def _mismatches(high: Side, low: Side, scale: int, channels: int | None) -> list[str]:
    """What is wrong with pairs of images that are each in order."""
    both = [
        (high.found[h], low.found[l])
        for h, l in zip(high.names, low.names, strict=True)
        if h in high.found and l in low.found
    ]
    sentences = []
    odd = [(h, l) for h, l in both if h.size != (scale * l.size[0], scale * l.size[1])]
    if odd:
        shown = [f"{_stem(h.entry.name)} {_size(h.size)} from {_size(l.size)}" for h, l in odd]
        true = {s for s in SCALES if all(h.size == (s * l.size[0], s * l.size[1]) for h, l in both)}
        fix = f"set -s data.scale={true.pop()}" if true else f"make each HR side {scale} times its LR side"
        sentences.append(f"data.scale: {len(odd)} of {len(both)} pairs are not ×{scale} ({few(shown)}), so {fix}")
    mixed = [h.entry.name for h, l in both if h.grey != l.grey]
    if mixed and channels is None:
        sentences.append(
            f"{low.setting}: {len(mixed)} of {len(both)} pairs are grey on one side and in colour on the other "
            f"({few(mixed)}), so convert one of them or set -s data.channels=3"
        )
    return sentences


def _too_small(high: Side, patch: int, scale: int) -> list[str]:
    good = [high.found[name] for name in high.names if name in high.found]
    small = [file for file in good if min(file.size) < patch]
    if not small:
        return []
    shown = [f"{file.entry.name} {_size(file.size)}" for file in small]
    step = 8 * scale
    fits = min(min(file.size) for file in small) // step * step
    fix = f"set -s data.patch_size={fits} or remove them" if fits >= 32 else "remove them"
    return [
        f"{high.setting}: {len(small)} of {len(good)} images are smaller than data.patch_size {patch} "
        f"({few(shown)}), so {fix}"
    ]


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}×{size[0]}"


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()
