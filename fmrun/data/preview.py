"""A picture of what training will see, for a glance before it starts."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..grid import save_png
from ..rng import numpy_generator
from .pair_feed import Patches
from .pair_set import Pairs

TILE = 256
"""Side that a patch is shown at, at least; patches are enlarged by whole factors, pixel by pixel."""

GAP, LINE, HEAD = 12, 15, 44
PAPER, INK, FAINT = (255, 255, 255), (28, 28, 30), (120, 120, 126)


def write_preview(pairs: Pairs, path: Path, *, seed: int, patch_size: int, rows: int = 4, variants: int = 3) -> None:
    """Write one PNG of `rows` patches: low resolution, enlarged pixel by pixel, beside high.

    A random degradation is shown `variants` times for the same patch, with what was done to it. The patches are those
    of the first draws, neither mirrored nor turned.
    """
    sheet = torch.from_numpy(np.array(preview(pairs, seed, patch_size, rows, variants)))
    save_png(sheet.permute(2, 0, 1), path)


def preview(pairs: Pairs, seed: int, patch_size: int, rows: int, variants: int) -> Image.Image:
    """The sheet that `write_preview` writes."""
    variants = variants if pairs.random else 1
    across = 1 if pairs.random else 2
    patches = Patches(pairs, seed=seed, global_batch=rows * across, patch_size=patch_size, hflip=False, rotate=False)
    shown = [_patch(patches, position, seed, variants) for position in range(rows * across)]
    tile = shown[0].high.width
    captions = 1 + max(len(_wrapped(text, tile)) for item in shown for text in (item.name, *item.steps))
    height = tile + captions * LINE + GAP
    columns = (variants + 1) * across
    sheet = Image.new("RGB", (GAP + columns * (tile + GAP), HEAD + rows * height + GAP // 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    info = pairs.info
    low = {"files": "LR files", "bicubic": "bicubic LR", "chain": "random degradations"}[info.low]
    pen.text((GAP, 10), f"x{info.scale}, {low}, patches of {patch_size} px", INK, _font(17))
    for k, item in enumerate(shown):
        top = HEAD + k // across * height
        left = GAP + k % across * (variants + 1) * (tile + GAP)
        side = item.high.width // item.enlarged
        for v, (image, steps) in enumerate(zip(item.lows, item.steps, strict=True)):
            _place(sheet, pen, image, left + v * (tile + GAP), top, f"LR {side // info.scale} px", steps)
        _place(sheet, pen, item.high, left + variants * (tile + GAP), top, f"HR {side} px", item.name)
    return sheet


class _Shown:
    """A high-resolution patch with its low-resolution variants, all of one size, and what was done to each."""

    def __init__(self, name: str, high: Image.Image, enlarged: int, lows: list[Image.Image], steps: list[str]) -> None:
        self.name, self.high, self.enlarged, self.lows, self.steps = name, high, enlarged, lows, steps


def _patch(patches: Patches, position: int, seed: int, variants: int) -> _Shown:
    pairs = patches.pairs
    index = patches.image(position)
    spot = patches.spot(position, index)
    spots = [spot]
    for variant in range(1, variants):
        spots.append(spot._replace(steps=pairs.recipe(numpy_generator(seed, "degrade", variant, position))))
    cut = pairs.patches(index, spots, patches.side)
    side = patches.side * pairs.scale
    enlarged = max(1, -(-TILE // side))
    steps = [" · ".join(map(str, s.steps)) if s.steps else "" for s in spots]
    lows = [_enlarge(low, enlarged * pairs.scale) for low, _ in cut]
    name = pairs.names[index].encode(errors="replace").decode()
    return _Shown(name, _enlarge(cut[0][1], enlarged), enlarged, lows, steps)


def _enlarge(patch: np.ndarray, factor: int) -> Image.Image:
    """RGB, over white where it is transparent."""
    pixels = np.repeat(np.repeat(patch, factor, axis=0), factor, axis=1)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    paper = Image.new("RGB", image.size, PAPER)
    paper.paste(image.convert("RGB"), mask=image.getchannel("A") if image.mode == "RGBA" else None)
    return paper


def _place(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, image: Image.Image, left: int, top: int, title: str, text: str
) -> None:
    sheet.paste(image, (left, top))
    pen.text((left, top + image.height + 2), title, INK, _font(12))
    for i, line in enumerate(_wrapped(text, image.width)):
        pen.text((left, top + image.height + 2 + (i + 1) * LINE), line, FAINT, _font(12))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between steps; a name too long is cut."""
    font = _font(12)
    lines: list[str] = []
    for word in text.split(" · "):
        if lines and font.getlength(f"{lines[-1]} · {word}") <= width:
            lines[-1] += f" · {word}"
        else:
            lines.append(word)
    return [_cut(line, width) for line in lines if line]


def _cut(line: str, width: int) -> str:
    font = _font(12)
    while font.getlength(line) > width:
        line = line[:-4] + "..."
    return line


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or without FreeType
        return ImageFont.load_default()
