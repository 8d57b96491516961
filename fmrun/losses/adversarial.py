"""Adversarial losses on logits, and the gradient penalties R1 and R2.

Each `d_*` takes logits of real and generated images and returns the discriminator's loss; each `g_*` takes logits of
generated images and, for the relativistic loss, those of the real images they are paired with. Logits of any shape;
all are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feature_matching.discriminator import Logits, scales
from ..feature_matching.statistics import at_least_float32


def d_vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """-log s(D(r)) - log(1 - s(D(g))), s the logistic function (Goodfellow et al. 2014)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def g_vanilla(fake: Tensor, real: Tensor | None) -> Tensor:
    """-log s(D(g)), the non-saturating form (Goodfellow et al. 2014)."""
    return F.softplus(-fake).mean()


def d_lsgan(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 (D(r) - 1)^2 + 1/2 D(g)^2 (Mao et al. 2017, eq. 9)."""
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def g_lsgan(fake: Tensor, real: Tensor | None) -> Tensor:
    """1/2 (D(g) - 1)^2 (Mao et al. 2017, eq. 9)."""
    return 0.5 * (fake - 1).square().mean()


def d_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - D(r)) + max(0, 1 + D(g)) (Lim & Ye 2017; Miyato et al. 2018, eq. 17)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def g_linear(fake: Tensor, real: Tensor | None) -> Tensor:
    """-D(g): the generator's loss for hinge (Miyato et al. 2018, eq. 17) and Wasserstein (Arjovsky et al. 2017)."""
    return -fake.mean()


def d_wgan(real: Tensor, fake: Tensor) -> Tensor:
    """D(g) - D(r) (Arjovsky et al. 2017); keep D Lipschitz with spectral norm or R1."""
    return fake.mean() - real.mean()


def d_r3gan(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(r) - D(g))), image by image (Huang et al. 2024, eq. 3); used with R1 and R2."""
    return F.softplus(fake - real).mean()


def g_r3gan(fake: Tensor, real: Tensor | None) -> Tensor:
    """softplus(-(D(g) - D(r))), image by image (Huang et al. 2024, eq. 3)."""
    assert real is not None
    return F.softplus(real - fake).mean()


def _over_scales(losses: Sequence[Tensor]) -> Tensor:
    """The loss of logits at several scales: the mean of each one's (Wang et al. 2018, pix2pixHD, eq. 3, over D's number)."""
    return losses[0] if len(losses) == 1 else torch.stack(tuple(losses)).mean()


def _of_discriminator(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Logits, Logits], Tensor]:
    def mean(real: Logits, fake: Logits) -> Tensor:
        return _over_scales([loss(r, f) for r, f in zip(scales(real), scales(fake), strict=True)])

    return mean


def _of_generator(loss: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[Logits, Logits | None], Tensor]:
    def mean(fake: Logits, real: Logits | None) -> Tensor:
        reals = scales(real) if real is not None else (None,) * len(scales(fake))
        return _over_scales([loss(f, r) for f, r in zip(scales(fake), reals, strict=True)])

    return mean


D_LOSSES = {
    name: _of_discriminator(loss)
    for name, loss in (
        ("vanilla", d_vanilla),
        ("lsgan", d_lsgan),
        ("hinge", d_hinge),
        ("wgan", d_wgan),
        ("r3gan", d_r3gan),
    )
}
G_LOSSES = {
    name: _of_generator(loss)
    for name, loss in (
        ("vanilla", g_vanilla),
        ("lsgan", g_lsgan),
        ("hinge", g_linear),
        ("wgan", g_linear),
        ("r3gan", g_r3gan),
    )
}


def squared_gradient(logits: Logits, images: Tensor) -> Tensor:
    """E ||grad_x D(x)||^2 over the batch (Mescheder et al. 2018, eq. 9), with a graph for its own gradient.

    `logits` (B, …) of `images` (B, C, H, W); a logit map counts as its mean per image, several scales as theirs.
    """
    per_image = [scale.flatten(1).mean(1) if scale.ndim > 1 else scale for scale in scales(logits)]
    total = per_image[0] if len(per_image) == 1 else torch.stack(per_image).mean(0)
    (gradient,) = torch.autograd.grad(total.sum(), images, create_graph=True)
    return at_least_float32(gradient).square().sum((1, 2, 3)).mean()
