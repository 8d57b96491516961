"""How strictly types are checked: `make lint` runs mypy, and this holds what it is asked."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STRICT = ("train", "tasks", "feature_matching", "runs", "losses")


def test_the_rooms_of_the_heart_are_strict() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"][0]
    assert settings.pop("module") == [f"fmrun.{room}.*" for room in STRICT]
    assert settings.pop("implicit_reexport") is False
    assert {"disallow_any_explicit", "disallow_untyped_defs", "warn_return_any"} <= settings.keys()
    assert all(settings.values())


def test_few_lines_are_exempt() -> None:
    lines = [line for file in (ROOT / "fmrun").rglob("*.py") for line in file.read_text().splitlines()]
    assert sum("type: ignore" in line for line in lines) <= 10
