"""Lambda is the share of the gradient: what is logged is what the weights give, and on average what was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.commands import BARE, TINY, fmrun, good, rows, saved, train

from fmrun.config.schema import FeatureMatchingConfig
from fmrun.data.feed import order
from fmrun.feature_matching.strength import DENSE_MEASUREMENTS, Strength
from fmrun.models.dcgan import DcganDiscriminator, DcganGenerator
from fmrun.runtime.rng import torch_generator

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")
LAYERS = ("block1", "block2", "block3")


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


# ---- what is logged


def distance(match: str, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    if match == "mean":
        return (real.mean(0) - fake.mean(0)).square().mean()

    def covariance(x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(1, -1).flatten(0, -2)
        x = x - x.mean(0)
        return x.T @ x / (len(x) - 1)

    return (covariance(real) - covariance(fake)).square().sum() / (4 * real.shape[1] ** 2)


@pytest.mark.parametrize(("match", "weight", "norm"), [("mean", 0.25, "batch"), ("coral", 2.0, "none")])
def test_the_share_is_what_the_weights_of_two_checkpoints_give(match: str, weight: float, norm: str) -> None:
    """The discriminator as it is after its update of a step, the generator as it was before: without a line of the step."""
    step = 3
    own = ("--lambda-feature", str(weight), "--balance", "gradient", "--layers", "key")
    settings = (f"feature_matching.match={match}", f"discriminator.norm={norm}", "log.every=1", "checkpoint.every=1")
    keep = ("checkpoint.keep_last=9", "train.augment=[]", "eval.every=0")
    train(*own, *(f for s in (*settings, *keep) for f in ("-s", s)), "--steps", str(step + 1), "--name", "run")
    before, after = (saved(RUNS / "run", s).tensors for s in (step, step + 1))
    generator = DcganGenerator(28, 1, 4, 8, torch.Generator())
    discriminator = DcganDiscriminator(28, 1, 4, norm, torch.Generator())
    for net, name, tensors in ((generator, "generator", before), (discriminator, "discriminator", after)):
        net.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
    pixels = torch.from_numpy(np.load("images.npz")["images"])[order(0, 40, 8 * step, 8)]
    real = pixels[:, None].float() / 127.5 - 1
    image = generator(torch.randn(8, 8, generator=torch_generator(0, "latent", step))).detach().requires_grad_()
    out, truth = discriminator(image, LAYERS), discriminator(real, LAYERS).features
    (adversarial,) = torch.autograd.grad(F.softplus(-out.logits).mean(), image, retain_graph=True)
    matching = torch.stack([distance(match, truth[k].detach(), out.features[k]) for k in LAYERS]).mean()
    (gradient,) = torch.autograd.grad(matching, image)
    row = rows(RUNS / "run")[step]
    share = weight * row["fm/balance"] * float(gradient.norm() / adversarial.norm())
    assert row["fm/share"] == pytest.approx(share, rel=1e-3)
    assert row["fm/weight"] == pytest.approx(weight * row["fm/balance"], rel=1e-6)


# ---- its mean


def new_discriminator(step: int) -> float:
    """Log of the gradients' ratio as a DCGAN's is: falling fast at first."""
    return -4 - 1.2 * (1 - math.exp(-step / 40)) - 0.0015 * step


def without_norm(step: int) -> float:
    return -3 + 0.005 * step


def jumping(step: int) -> float:
    return -3 + 2.0 * (step > 150) - 3.0 * (step > 280)


@pytest.mark.parametrize("course", [new_discriminator, without_norm, jumping])
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_share_over_400_steps_is_lambda(course: Callable[[int], float], seed: int) -> None:
    """Batches differ by a fifth, as measured on DCGANs."""
    config = FeatureMatchingConfig()
    strength = Strength(True, config.measure_every, config.balance_decay)
    noise = np.random.default_rng(seed).normal(0, 0.19, 400)
    measured, all_steps = [], []
    for step in range(400):
        ratio = math.exp(course(step) + noise[step])
        if strength.due(step):
            strength.measure(number(1.0), number(ratio), number(0.1))
            measured.append(float(strength.share))
        all_steps.append(0.1 * float(strength.balance) * ratio)
    assert np.mean(measured) == pytest.approx(0.1, rel=0.03)
    assert np.mean(all_steps) == pytest.approx(0.1, rel=0.06)
    worst = [np.mean(all_steps[i : i + 32]) for i in range(DENSE_MEASUREMENTS, 368)]
    assert 0.07 < min(worst) < max(worst) < 0.15


# ---- a statistic that is blind


def test_a_statistic_blind_everywhere_leaves_the_balance_and_is_reported() -> None:
    """A layer whose features are the same whatever the image is."""
    Path("own_nets.py").write_text(
        """
import torch
from torch import nn

class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 4, 28), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 1, 1)
        self.act = nn.PReLU(init=1.0)

    def forward(self, x):
        return self.b(self.act(self.norm(self.a(x))))
"""
    )
    own = ("-s", "discriminator.target=own_nets:Judge", "--layers", "act", "--balance", "gradient", "-s", "log.every=1")
    done = train(*own, "--steps", "3", "--name", "run")
    said = " ".join(done.warnings)
    assert "match 'mean' is blind on layer 'act'" in said
    assert (
        "the statistic is blind on every matched layer, so there is nothing that the balance could weigh: it stays at 1"
        in said
    )
    assert [row["fm/balance"] for row in rows(RUNS / "run")] == [1.0] * 3
    good("resume", "run", "--steps", "5")
    assert [row["fm/balance"] for row in rows(RUNS / "run")] == [1.0] * 5
    assert saved(RUNS / "run", 5).tensors["matching.discriminator.strength.held"]
    assert any("it stays at 1" in line for line in fmrun("train", *BARE, *own, "--dry-run").warnings)


def test_sums_and_tiny_statistics_get_the_configured_gradient_share() -> None:
    """Balances far from 1 in either direction."""
    for name, settings in (
        ("sum", ("-s", "feature_matching.elements=sum")),
        ("coral", ("-s", "feature_matching.match=coral", "--layers", "block2.conv")),
    ):
        train(
            *settings,
            "--lambda-feature",
            "0.1",
            "--balance",
            "gradient",
            "-s",
            "log.every=1",
            "--steps",
            "3",
            "--name",
            name,
        )
        assert [row["fm/share"] for row in rows(RUNS / name)] == pytest.approx([0.1] * 3, rel=0.4)


# ---- the head


def test_the_how_tos_recipe_matches_the_logits() -> None:
    train("--preset", "dcgan-howto", "--steps", "2", "--name", "run", "-s", "log.every=1")
    first, second = rows(RUNS / "run")
    for row in (first, second):
        assert row["fm/head"] == row["fm/distance"] > 0
        assert row["fm/weight"] == pytest.approx(0.1)
        assert 0 < row["fm/share"] < 10
    for arguments in (("run",), ("--preset", "dcgan", "--layers", "head", "-s", "feature_matching.match=sample")):
        probed = good("probe-layers", *arguments, *(() if arguments == ("run",) else TINY), "--json")
        result = json.loads(probed.out)
        assert "matched, and not listed: head" in result["notes"]
        assert not any(layer["selected"] for layer in result["layers"])
        assert result["share"] > 0
