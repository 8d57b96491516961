"""Images from noise, wherever they come from: folders, idx-ubyte, npz, torchvision's small data sets, and the bundled ones."""

import gzip
import lzma
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config.data import DataConfig
from ..runtime.errors import UserError, nearest, reading
from ..runtime.report import counted
from ..runtime.rng import numpy_generator
from .check import Side, scan
from .files import DECODER_ERRORS, BadImage, Progress, Square, find_images
from .places import few, is_named, missing
from .store import Images

BUNDLED = {name: Path(__file__).parent / "bundled" for name in ("fashion-mnist", "stacked-fashion-mnist")}
TILE, COLUMNS = 28, 100
"""The bundled images lie in PNG grids: squares of `TILE` pixels, `COLUMNS` a row."""

STACKS = 5
"""Stacked images per bundled one."""

TORCHVISION: dict[str, dict[str, Any]] = {
    **{name: {"train": True} for name in ("MNIST", "FashionMNIST", "KMNIST", "QMNIST")},
    "EMNIST": {"split": "balanced", "train": True},
    **{name: {"train": True} for name in ("USPS", "CIFAR10", "CIFAR100")},
    "SVHN": {"split": "train"},
    "STL10": {"split": "unlabeled"},
}
"""torchvision's data sets that hold their images as one array, and which part of each is trained on."""

NPZ_IMAGES = ("images", "x_train", "arr_0")
NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)


class BadFile(Exception):
    """What is wrong with a file, and what to do about it: the second half of a sentence."""


def open_images(config: DataConfig, seed: int, progress: Progress | None = None) -> tuple[Images, Images | None]:
    """Training and validation images (or `None`), checked whole: `UserError` names all that cannot be used.

    `seed` decides which images `valid_fraction` holds out. `progress` is told (images decoded, images in all)
    of folders.
    """

    def opened(field: str, path: str, split: str, channels: int | None) -> Images:
        try:
            raw = read_array(path, config, split)
        except BadFile as problem:
            raise UserError(f"{field}: '{path}' {problem}") from problem
        images = (
            _folder(field, path, config, channels, progress)
            if raw is None
            else _array(field, path, raw, config, channels)
        )
        if len(images) < 2:
            raise UserError(
                f"{field}: '{path}' holds {counted(len(images), 'image')} and at least 2 are needed: add more"
            )
        return images

    return open_splits(config, seed, opened, [], least=2)


def open_splits(
    config: DataConfig,
    seed: int,
    opened: Callable[[str, str, str, int | None], Images],
    problems: list[str],
    least: int,
) -> tuple[Images, Images | None]:
    """Training data and those held out, which are `data.valid_path`, the bundled ones for validation, or
    `data.valid_fraction` of the others, of which `least` are left; UserError if there are `problems`.

    `opened` is given the field, the path, the split (`train` or `valid`) and the channels.
    """

    def tried(field: str, path: str, split: str, channels: int | None) -> Images | None:
        try:
            with reading(path):
                return opened(field, path, split, channels)
        except UserError as problem:
            problems.append(str(problem))
            return None

    train = tried("data.path", config.path, "train", config.channels)
    channels = config.channels if train is None else train.channels
    valid = None
    if config.valid_path is not None:
        valid = tried("data.valid_path", config.valid_path, "valid", channels)
    elif train is not None and is_bundled(config.path) and config.lr_path is None:
        valid = tried("data.path", config.path, "valid", channels)
    if problems:
        raise UserError("; ".join(problems))
    assert train is not None
    if valid is not None or not config.valid_fraction:
        return train, valid
    count = len(train)
    held = min(max(1, round(count * config.valid_fraction)), count - least)
    if held < 1:
        raise UserError(
            f"data.valid_fraction: of {counted(count, 'image')} none can be held out: add images, or set "
            "-s data.valid_fraction=0"
        )
    shuffled = numpy_generator(seed, "split").permutation(count)
    return train.take(np.sort(shuffled[held:])), train.take(np.sort(shuffled[:held]))


def is_bundled(path: str) -> bool:
    """Whether these images come with fmrun."""
    return path.lower().startswith("bundled:")


def _folder(field: str, path: str, config: DataConfig, channels: int | None, progress: Progress | None) -> Images:
    root = Path(path).expanduser()
    names = find_images(field, root)
    side = Side(field, root, names, Square(config.image_size, config.fit))
    chosen, keep = scan([side], config, channels, progress)
    if said := side.report(len(names), config.skip_unreadable):
        raise UserError(said[0])
    return side.images(chosen, keep)


