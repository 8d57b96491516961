"""Image files: found in folders, opened upright, and brought to a size."""

import os
import stat
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, features

from ..config.data import DataConfig
from ..runtime.errors import UserError, reading
from ..runtime.report import counted, note_once
from .places import few

Progress = Callable[[int, int], None]
"""Called with (images decoded so far, images in all)."""

AVIF = "avif" in features.modules and features.check_module("avif")
"""Whether the installed Pillow reads AVIF."""

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Only these are tried, whatever a file calls itself: some of Pillow's other readers start programs (EPS).
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
if AVIF:
    SUFFIXES, FORMATS = (*SUFFIXES, ".avif"), (*FORMATS, "AVIF")

LEGAL_SIZES: tuple[int, ...] = get_args(DataConfig.model_fields["image_size"].annotation)

THUMBNAILS = ("@eaDir", "__MACOSX")
"""Folders that file servers and archivers leave beside images, besides hidden ones."""

SMALLEST_SIDE = 8
"""Images with a shorter side than this (such as tracking pixels) are refused."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GREY_16 = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", *GREY_16)
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")

DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError),
    *(EOFError, struct.error, zlib.error),
)
"""What Pillow's decoders raise over damaged files."""

BAD = {
    "unreadable": ("missing or not readable", "so restore them, give yourself permission (chmod u+r) or remove them"),
    "empty": ("empty files", "so copy them again or remove them"),
    "foreign": (f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]} inside", "so convert or remove them"),
    "damaged": ("cut short or damaged", "so copy them again or remove them"),
    "huge": ("larger than 178 million pixels", "so make them smaller"),
    "deep": ("of more than 16 bits per pixel and channel", "so convert them to 8 or 16 bits"),
    "tiny": (f"smaller than {SMALLEST_SIDE} px", "so remove them"),
    "size": ("", ""),
}
"""What can be wrong with an image, and what to do about it; for `size` that depends on what is wanted."""

UNREADABLE = ("unreadable", "empty", "foreign", "damaged")
"""What is wrong with files that `data.skip_unreadable` leaves out."""


class BadImage(Exception):
    """An image that cannot be used; `kind` is a key of `BAD`, `detail` its size if that is what is wrong."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Entry(NamedTuple):
    """A file: its name relative to the folder, its size in bytes and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str


# ---- one file


