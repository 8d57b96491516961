"""Photographs by libvips: read as they are meant to be seen, a region at a time, and written with the depth and alpha they
had.

Grey stays grey, 16 bits stay 16 bits, palettes become colours, CMYK and Lab become sRGB; EXIF orientation is applied,
the ICC profile kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyvips
from PIL import Image, ImageCms, ImageOps

from ..runtime.errors import reading
from ..runtime.files import make_folder, saving, write_atomic
from .files import BadImage, content, opened

WRITTEN = {
    ".png": {"filter": "paeth"},
    ".tif": {"compression": "deflate", "predictor": "horizontal"},
    ".tiff": {"compression": "deflate", "predictor": "horizontal"},
}
"""Formats that hold 16 bits and alpha, and how they are compressed."""
GREY = ("b-w", "grey16")
PROFILE = "icc-profile-data"


def read_photo(path: Path) -> tuple[pyvips.Image, int]:
    """The photograph in a file, upright, 1 (grey) or 3 (sRGB) colours and alpha where it has one, uchar or ushort, and how
    many images the file holds, of which it is the first. Pixels are decoded when they are asked for.

    Raises BadImage; what reads the pixels raises pyvips.Error where they are damaged.
    """
    data = content(path)
    with reading(path), opened(BytesIO(data)) as header:  # of the formats that fmrun reads, and not huge
        try:
            if header.mode == "LAB" or header.format in ("BMP", "AVIF"):
                image = _by_pillow(header)
            else:
                image = pyvips.Image.new_from_buffer(data, "", fail_on="error").autorot()
            return _plain(image), image.get("n-pages") if "n-pages" in image.get_fields() else 1
        except (pyvips.Error, OSError, ValueError, SyntaxError) as error:
            raise BadImage("damaged") from error


def _by_pillow(image: Image.Image) -> pyvips.Image:
    """What libvips cannot read (BMP, Lab of 8 bits) or reads less well: it enlarges the colours of AVIF by repetition."""
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        upright = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        return pyvips.Image.new_from_array(np.asarray(upright), interpretation="srgb")
    upright = ImageOps.exif_transpose(image)
    mode = "L" if upright.mode in ("1", "L") else "RGBA" if upright.mode == "RGBA" else "RGB"
    pixels = np.asarray(upright.convert(mode))
    made = pyvips.Image.new_from_array(pixels, interpretation="b-w" if mode == "L" else "srgb").copy()
    if profile := image.info.get("icc_profile"):
        made.set_type(pyvips.GValue.blob_type, PROFILE, profile)
    return made


def _plain(image: pyvips.Image) -> pyvips.Image:
    """Grey or sRGB, with a profile only where it is of these colours."""
    if image.interpretation == "cmyk" and image.get_typeof(PROFILE):
        image = image.icc_transform("srgb", embedded=True, intent="perceptual").copy()
        image.remove(PROFILE)
    elif image.interpretation == "cmyk":  # as Pillow and browsers do without a profile
        top = top_value(image)
        image = (image[:3] * -1 + top) * (image[3] * -1 + top) / top
        image = (image + 0.5).cast("uchar" if top == 255 else "ushort")
        image = image.copy(interpretation="srgb" if top == 255 else "rgb16")
    elif image.interpretation not in (*GREY, "srgb", "rgb16"):
        image = image.colourspace("srgb")
    if image.format not in ("uchar", "ushort"):
        raise BadImage("deep")
    if image.get_typeof(PROFILE):
        profile, space = image.get(PROFILE), b"GRAY" if image.interpretation in GREY else b"RGB "
        if profile[16:20] != space or profile[36:40] != b"acsp":
            image = image.copy()
            image.remove(PROFILE)
    return image


def top_value(image: pyvips.Image) -> int:
    return 255 if image.format == "uchar" else 65535


def write_photo(path: Path, image: pyvips.Image, scale: int, bands: Iterable[np.ndarray]) -> None:
    """Write what was made of `image`, wholly or not at all: bands (rows, W · scale, C) from the top down, of its type.

    They lie uncompressed beside `path` until all are there. Raises SaveError when the disk refuses.
    """
    raw = path.with_name(f".{path.name}.raw.{os.getpid()}.tmp")
    with saving(path):
        make_folder(path.parent)
        try:
            with raw.open("wb") as file:
                for band in bands:
                    file.write(band.tobytes())
            size = image.width * scale, image.height * scale, image.bands
            how = {"format": image.format, "interpretation": image.interpretation}
            made = pyvips.Image.rawload(str(raw), *size, **how).copy()
            if image.get_typeof(PROFILE):
                made.set_type(pyvips.GValue.blob_type, PROFILE, image.get(PROFILE))
            suffix = path.suffix.lower()
            write_atomic(path, made.write_to_buffer(suffix, keep="icc", **WRITTEN[suffix]))
        finally:
            raw.unlink(missing_ok=True)
