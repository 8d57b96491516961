"""Super-resolution: an upscaling generator against a discriminator of the high resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import Config
from ..data.feed import PairBatch, Windows
from ..data.files import Progress
from ..data.filters import bicubic_up
from ..data.grid import grid, save_png, to_uint8
from ..data.pairs import open_pairs
from ..data.places import few
from ..data.store import Images, to_float
from ..losses.image import ImageLosses
from ..metrics.paired import WINDOW, psnr_y, ssim_y
from ..metrics.perceptual import perceptual_metrics
from ..metrics.reals import shuffled
from ..models.custom import custom_generator
from ..models.tiling import Tiles
from ..models.tiling import upscale as upscale_in_tiles
from ..models.upscalers import (
    ARCHITECTURES,
    Tiling,
    Upscaler,
    build_upscaler,
    fuse_convolutions,
    load_pretrained,
    read_pretrained,
    tiling,
    upscaler_for,
)
from ..models.weights import load_weights
from ..runs.checkpoint import read_meta
from ..runtime.dist import World
from ..runtime.errors import UserError
from ..runtime.report import warn_once
from ..runtime.rng import torch_generator
from . import Batch, Data, Kind, Raw, Task
from .pair import PairData, PairTask

PREVIEW_SIDE = 128
"""Side of the pieces of validation images shown, in high-resolution pixels."""

LEAST_SHOWN = 256
"""Side that a patch of training is shown at, at least, in pixels."""

VARIANTS = ("norm", "layer_norm", "dysample", "unshuffle")
"""Settings of `generator` that a net from a file needs to be built again without the file."""


def _params(config: Config) -> dict[str, int | bool | None]:
    c = config.generator
    return {name: getattr(c, name) for name in ("features", "blocks", "kernel", *VARIANTS)}


def described(config: Config, channels: int) -> Upscaler | None:
    """The upscaler of a config, None if it is the user's own; UserError, saying what there is, for one that cannot be."""
    if config.generator.target is not None:
        return None
    return upscaler_for(config.generator.type, config.data.scale, channels, **_params(config))


def tile_field(config: Config, channels: int) -> Tiling:
    """How far the generator sees; how far a net of the user's own does, nobody knows."""
    upscaler = described(config, channels)
    return tiling(upscaler) if upscaler is not None else Tiling(None, 1)


def _own(config: Config, channels: int, rng: torch.Generator) -> nn.Module:
    """The net of `generator.target`, tried at the patch size and at one that is a multiple of nothing."""
    c, scale = config.generator, config.data.scale
    assert c.target is not None
    side = config.data.patch_size // scale
    sizes = ((side, side), (side + 3, side + 5))
    examples = [(torch.full((2, channels, h, w), 0.5), (2, channels, scale * h, scale * w)) for h, w in sizes]
    return custom_generator(c.target, c.params, rng, examples)


def build_generator(config: Config, channels: int) -> nn.Module:
    """The upscaler with its first weights, from scratch or from a file, on the CPU."""
    c, params = config.generator, _params(config)
    rng = torch_generator(config.seed, "init", 0)
    if c.init is None or c.target is not None or _is_checkpoint(c.init):
        if c.target is not None:
            net = _own(config, channels, rng)
        else:
            net = build_upscaler(c.type, config.data.scale, channels, rng, **params)
        if c.init is not None:
            load_weights(net, c.init, ("ema", "generator"), "generator.init", config)
        return net
    return load_pretrained(c.init, scale=config.data.scale, channels=channels, arch=c.type, params=params)


def _is_checkpoint(path: str) -> bool:
    """Whether a file is a checkpoint of fmrun's; what else it is, `read_pretrained` says."""
    try:
        read_meta(Path(path))
        return True
    except UserError:
        return False


def _refuse_tiny(pairs: Images) -> None:
    """UserError if an image is too small to be measured."""
    least = WINDOW + 2 * pairs.scale
    tiny = [name for name, size in zip(pairs.names, pairs.sizes, strict=True) if min(size) < least]
    if tiny:
        raise UserError(
            f"photographs need at least {least} px a side to be measured, and {len(tiny)} of {len(pairs)} in "
            f"'{pairs.name}' have less ({few(tiny)}): remove them"
        )


@torch.no_grad()
def upscaled(net: nn.Module, low: Tensor, field: Tiling, scale: int) -> Tensor:
    """An image (C, h, w), uint8, by an upscaler, in tiles: (1, C, scale h, scale w) in [0, 1], of the net's type and on
    its device."""
    weight = next(net.parameters())
    image = upscale_in_tiles(net, low[None].to(weight.dtype) / 255, scale=scale, tiles=Tiles.of(field))
    return image.to(weight.device, weight.dtype).clamp(0, 1)


