"""Photographs read as they are meant to be seen, and written as PNG with the depth and alpha they had.

Grey stays grey, 16 bits stay 16 bits, palettes become colours, CMYK becomes sRGB; EXIF orientation is applied, the ICC
profile kept.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from .data.files import ALPHA, DECODER_ERRORS, GREY_16, BadImage, content
from .data.files import opened as _opened
from .errors import reading

PNG_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's colour type by the number of channels."""


@dataclass(frozen=True)
class Photo:
    """An image upright, in its own depth."""

    colour: np.ndarray
    """(H, W, 1 or 3), uint8 or uint16."""
    alpha: np.ndarray | None
    """(H, W), of the same type; colours are not multiplied by it."""
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    """What says how the numbers are meant to look, as PNG has it: iCCP, or sRGB, gAMA, cHRM."""
    frames: int = 1
    """How many the file holds; this is the first."""


def read(path: Path) -> Photo:
    """The photograph in a file. Raises BadImage for whatever is wrong with it."""
    with reading(path), _open(data := content(path)) as image:
        try:
            frames = int(getattr(image, "n_frames", 1))
            deep = _rawmode(image)
            image.load()
            if ";16" in deep and image.mode in ("LA", "RGB", "RGBA", "RGBX"):
                colour, alpha = _deep(data, image, deep)
            else:
                colour, alpha = _split(image)
            turn = _orientation(image)
            chunks = _meaning(image, colour.shape[-1])
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            raise BadImage("damaged") from error
    return Photo(_turned(colour, turn), None if alpha is None else _turned(alpha, turn), chunks, frames)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except DECODER_ERRORS:  # damaged metadata beside intact pixels
        return 1


def _open(data: bytes) -> ImageFile.ImageFile:
    image = _opened(BytesIO(data))
    assert isinstance(image, ImageFile.ImageFile)
    return image