def _array(field: str, path: str, raw: np.ndarray, config: DataConfig, channels: int | None) -> Images:
    """`raw`, uint8 `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)`, with the size that `config` asks for."""
    images = raw
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"{field}: '{path}' holds an array of shape {raw.shape}: "
            "images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
        )
    count, height, width = images.shape[:3]
    shape = Square(config.image_size, config.fit)
    try:
        shape(Image.new("L", (width, height)))
    except BadImage as problem:
        what, fix = shape.remedy({(width, height)}) if problem.kind == "size" else ("too small", "take other images")
        raise UserError(f"{field}: the {count} images in '{path}' are {width}×{height}, {what}: {fix}") from problem
    if channels == 3 and images.shape[3] == 1:
        images = np.repeat(images, 3, axis=3)
    elif channels == 1 and images.shape[3] == 3:
        images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    size = shape.size
    if shape.fit == "crop" and (height, width) != (size, size):
        pictures = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)
        images = np.stack([np.asarray(shape(picture)) for picture in pictures]).reshape(count, size, size, -1)
    else:
        gaps = [((size - side) // 2, (size - side + 1) // 2) for side in (height, width)]
        images = np.pad(images, [(0, 0), *gaps, (0, 0)])
    return Images.of_array(path, images)


def read_array(path: str, config: DataConfig, split: str) -> np.ndarray | None:
    """The array that `path` names, or `None` if `path` is a folder. Raises `BadFile`."""
    scheme, _, name = path.partition(":")
    if is_named(path, "generate"):
        return READERS[scheme.lower()](name, split, config.root)
    if why := missing(path, "generate"):
        raise BadFile(why)
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            return None
        if not place.is_file():
            raise BadFile("is neither a folder nor a file: give one of them")
        return read_file(place)
    except PermissionError as error:
        raise BadFile("is not readable: give yourself permission (chmod u+r)") from error
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror or error}): give another folder or file of images") from error


def read_file(path: Path) -> np.ndarray:
    """An idx-ubyte (also gzipped) or npz file, told apart by content; `BadFile` says what it is instead."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"PK"):
        return read_npz(path)
    if start.startswith((b"\x1f\x8b", b"\0\0")) or "ubyte" in path.name:
        images = read_idx(path)
        if images.ndim == 1:
            raise BadFile("holds labels: give the file of images")
        return images
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")):
        raise BadFile(f"is a single image: give its folder, {path.parent}")
    raise BadFile("is of unknown type: give a folder of images, an idx-ubyte(.gz) or .npz file, or torchvision:NAME")


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx-ubyte file, gzipped or not: magic `00 00 08 ndim`, big-endian sizes, bytes."""
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        if data[:3] != b"\0\0\x08":
            raise BadFile(
                "is no idx-ubyte file, or its numbers are not bytes: convert them to 0 to 255, or give other images"
            )
        head = 4 + 4 * data[3]
        return np.frombuffer(data, np.uint8, offset=head).reshape(np.frombuffer(data[4:head], ">u4"))
    except (EOFError, OSError, IndexError, ValueError, zlib.error) as error:
        raise BadFile("is cut short or damaged: copy it again") from error


def read_npz(path: Path) -> np.ndarray:
    """The images of an npz file, without unpickling anything."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = list(file.files)
            key = next((name for name in NPZ_IMAGES if name in names), names[0] if len(names) == 1 else None)
            if key is None:
                raise BadFile(
                    f"has {'arrays ' + few(names) if names else 'no arrays'}: name the one with the images 'images'"
                )
            images = file[key]
    except NPZ_ERRORS as error:
        if "pickle" in str(error):
            raise BadFile("holds Python objects, which are not loaded: save plain uint8 arrays") from error
        raise BadFile("is cut short or damaged, or no .npz file: copy it again") from error
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise BadFile(f"holds '{key}' as {getattr(images, 'dtype', 'no array')}: save it as uint8, 0 to 255")
    return images


def read_torchvision(name: str, split: str, root: str) -> np.ndarray:
    """The training part of one of torchvision's data sets, already downloaded under `root`."""
    if name not in TORCHVISION:
        known = list(TORCHVISION)
        raise BadFile(f"is not among torchvision:{', '.join(known)}{nearest(name, known)}")
    from torchvision import datasets  # takes a second to import

    options = TORCHVISION[name]
    place = os.path.expanduser(root)
    try:
        data = getattr(datasets, name)(place, download=False, **options)
    except ModuleNotFoundError as error:
        raise BadFile(f"needs {error.name}: pip install {error.name}") from error
    except (*DECODER_ERRORS, AssertionError, pickle.PickleError) as error:  # files are absent or damaged
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "train")
        call = f"{name}({place!r}, download=True{', ' + shown if shown else ''})"
        raise BadFile(
            f"is not, or not whole, under data.root '{root}': "
            f'get it with python -c "from torchvision.datasets import *; {call}"'
        ) from error
    images = np.asarray(data.data)
    return images.transpose(0, 2, 1) if name == "EMNIST" else images  # its files hold every letter transposed


def read_bundled(name: str, split: str, root: str = "") -> np.ndarray:
    """`split` ("train" or "valid") of the images that come with fmrun."""
    if name not in BUNDLED:
        known = list(BUNDLED)
        raise BadFile(f"is not among bundled:{', '.join(known)}{nearest(name, known)}")
    if name.startswith("stacked-"):
        return stack(read_bundled(name.removeprefix("stacked-"), split), split)
    with Image.open(BUNDLED[name] / f"{name}-{split}.png", formats=("PNG",)) as image:
        grid = np.asarray(image)
    rows = grid.shape[0] // TILE
    return grid.reshape(rows, TILE, COLUMNS, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)


def stack(images: np.ndarray, split: str) -> np.ndarray:
    """Colour images `(STACKS · N, 3, H, W)` whose channels are three of the grey ones `(N, H, W)`, drawn independently
    and always the same (Metz et al. 2017, Unrolled GANs, with another set of digits)."""
    rng = numpy_generator(0, "stack", ("train", "valid").index(split))
    return images[rng.integers(len(images), size=(STACKS * len(images), 3))]


READERS: dict[str, Callable[[str, str, str], np.ndarray]] = {"bundled": read_bundled, "torchvision": read_torchvision}
"""By the rows of `config.tables.SOURCES`: uint8 images of a name, a split (`train` or `valid`) and `data.root`."""
