"""Photographs through an upscaler, in tiles, one file after another.

Colours go through the net, alpha by bicubic interpolation (through the net too if it has 4 channels).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyvips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.files import BAD, SUFFIXES, BadImage, find_images, quiet
from ..data.photos import WRITTEN, read_photo, top_value, write_photo
from ..data.places import few
from ..models.tiling import Tiles, bands, running
from ..runtime.errors import UserError, reading
from ..runtime.files import clean
from ..runtime.report import Reporter

SLICE = 32
"""Rows of the small image that are turned into numbers at a time: copies of a whole band would double the memory."""


def enlarge(net: nn.Module, photo: pyvips.Image, *, scale: int, channels: int, tiles: Tiles) -> Iterator[np.ndarray]:
    """A photograph (see `photos.read_photo`) upscaled, from the top down: bands (rows, W · scale, C) of its own type.

    The net takes and gives `channels` in [0, 1]. With 1, the colours go through one after the other; with 3, grey goes
    through as colour and the mean of what comes out is kept; with 4, alpha goes through with the colours.
    """
    top = top_value(photo)
    run, colours = running(net), photo.bands - photo.hasalpha()

    def region(rows: slice, columns: slice) -> Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        pixels = photo.crop(columns.start, rows.start, width, height).numpy().reshape(height, width, -1)
        return torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0)[None].div_(top)

    def through(image: Tensor) -> Tensor:
        colour, alpha = image[:, :colours], image[:, colours:]
        if channels == 1:
            made = torch.cat([run(part) for part in colour.split(1, dim=1)], dim=1)
        else:
            colour = colour.expand(-1, 3, -1, -1)
            opaque = alpha if photo.hasalpha() else torch.ones_like(colour[:, :1])
            made = run(torch.cat([colour, opaque], dim=1) if channels == 4 else colour)
        parts = [made[:, :3].mean(dim=1, keepdim=True) if colours == 1 and channels > 1 else made[:, :3]]
        if photo.hasalpha() and channels == 4:
            parts.append(made[:, 3:])
        elif photo.hasalpha():
            parts.append(F.interpolate(alpha, scale_factor=scale, mode="bicubic", align_corners=False).to(made.device))
        return torch.cat(parts, dim=1)

    source = region
    if photo.hasalpha() and photo[colours].min() == 0:  # takes the whole image, for a hole may be of any size
        whole = region(slice(0, photo.height), slice(0, photo.width))
        whole[:, :colours] = bleed(whole[:, :colours], whole[:, colours:])
        source = lambda rows, columns: whole[..., rows, columns]  # noqa: E731
    made = bands(through, source, (photo.height, photo.width), scale=scale, tiles=tiles)
    for band in (part for whole_band in made for part in whole_band.split(SLICE * scale, dim=-2)):
        if not bool(band.isfinite().all()):
            raise UserError("the generator gives not-a-number for this image; sample from another checkpoint")
        numbers = band[0].clamp(0, 1).mul_(top).round_().movedim(0, -1).numpy()
        yield numbers.astype(np.uint8 if top == 255 else np.uint16)


def bleed(colour: Tensor, alpha: Tensor) -> Tensor:
    """`colour` (1, C, H, W) with the colours of what is not transparent (alpha > 0) spread smoothly over what is.

    What lies under full transparency is often black, and an upscaler would draw it into the edges. Averages weighted
    by alpha are taken over ever larger squares until one has colour, then smoothed on the way back.
    """
    holes = alpha == 0
    if not holes.any() or holes.all():
        return colour
    return torch.where(holes, _spread(colour * alpha, alpha), colour)


def _spread(weighted: Tensor, alpha: Tensor) -> Tensor:
    known = weighted / alpha.clamp(min=1e-6)
    if min(alpha.shape[-2:]) == 1 or bool((alpha > 0).all()):
        total = alpha.sum(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
        mean = weighted.sum(dim=(-2, -1), keepdim=True) / total
        return torch.where(alpha > 0, known, mean)
    half = [F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (weighted, alpha)]
    wider = F.interpolate(_spread(*half), size=alpha.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(alpha > 0, known, wider)


def plan(source: Path, out: Path, scale: int, *, overwrite: bool = False) -> list[tuple[Path, Path]]:
    """What is to be made of a file, or of all images under a folder: `STEM_xN.png` in `out`, folders inside kept; of one
    file, `out` itself where it ends in .png or .tif.

    Raises UserError if there is nothing, if two would get the same name, or, unless `overwrite`, if a file of that name
    is there already: nothing is replaced unasked.
    """
    if not source.exists():
        raise UserError(f"--input: there is no file or folder '{source}'")
    many, to_file = source.is_dir(), out.suffix.lower() in SUFFIXES and not out.is_dir()
    if to_file and (many or out.suffix.lower() not in WRITTEN):
        raise UserError(f"--out {out}: give a folder" + ("" if many else f", or a name ending in {', '.join(WRITTEN)}"))
    if many and out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--out {out} lies in the folder of --input, whose next pictures would be its own: give another"
        )
    names = [Path(name) for name in (find_images("--input", source) if many else [source.name])]
    made = [out if to_file else out / name.with_name(f"{name.stem}_x{scale}.png") for name in names]
    jobs = [(source / name if many else source, target) for name, target in zip(names, made, strict=True)]
    by_target: dict[str, Path] = {}
    for path, target in jobs:
        if other := by_target.get(str(target).casefold()):
            raise UserError(f"--input: '{other}' and '{path}' would both become '{target}': rename one of them")
        by_target[str(target).casefold()] = path
    if made[0].resolve() == source.resolve():
        raise UserError(f"--out {out}: that is the image itself; give another name")
    if not overwrite and (there := [str(target) for target in made if target.exists()]):
        raise UserError(f"--out {out}: already there: {few(there)}; give another --out, or --overwrite to replace")
    return jobs


def upscale_photos(
    net: nn.Module,
    source: Path,
    out: Path,
    *,
    scale: int,
    channels: int,
    tiles: Tiles,
    report: Reporter,
    overwrite: bool = False,
) -> list[Path]:
    """Upscale a photograph, or all under a folder; the paths written, in order. See `plan` and `enlarge`.

    Raises UserError that names all that cannot be read, once the others are done, and SaveError when the disk refuses.
    """
    with reading(source):
        jobs = plan(source, out, scale, overwrite=overwrite)
    for folder in {target.parent for _, target in jobs}:
        clean(folder)
    if tiles.feather:
        report.note("this generator sees further than its tiles overlap; they are blended where they meet")
    bad: dict[str, list[str]] = defaultdict(list)
    made = []
    with quiet():
        for path, target in jobs:
            try:
                photo, count = read_photo(path)
                if count > 1:
                    report.warn(f"'{path}' holds {count} images; the first is upscaled")
                write_photo(target, photo, scale, enlarge(net, photo, scale=scale, channels=channels, tiles=tiles))
                made.append(target)
            except BadImage as problem:
                bad[problem.kind].append(str(path))
            except pyvips.Error:
                bad["damaged"].append(str(path))
    if bad:
        parts = [f"{BAD[kind][0]} ({few(paths)}), {BAD[kind][1]}" for kind, paths in bad.items()]
        others = "; the others are done" if made else ""
        raise UserError(
            f"--input: {len(jobs) - len(made)} of {len(jobs)} images cannot be used: " + "; ".join(parts) + others
        )
    return made