def _split(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours and alpha of an image of 8 bits, or of 16 bits of grey."""
    key = image.info.get("transparency")
    if image.mode in GREY_16:
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise BadImage("deep")
        grey = wide.astype(np.uint16)[..., None]
        return grey, _keyed(grey, key)
    if image.mode in ("CMYK", "LAB"):
        image = _srgb(image)
    if image.mode in ALPHA or (image.mode == "P" and key is not None):
        both = np.asarray(image.convert("LA" if image.mode in ("LA", "La") else "RGBA"))
        return both[..., :-1], both[..., -1]
    if image.mode in ("1", "L"):
        grey = np.asarray(image.convert("L"))[..., None]
        return grey, _keyed(grey, 255 * bool(key) if image.mode == "1" and key is not None else key)
    colour = np.asarray(image.convert("RGB"))
    return colour, _keyed(colour, key)


def _keyed(colour: np.ndarray, key: Any) -> np.ndarray | None:
    """Alpha of an image in which one colour means transparent."""
    if not isinstance(key, int | tuple):
        return None
    opaque = (colour != np.asarray(key)).any(axis=-1)
    return opaque.astype(colour.dtype) * np.iinfo(colour.dtype).max


def _rawmode(image: ImageFile.ImageFile) -> str:
    """What a pixel is in the file, in Pillow's words; `;16` is in it if it has 16 bits a channel."""
    for *_, args in image.tile:
        mode = args[0] if isinstance(args, tuple) else args
        return mode if isinstance(mode, str) else ""
    return ""


def _deep(data: bytes, high: ImageFile.ImageFile, rawmode: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours and alpha of 16 bits. Pillow keeps the high byte of every sample, so the low bytes are read by telling it
    that the file has the other byte order."""
    if rawmode == "LA;16B":  # has no other order, but is read like RGBA of 8 bits
        header = data[16:24] + bytes([8, 6]) + data[26:29]
        checked = b"IHDR" + header
        data = data[:12] + checked + struct.pack(">I", zlib.crc32(checked)) + data[33:]
        with _open(data) as image:
            pairs = np.asarray(image).astype(np.uint16)
        grey, alpha = (pairs[..., i] << 8 | pairs[..., i + 1] for i in (0, 2))
        return grey[..., None], alpha
    order = rawmode[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    premultiplied = rawmode.startswith("RGBa")
    kind = rawmode[:-1].replace("RGBa", "RGBA")  # or Pillow divides each byte by itself
    top = _decoded(data, kind + order) if premultiplied else np.asarray(high)
    both = top.astype(np.uint16) << 8 | _decoded(data, kind + ("B" if order == "L" else "L"))
    if not kind.startswith("RGBA"):
        colour = both[..., :3]
        return colour, _keyed(colour, high.info.get("transparency"))
    colour, alpha = both[..., :3], both[..., 3]
    if premultiplied:
        plain = colour * (65535 / np.maximum(alpha, 1))[..., None]
        colour = plain.round().clip(0, 65535).astype(np.uint16)
    return colour, alpha


def _decoded(data: bytes, rawmode: str) -> np.ndarray:
    """The image as if its pixels were stored in this way."""
    with _open(data) as image:
        tiles: list[Any] = []
        for tile in image.tile:
            args: Any = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
            tiles.append(tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args))
        image.tile = tiles
        return np.asarray(image)


def _srgb(image: Image.Image) -> Image.Image:
    """CMYK or LAB as RGB, by its profile if it has one."""
    from PIL import ImageCms

    try:
        icc = image.info.get("icc_profile")
        if image.mode == "CMYK" and not icc:
            return image.convert("RGB")
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else BytesIO(icc or b"")
        made = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")  # type: ignore[arg-type]
        assert made is not None
        return made
    except (ImageCms.PyCMSError, ImportError):
        return image.convert("RGB")


def _meaning(image: Image.Image, channels: int) -> tuple[tuple[bytes, bytes], ...]:
    info = image.info
    icc = info.get("icc_profile")
    space = b"GRAY" if channels == 1 else b"RGB "
    if isinstance(icc, bytes) and icc[36:40] == b"acsp" and icc[16:20] == space:
        return ((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)),)
    if image.format != "PNG":
        return ()
    chunks: list[tuple[bytes, bytes]] = []
    if "srgb" in info:
        chunks.append((b"sRGB", bytes([info["srgb"]])))
    if "gamma" in info:
        chunks.append((b"gAMA", struct.pack(">I", round(info["gamma"] * 100000))))
    if len(info.get("chromaticity", ())) == 8:
        chunks.append((b"cHRM", struct.pack(">8I", *(round(x * 100000) for x in info["chromaticity"]))))
    return tuple(chunks)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, …) stored under this EXIF orientation as they are to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else None)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else None)
    return np.ascontiguousarray(pixels[rows, columns])


def png(
    width: int, height: int, made: Iterator[np.ndarray], chunks: tuple[tuple[bytes, bytes], ...] = ()
) -> Iterator[bytes]:
    """A PNG file part by part, of bands (rows, width, channels), uint8 or uint16. Pillow writes no colours of 16 bits.

    Every row has the filter whose result is smallest in sum, as libpng chooses (PNG specification, 12.7).
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pack = zlib.compressobj(6)
    above: np.ndarray | None = None
    for band in made:
        channels, size = band.shape[-1], band.dtype.itemsize
        lines = band.astype(band.dtype.newbyteorder(">")).reshape(len(band), -1).view(np.uint8)
        if above is None:
            above = np.zeros_like(lines[0])
            head = struct.pack(">IIBBBBB", width, height, 8 * size, PNG_TYPE[channels], 0, 0, 0)
            yield b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            yield b"".join(chunk(kind, content) for kind, content in chunks)
        for i in range(0, len(lines), 64):
            if data := pack.compress(_filtered(lines[i : i + 64], above, channels * size)):
                yield chunk(b"IDAT", data)
            above = lines[min(i + 64, len(lines)) - 1]
    yield chunk(b"IDAT", pack.flush()) + chunk(b"IEND", b"")


def _filtered(lines: np.ndarray, above: np.ndarray, step: int) -> bytes:
    up = np.concatenate([above[None], lines[:-1]])
    left, corner = (np.pad(x, ((0, 0), (step, 0)))[:, : x.shape[1]] for x in (lines, up))
    a, b, c = (x.astype(np.int16) for x in (left, up, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    paeth = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))
    ways = [lines, lines - left, lines - up, lines - ((a + b) >> 1).astype(np.uint8), lines - paeth]
    costs = np.stack([np.minimum(way, np.negative(way)).sum(axis=1, dtype=np.int64) for way in ways])
    best = costs.argmin(axis=0)
    out = np.empty((len(lines), lines.shape[1] + 1), dtype=np.uint8)
    out[:, 0] = best
    for kind, way in enumerate(ways):
        out[best == kind, 1:] = way[best == kind]
    return out.tobytes()
