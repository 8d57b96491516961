"""The images of a super-resolution experiment: `open_pairs` finds and checks them, `PairFeed` hands them to the step."""

from pathlib import Path

import numpy as np

from ..config.degradation import DegradationConfig
from ..errors import UserError, nearest
from ..rng import numpy_generator
from .folder import Choice, Progress
from .pair_feed import PairBatch, PairFeed
from .pair_folder import Place, open_pair_folder
from .pair_set import PairInfo, Pairs
from .places import missing

__all__ = ["PairBatch", "PairFeed", "PairInfo", "Pairs", "open_pairs"]

BUNDLED = {"photographs": Path(__file__).parent / "bundled" / "photos"}


def open_pairs(
    path: str,
    lr_path: str | None = None,
    *,
    valid_path: str | None = None,
    valid_lr_path: str | None = None,
    valid_fraction: float = 0.0,
    scale: int,
    patch_size: int | None,
    channels: int | None = None,
    cache: str = "auto",
    degradation: DegradationConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    leave_out: tuple[str, ...] = (),
    valid_leave_out: tuple[str, ...] = (),
    choice: Choice = Choice.REFUSE,
) -> tuple[Pairs, Pairs | None]:
    """Training and validation pairs (or `None`), checked whole: `UserError` names all that cannot be used.

    Args:
        path: high-resolution images: a folder (any nesting) or `bundled:photographs`.
        lr_path: their low-resolution partners, of the same relative names up to the ending (`0001x2.png` also belongs
            to `0001.png` at scale 2). `None` makes them from the others by `degradation`.
        valid_path, valid_lr_path: the same for validation. Without them the bundled validation photographs serve
            where `path` is bundled, else `valid_fraction` of the pairs, which depends on `seed`.
        scale: factor between the sides of a pair, exact. Images without partners are cut to their middle, whose sides
            are multiples of it.
        patch_size: side of the patches trained on, in high-resolution pixels; `None`: whole images are measured on.
        channels: 1 (grey), 3 (RGB), 4 (RGBA) or `None`: 1 where all images are grey, else 3.
        cache: `data.cache`.
        degradation: bicubic unless given.
        progress: told (images decoded, images in all) of each folder.
        leave_out, valid_leave_out: names of high-resolution files that are not looked at, nor their partners.
        choice: what becomes of pairs that cannot be read.
    """
    degradation = degradation or DegradationConfig()
    problems: list[str] = []
    if patch_size is not None and patch_size % scale:
        problems.append(f"data.patch_size: {patch_size} is no multiple of data.scale {scale}: set it to one")
    if lr_path is not None and valid_path is not None and valid_lr_path is None:
        problems.append("data.valid_lr_path: the LR images of data.valid_path are missing: give their folder")
    if valid_lr_path is not None and valid_path is None:
        problems.append("data.valid_path: the HR images of data.valid_lr_path are missing: give their folder")

    def opened(
        split: str, high: str, low: str | None, fields: tuple[str, str], patch: int | None, channels: int | None
    ) -> Pairs | None:
        try:
            pairs = open_pair_folder(
                _place(fields[0], high, split),
                None if low is None else _place(fields[1], low, split, bundled=False),
                scale=scale,
                patch=patch,
                channels=channels,
                cache=cache,
                degradation=degradation,
                progress=progress,
                leave_out=leave_out if split == "train" else valid_leave_out,
                choice=choice,
            )
        except UserError as problem:
            problems.append(str(problem))
            return None
        pairs.name = high
        return pairs

    train = opened("train", path, lr_path, ("data.path", "data.lr_path"), patch_size, channels)
    if train:
        channels = train.channels
    valid = None
    if valid_path is not None:
        valid = opened("valid", valid_path, valid_lr_path, ("data.valid_path", "data.valid_lr_path"), None, channels)
    elif train and _bundled(path) and lr_path is None:
        valid = opened("valid", path, None, ("data.path", ""), None, channels)
    if problems:
        raise UserError("; ".join(problems))
    assert train is not None
    if valid is None and valid_fraction > 0:
        return _split(train, valid_fraction, seed)
    return train, valid


def _bundled(path: str) -> bool:
    return path.lower().startswith("bundled:")


def _place(field: str, path: str, split: str, bundled: bool = True) -> Place:
    """The folder that `path` names."""
    if bundled and _bundled(path):
        name = path.partition(":")[2]
        if name not in BUNDLED:
            known = list(BUNDLED)
            raise UserError(f"{field}: '{path}' is not among bundled:{', '.join(known)}{nearest(name, known)}")
        return Place(field, BUNDLED[name] / split)
    if why := missing(path, "upscale"):
        raise UserError(f"{field}: '{path}' {why}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{field}: '{path}' is a file: give a folder of images")
    return Place(field, root)


def _split(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training pairs and held-out ones, at least one of each, each in their old order; a photograph is in one of them
    only."""
    held = min(max(1, round(len(pairs) * fraction)), len(pairs) - 1)
    if held < 1:
        raise UserError(
            "data.valid_fraction: of 1 image none can be held out: add images, or set -s data.valid_fraction=0"
        )
    shuffled = numpy_generator(seed, "split").permutation(len(pairs))
    return pairs.take(np.sort(shuffled[held:])), pairs.take(np.sort(shuffled[:held]))
