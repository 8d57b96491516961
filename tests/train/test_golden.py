"""Numbers of training stay what they were: rows and pictures of twelve runs, against those kept in `tests/golden`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import golden_runs
from support.commands import CALIBRATION_IMAGES
from support.golden_runs import GOLDEN, RUNS

from fmrun.tasks import generate

KEPT = json.loads((GOLDEN / "runs.json").read_text())["runs"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_numbers_it_gave(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CALIBRATION_IMAGES", CALIBRATION_IMAGES)
    golden_runs.data(workplace)
    golden_runs.run(name)
    made, kept = golden_runs.record(name), KEPT[name]
    assert (made["data"], made["held_out"]) == (kept["data"], kept["held_out"])
    assert [row.keys() for row in made["rows"]] == [row.keys() for row in kept["rows"]]
    for new, old in zip(made["rows"], kept["rows"], strict=True):
        assert new == pytest.approx(old, rel=1e-6, abs=1e-9, nan_ok=True), old["step"]
    pictures = golden_runs.pictures(name)
    assert pictures.keys() == {file.name for file in GOLDEN.glob(f"{name}-*.png")}
    for picture, file in pictures.items():
        new, old = (np.asarray(Image.open(p)).astype(int) for p in (file, GOLDEN / picture))
        assert new.shape == old.shape
        assert abs(new - old).max() <= 1, picture
