"""The picture of what will be trained on."""

from pathlib import Path

import numpy as np
import pytest
from pair_images import CONFIGS, feed, opened, write_pairs
from PIL import Image

from fmrun.data.preview import write_preview


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_preview_shows_what_is_trained_on(tmp_path: Path, folder: Path, kind: str, channels: int) -> None:
    low = folder / "lr" if kind == "files" else None
    pairs = opened(folder / "hr", low, degradation=CONFIGS[kind], channels=channels)
    write_preview(pairs, tmp_path / "a" / "preview.png", seed=0, patch_size=32, rows=2)
    with Image.open(tmp_path / "a" / "preview.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[2] == 3
    assert sheet.shape[1] == 12 + 4 * (256 + 12)
    across = 1 if kind == "chain" else 2
    low_patches, high_patches = feed(pairs, seed=0, global_batch=2 * across, hflip=False, rotate=False).batch(0)
    if channels == 3:
        np.testing.assert_array_equal(sheet[44:300:16, 12:268:16], low_patches[0].permute(1, 2, 0))
        right = 12 + (3 if kind == "chain" else 1) * 268
        np.testing.assert_array_equal(sheet[44:300:8, right : right + 256 : 8], high_patches[0].permute(1, 2, 0))
    before = (tmp_path / "a" / "preview.png").read_bytes()
    write_preview(pairs, tmp_path / "a" / "preview.png", seed=0, patch_size=32, rows=2)
    assert (tmp_path / "a" / "preview.png").read_bytes() == before
