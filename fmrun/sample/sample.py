"""Pictures from a trained generator. Image i of seed s is the same bytes whatever else is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import trust
from ..config.presets import from_json
from ..config.schema import Config
from ..data.grid import grid, save_png, to_uint8
from ..models.custom import expecting_old_code
from ..models.layout import placed
from ..models.tiling import Tiles
from ..runs import checkpoint
from ..runs.folder import Run
from ..runtime.errors import UserError
from ..runtime.files import clean
from ..runtime.precision import set_determinism
from ..runtime.report import Reporter
from ..tasks import kind
from ..tasks.generate import latents
from ..tasks.upscale import tile_field
from ..train.state import without_init

CHUNK = 16
"""Images are always made in the same chunks, for a batch's size can change the last bits of an image."""

PART = 32 * CHUNK
"""So many images of a long series are held at a time."""


@dataclass(frozen=True)
class Source:
    """A generator ready to sample from, and where its pictures go by default."""

    net: nn.Module
    config: Config
    step: int
    folder: Path
    raw: bool = False

    def described(self, target: Run | Path) -> str:
        """Which generator it is: `run dcgan-fm-001, step 3000, averaged weights`."""
        name = target.name if isinstance(target, Path) else f"run {target.name}"
        return f"{name}, step {self.step}, {'weights as trained' if self.raw else 'averaged weights'}"


def open_source(
    target: Run | Path, *, raw: bool, device: torch.device, report: Reporter, trust_code: bool = False
) -> Source:
    """The averaged (or `raw`) generator of a run's newest readable checkpoint, or of a checkpoint file alone."""
    trust.admit(named_code(target), trust_code)
    if isinstance(target, Run):
        saved, skipped = checkpoint.newest(target.checkpoints)
        if saved is None and skipped:
            raise UserError(f"run {target.name}: none of its {len(skipped)} checkpoints can be read")
        for sentence in skipped:
            report.warn(f"{sentence}; sampling from the checkpoint before")
        if saved is None:
            raise target.no_checkpoint()
        folder = target.samples
    else:
        saved, folder = checkpoint.read(target), Path(".")
    return load_source(saved, folder, raw=raw, device=device)


def named_code(target: Run | Path) -> list[trust.Target]:
    """The code that the checkpoints of a run, or one checkpoint file, name."""
    targets: list[trust.Target] = []
    seen = None
    if isinstance(target, Run):
        run, folder = target, target.checkpoints
        files = [checkpoint.path_of(folder, step) for step in reversed(checkpoint.steps(folder))]
    else:
        run, files = None, [target]
    for file in files:
        with suppress(UserError):  # what cannot be read is left out, or refused, when it is opened
            content = checkpoint.read_meta(file).config
            if content != seen:  # all but always the same
                targets += trust.targets(from_json(content), str(file), {} if run is None else run.code())
                seen = content
    return targets


def load_source(saved: checkpoint.Checkpoint, folder: Path, *, raw: bool, device: torch.device) -> Source:
    """The averaged (or `raw`) generator of a checkpoint."""
    set_determinism(True, device)
    config = without_init(from_json(saved.meta.config))
    assert config.data.channels is not None
    net = kind(config.task).generator(config, config.data.channels)
    with expecting_old_code(config):
        net.load_state_dict(saved.part("generator" if raw else "ema"))
    net = placed(net, device, torch.float32).eval()
    return Source(net, config, saved.step, folder, raw)


@torch.no_grad()
def draw(source: Source, noise: Tensor) -> Tensor:
    """Images, uint8 (n, C, H, W), from latents (n, latent_dim), made in full chunks."""
    device = next(source.net.parameters()).device
    count = len(noise)
    filled = torch.cat([noise, noise.new_zeros(-count % CHUNK, noise.shape[1])])
    return torch.cat([to_uint8(source.net(chunk.to(device))).cpu() for chunk in filled.split(CHUNK)])[:count]


def images(source: Source, seed: int, count: int) -> Iterator[Tensor]:
    """Images 0 to `count` - 1 of the seed, uint8 (n, C, H, W), a few hundred at a time."""
    for start in range(0, count, PART):
        part = range(start, min(start + PART, count))
        yield draw(source, latents(seed, "sample", part, source.config.generator.latent_dim))


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points (len(t), d) on the great circle from `a` to `b` (d,), lengths interpolated linearly (White 2016)."""
    t = t[:, None]
    length_a, length_b = a.norm(), b.norm()
    cosine = torch.dot(a / length_a, b / length_b).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-6:
        return torch.lerp(a, b, t)
    direction = (torch.sin((1 - t) * angle) * a / length_a + torch.sin(t * angle) * b / length_b) / angle.sin()
    return direction * torch.lerp(length_a, length_b, t)


def interpolation(seed: int, num: int, steps: int, latent_dim: int) -> Tensor:
    """Latents of `num` pictures in rows of `steps`: row r goes from latent r to latent r + 1 of the seed."""
    rows = math.ceil(num / steps)
    ends = latents(seed, "sample", range(rows + 1), latent_dim)
    t = torch.linspace(0, 1, steps)
    return torch.cat([slerp(ends[r], ends[r + 1], t) for r in range(rows)])[:num]


def draw_samples(
    source: Source,
    *,
    num: int,
    seed: int,
    columns: int | None,
    interpolate: int | None,
    individual: bool,
    out: Path | None,
) -> Sequence[Path]:
    """Write a grid, or single files; the paths written."""
    if source.config.has_targets:
        raise UserError("this generator upscales images: give it some with --input FILE-OR-FOLDER")
    latent_dim = source.config.generator.latent_dim
    stem = f"{'interpolation-' if interpolate else ''}seed-{seed}-of-step-{source.step}"
    place = out or source.folder / (stem if individual else f"{stem}.png")
    if individual and (place.is_file() or place.suffix.lower() == ".png"):
        raise UserError(f"--out {place}: --individual writes many files and needs a folder")
    if not individual and (place.is_dir() or not (place.suffix or place.is_file())):
        place /= f"{stem}.png"
    if not individual and place.suffix.lower() != ".png":
        raise UserError(f"--out {place}: pictures are written as .png; give a name ending in .png, or a folder")
    noise = interpolation(seed, num, interpolate, latent_dim) if interpolate else None
    made = draw(source, latents(seed, "sample", range(num), latent_dim) if noise is None else noise)
    paths = [place / f"{stem}-{i:05d}.png" for i in range(num)] if individual else [place]
    clean(paths[0].parent)
    for path, image in zip(paths, made if individual else [grid(made, columns or interpolate)], strict=True):
        save_png(image, path)
    return paths


def upscale_input(
    source: Source, path: Path, *, out: Path | None, overwrite: bool, tile: int | None, report: Reporter
) -> Sequence[Path]:
    """Upscale a photograph, or all under a folder, in tiles; the paths written."""
    config = source.config
    if not config.has_targets:
        raise UserError(f"--input {path}: this generator makes images from noise; leave --input out")
    assert config.data.channels is not None
    from .upscale import upscale_photos  # imports libvips

    view = tile_field(config, config.data.channels)
    return upscale_photos(
        source.net,
        path,
        out or Path("."),
        scale=config.data.scale,
        channels=config.data.channels,
        tiles=Tiles.of(view, tile),
        report=report,
        overwrite=overwrite,
    )
