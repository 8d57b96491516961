"""Adding is local: one place in the code and one row in `config/tables.py`, or, for a command, one file.

One of each kind is added to a copy of fmrun and used by the commands.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import write_images

import fmrun
from fmrun.config import tables
from fmrun.data import sources
from fmrun.feature_matching import statistics
from fmrun.losses import adversarial
from fmrun.metrics import distribution
from fmrun.models import upscalers
from fmrun.tasks import Task

ROWS = {
    "STATISTICS": '"largest": Row("largest value at each position", ("criterion",)),',
    "ADVERSARIAL_LOSSES": '"exponential": AdversarialRow("exponential"),',
    "DISCRIMINATORS": '"linear": NetRow("one linear layer after another"),',
    "GENERATORS": '"linear": NetRow("one linear layer after another", ("latent_dim",), FROM_LATENTS),',
    "METRICS": '"centre": MetricRow("distance of centres", "lower", of_features=True),',
    "SOURCES": '"ramp": SourceRow("grey ramps"),',
    "TASKS": """"sphere": TaskRow(
        has_targets=False, samples_of="latents", data="a folder or file of images", sizes="generator.width"
    ),""",
}
"""What is written into `config/tables.py`."""

ADDED: dict[str, dict[str, str]] = {
    "feature_matching/statistics.py": {
        "STATISTICS: dict": '''def largest(real: Tensor, fake: Tensor, *, criterion: str = "l2", eps: float = 1e-6, **_) -> Tensor:
    """Distance between the largest values over the batch."""
    return pointwise(real.amax(0) - fake.amax(0), criterion, eps).mean()


STATISTICS: dict''',
        '    "mean": mean,\n': '    "mean": mean,\n    "largest": largest,\n',
    },
    "losses/adversarial.py": {
        "def _over_scales": '''def d_exponential(real: Tensor, fake: Tensor) -> Tensor:
    """exp(-D(r)) + exp(D(g)), as in boosting."""
    return (-real).exp().mean() + fake.exp().mean()


def g_exponential(fake: Tensor, real: Tensor | None) -> Tensor:
    """exp(-D(g))."""
    return (-fake).exp().mean()


def _over_scales''',
        '("hinge", d_hinge),': '("hinge", d_hinge), ("exponential", d_exponential),',
        '("hinge", g_linear),': '("hinge", g_linear), ("exponential", g_exponential),',
    },
    "metrics/distribution.py": {
        'return {"kid"': '''centre = float((made.mean(0) - real.mean(0)).norm())
    return {"centre": centre, "kid"''',
    },
    "data/sources.py": {
        "READERS: dict": '''def read_ramps(name: str, split: str, root: str) -> np.ndarray:
    """As many ramps as `name` says."""
    return np.broadcast_to(np.arange(0, 252, 9, dtype=np.uint8), (int(name), 28, 28)).copy()


READERS: dict''',
        '{"bundled": read_bundled,': '{"ramp": read_ramps, "bundled": read_bundled,',
    },
}
"""Functions written into a room, by what they are written before or in the place of."""

FILES = {
    "models/linear.py": '''"""Networks of linear layers."""

from torch import nn

from ..feature_matching.given import discriminator_of


def generator(config, image, rng):
    return nn.Sequential(nn.Linear(config.latent_dim, 64), nn.ReLU(), nn.Linear(64, 784), nn.Unflatten(1, image), nn.Tanh())


def discriminator(config, image, rng):
    layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    return discriminator_of(layers, image)
''',
    "cli/hello.py": '''"""`hello`."""


def hello() -> int:
    """Greet."""
    print("hello")
    return 0
''',
    "tasks/sphere.py": '''"""Images from latents on a sphere, whose mean is drawn to that of real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn

