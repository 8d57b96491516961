"""Makes the bundled images from the training files of Fashion-MNIST.

`python docs/bundled/fashion_mnist.py FOLDER`, where FOLDER holds `train-images-idx3-ubyte.gz` and
`train-labels-idx1-ubyte.gz`. The test files are never read. Of each class 1,000 images are for training and
200 others for validation, both in shuffled order; seed 0 decides which.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import fmrun.data
from fmrun.data.sources import COLUMNS, TILE, read_idx

NAME = "fashion-mnist"
SPLITS = {"train": 1000, "valid": 200}
"""Images per class."""


def choose(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the images of each split."""
    generator = np.random.Generator(np.random.PCG64(0))
    chosen: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for label in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        for split, count in SPLITS.items():
            chosen[split].append(shuffled[:count])
            shuffled = shuffled[count:]
    return {split: generator.permutation(np.concatenate(parts)) for split, parts in chosen.items()}


def write(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """One PNG grid of the images, and their labels as one digit each in the same rows."""
    grid = images.reshape(-1, COLUMNS, TILE, TILE).swapaxes(1, 2).reshape(-1, COLUMNS * TILE)
    Image.fromarray(grid).save(folder / f"{NAME}-{split}.png", optimize=True)
    rows = ["".join(map(str, row)) for row in labels.reshape(-1, COLUMNS)]
    (folder / f"{NAME}-{split}.txt").write_text("\n".join(rows) + "\n")


def make(source: Path, target: Path) -> None:
    """Write all files to `target` from the idx files in `source`."""
    images = read_idx(source / "train-images-idx3-ubyte.gz")
    labels = read_idx(source / "train-labels-idx1-ubyte.gz")
    for split, indices in choose(labels).items():
        write(target, split, images[indices], labels[indices])


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(fmrun.data.__file__).parent / "bundled")
