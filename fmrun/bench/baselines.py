"""Training steps of others, for the same nets: what fmrun's step is measured against.

*Published* is the order of pix2pixHD (Wang et al. 2018, arXiv:1711.11585; NVIDIA/pix2pixHD, train.py and
models/pix2pixHD_model.py, without the pool of old images): both losses are computed from the same weights before either
net is updated, and the generator matches the features of the pass on real images that the discriminator learns from.
*How-to* is the step of tutorials: the discriminator is updated first, the generator's update makes new images, and the
features come from passes of their own. In both the discriminator is trainable throughout, so its weight gradients are
computed in the generator's update too and thrown away. Costs are in units of one discriminator forward, g for the
generator's; a backward pass to the input counts 1, one to the weights 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import AdamConfig
from ..models.norm import advance_spectral
from ..tasks import Batch
from .steps import OwnStep

Features = Mapping[str, Tensor]


def fresh(batch: Batch) -> Batch:
    """The batch with new latents, where the generator starts from latents."""
    return batch if batch.noise is None else replace(batch, noise=torch.randn_like(batch.noise))


def _loss(logits: Tensor, real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def _adam(net: nn.Module, config: AdamConfig) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=config.lr, betas=config.betas, eps=config.eps)


class Baseline:
    """A step of others, `method`, with the nets and the batch of `own`, which it takes over, in a memory format.

    Losses are those of its config in their usual form: binary cross-entropy, the generator's losses on the image, and the
    squared distance of feature means, or the absolute one between features of each image and its target.
    """

    eager = staticmethod(nullcontext)

    def __init__(self, own: OwnStep, method: Callable[[Baseline], None], memory_format: torch.memory_format):
        self.method, self.layers, self.precision = method, own.layers, own.precision
        self.task, self.config = own.state.task, own.state.config
        self.discriminator: nn.Module = self.task.discriminators[0].net.to(memory_format=memory_format)
        self.generator: nn.Module = self.task.generator.to(memory_format=memory_format)
        batch = own.batch
        low = None if batch.condition is None else batch.condition.contiguous(memory_format=memory_format)
        self.batch = replace(batch, real=batch.real.contiguous(memory_format=memory_format), condition=low)
        self.optimise_d = _adam(self.discriminator, self.config.optim.discriminator)
        self.optimise_g = _adam(self.generator, self.config.optim.generator)

    def __call__(self) -> None:
        self.method(self)

    def published(self) -> None:
        """D(fake detached) 1 + 2, D(real) 1 + 2, D(fake) 1 + 2, G g + 2g: 9 + 3g."""
        advance_spectral(self.discriminator)
        fake = self.task.generate(self.batch)
        fake_logits, _ = self._judge(fake.detach())
        real_logits, real_features = self._judge(self.batch.real, self.layers)
        d_loss = _loss(fake_logits, False) + _loss(real_logits, True)
        logits, features = self._judge(fake, self.layers)
        g_loss = self._image_loss(fake, logits) + self._matching_loss(real_features, features)
        _update(self.optimise_g, g_loss)
        _update(self.optimise_d, d_loss)

    def howto_plain(self) -> None:
        """D's update: D(real) 1 + 2, D(fake detached) 1 + 2. G's: D(fake) 1 + 2. G g + 2g. In all 9 + 3g."""
        fake = self.task.generate(self.batch)
        self._update_discriminator(fake)
        _update(self.optimise_g, self._image_loss(fake, self._judge(fake)[0]))

    def howto(self) -> None:
        """D's update as before. G's: D(fake) 1 + 2, features of fake 1 + 2, of real 1. G g, and g + 2g. In all 13 + 4g."""
        self._update_discriminator(self.task.generate(self.batch))
        fake = self.task.generate(fresh(self.batch))
        g_loss = self._image_loss(fake, self._judge(fake)[0])
        real_features, features = (self._judge(image, self.layers)[1] for image in (self.batch.real, fake))
        _update(self.optimise_g, g_loss + self._matching_loss(real_features, features))

    def _judge(self, image: Tensor, layers: tuple[str, ...] = ()) -> tuple[Tensor, Features]:
        out = self.discriminator(image, layers)
        return out.logits, out.features

    def _update_discriminator(self, fake: Tensor) -> None:
        advance_spectral(self.discriminator)
        real_logits, fake_logits = self._judge(self.batch.real)[0], self._judge(fake.detach())[0]
        _update(self.optimise_d, _loss(real_logits, True) + _loss(fake_logits, False))

    def _image_loss(self, fake: Tensor, logits: Tensor) -> Tensor:
        """The generator's losses but for feature matching."""
        weights = self.task.image_weights(self.config.full_step)
        others = self.task.image_losses(self.batch, fake, tuple(weights), weights).values()
        adversarial = self.config.losses.gan.weight * _loss(logits, True)
        return torch.stack([adversarial, *others]).sum()

    def _matching_loss(self, real: Features, fake: Features) -> Tensor:
        pairs = [(fake[name], real[name].detach()) for name in self.layers]
        if self.config.has_targets:
            distances = [F.l1_loss(f, r) for f, r in pairs]
        else:
            distances = [F.mse_loss(f.mean(0), r.mean(0)) for f, r in pairs]
        return self.config.feature_matching.weight * torch.stack(distances).mean()


def _update(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
