"""Images as PNG files: grids and single ones, the same bytes for the same images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..runtime.files import make_folder, saving, write_atomic
from .store import to_uint8


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Tile images (N, C, H, W), uint8 or in [-1, 1], row by row into one uint8 image (C, H', W') on white; nearly square unless
    `columns` is given."""
    n, c, h, w = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu() if images.dtype == torch.uint8 else to_uint8(images.cpu())):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def encode_png(image: Tensor) -> bytes:
    """A uint8 image (C, H, W), C 1 or 3, as a PNG file."""
    array = image.movedim(0, -1).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image (C, H, W), C 1 or 3, whole or not at all. Raises SaveError when the disk refuses."""
    data = encode_png(image)
    with saving(path):
        make_folder(path.parent)
        write_atomic(path, data)