def content(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImage."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise BadImage("foreign")
        data = path.read_bytes()
    except OSError as error:
        raise BadImage("unreadable") from error
    if not data:
        raise BadImage("empty")
    return data


def opened(file: Path | IO[bytes]) -> Image.Image:
    """An image whose pixels are yet to be decoded. Raises BadImage."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("huge") from error
    except DECODER_ERRORS as error:
        raise BadImage("foreign") from error
    if image.mode == "F":
        raise BadImage("deep")
    return image


def decode(path: Path, data: bytes | None = None) -> Image.Image:
    """An image file, or its content `data` where that is read already, as it is to be seen, in its own mode. Raises
    BadImage, and UserError where it does not fit in memory."""
    with reading(path), opened(BytesIO(content(path) if data is None else data)) as image:
        try:
            image.load()
        except DECODER_ERRORS as error:
            raise BadImage("damaged") from error
        with suppress(
            *DECODER_ERRORS
        ):  # damaged metadata beside intact pixels: shown as it is stored, like in a browser
            ImageOps.exif_transpose(image, in_place=True)
        return image


def converted(image: Image.Image, channels: int) -> Image.Image:
    """`image` as grey (by luma), RGB or RGBA: 16 bits are rounded to 8; without alpha, it lies over white."""
    if image.mode in GREY_16:
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadImage("deep")
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257
    elif channels != 4 and (image.mode in ALPHA or "transparency" in image.info):
        see_through = image.convert("LA" if image.mode in GREY else "RGBA")
        plain = see_through.convert(see_through.mode[:-1])
        image = Image.new(plain.mode, plain.size, "white")
        image.paste(plain, mask=see_through.getchannel("A"))
    if image.mode == MODES[channels]:
        return image
    return image.convert("RGBA") if channels == 4 else image.convert("RGB").convert(MODES[channels])


class Square(NamedTuple):
    """Images brought to `size` × `size` as `data.fit` says: see there."""

    size: int
    fit: str

    def remedy(self, sizes: set[tuple[int, int]]) -> tuple[str, str]:
        """What is wrong with images of these sizes, and what to add to the command."""
        what = f"larger than {self.size}×{self.size}" if self.fit == "pad" else f"not {self.size}×{self.size}"
        fixes = ["-s data.fit=crop"]
        width, height = min(sizes)
        if len(sizes) == 1 and width == height and width in LEGAL_SIZES and width != self.size:
            fixes.append(f"-s data.image_size={width}")
        elif self.fit == "exact" and max(map(max, sizes)) < self.size:
            fixes.append("-s data.fit=pad")
        return what, "add " + " or ".join(fixes)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Raises BadImage."""
        width, height, size = *image.size, self.size
        if (width, height) == (size, size):
            return image
        if (self.fit == "exact" and (size, width, height) != (32, 28, 28)) or (
            self.fit == "pad" and max(image.size) > size
        ):
            raise BadImage("size", f"{width}×{height}")
        if min(image.size) < SMALLEST_SIDE:
            raise BadImage("tiny")
        if self.fit == "crop":
            side = min(image.size)
            left, top = (width - side) // 2, (height - side) // 2
            box = (left, top, left + side, top + side)
            # resized to their own size, Pillow's images may change
            return image.crop(box) if side == size else image.resize((size, size), Image.Resampling.LANCZOS, box=box)
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(image, ((size - width) // 2, (size - height) // 2))
        return canvas


class Middle(NamedTuple):
    """The middle of images, whose sides are multiples of `multiple`; an odd pixel goes to the bottom or right."""

    multiple: int
    smallest: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """Raises BadImage."""
        if min(image.size) < self.smallest:
            raise BadImage("tiny")
        width, height = (side // self.multiple * self.multiple for side in image.size)
        if image.size == (width, height):
            return image
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


# ---- many files


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings (large images, odd metadata) from the terminal.

    Filters belong to the process, not to a thread: enter it before starting threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.init()
        yield


def each(work: Callable[[int], object], count: int, progress: Progress | None = None) -> None:
    """`work(0)`, …, `work(count − 1)`, by several threads: Pillow decodes outside the interpreter's lock."""
    alone = torch.utils.data.get_worker_info() is not None  # in a worker process, of which there are several
    with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        done = map(work, range(count)) if alone else pool.map(work, range(count))
        for i, _ in enumerate(done, 1):
            if progress:
                progress(i, count)


def find_images(field: str, root: Path) -> list[str]:
    """Relative names of all images under `root`, sorted; what is left out is said: other files, hidden ones, and
    folders of thumbnails. Linked folders are entered once. `field` is the setting named in errors."""
    names: list[str] = []
    others: list[str] = []
    passed: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    failures: list[OSError] = []

    def aside(name: str) -> bool:
        return name.startswith(".") or name in THUMBNAILS

    for folder, folders, files in os.walk(root, followlinks=True, onerror=failures.append):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        passed.update(f"{name} folder" for name in folders if aside(name))
        folders[:] = [name for name in folders if not aside(name)]
        passed["hidden file"] += sum(map(aside, files))
        for file in (file for file in files if not aside(file)):
            image = file.lower().endswith(SUFFIXES)
            (names if image else others).append((Path(folder) / file).relative_to(root).as_posix())
    if failures:
        unreadable = [f"'{error.filename}' ({error.strerror})" for error in failures]
        raise UserError(f"{field}: cannot list {few(unreadable)}: give yourself permission (chmod u+rx)")
    if names:
        endings = Counter(Path(name).suffix.lower() or "extensionless" for name in others)
        parts = [f"{count} {ending}" for ending, count in endings.most_common()]
        parts += [counted(count, what) for what, count in passed.most_common() if count]
        if parts:
            note_once(f"'{root}': {few(parts)} left out")
        return sorted(names)
    arrays = sorted((name for name in others if "ubyte" in name or name.endswith(".npz")), key=lambda n: "labels" in n)
    if arrays:
        raise UserError(f"{field}: '{root}' holds no image files but '{arrays[0]}': give that file, {root / arrays[0]}")
    what = f"no images, only other files ({few(sorted(others))})" if others else "no files"
    raise UserError(f"{field}: '{root}' holds {what}: give a folder with {', '.join(SUFFIXES)} files")
