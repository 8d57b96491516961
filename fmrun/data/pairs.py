"""Pairs of a low- and a high-resolution image, of two folders or made of one: matched by name, and checked."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..config.data import DataConfig
from ..runtime.errors import UserError, nearest
from .check import Side, scan
from .files import SMALLEST_SIDE, Middle, Progress, each, find_images
from .filters import bicubic_down
from .places import few, missing
from .sources import is_bundled, open_splits
from .store import Images

BUNDLED = {"photographs": Path(__file__).parent / "bundled" / "photos"}
SCALES = (1, 2, 3, 4)


def open_pairs(
    config: DataConfig, seed: int, progress: Progress | None = None, trained: bool = True
) -> tuple[Images, Images | None]:
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

    def opened(field: str, path: str, split: str, channels: int | None) -> Images:
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
) -> Images:
    """The pairs of the high-resolution folder, and of the other where there is one; `patch` is the smallest side that
    will do."""
    problems: list[str] = []
    scale, has_lr_files = config.scale, len(places) == 2
    bicubic = not has_lr_files and config.degradation.kind == "bicubic"
    names_by_side = [find_images(*place) for place in places]
    totals = [len(names) for names in names_by_side]
    if has_lr_files:
        names_by_side = _matched(problems, places, names_by_side, scale)
    shapes = (Middle(1 if has_lr_files else scale, SMALLEST_SIDE), Middle(1, 1))
    sides = [Side(*place, names, shape) for place, names, shape in zip(places, names_by_side, shapes, strict=False)]
    chosen, keep = scan(sides, config, channels, progress, more=1 + 1 / scale**2 if bicubic else 1)
    for side, total in zip(sides, totals, strict=True):
        problems += side.report(total, config.skip_unreadable)
    if has_lr_files:
        problems += _mismatches(sides[0], sides[1], scale, channels)
    problems += _too_small(sides[0], patch, scale)
    if problems:
        raise UserError("; ".join(problems))
    high, *low_images = (side.images(chosen, keep) for side in sides)
    low = low_images[0] if low_images else None
    if bicubic and keep:
        low = Images.room(high.name, chosen, high.sizes // scale)
        views = [low.view(i) for i in range(len(low))]

        def shrink(i: int) -> None:
            views[i][:] = bicubic_down(high.view(i), scale)

        each(shrink, len(views))
    return replace(high, scale=scale, low=low, degradation=None if has_lr_files else config.degradation)


def _matched(
    problems: list[str], places: list[tuple[str, Path]], names_by_side: list[list[str]], scale: int
) -> list[list[str]]:
    """The names of both sides in the order of the pairs; what has no partner goes to `problems`."""
    for (setting, root), names in zip(places, names_by_side, strict=True):
        stems = Counter(map(_stem, names))
        twice = [name for name in names if stems[_stem(name)] > 1]
        if twice:
            problems.append(
                f"{setting}: files in '{root}' differ in nothing but their ending ({few(twice)}), so remove all but one of each"
            )
    by_stem = {_stem(name): name for name in names_by_side[0]}
    matched: dict[str, str] = {}
    alone = []
    for name in names_by_side[1]:
        stem = _stem(name)
        # DIV2K and its like call the halved 0001.png 0001x2.png
        hit = stem if stem in by_stem else stem.removesuffix(f"x{scale}")
        if hit in by_stem and hit not in matched:
            matched[hit] = name
        else:
            alone.append(name)
    singles = [name for stem, name in by_stem.items() if stem not in matched], alone
    for k, names in enumerate(singles):
        if names:
            problems.append(
                f"{places[1 - k][0]}: {len(names)} of {len(names_by_side[k])} images in '{places[k][1]}' have no partner of the same "
                f"name in '{places[1 - k][1]}' ({few(names)}), so add or remove them"
            )
    common = [stem for stem in by_stem if stem in matched]
    if not common:
        raise UserError("; ".join(problems))
    return [[by_stem[stem] for stem in common], [matched[stem] for stem in common]]


def _mismatches(high: Side, low: Side, scale: int, channels: int | None) -> list[str]:
    """What is wrong with pairs of images that are each in order."""
    both = [
        (high.scanned[h], low.scanned[l])
        for h, l in zip(high.names, low.names, strict=True)
        if h in high.scanned and l in low.scanned
    ]
    sentences = []
    odd = [(h, l) for h, l in both if h.size != (scale * l.size[0], scale * l.size[1])]
    if odd:
        examples = [f"{_stem(h.entry.name)} {_size(h.size)} from {_size(l.size)}" for h, l in odd]
        true = {s for s in SCALES if all(h.size == (s * l.size[0], s * l.size[1]) for h, l in both)}
        fix = f"set -s data.scale={true.pop()}" if true else f"make each HR side {scale} times its LR side"
        sentences.append(f"data.scale: {len(odd)} of {len(both)} pairs are not ×{scale} ({few(examples)}), so {fix}")
    mixed = [h.entry.name for h, l in both if h.grey != l.grey]
    if mixed and channels is None:
        sentences.append(
            f"{low.setting}: {len(mixed)} of {len(both)} pairs are grey on one side and in colour on the other "
            f"({few(mixed)}), so convert one of them or set -s data.channels=3"
        )
    return sentences


def _too_small(high: Side, patch: int, scale: int) -> list[str]:
    good = [high.scanned[name] for name in high.names if name in high.scanned]
    small = [file for file in good if min(file.size) < patch]
    if not small:
        return []
    examples = [f"{file.entry.name} {_size(file.size)}" for file in small]
    step = 8 * scale
    fits = min(min(file.size) for file in small) // step * step
    fix = f"set -s data.patch_size={fits} or remove them" if fits >= 32 else "remove them"
    return [
        f"{high.setting}: {len(small)} of {len(good)} images are smaller than data.patch_size {patch} "
        f"({few(examples)}), so {fix}"
    ]


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}×{size[0]}"


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()
