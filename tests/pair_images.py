"""Small image pairs on disk, and short ways to open and draw from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fmrun.config.degradation import DegradationConfig
from fmrun.data.pairs import PairFeed, Pairs, open_pairs

CHAIN = DegradationConfig(kind="chain")
CONFIGS = {"files": None, "bicubic": DegradationConfig(), "chain": CHAIN}
SIZES = [(40, 52), (64, 48), (57, 61), (48, 48), (90, 44)]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path, **options)


def opened(path: Path | str, lr_path: Path | None = None, **options: Any) -> Pairs:
    low = None if lr_path is None else str(lr_path)
    return open_pairs(str(path), low, **{"scale": 2, "patch_size": 32, **options})[0]


def feed(pairs: Pairs, part: slice = slice(None), global_batch: int = 6, **options: Any) -> PairFeed:
    defaults = {
        "seed": 3,
        "device": "cpu",
        "cache": "auto",
        "workers": 0,
        "patch_size": 32,
        "hflip": True,
        "rotate": True,
        "start": 0,
    }
    return PairFeed(pairs, global_batch=global_batch, rank_slice=part, **{**defaults, **options})


def write_pairs(root: Path) -> Path:
    """`hr` and `lr` under `root`; each high-resolution image repeats the pixels of its low-resolution one."""
    for i, size in enumerate(SIZES):
        low = picture(*size, seed=i)
        save(root / "lr" / "part" / f"{i}.png", low)
        save(root / "hr" / "part" / f"{i}.bmp", low.repeat(2, 0).repeat(2, 1))
    return root


def made(folder: Path, kind: str, cache: str) -> Pairs:
    low = folder / "lr" if kind == "files" else None
    return opened(folder / "hr", low, cache=cache, degradation=CONFIGS[kind])


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
