"""A picture of what training will see, for a glance before it starts."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..grid import save_png
from ..rng import numpy_generator
from .feed import Windows
from .pairs import Pairs

TILE = 256
"""Side that a patch is shown at, at least; patches are enlarged by whole factors, pixel by pixel."""

GAP, LINE, HEAD = 12, 15, 44
PAPER, INK, FAINT = (255, 255, 255), (28, 28, 30), (120, 120, 126)
LETTER = 7
"""Pixels to a letter of a caption."""


def write_preview(pairs: Pairs, path: Path, *, seed: int, patch_size: int, rows: int = 4, variants: int = 3) -> None:
    """Write one PNG of `rows` patches: low resolution, enlarged pixel by pixel, beside high.

    A random degradation is shown `variants` times for the same patch, with what was done to it. The patches are those
    of the first draws, neither mirrored nor turned.
    """
    variants, across = (variants, 1) if pairs.random else (1, 2)
    windows = Windows(pairs, seed=seed, global_batch=rows * across, patch_size=patch_size)
    table = windows.rows(0)
    shown = []
    for place, corner in enumerate(windows.corners(0, table)):
        rngs = (numpy_generator(seed, "degrade", variant, place) for variant in range(1, variants))
        corners = [corner, *(corner._replace(steps=pairs.recipe(rng)) for rng in rngs)]
        cut = pairs.cut(int(table[place, 0]), corners, windows.side)
        enlarged = max(1, -(-TILE // patch_size))
        name = pairs.names[table[place, 0]].encode(errors="replace").decode()
        tiles = [
            (f"LR {windows.side} px", low, enlarged * pairs.scale, " · ".join(map(str, corner.steps or ())))
            for corner, (low, _) in zip(corners, cut, strict=True)
        ]
        shown.append([*tiles, (f"HR {patch_size} px", cut[0][1], enlarged, name)])
    tile = enlarged * patch_size
    captions = [[textwrap.wrap(text, tile // LETTER) for *_, text in row] for row in shown]
    height = tile + (1 + max(len(lines) for row in captions for lines in row)) * LINE + GAP
    columns = (variants + 1) * across
    sheet = Image.new("RGB", (GAP + columns * (tile + GAP), HEAD + rows * height + GAP // 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    low = {"files": "LR files", "bicubic": "bicubic LR", "chain": "random degradations"}[pairs.made_by]
    large, small = ImageFont.load_default(17), ImageFont.load_default(12)
    pen.text((GAP, 10), f"x{pairs.scale}, {low}, patches of {patch_size} px", INK, large)
    for k, row in enumerate(shown):
        top = HEAD + k // across * height
        for v, (title, patch, factor, _) in enumerate(row):
            left = GAP + (k % across * (variants + 1) + v) * (tile + GAP)
            sheet.paste(_enlarge(patch, factor), (left, top))
            pen.text((left, top + tile + 2), title, INK, small)
            pen.text((left, top + tile + 2 + LINE), "\n".join(captions[k][v]), FAINT, small, spacing=1)
    save_png(torch.from_numpy(np.array(sheet)).permute(2, 0, 1), path)


def _enlarge(patch: np.ndarray, factor: int) -> Image.Image:
    """RGB, over white where it is transparent."""
    pixels = np.repeat(np.repeat(patch, factor, axis=0), factor, axis=1)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    paper = Image.new("RGB", image.size, PAPER)
    paper.paste(image.convert("RGB"), mask=image.getchannel("A") if image.mode == "RGBA" else None)
    return paper
