"""The picture of what will be trained on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pair_images import CONFIGS, feed, opened, write_pairs

from fmrun.config.schema import Config
from fmrun.tasks.upscale import UpscaleData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(("kind", "channels"), [("files", 3), ("bicubic", 1), ("chain", 4)])
def test_a_preview_shows_what_is_trained_on(tmp_path: Path, folder: Path, kind: str, channels: int) -> None:
    low = folder / "lr" if kind == "files" else None
    degradation = CONFIGS[kind].model_dump()
    data = {"path": str(folder / "hr"), "lr_path": low and str(low), "patch_size": 32, "channels": channels}
    config = Config.model_validate(
        {"task": "upscale", "generator": {"type": "compact"}, "data": {**data, "degradation": degradation}}
    )
    UpscaleData(config, trained=False).draw(tmp_path / "a" / "preview.png", 2)
    with Image.open(tmp_path / "a" / "preview.png") as image:
        sheet = np.asarray(image).reshape(2 * 258 + 2, 2 * 258 + 2, -1)
    pairs = opened(folder / "hr", low, degradation=CONFIGS[kind], channels=channels)
    lows, highs = feed(pairs, seed=0, global_batch=2, hflip=False, rotate=False).batch(0)
    np.testing.assert_array_equal(sheet[2:258:16, 2:258:16], lows[0, :3].permute(1, 2, 0))
    np.testing.assert_array_equal(sheet[260:516:8, 260:516:8], highs[1, :3].permute(1, 2, 0))