def bicubic(low: Tensor, scale: int) -> Tensor:
    """An image (C, h, w) in [0, 255], enlarged by cubic interpolation: (1, C, scale h, scale w) in [0, 1]."""
    return bicubic_up(low[None] / 255, scale).clamp(0, 1)


@torch.no_grad()
def restored(
    way: Callable[[Tensor], Tensor],
    valid: Images,
    count: int,
    distances: Mapping[str, nn.Module],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """`psnr_y`, `ssim_y` and each of `distances` between `count` images, the same whenever there are as many, and what `way` makes of their low
    resolution (C, h, w), uint8: means over the images. `tell` hears how many of how many are done."""
    count = min(count, len(valid))
    sums = dict.fromkeys(("psnr_y", "ssim_y", *distances), 0.0)
    exact = []
    for done, index in enumerate(sorted(shuffled(len(valid))[:count].tolist()), 1):
        low, high = valid.pair(index)
        image = (way(low) * 255).round() / 255
        original = high[None].to(image.device, image.dtype) / 255
        ratio = float(psnr_y(image, original, valid.scale))
        if math.isinf(ratio):
            exact.append(valid.names[index])
        sums["psnr_y"] += ratio / count
        sums["ssim_y"] += float(ssim_y(image, original, valid.scale)) / count
        for name, distance in distances.items():
            sums[name] += float(distance(image.float(), original.float())) / count
        tell(done, count)
    if exact:
        warn_once(
            f"the PSNR of {few(exact)} in '{valid.name}' is infinite, for it comes out exactly as it is; the mean is null "
            "in JSON: to measure it, remove flat photographs"
        )
    return sums


class Upscale(PairTask):
    """Generator and discriminator of super-resolution, with everything they are trained by."""

    def __init__(self, config: Config, device: torch.device, world: World):
        channels, side = config.data.channels, config.data.patch_size
        assert channels is not None
        super().__init__(config, device, world, (channels, side, side))
        self.average.eval()
        self.losses = ImageLosses(
            config.losses, device, world, batch_size=config.train.batch_size, precision=self.precision
        )

    def prepare(self, raw: Raw, draw: int) -> list[Batch]:
        """Patches in [-1, 1]; augmentation is drawn for the global batch and sliced."""
        assert isinstance(raw, PairBatch)
        count = self.config.train.accumulate
        low, high = (to_float(images, self.dtype).contiguous(memory_format=torch.channels_last) for images in raw)
        return [
            Batch(real=h, condition=l, augment=a)
            for h, l, a in zip(high.chunk(count), low.chunk(count), self.augmentation(draw), strict=True)
        ]

    def _upscale(self, net: nn.Module, low: Tensor) -> Tensor:
        """Upscalers take and give [0, 1]."""
        return self.run(net, (low + 1) / 2) * 2 - 1

    def generate(self, batch: Batch) -> Tensor:
        assert batch.condition is not None
        return self._upscale(self.forward, batch.condition)

    def image_weights(self, step: int) -> dict[str, float]:
        return self.losses.weights(step)

    def image_losses(
        self, batch: Batch, image: Tensor, names: Sequence[str], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        return self.losses(image, batch.real, names, weights)

    def fit_average(self) -> None:
        """SPAN holds a copy of its weights in another form; running averages only a net of the user's own has."""
        self.copy_buffers()
        fuse_convolutions(self.average)


class UpscaleData(PairData):
    """Training and validation pairs, checked whole."""

    def __init__(self, config: Config, progress: Progress | None = None, *, trained: bool = True):
        d = config.data
        described(config, d.channels or 3)  # what no data could mend is said before they are read
        self.train, self.valid = open_pairs(d, config.seed, progress, trained)
        if self.valid is not None or not trained:
            _refuse_tiny(self.valid if self.valid is not None else self.train)
        data = d.model_copy(update={"channels": self.train.channels})
        generator = config.generator
        known = ARCHITECTURES[generator.type].params if generator.target is None else ()
        left = [key for key, value in _params(config).items() if value is None and key in known]
        # once settled they are in the run's config, and the file is needed no more
        if left and generator.init is not None and not _is_checkpoint(generator.init):
            own = read_pretrained(generator.init)[1].params  # the file decides what the config leaves open
            generator = generator.model_copy(update={key: own[key] for key in left if key in own})
        self.config = config.model_copy(update={"data": data, "generator": generator})

    def describe(self) -> str:
        train, valid = self.train, self.valid
        held = f" + {len(valid)} held out" if valid is not None else ""
        low = {"files": "from files", "bicubic": "by bicubic", "chain": "by random degradations"}[train.made_by]
        return f"{len(train)}{held} photographs, ×{train.scale}, {train.channels} channels, low resolution {low}"

    def draw(self, path: Path, rows: int) -> None:
        """Low resolution beside high, enlarged pixel by pixel; neither mirrored nor turned. Transparent pixels are shown as
        they are stored."""
        side, scale = self.config.data.patch_size, self.train.scale
        windows = Windows(self.train, seed=self.config.seed, global_batch=rows, patch_size=side)
        factor = max(1, -(-LEAST_SHOWN // side))
        low, high = (part.permute(0, 3, 1, 2)[:, :3] for part in windows.read(0))
        shown = F.interpolate(low, scale_factor=scale * factor), F.interpolate(high, scale_factor=factor)
        save_png(grid(torch.stack(shown, 1).flatten(0, 1), columns=2), path)


class UpscaleMonitor:
    """Photographs upscaled by the averaged generator, beside bicubic upscaling and their originals."""

    generated = None

    def __init__(self, task: Task, data: Data):
        assert isinstance(task, Upscale)
        assert isinstance(data, UpscaleData)
        self.task: Upscale = task
        config = task.config
        self.pairs: Images = data.valid if data.valid is not None else data.train
        self.field: Tiling = tile_field(config, data.train.channels)
        self.perceptual: dict[str, nn.Module] = {}
        if config.eval.every:
            self.perceptual = perceptual_metrics(task.device, config.eval.perceptual, 1)
        measured = ("psnr_y", "ssim_y", *self.perceptual)
        self.names = tuple(f"eval/{name}{suffix}" for name in measured for suffix in ("", "_bicubic"))

    def upscale(self, low: Tensor) -> Tensor:
        """An image (C, h, w), uint8, by the averaged generator, in tiles: (1, C, scale h, scale w) in [0, 1]."""
        return upscaled(self.task.average, low, self.field, self.task.config.data.scale)

    def bicubic(self, low: Tensor) -> Tensor:
        """What has to be beaten: (1, C, scale h, scale w) in [0, 1]."""
        return bicubic(low.to(self.task.device, self.task.dtype), self.task.config.data.scale)

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Middles of the first images: low resolution | bicubic | generated | original."""
        pairs, rows = self.pairs, []
        scale, gap = pairs.scale, 4
        for index in range(min(count, len(pairs))):
            low, high = pairs.pair(index)
            side = min(PREVIEW_SIDE // scale, *low.shape[1:])
            top, left = ((n - side) // 2 for n in low.shape[1:])
            low = low[:, top : top + side, left : left + side]
            high = high[:, top * scale : (top + side) * scale, left * scale : (left + side) * scale]
            nearest = low.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            shown = [
                nearest,
                *(to_uint8(x[0].float().cpu() * 2 - 1) for x in (self.bicubic(low), self.upscale(low))),
                high,
            ]
            size = PREVIEW_SIDE // scale * scale
            row = torch.full((high.shape[0], size + gap, 4 * (size + gap) + gap), 255, dtype=torch.uint8)
            for i, image in enumerate(shown):
                at = gap + i * (size + gap)
                row[:, : image.shape[1], at : at + image.shape[2]] = image
            rows.append(row)
        top = torch.full((rows[0].shape[0], gap, rows[0].shape[2]), 255, dtype=torch.uint8)
        return torch.cat([top, *rows], 1)

    def held_out(self, count: int) -> dict[str, float]:
        """PSNR and SSIM of luma, and the perceptual distance, over whole validation images, of the averaged generator and
        of bicubic upscaling."""
        scores = {
            suffix: restored(way, self.pairs, count, self.perceptual)
            for suffix, way in (("", self.upscale), ("_bicubic", self.bicubic))
        }
        return {f"eval/{name}{suffix}": value for suffix, values in scores.items() for name, value in values.items()}


def blank(config: Config, world: World, device: torch.device) -> PairBatch:
    part, side, scale = world.local_slice(config.train.batch_size), config.data.patch_size, config.data.scale
    shape = (part.stop - part.start, config.data.channels or 3, side, side)
    high = torch.zeros(shape, dtype=torch.uint8, device=device)
    return PairBatch(high[..., ::scale, ::scale], high)


KIND = Kind(Upscale, build_generator, UpscaleData, UpscaleMonitor, blank)
