"""The step as it is published, with nothing of fmrun's own step: what fmrun is measured against.

In units of one discriminator forward, g for the generator's:

    both          D's update    D(real) 1 + 2    D(fake) 1 + 2    G forward g
    plain         G's update    D(fake) 1 + 2                                                 G backward 2g
    matching      G's update    D(fake) 1 + 2    D(fake) again 1 + 2    D(real) 1    G forward g, backward 2g
    separate      G's update    D(fake) 1 + 1    D(fake) again 1 + 1    D(real) 1    G backward 2g

9 + 3g, 13 + 4g and 11 + 3g. `matching` is the usual recipe (fresh images for the generator, features by forward hooks
from passes of their own, a discriminator whose weight gradients are computed and thrown away); `separate` freezes the
discriminator and keeps the images, as super-resolution trainers do, and still passes the adversarial and the feature
term one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.pixel import charbonnier
from ..models.dcgan import DcganDiscriminator, DcganGenerator
from ..models.munet import MUNet
from ..models.norm import advance_spectral
from ..state import State
from ..tasks import Batch


def dcgan_generator(net: DcganGenerator) -> nn.Sequential:
    """The same weights in the usual form."""
    modules: list[nn.Module] = [net.project, net.norm, nn.ReLU(inplace=True)]
    for block in net.blocks:
        modules += [block["conv"], block["norm"], nn.ReLU(inplace=True)]  # type: ignore[index]
    return nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), *modules, net.image, nn.Tanh())


def dcgan_discriminator(net: DcganDiscriminator) -> tuple[nn.Sequential, dict[str, nn.Module]]:
    """The same weights in the usual form, and the modules whose outputs are its features, by their names."""
    modules: list[nn.Module] = []
    hooked: dict[str, nn.Module] = {}
    for i, block in enumerate(net.blocks, 1):
        modules.append(block["conv"])  # type: ignore[index]
        hooked[f"block{i}.conv"] = modules[-1]
        if "norm" in block:  # type: ignore[operator]
            modules.append(block["norm"])  # type: ignore[index]
        modules.append(nn.LeakyReLU(0.2, inplace="norm" in block))  # type: ignore[operator]
        hooked[f"block{i}"] = modules[-1]
    return nn.Sequential(*modules, net.head, nn.Flatten(0)), hooked


class Judge(nn.Module):
    """MUNet as a net of one output."""

    def __init__(self, net: MUNet):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        logits = self.net(image).logits
        assert isinstance(logits, Tensor)
        return logits


def munet_modules(net: MUNet) -> dict[str, nn.Module]:
    """Features that are a module's output; those of the other two branches are computed by functions."""
    stages = {f"enc{i}": stage for i, stage in enumerate(net.encoder, 1)}
    return {
        "input": net.input,
        **stages,
        "bottleneck": net.bottleneck,
        "spatial": net.decoder[-1],
        "fusion": net.fusion,
    }


def means(real: Tensor, fake: Tensor) -> Tensor:
    return F.mse_loss(fake.mean(0), real.mean(0))


@dataclass
class Textbook:
    """A pair with its optimisers, written down once and run as `plain`, `matching` or `separate`."""

    generator: nn.Module
    discriminator: nn.Module
    hooked: Sequence[nn.Module]
    """Modules whose outputs are matched."""
    start: Callable[[Batch], Tensor]
    """What the generator starts from."""
    distance: Callable[[Tensor, Tensor], Tensor]
    weight: float
    pixels: bool
    """Whether the generator also learns from originals."""

    def __post_init__(self) -> None:
        adam: dict[str, Any] = {"lr": 2e-4, "betas": (0.5, 0.999)}
        self.optimise_d = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.optimise_g = torch.optim.Adam(self.generator.parameters(), **adam)

    def layout(self, memory_format: torch.memory_format) -> Textbook:
        """Move both nets into a memory format; batches have to be in it as well."""
        self.generator.to(memory_format=memory_format)
        self.discriminator.to(memory_format=memory_format)
        return self

    def plain(self, batch: Batch) -> None:
        """9 + 3g."""
        fake = self.generator(self.start(batch))
        self._update_discriminator(batch, fake)
        self.optimise_g.zero_grad()
        self._image_loss(batch, fake, self.discriminator(fake)).backward()
        self.optimise_g.step()

    def matching(self, batch: Batch) -> None:
        """13 + 4g."""
        self._update_discriminator(batch, self.generator(self.start(batch)))
        fake = self.generator(self.start(batch))
        self.optimise_g.zero_grad()
        loss = self._image_loss(batch, fake, self.discriminator(fake))
        real_features, fake_features = self.features(batch.real), self.features(fake)
        (loss + self._feature_loss(real_features, fake_features)).backward()
        self.optimise_g.step()

    def separate(self, batch: Batch) -> None:
        """11 + 3g."""
        fake = self.generator(self.start(batch))
        self._update_discriminator(batch, fake)
        self.optimise_g.zero_grad()
        self.discriminator.requires_grad_(False)
        loss = self._image_loss(batch, fake, self.discriminator(fake))
        with torch.no_grad():
            real_features = self.features(batch.real)
        (loss + self._feature_loss(real_features, self.features(fake))).backward()
        self.discriminator.requires_grad_(True)
        self.optimise_g.step()

    def features(self, image: Tensor) -> list[Tensor]:
        """Outputs of the hooked modules, from a pass made for them."""
        found: list[Tensor] = []
        handles = [m.register_forward_hook(lambda module, given, out: found.append(out)) for m in self.hooked]
        try:
            self.discriminator(image)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _update_discriminator(self, batch: Batch, fake: Tensor) -> None:
        advance_spectral(self.discriminator)
        self.optimise_d.zero_grad()
        for image, target in ((batch.real, 1.0), (fake.detach(), 0.0)):
            logits = self.discriminator(image)
            F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target)).backward()
        self.optimise_d.step()

    def _image_loss(self, batch: Batch, fake: Tensor, logits: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        return loss + charbonnier(fake, batch.real) if self.pixels else loss

    def _feature_loss(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        distances = [self.distance(r.detach(), f) for r, f in zip(real, fake, strict=True)]
        return self.weight * torch.stack(distances).mean()


def textbook(state: State, layers: Sequence[str]) -> Textbook:
    """The pair of `state` with weights of its own, matching `layers`."""
    generator, discriminator = copy.deepcopy((state.task.generator, state.task.critics[0].net))
    weight = state.config.feature_matching.weight
    net: nn.Module
    if isinstance(discriminator, DcganDiscriminator):
        net, modules = dcgan_discriminator(discriminator)
        return Textbook(
            dcgan_generator(generator), net, [modules[n] for n in layers], _latents, means, weight, pixels=False
        )
    modules = munet_modules(discriminator)
    net = Judge(discriminator)
    return Textbook(Upscaling(generator), net, [modules[n] for n in layers], _low, F.l1_loss, weight, pixels=True)


class Upscaling(nn.Module):
    """Upscalers take and give [0, 1]; training has images in [-1, 1]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, low: Tensor) -> Tensor:
        high: Tensor = self.net((low + 1) / 2) * 2 - 1
        return high


def _latents(batch: Batch) -> Tensor:
    assert batch.noise is not None
    return torch.randn_like(batch.noise)


def _low(batch: Batch) -> Tensor:
    assert batch.condition is not None
    return batch.condition
