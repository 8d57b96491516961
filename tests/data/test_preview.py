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


@pytest.mark.parametrize(("kind", "channels"), [("files", 3), ("bicubic", 1), ("chain", 4)])
def test_a_preview_shows_what_is_trained_on(tmp_path: Path, folder: Path, kind: str, channels: int) -> None:
    low = folder / "lr" if kind == "files" else None
    pairs = opened(folder / "hr", low, degradation=CONFIGS[kind], channels=channels)
    write_preview(pairs, tmp_path / "a" / "preview.png", seed=0, patch_size=32, rows=2)
    with Image.open(tmp_path / "a" / "preview.png") as image:
        sheet = np.asarray(image)
    across = 4 if kind == "chain" else 2
    assert sheet.shape == (2 * 268, across * 268, 3)
    lows, highs = feed(pairs, seed=0, global_batch=2, hflip=False, rotate=False).batch(0)
    np.testing.assert_array_equal(sheet[:256:16, :256:16], lows[0, :3].permute(1, 2, 0).expand(-1, -1, 3))
    right = (across - 1) * 268
    np.testing.assert_array_equal(
        sheet[268:524:8, right : right + 256 : 8], highs[1, :3].permute(1, 2, 0).expand(-1, -1, 3)
    )
