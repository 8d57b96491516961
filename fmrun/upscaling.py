"""Photographs through an upscaler, in tiles, one file after another.

Colours go through the net, alpha by bicubic interpolation (through the net too if it has 4 channels).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.files import BAD, SUFFIXES, BadImage, each, find, quiet, threads
from .data.places import few
from .errors import UserError, reading
from .memory import is_out_of_memory
from .photos import Photo, png, read
from .report import Reporter
from .runs import clean, make_folder, saving, write_atomic
from .tiling import Layout, Seam, bands, seam

DECODERS = 4
"""Photographs decoded at the same time while they are checked."""
SLICE = 32
"""Rows of the small image that are turned into numbers at a time: copies of a whole band would double the memory."""


def enlarge(
    net: nn.Module,
    photo: Photo,
    *,
    scale: int,
    channels: int,
    cut: Layout,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """The photograph upscaled, from the top down: bands (rows, W · scale, planes) of its own type.

    Args:
        net, scale, cut, device, progress: see `tiling.bands`; images in [0, 1].
        channels: the net's. With 1, the colours go through one after the other; with 3, grey goes through as colour
            and the mean of what comes out is kept; with 4, alpha goes through with the colours.
    """
    top_value = float(np.iinfo(photo.colour.dtype).max)
    planes = photo.colour.shape[-1]
    image, alpha = _input(photo, channels)

    def through(part: Tensor, told: Callable[[int, int], None] | None) -> Iterator[Tensor]:
        return bands(net, part, scale=scale, cut=cut, device=device, progress=told)

    parts = [through(part, _share(progress, i, planes)) for i, part in enumerate(image.split(1, dim=1))]
    made = map(torch.cat, zip(*parts, strict=True)) if channels == 1 else through(image, progress)
    row = 0
    for band in (part for whole in made for part in whole.split(SLICE * scale, dim=-2)):
        if not bool(band.isfinite().all()):
            raise UserError("the generator gives not-a-number for this image; sample from another checkpoint")
        rows = band.shape[-2]
        colour = band.transpose(0, 1) if channels == 1 else band[:, :3]
        if planes == 1 and channels > 1:
            colour = colour.mean(dim=1, keepdim=True)
        pieces = [colour]
        if alpha is not None:
            pieces.append(band[:, 3:] if channels == 4 else _bicubic(alpha, scale, row, rows))
        numbers = torch.cat(pieces, dim=1)[0].clamp(0, 1).mul_(top_value).round_().movedim(0, -1).numpy()
        yield numbers.astype(photo.colour.dtype)
        row += rows


def _input(photo: Photo, channels: int) -> tuple[Tensor, Tensor | None]:
    """What a net of so many channels is given of a photograph (with 1, all colours, to go through one after the other),
    and its alpha, both (1, C, H, W) in [0, 1]."""
    top_value = float(np.iinfo(photo.colour.dtype).max)
    image = _tensor(photo.colour, top_value)
    alpha = None if photo.alpha is None else _tensor(photo.alpha[..., None], top_value)
    if alpha is not None:
        image = bleed(image, alpha)
    if channels > 1:
        image = image.expand(-1, 3, -1, -1)
    if channels == 4:
        image = torch.cat([image, torch.ones_like(image[:, :1]) if alpha is None else alpha], dim=1)
    return image, alpha


def seam_of(net: nn.Module, photo: Photo, *, scale: int, channels: int, cut: Layout) -> Seam | None:
    """How much tiling shows in the middle of a photograph, two tiles or a little more each way; None where it fits in one
    tile."""
    height, width = photo.colour.shape[:2]
    rows, columns = (min(n, 2 * (cut.tile + cut.fade + cut.multiple)) for n in (height, width))
    top, left = ((n - m) // 2 // cut.multiple * cut.multiple for n, m in ((height, rows), (width, columns)))
    if len(cut.edges(rows)) == len(cut.edges(columns)) == 2:
        return None
    image, _ = _input(photo, channels)
    piece = image[:, : 1 if channels == 1 else None, top : top + rows, left : left + columns]
    try:
        return seam(net, piece, scale=scale, cut=cut)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):  # tiles may be all that fits
            raise
        return None


def _tensor(pixels: np.ndarray, top_value: float) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0)[None].div_(top_value)


def _share(progress: Callable[[int, int], None] | None, part: int, parts: int) -> Callable[[int, int], None] | None:
    """Tells `progress` of one of several passes that take turns."""
    if progress is None or part + 1 == parts == 1:
        return progress
    return lambda done, total: progress((done - 1) * parts + part + 1, total * parts)


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


def _bicubic(plane: Tensor, scale: int, row: int, rows: int) -> Tensor:
    """Rows `row` … `row + rows` of `plane` (1, 1, H, W) upscaled by bicubic interpolation, clamped to [0, 1]."""
    begin, end = max(0, row // scale - 3), min(plane.shape[-2], (row + rows) // scale + 3)
    made = F.interpolate(plane[..., begin:end, :], scale_factor=scale, mode="bicubic", align_corners=False)
    return made[..., row - begin * scale :, :][..., :rows, :].clamp(0, 1)


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


def plan(source: Path, out: Path, scale: int, *, overwrite: bool = False, field: str = "--input") -> list[Job]:
    """What is to be made of a file, or of all images under a folder: `STEM_xN.png` in `out`, folders inside kept; of one
    file, `out` itself where it ends in .png.

    Raises UserError if there is nothing, if two would get the same name, or, unless `overwrite`, if a file of that name
    is there already: nothing is replaced unasked.
    """
    if not source.exists():
        raise UserError(f"{field}: there is no file or folder '{source}'")
    ending = f"_x{scale}.png"
    if not source.is_dir():
        alone = out.suffix.lower() == ".png" and not out.is_dir()
        if out.suffix.lower() in SUFFIXES and not alone and not out.is_dir():
            raise UserError(f"--out {out}: pictures are written as .png; give a name ending in .png, or a folder")
        jobs = [Job(source, out if alone else out / (source.stem + ending))]
    else:
        if out.is_file() or (out.suffix.lower() == ".png" and not out.is_dir()):
            raise UserError(f"--out {out}: a folder of images needs a folder")
        names = [Path(name) for name in find(field, source)]
        if _inside(out, source) and out.resolve() != source.resolve():
            names = [name for name in names if not _inside(source / name, out)]
        jobs = [Job(source / name, out / name.parent / (name.stem + ending)) for name in names]
        targets = {job.target.resolve() for job in jobs}
        jobs = [job for job in jobs if job.source.resolve() not in targets]  # made of others by an earlier call
        if not jobs:
            raise UserError(f"{field}: '{source}' holds no images but those made of others")
    by_target = defaultdict(list)
    for job in jobs:
        by_target[str(job.target).casefold()].append(job)
    for same in by_target.values():
        if len(same) > 1:
            both = " and ".join(f"'{job.source}'" for job in same)
            raise UserError(f"{field}: {both} would all become '{same[0].target}': rename all but one")
    for job in jobs:
        if job.target.resolve() == job.source.resolve():
            raise UserError(f"--out {out}: that is the image itself; give another name")
    there = [str(job.target) for job in jobs if job.target.exists()]
    if there and not overwrite:
        raise UserError(f"--out {out}: already there: {few(there)}; give another --out, or --overwrite to replace")
    return jobs


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def check(jobs: list[Job], field: str = "--input") -> None:
    """Decode every photograph once. Raises UserError that names all that cannot be."""

    def trouble(i: int) -> BadImage | None:
        try:
            read(jobs[i].source)
        except BadImage as problem:
            return problem
        return None

    by_kind: dict[str, list[str]] = defaultdict(list)
    for job, problem in zip(jobs, each(trouble, len(jobs), workers=min(DECODERS, threads())), strict=True):
        if problem:
            by_kind[problem.kind].append(str(job.source))
    if not by_kind:
        return
    parts = []
    for kind in (kind for kind in BAD if kind in by_kind):
        what, fix = BAD[kind]
        parts.append(f"{what} ({few(by_kind[kind])}), {fix}")
    count = sum(map(len, by_kind.values()))
    raise UserError(f"{field}: {count} of {len(jobs)} images cannot be used: " + "; ".join(parts))


def upscale_photos(
    net: nn.Module,
    source: Path,
    out: Path,
    *,
    scale: int,
    channels: int,
    cut: Layout,
    report: Reporter,
    exact: bool = True,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    field: str = "--input",
) -> list[Path]:
    """Upscale a photograph, or all under a folder; the paths written, in order. See `plan`, `check` and `enlarge`.

    `progress` is told (tiles done, tiles in all) of the photograph in hand. Where tiles do not give `exact`ly what the
    whole would, how much they differ is measured and said. Raises UserError before anything is made if
    anything cannot be, SaveError when the disk refuses.
    """
    with reading(source):
        jobs = plan(source, out, scale, overwrite=overwrite, field=field)
    check(jobs, field)
    for folder in {job.target.parent for job in jobs}:
        clean(folder)
    with quiet():
        for job in jobs:
            try:
                photo = read(job.source)
            except BadImage as problem:
                raise UserError(
                    f"{field}: '{job.source}' was fine and has changed since: {BAD[problem.kind][0]}"
                ) from None
            if photo.frames > 1:
                report.warn(f"'{job.source}' holds {photo.frames} images; the first is upscaled")
            height, width = photo.colour.shape[:2]
            found = None if exact else seam_of(net, photo, scale=scale, channels=channels, cut=cut)
            if found is not None:
                report.note(
                    "this generator sees further than its tiles overlap; where they meet, the result differs from an "
                    f"untiled one by {found}, measured in the middle of {job.source.name}"
                )
                exact = True  # said once
            made = enlarge(net, photo, scale=scale, channels=channels, cut=cut, device=device, progress=progress)
            parts = list(png(width * scale, height * scale, made, photo.chunks))
            with saving(job.target):
                make_folder(job.target.parent)
                write_atomic(job.target, *parts)
    return [job.target for job in jobs]
