"""A task is one file and one row: a third one is trained, resumed, sampled, measured, compared and swept by the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import write_images

import fmrun
from fmrun.tasks import Task

SPHERE = '''"""Images from latents on a sphere, whose mean is drawn to that of real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn

from ..config import Config
from . import Batch, Raw
from .generate import KIND as FROM_LATENTS
from .generate import Generate, build_generator

MEAN_WEIGHT = 0.5


class OnSphere(nn.Module):
    """A generator of latents (n, d), which it puts on the sphere of radius sqrt(d) first."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, latents: Tensor) -> Tensor:
        return self.net(latents / latents.norm(dim=1, keepdim=True) * sqrt(latents.shape[1]))


def generator(config: Config, channels: int) -> nn.Module:
    return OnSphere(build_generator(config, channels))


class Sphere(Generate):
    def prepare(self, raw: Raw, draw: int) -> list[Batch]:
        return [replace(batch, condition=batch.real.mean((2, 3))) for batch in super().prepare(raw, draw)]

    def image_weights(self, step: int) -> dict[str, float]:
        return {"mean": MEAN_WEIGHT}

    def image_losses(
        self, batch: Batch, image: Tensor, names: Sequence[str], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        assert batch.condition is not None
        distance = (image.mean((0, 2, 3)) - batch.condition.mean(0)).square().mean()
        return {name: distance * weights[name] for name in names}


KIND = replace(FROM_LATENTS, task=Sphere, generator=generator)
'''

ROW = """    "sphere": TaskRow(
        has_targets=False,
        samples_of="latents",
        data="a folder or file of images",
        schemes=("bundled:",),
        sizes="generator.width",
    ),
"""

SMALL = "--device cpu --batch-size 8 -s data.image_size=28 -s generator.width=4 -s discriminator.width=4"
COMMANDS = (
    f"train --preset dcgan-fm -s task=sphere --data images.npz --steps 4 --name one -s log.every=2 {SMALL}",
    "resume one --steps 6",
    "sample one --num 4 --out samples.png",
    "eval one --num 20",
    "probe-layers one",
    f"sweep --preset dcgan-fm -s task=sphere --data images.npz --steps 4 --over lambda_feature=0.1 --seeds 1 --name swept {SMALL}",
    "compare one swept/weight-0.1_seed-0 --html page.html --json",
)
"""In one process but for the sweep's: torch takes seconds to import."""

CALLS = """
import sys
from fmrun.__main__ import main
for command in sys.argv[1:]:
    sys.argv = ["fmrun", *command.split()]
    try:
        main()
    except SystemExit as exit:
        assert exit.code == 0, (command, exit.code)
"""


def test_the_step_and_the_loop_need_little_of_a_task() -> None:
    members = {name for name in (*Task.__annotations__, *vars(Task)) if not name.startswith("_")}
    assert len(members) == 12


def test_a_third_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "with-sphere" / "fmrun"
    shutil.copytree(Path(fmrun.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "tasks" / "sphere.py").write_text(SPHERE)
    (package.parent / "presets").symlink_to(Path(fmrun.__file__).parents[1] / "presets")
    tables = package / "config" / "tables.py"
    tables.write_text(tables.read_text().replace("TASKS = {\n", "TASKS = {\n" + ROW, 1))
    write_images(tmp_path / "images.npz", 80)
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, *COMMANDS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["loss/mean"] > 0 for row in rows)
    assert "fm/share.mean" in rows[0]
    assert (tmp_path / "samples.png").is_file()
    assert "latents" in (tmp_path / "page.html").read_text()
