"""Small image pairs on disk, and short ways to open and draw from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fmrun.config.data import DataConfig
from fmrun.config.degradation import DegradationConfig
from fmrun.data.feed import Feed, Windows
from fmrun.data.pairs import open_pairs
from fmrun.data.store import Images

CHAIN = DegradationConfig(kind="chain")
CONFIGS = {"files": DegradationConfig(), "bicubic": DegradationConfig(), "chain": CHAIN}
SIZES = [(40, 52), (64, 48), (57, 61), (48, 48), (90, 44)]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path, **options)


def both(
    path: Path | str, lr_path: Path | str | None = None, seed: int = 0, trained: bool = True, **options: Any
) -> tuple[Images, Images | None]:
    low = None if lr_path is None else str(lr_path)
    progress = options.pop("progress", None)
    settings = {"scale": 2, "patch_size": 32, **options}
    return open_pairs(DataConfig(path=str(path), lr_path=low, **settings), seed, progress, trained)


def opened(path: Path | str, lr_path: Path | None = None, **options: Any) -> Images:
    return both(path, lr_path, **options)[0]


def windows(data: Images, part: slice = slice(None), **options: Any) -> Windows:
    own = {"patch_size": 32, "rotate": True} if data.has_targets else {}
    return Windows(data, local_slice=part, **{"seed": 3, "global_batch": 6, "hflip": True, **own, **options})


def feed(data: Images, part: slice = slice(None), **options: Any) -> Feed:
    """Of images or pairs; the options are those of `Feed` and of `Windows`."""
    where = {"device": "cpu", "cache": "auto", "workers": 0, "start": 0}
    where = {name: options.pop(name, value) for name, value in where.items()}
    return Feed(windows(data, part, **options), **where)


def write_pairs(root: Path) -> Path:
    """`hr` and `lr` under `root`; each high-resolution image repeats the pixels of its low-resolution one."""
    for i, size in enumerate(SIZES):
        low = picture(*size, seed=i)
        save(root / "lr" / "part" / f"{i}.png", low)
        save(root / "hr" / "part" / f"{i}.bmp", low.repeat(2, 0).repeat(2, 1))
    return root


def made(folder: Path, kind: str, cache: str) -> Images:
    low = folder / "lr" if kind == "files" else None
    return opened(folder / "hr", low, cache=cache, degradation=CONFIGS[kind])


def equal(a: Any, b: Any) -> bool:
    """Of tensors, or tuples of them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(equal, a, b))
