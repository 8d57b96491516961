"""One image: from a file's bytes to uint8 `(C, S, S)`, or a `BadImage` that says what is wrong with it."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from ..errors import reading

AVIF = "avif" in features.modules and features.check_module("avif")
"""Whether the installed Pillow reads AVIF."""

SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    *((".avif",) if AVIF else ()),
)
# Only these are tried, whatever a file calls itself: some of Pillow's other readers start programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if AVIF else ()))
SMALLEST_SIDE = 8
"""Images with a shorter side than this (such as tracking pixels) are refused, whatever `fit` says."""

GREY_16 = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", *GREY_16)
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

BAD = {
    "missing": ("missing, or broken links", "so restore or remove them"),
    "denied": ("not readable", "so give yourself permission (chmod u+r)"),
    "unreadable": ("not readable from this disk", "so copy them elsewhere or remove them"),
    "empty": ("empty files", "so copy them again or remove them"),
    "foreign": (f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]} inside", "so convert or remove them"),
    "damaged": ("cut short or damaged", "so copy them again or remove them"),
    "huge": ("larger than 178 million pixels", "so make them smaller"),
    "deep": ("of more than 16 bits a pixel and channel", "so convert them to 8 or 16 bits"),
    "tiny": (f"smaller than {SMALLEST_SIDE} px", "so remove them"),
    "size": ("", ""),
}
"""What can be wrong with an image, and what to do about it; for `size` that depends on the other images."""

UNREADABLE = ("missing", "denied", "unreadable", "empty", "foreign", "damaged")
"""What is wrong with files that `data.skip_unreadable` leaves out."""


class BadImage(Exception):
    """An image that cannot be used; `kind` is a key of `BAD`, `detail` its size if that is what is wrong."""

    def __init__(self, kind: str, detail: str = "") -> None:
        assert kind in BAD, kind
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Header:
    """What is known of an image file before it is decoded; its size is that of the upright image."""

    width: int
    height: int
    grey: bool


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings (large images, odd metadata) from the terminal.

    Filters belong to the process, not to a thread: enter it before starting threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.init()
        yield


def to_float(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 images to [-1, 1]: x / 127.5 − 1, computed in at least fp32 and then rounded to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return images.to(wide).div_(127.5).sub_(1).to(dtype)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to uint8, rounded and clamped; not-a-number becomes grey. Inverse of `to_float`."""
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    return images.to(wide).nan_to_num(nan=0.0).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def check_size(width: int, height: int, size: int, fit: str) -> None:
    """Raise `BadImage` if an image of this size cannot become `size` × `size` under `fit`."""
    padded = size == 32 and (width, height) == (28, 28)
    if fit == "exact" and (width, height) != (size, size) and not padded:
        raise BadImage("size", f"{width}×{height}")
    if min(width, height) < SMALLEST_SIDE:
        raise BadImage("tiny")
    if fit == "pad" and max(width, height) > size:
        raise BadImage("size", f"{width}×{height}")


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """Zeros around `(…, H, W)` to `(…, size, size)`; an odd row or column goes to the bottom or right."""
    gaps = [size - side for side in images.shape[-2:]]
    return np.pad(images, [(0, 0)] * (images.ndim - 2) + [(gap // 2, gap - gap // 2) for gap in gaps])


def crop(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` (antialiased Lanczos), then the centre square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return image.crop(box)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def fit_image(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """An `L` or `RGB` image as uint8 `(C, size, size)`."""
    check_size(image.width, image.height, size, fit)
    if fit == "crop":
        image = crop(image, size)
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return pixels if pixels.shape[1:] == (size, size) else pad(pixels, size)


def read_header(path: Path) -> Header:
    """Size and kind of an image file from its first bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise BadImage("foreign")
        with path.open("rb") as file:
            if not file.read(1):
                raise BadImage("empty")
            file.seek(0)
            with _opened(file) as image:
                # Asking a PNG for its orientation decodes it whole unless the metadata comes first.
                known = image.format != "PNG" or "exif" in image.info
                width, height = image.size
                if known and _orientation(image) in (5, 6, 7, 8):
                    width, height = height, width
                return Header(width, height, image.mode in GREY)
    except OSError as error:
        raise _unreadable(error) from error


def decode(path: Path, channels: int, size: int, fit: str, data: bytes | None = None) -> np.ndarray:
    """An image file, or its content `data` where that is read already, as uint8 `(channels, size, size)`, upright, without
    alpha (over white)."""
    with reading(path), _opened(BytesIO(content(path) if data is None else data)) as image:
        try:
            image.load()
            upright = _upright(image)
            flat = _flat(upright, "L" if channels == 1 else "RGB")
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            raise BadImage("damaged") from error
    return fit_image(flat, size, fit)


def content(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImage."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error
    if not data:
        raise BadImage("empty")
    return data


def _unreadable(error: OSError) -> BadImage:
    if isinstance(error, PermissionError):
        return BadImage("denied")
    return BadImage("missing" if isinstance(error, FileNotFoundError) else "unreadable")


def _opened(file: object) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)  # type: ignore[arg-type]
    except Image.DecompressionBombError as error:
        raise BadImage("huge") from error
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage("foreign") from error
    if image.mode == "F":
        raise BadImage("deep")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata beside intact pixels: shown as it lies, like in a browser
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode` (`L` by luma, or `RGB`), 16 bits rounded to 8, transparency over white."""
    if image.mode in GREY_16:
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadImage("deep")
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257
    elif image.mode in ALPHA or "transparency" in image.info:
        see_through = image.convert("LA" if image.mode in GREY else "RGBA")
        plain = see_through.convert(see_through.mode[:-1])
        image = Image.new(plain.mode, plain.size, "white")
        image.paste(plain, mask=see_through.getchannel("A"))
    return image if image.mode == mode else image.convert("RGB").convert(mode)
