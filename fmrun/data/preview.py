"""A picture of what training will see, for a glance before it starts."""

from pathlib import Path

import numpy as np
import torch

from ..grid import save_png
from ..rng import numpy_generator
from .feed import Windows
from .pairs import Pairs
from .store import Window

TILE, GAP = 256, 12
"""Side that a patch is shown at, at least, enlarged by whole factors pixel by pixel; and what lies between patches."""


def write_preview(pairs: Pairs, path: Path, *, seed: int, patch_size: int, rows: int = 4, variants: int = 3) -> None:
    """Write one PNG of `rows` patches: low resolution, enlarged pixel by pixel, beside high.

    A random degradation is shown `variants` times for the same patch. The patches are those of the first draw, neither
    mirrored nor turned. Transparent pixels are shown as they are stored.
    """
    variants = variants if pairs.random else 1
    windows = Windows(pairs, seed=seed, global_batch=rows, patch_size=patch_size)
    scale, factor = pairs.scale, max(1, -(-TILE // patch_size))
    shown = []
    for place, ((image, top, left, _), steps) in enumerate(
        zip(windows.rows(0).tolist(), windows.recipes(0), strict=True)
    ):
        others = [pairs.recipe(numpy_generator(seed, "degrade", variant, place)) for variant in range(1, variants)]
        lows, highs = pairs.cut(image, [Window(top, left, windows.side, windows.side)] * variants, [steps, *others])
        tiles = [*(low.repeat(scale, 0).repeat(scale, 1) for low in lows), highs[0]]
        framed = [np.pad(tile.repeat(factor, 0).repeat(factor, 1), ((0, GAP), (0, GAP), (0, 0))) for tile in tiles]
        shown.append(np.concatenate(framed, axis=1))
    sheet = torch.from_numpy(np.concatenate(shown)[..., :3]).permute(2, 0, 1)
    save_png(sheet.expand(3, -1, -1), path)
