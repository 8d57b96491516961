"""What every task of a generator against a discriminator shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..data.feed import Feed, Windows
from ..data.store import Images
from ..feature_matching import FeatureMatching
from ..feature_matching.discriminator import DiscriminatorOutput, Shape, at_each_scale
from ..feature_matching.walked import WalkedDiscriminator
from ..models.augment import NUMBERS
from ..models.custom import custom_discriminator, user_errors
from ..models.layout import placed, twin_of
from ..models.norm import sync_batch_norm
from ..models.weights import load_weights
from ..runtime.dist import World
from ..runtime.precision import choose_precision, storage_dtype
from ..runtime.rng import torch_generator
from . import Batch, DiscriminatorRole, StepPlan, StepScalars, kind


def build_discriminator(config: Config, image: Shape) -> nn.Module:
    """The discriminator of images (C, H, W) with its first weights, on the CPU, without touching global random state."""
    d = config.discriminator
    rng = torch_generator(config.seed, "init", 1)
    with torch.random.fork_rng(devices=[]):
        if d.target is not None:
            net = custom_discriminator(d.target, d.params, rng, image)
        else:
            net = import_module(f"..models.{d.type}", __package__).discriminator(d, image, rng)
    if d.init is not None:
        load_weights(net, d.init, ("discriminator",), "discriminator.init", config)
    return net


@user_errors()
def feature_matching(config: Config, net: nn.Module, image: Shape, **changes: object) -> FeatureMatching:
    """The config's feature matching of a discriminator of images (C, H, W), with these changes."""

    def generator(step: int, place: int, device: torch.device) -> torch.Generator:
        return torch_generator(config.seed, "directions", step, place, device=device)

    settings = config.feature_matching.model_dump()
    settings.update(changes)
    return FeatureMatching(net, image, **settings, directions_generator=generator)


def _compiled(net: nn.Module, mode: str) -> nn.Module:
    compiled = torch.compile(net, mode=mode)
    assert isinstance(compiled, nn.Module)
    return compiled if mode == "default" else _Kept(compiled)


class _Kept(nn.Module):
    """A net whose outputs lie in memory that its next call writes to, and are copied out of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *arguments: object) -> Tensor | DiscriminatorOutput:
        out: Tensor | DiscriminatorOutput = self.net(*arguments)
        if isinstance(out, Tensor):
            return out.clone()
        logits = at_each_scale(torch.clone, out.logits) if out.logits is not None else None
        return DiscriminatorOutput(logits, {name: feature.clone() for name, feature in out.features.items()})


class PairData:
    """Images that have been opened."""

    train: Images
    config: Config

    def feed(self, world: World, device: torch.device, start: int, *, cache: str = "auto", workers: int = 0) -> Feed:
        """This process's share of the windows of each draw, from draw `start` on: patches of pairs, or whole images."""
        config, data = self.config, self.config.data
        windows = Windows(
            self.train,
            seed=config.seed,
            global_batch=config.train.batch_size,
            local_slice=world.local_slice(config.train.batch_size),
            patch_size=data.patch_size if self.train.has_targets else None,
            hflip=data.hflip,
            rotate=data.rotate,
        )
        return Feed(windows, device=device, cache=cache, workers=workers, start=start)


class PairTask:
    """A generator, its moving average and one discriminator, placed, matched and compiled as the config says.

    Args:
        config: the experiment; `data.channels` resolved.
        device: where to train.
        world: the processes that share the global batch.
        image: shape (C, H, W) of the images that the discriminator sees in training.
    """

    def __init__(self, config: Config, device: torch.device, world: World, image: Shape):
        self.config, self.device, self.world = config, device, world
        self.precision = choose_precision(config.precision, device)
        self.dtype = storage_dtype(self.precision)

        self.generator = placed(kind(config.task).generator(config, image[0]), device, self.dtype)
        self.average = twin_of(self.generator)
        net = placed(build_discriminator(config, image), device, self.dtype)
        matching = feature_matching(config, net, image) if config.feature_matching.weight > 0 else None
        gan = config.losses.gan
        sync_batch_norm(self.generator, world, device, double_backward=False)
        net = sync_batch_norm(net, world, device, double_backward=gan.r1 > 0 or gan.r2 > 0)
        role = DiscriminatorRole(
            "discriminator",
            net,
            image,
            gan=gan,
            matching=matching,
            policy=config.train.augment,
            trained=config.discriminator.train,
            precision=self.precision,
        )
        self.discriminators: tuple[DiscriminatorRole, ...] = (role,)
        self.forward: nn.Module = self.generator
        """Compiled, where the config asks for it; the same parameters as `generator`."""
        if config.compile:
            # one variant for each way a step runs a net: with and without statistics, gradients, taps
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            mode = config.compile_mode
            self.forward = _compiled(self.generator, mode)
            if not isinstance(net, WalkedDiscriminator):
                role.compiled = _compiled(net, mode)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, nets run uncompiled: what happens once is not worth compiling, and hooks are seen."""
        compiled = self.forward, [role.compiled for role in self.discriminators]
        self.forward = self.generator
        for role in self.discriminators:
            role.compiled = role.net
        try:
            yield
        finally:
            self.forward = compiled[0]
            for role, net in zip(self.discriminators, compiled[1], strict=True):
                role.compiled = net

    def plan(self, step: int) -> StepPlan:
        """What happens in `step`; a function of the step alone."""
        others = tuple(name for name, weight in self.image_weights(step).items() if weight > 0)
        return StepPlan(
            tuple(role.plan(step, bool(others)) for role in self.discriminators),
            log_diversity=(step + 1) % self.config.log.every == 0,
            image_losses=others,
        )

    def image_weights(self, step: int) -> dict[str, float]:
        """Weight at `step` of every generator loss that no discriminator judges."""
        return {}

    def image_losses(
        self, batch: Batch, image: Tensor, names: Sequence[str], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        return {}

    def augmentation(self, draw: int) -> list[Tensor | None]:
        """The augmentation of each micro-batch, drawn for the global batch and sliced; None without one."""
        config, whole = self.config, self.config.train.batch_size
        if not config.train.augment:
            return [None] * config.train.accumulate
        rng = torch_generator(config.seed, "augment", draw, device=self.device)
        drawn = torch.rand(2, whole, NUMBERS, generator=rng, device=self.device)[:, self.world.local_slice(whole)]
        return list(drawn.to(self.dtype).chunk(config.train.accumulate, dim=1))

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Give the averaged generator the buffers of the generator, where that is the user's own: what they are for, and
        how they would be averaged, nobody knows."""
        if self.config.generator.target is not None:
            for mine, theirs in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mine.copy_(theirs)

    def scalars(self) -> StepScalars:
        return StepScalars(len(self.discriminators), self.device, self.dtype, tuple(self.image_weights(0)))

    def run(self, net: nn.Module, x: Tensor) -> Tensor:
        """What a generator makes of `x`, in the precision of training, as at least float32."""
        with self.autocast():
            image: Tensor = net(x)
        return image.to(self.dtype)

    def autocast(self) -> torch.autocast:
        half = self.precision in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype=self.precision if half else None, enabled=half)
