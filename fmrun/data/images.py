"""The images of an experiment: `open_data` finds and checks them, `Feed` hands them to the step."""

import numpy as np

from ..config.data import DataConfig
from ..errors import UserError, reading
from ..rng import numpy_generator
from .arrays import BadFile, open_array, read_array
from .feed import Feed, flips, order, placement
from .folder import Choice, FolderImages, Progress, open_folder
from .pixels import to_float, to_uint8
from .source import ArrayImages, Images

__all__ = [
    "ArrayImages",
    "Feed",
    "FolderImages",
    "Images",
    "flips",
    "open_data",
    "order",
    "placement",
    "to_float",
    "to_uint8",
]


def open_data(
    config: DataConfig, seed: int, progress: Progress | None = None, settled: bool = False
) -> tuple[Images, Images | None]:
    """Training and validation images (or `None`), checked whole: `UserError` names all that cannot be used.

    `seed` decides which images `valid_fraction` holds out. `progress` is told (images decoded, images in all)
    of folders. `settled`: whether the config is that of a run, which has decided what to leave out.
    """
    choice = Choice.SKIP if config.skip_unreadable else Choice.SETTLED if settled else Choice.REFUSE
    bundled = config.path.lower().startswith("bundled:")
    problems: list[str] = []
    train = _open(problems, "data.path", config.path, config, config.channels, "train", progress, choice)
    valid = None
    if config.valid_path is not None or bundled:
        channels = train.channels if train else config.channels
        path = config.path if config.valid_path is None else config.valid_path
        field = "data.path" if config.valid_path is None else "data.valid_path"
        if train or config.valid_path is not None:
            valid = _open(problems, field, path, config, channels, "valid", progress, choice)
    if problems:
        raise UserError("; ".join(problems))
    assert train is not None
    if valid is None and config.valid_fraction > 0:
        return _split(train, config.valid_fraction, seed)
    return train, valid


def _open(
    problems: list[str],
    field: str,
    path: str,
    config: DataConfig,
    channels: int | None,
    split: str,
    progress: Progress | None,
    choice: Choice,
) -> Images | None:
    """One split, or `None` and a new entry in `problems`."""
    images: Images
    try:
        with reading(path):
            raw = read_array(path, config, split)
        if raw is None:
            leave_out = config.leave_out if split == "train" else config.valid_leave_out
            images = open_folder(field, path, config, channels, progress, leave_out=leave_out, choice=choice)
        else:
            images = open_array(field, path, raw, config, channels)
    except BadFile as problem:
        problems.append(f"{field}: '{path}' {problem}")
    except UserError as problem:
        problems.append(str(problem))
    else:
        if len(images) >= 2:
            return images
        if not images and images.left_out:
            problems.append(f"{field}: no image in '{path}' is left that could be read: copy them again")
            return None
        problems.append(
            f"{field}: '{path}' holds {len(images)} image{'s' * (len(images) != 1)} and at least 2 are needed: add more"
        )
    return None


def _split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Training images and held-out ones, at least one of these and two of those, each in their old order."""
    held = min(max(1, round(len(images) * fraction)), len(images) - 2)
    if held < 1:
        raise UserError(
            f"data.valid_fraction: of {len(images)} images none can be held out: add images, "
            "or set -s data.valid_fraction=0"
        )
    shuffled = numpy_generator(seed, "split").permutation(len(images))
    return images.take(np.sort(shuffled[held:])), images.take(np.sort(shuffled[:held]))
