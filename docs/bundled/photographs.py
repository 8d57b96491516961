"""Makes the bundled photographs from those that scikit-image carries.

`python docs/bundled/photographs.py`, with scikit-image installed (`pip install scikit-image`; made with 0.26.0).
"""

from pathlib import Path

from PIL import Image

import fmrun.data

SPLITS = {
    "train": ("astronaut", "brick", "grass", "gravel", "hubble_deep_field", "rocket"),
    "valid": ("chelsea", "coffee"),
}
"""Split by photograph: no patch of one is both learned from and measured on."""


def make(target: Path) -> None:
    """Write all photographs as PNG under `target`, pixels unchanged."""
    from skimage import data

    for split, names in SPLITS.items():
        (target / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(getattr(data, name)()).save(target / split / f"{name}.png", optimize=True)


if __name__ == "__main__":
    make(Path(fmrun.data.__file__).parent / "bundled" / "photos")