from ..config.schema import Config
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
''',
}

SMALL = "--device cpu --batch-size 8 -s data.image_size=28 -s generator.width=4 -s discriminator.width=4"
LINEAR = "-s generator.type=linear -s discriminator.type=linear"
ADDED_CHOICES = f"{LINEAR} -s feature_matching.match=largest -s losses.gan.type=exponential --layers all"
COMMANDS = (
    f"train --preset dcgan-fm -s task=sphere --data images.npz --steps 4 --name one -s log.every=2 {SMALL}",
    "resume one --steps 6",
    "sample one --num 4 --out samples.png",
    "eval one --num 20 --json",
    "probe-layers one",
    f"sweep --preset dcgan-fm -s task=sphere --data images.npz --steps 4 --over lambda_feature=0.1 --seeds 1 --name swept {SMALL}",
    "compare one swept/weight-0.1_seed-0 --html page.html --csv -",
    f"train --preset dcgan-fm --data ramp:40 --steps 2 --name two --device cpu --batch-size 8 -s data.image_size=28 {ADDED_CHOICES}",
    "hello",
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


def replaced(text: str, before: str, after: str) -> str:
    assert text.count(before) == 1, before
    return text.replace(before, after)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where all of COMMANDS have run, and what they wrote to stdout."""
    place = tmp_path_factory.mktemp("adding")
    package = place / "source" / "fmrun"
    shutil.copytree(Path(fmrun.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package.parent / "presets").symlink_to(Path(fmrun.__file__).parents[1] / "presets")
    for name, text in FILES.items():
        (package / name).write_text(text)
    for name, changes in ADDED.items():
        text = (package / name).read_text()
        for before, after in changes.items():
            text = replaced(text, before, after)
        (package / name).write_text(text)
    rows = (package / "config" / "tables.py").read_text()
    for name, row in ROWS.items():
        rows = replaced(rows, f"\n{name} = {{\n", f"\n{name} = {{\n    {row}\n")
    (package / "config" / "tables.py").write_text(rows)
    write_images(place / "images.npz", 80)
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CALLS, *COMMANDS]
    end = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stderr
    return place, end.stdout


def test_a_task(done: tuple[Path, str]) -> None:
    place, _ = done
    rows = [json.loads(line) for line in (place / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["loss/mean"] > 0 for row in rows)
    assert "fm/share.mean" in rows[0]
    assert (place / "samples.png").is_file()
    assert "latents" in (place / "page.html").read_text()


@pytest.mark.parametrize(
    "field",
    [
        lambda config: config["feature_matching"]["match"] == "largest",
        lambda config: config["losses"]["gan"]["type"] == "exponential",
        lambda config: config["discriminator"]["type"] == "linear",
        lambda config: config["generator"]["type"] == "linear",
        lambda config: config["data"]["path"] == "ramp:40",
    ],
    ids=["statistic", "adversarial loss", "discriminator", "generator", "source"],
)
def test_a_choice(done: tuple[Path, str], field: Callable[[dict], bool]) -> None:
    run = done[0] / "runs" / "two"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert field(json.loads((run / "config.json").read_text()))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["fm/distance"] > 0


def test_a_score(done: tuple[Path, str]) -> None:
    (record,) = json.loads((done[0] / "runs" / "one" / "evaluations.json").read_text())["evaluations"]
    assert record["metrics"]["centre_mobilenet_v2"] > 0
    assert "centre_mobilenet_v2" in done[1]


def test_a_command(done: tuple[Path, str]) -> None:
    assert done[1].splitlines()[-1] == "hello"


def test_the_tables_name_what_the_code_has() -> None:
    assert tables.STATISTICS.keys() == statistics.STATISTICS.keys()
    assert tables.ADVERSARIAL_LOSSES.keys() == adversarial.D_LOSSES.keys() == adversarial.G_LOSSES.keys()
    assert tables.SOURCES.keys() == sources.READERS.keys()
    assert distribution.scores(torch.rand(10, 3), torch.rand(10, 3)).keys() == set(distribution.SCORES)
    upscaling = {name for name, row in tables.GENERATORS.items() if "upscale" in row.tasks}
    assert upscaling == upscalers.ARCHITECTURES.keys()
    models = Path(upscalers.__file__).parent
    for name in {*tables.DISCRIMINATORS, *(tables.GENERATORS.keys() - upscaling)}:
        assert (models / f"{name}.py").is_file()
    for name in tables.TASKS:
        assert (Path(fmrun.__file__).parent / "tasks" / f"{name}.py").is_file()


def test_the_step_and_the_loop_need_little_of_a_task() -> None:
    members = {name for name in (*Task.__annotations__, *vars(Task)) if not name.startswith("_")}
    assert len(members) == 12
