"""Adversarial losses against float64 references, and the gradient penalty against finite differences."""

import math

import pytest
import torch

from fmrun.config.schema import GanLossConfig
from fmrun.config.tables import ADVERSARIAL_LOSSES
from fmrun.losses.adversarial import D_LOSSES, G_LOSSES, squared_gradient

REAL = [2.5, -0.3, 0.9, -4.0]
FAKE = [-1.2, 0.4, 3.0, -0.8]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def average(values: list[float]) -> float:
    return sum(values) / len(values)


D_REFERENCE = {
    "vanilla": lambda r, g: (
        average([-math.log(sigmoid(x)) for x in r]) + average([-math.log(1 - sigmoid(x)) for x in g])
    ),
    "lsgan": lambda r, g: (average([(x - 1) ** 2 for x in r]) + average([x**2 for x in g])) / 2,
    "hinge": lambda r, g: average([max(0, 1 - x) for x in r]) + average([max(0, 1 + x) for x in g]),
    "wgan": lambda r, g: average(g) - average(r),
    "r3gan": lambda r, g: average([math.log(1 + math.exp(-(a - b))) for a, b in zip(r, g, strict=True)]),
}
G_REFERENCE = {
    "vanilla": lambda r, g: average([-math.log(sigmoid(x)) for x in g]),
    "lsgan": lambda r, g: average([(x - 1) ** 2 for x in g]) / 2,
    "hinge": lambda r, g: -average(g),
    "wgan": lambda r, g: -average(g),
    "r3gan": lambda r, g: average([math.log(1 + math.exp(-(b - a))) for a, b in zip(r, g, strict=True)]),
}


def logits(values: list[float], shape: tuple[int, ...] = (4,)) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(shape).requires_grad_()


@pytest.mark.parametrize("shape", [(4,), (2, 1, 2, 1)])
@pytest.mark.parametrize("name", D_LOSSES)
def test_losses_equal_their_published_form(name, shape):
    real, fake = logits(REAL, shape), logits(FAKE, shape)
    assert D_LOSSES[name](real, fake).item() == pytest.approx(D_REFERENCE[name](REAL, FAKE), rel=1e-12)
    assert G_LOSSES[name](fake, real).item() == pytest.approx(G_REFERENCE[name](REAL, FAKE), rel=1e-12)


@pytest.mark.parametrize("name", D_LOSSES)
def test_gradients(name):
    assert torch.autograd.gradcheck(D_LOSSES[name], (logits(REAL), logits(FAKE)))
    assert torch.autograd.gradcheck(lambda g: G_LOSSES[name](g, logits(REAL).detach()), (logits(FAKE),))


@pytest.mark.parametrize("name", D_LOSSES)
def test_discriminator_and_generator_losses_pull_in_opposite_directions(name):
    real, fake = logits(REAL), logits(FAKE)
    on_real, on_fake = torch.autograd.grad(D_LOSSES[name](real, fake), (real, fake))
    (on_g,) = torch.autograd.grad(G_LOSSES[name](fake, real.detach()), fake)
    assert on_real.sum() < 0 < on_fake.sum()
    assert on_g.sum() < 0


def test_only_relativistic_generator_losses_read_real_logits():
    paired = {name for name, row in ADVERSARIAL_LOSSES.items() if row.relativistic}
    assert paired == {"r3gan"}
    for name in set(G_LOSSES) - paired:
        assert G_LOSSES[name](logits(FAKE), None).isfinite()


def test_saturated_logits_stay_finite():
    extreme = torch.tensor([1e4, -1e4])
    for name in D_LOSSES:
        assert D_LOSSES[name](extreme, -extreme).isfinite()
        assert G_LOSSES[name](extreme, -extreme).isfinite()


@pytest.mark.parametrize(("alias", "name"), [("BCE", "vanilla"), ("wasserstein", "wgan"), ("R3GAN", "r3gan")])
def test_aliases(alias, name):
    assert GanLossConfig(type=alias).type == name


def test_squared_gradient_of_a_known_function():
    """D(x) = a sum x^2: gradient 2 a x, squared norm 4 a^2 |x|^2, whose gradient in a is 8 a |x|^2."""
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    penalty = squared_gradient(a * x.square().sum((1, 2, 3)), x)
    norm = x.detach().square().sum((1, 2, 3)).mean()
    assert penalty.item() == pytest.approx(float(4 * 0.49 * norm), rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, a)
    assert gradient.item() == pytest.approx(float(8 * 0.7 * norm), rel=1e-12)


def test_squared_gradient_of_a_logit_map_is_that_of_its_mean_per_image():
    conv = torch.nn.Conv2d(1, 1, 3).double()
    x = torch.randn(3, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    out = conv(x).tanh()
    expected = [torch.autograd.grad(out[i].mean(), x, retain_graph=True)[0].square().sum() for i in range(3)]
    assert squared_gradient(out, x).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-12)
