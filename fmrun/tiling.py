"""Upscaling in overlapping tiles: an image of any size in memory that depends on its width and the tile alone.

A net sees, for every output pixel, the input within its radius. Tiles that reach at least that far beyond the area
they answer for give what the whole image gives, up to rounding. Where the radius is too large for that, or the net
holds statistics of the whole image, neighbouring tiles are blended over a band instead; `seam` says what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

REACH = 384
"""Side of what the net is given at once unless the caller says otherwise, in input pixels."""
FADE = 8
"""Width of the blending between tiles that agree: rounding differs with a tile's size."""
FAR = 64
"""Overlap for nets that see further than this, or everything; blended over `FAR` pixels."""


@dataclass(frozen=True)
class Layout:
    """How an image is cut, in input pixels."""

    tile: int
    """Side of the area a tile answers for, at most."""
    overlap: int
    """How far a tile reaches beyond that area on every side."""
    fade: int
    """Width of the band across a border, half of it on either side, over which two tiles are blended; even, and at
    most twice `overlap`."""
    smallest: int = 1
    multiple: int = 1

    def edges(self, length: int) -> list[int]:
        """Where the areas along one side begin and end: as even as `multiple` allows, none less than `fade`."""
        least = max(self.fade, self.smallest, self.multiple)
        count = max(1, min(math.ceil(length / self.tile), length // (least + self.multiple)))
        inner = [round(i * length / count / self.multiple) * self.multiple for i in range(1, count)]
        return [0, *inner, length]

    def span(self, edges: list[int], i: int) -> tuple[int, int]:
        """What the net is given for area `i` along one side."""
        begin = max(0, edges[i] - self.overlap) // self.multiple * self.multiple
        return begin, min(edges[-1], edges[i + 1] + self.overlap)

    def halves(self, edges: list[int], i: int) -> tuple[int, int]:
        """By how much area `i` is blended outwards, before and after."""
        return (self.fade // 2 if i else 0), (self.fade // 2 if i + 2 < len(edges) else 0)


def layout(
    radius: int | None = None,
    smallest: int = 1,
    multiple: int = 1,
    *,
    tile: int | None = None,
    overlap: int | None = None,
) -> Layout:
    """The cut for a net that sees `radius` pixels on every side (None: everything), wants tiles of at least `smallest`
    and that they begin at multiples of `multiple`.

    `tile` and `overlap` (in input pixels) are chosen where they are None: so that the tiled result equals the whole
    for a radius up to `FAR`, and what the net is given is about `REACH` on a side.
    """
    if overlap is None:
        overlap = radius + FADE // 2 if radius is not None and radius <= FAR else FAR
    if overlap < 0:
        raise UserError(f"overlap must be 0 or more, not {overlap}")
    exact = radius is not None and radius <= overlap
    fade = min(FADE, 2 * (overlap - radius)) if exact and radius is not None else overlap // 2 * 2
    least = max(16, smallest, multiple)
    tile = tile if tile is not None else max(FAR, REACH - 2 * overlap, least)
    if tile < least:
        raise UserError(f"tile must be at least {least} pixels, not {tile}")
    return Layout(tile, overlap, min(fade, tile // 2 * 2), smallest, multiple)


@torch.no_grad()
def bands(
    net: nn.Module,
    image: Tensor,
    *,
    scale: int,
    cut: Layout,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """`net(image)` from the top down, as float32 bands (1, C', rows, W · scale) on the CPU that together are the whole.

    Args:
        net: from (1, C, h, w) to (1, C', h · scale, w · scale); runs in eval mode and is left in the mode it was in.
        image: (1, C, H, W), in the net's range, on any device.
        device: where the net lies and runs (default: where its weights are).
        progress: told (tiles done, tiles in all).
    """
    assert image.shape[:-3] == (1,), image.shape
    weights = next(net.parameters(), None)
    device = device or (weights.device if weights is not None else image.device)
    dtype = weights.dtype if weights is not None else torch.float32
    height, width = image.shape[-2:]
    rows, columns = cut.edges(height), cut.edges(width)
    total, done = (len(rows) - 1) * (len(columns) - 1), 0
    carried: Tensor | None = None
    with _evaluating(net):
        for r in range(len(rows) - 1):
            top, bottom = cut.span(rows, r)
            above, below = cut.halves(rows, r)
            first, last = rows[r] - above, rows[r + 1] + below
            band: Tensor | None = None
            for c in range(len(columns) - 1):
                left, right = cut.span(columns, c)
                before, after = cut.halves(columns, c)
                begin, end = columns[c] - before, columns[c + 1] + after
                piece = image[..., top:bottom, left:right].to(device, dtype)
                made = _run(net, piece, scale, cut)
                made = made[..., (first - top) * scale : (last - top) * scale, (begin - left) * scale :]
                made = made[..., : (end - begin) * scale].to("cpu", torch.float32)
                if band is None:
                    band = made.new_zeros(1, made.shape[1], (last - first) * scale, width * scale)
                weight = _ramp(end - begin, before, after, scale)
                band[..., begin * scale : end * scale] += made * weight
                done += 1
                if progress:
                    progress(done, total)
            assert band is not None
            band *= _ramp(last - first, above, below, scale)[:, None]
            if carried is not None:
                band[..., : carried.shape[-2], :] += carried
            ready = (last - first - 2 * below) * scale
            carried = band[..., ready:, :].clone() if below else None
            yield band[..., :ready, :]


def upscale(
    net: nn.Module,
    image: Tensor,
    *,
    scale: int,
    radius: int | None = None,
    smallest: int = 1,
    multiple: int = 1,
    tile: int | None = None,
    overlap: int | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """`net(image)`, float32 (1, C', H · scale, W · scale) on the CPU, made in tiles: see `layout` and `bands`."""
    cut = layout(radius, smallest, multiple, tile=tile, overlap=overlap)
    out: Tensor | None = None
    top = 0
    for band in bands(net, image, scale=scale, cut=cut, device=device, progress=progress):
        if out is None:
            out = band.new_empty(1, band.shape[1], image.shape[-2] * scale, image.shape[-1] * scale)
        out[..., top : top + band.shape[-2], :] = band
        top += band.shape[-2]
    assert out is not None
    return out


@dataclass(frozen=True)
class Seam:
    """Tiled minus untiled, in the net's range, in what lies within `overlap` of a border between tiles."""

    max: float
    mean: float
    edge: float
    """The largest change of that difference from one input pixel to the next across a border, in the mean along a
    tile's side: an even shift shows in `max`, a line that the eye finds shows here."""
    elsewhere: float
    """The largest difference everywhere else."""

    def __str__(self) -> str:
        largest, edge = (f"{255 * value:.2g}" for value in (max(self.max, self.elsewhere), self.edge))
        return f"at most {largest} of 255, and by a step of {edge} of 255 across the border"


def seam(net: nn.Module, image: Tensor, *, scale: int, cut: Layout) -> Seam:
    """How much tiling shows: `image` (1, C, H, W), larger than one tile, upscaled in tiles and as a whole."""
    with _evaluating(net), torch.no_grad():
        weights = next(net.parameters(), image)
        whole = net(image.to(weights.device, weights.dtype)).to("cpu", torch.float32)
    return compare(torch.cat(list(bands(net, image, scale=scale, cut=cut)), -2), whole, cut, scale)


def compare(tiled: Tensor, whole: Tensor, cut: Layout, scale: int) -> Seam:
    """The seams of `tiled` (1, C, H · scale, W · scale), which was cut so, against `whole`."""
    difference = (tiled - whole)[0]
    coarse = F.avg_pool2d(difference, scale)
    near = torch.zeros(difference.shape[-2:], dtype=torch.bool)
    edge, reach = 0.0, max(1, cut.overlap)
    for along, across in ((1, 2), (2, 1)):
        length = coarse.shape[across]
        for border in cut.edges(length)[1:-1]:
            begin = max(0, border - reach)
            width = min(border + reach, length) - begin
            near.narrow(across - 1, begin * scale, width * scale).fill_(True)
            for start, stop in pairwise(cut.edges(coarse.shape[along])):
                side = coarse.narrow(along, start, stop - start).narrow(across, begin, width)
                edge = max(edge, float(side.mean(dim=along).diff(dim=-1).abs().max()))
    at, off = difference.abs()[:, near], difference.abs()[:, ~near]
    if not at.numel():
        raise ValueError("the image fits in one tile: there is no seam to measure")
    return Seam(float(at.max()), float(at.mean()), edge, float(off.max()) if off.numel() else 0.0)


def _run(net: nn.Module, piece: Tensor, scale: int, cut: Layout) -> Tensor:
    """`net(piece)`, which is padded for the net where it is too small, and cropped."""
    height, width = piece.shape[-2:]
    piece = _pad(_pad(piece, cut.smallest - height, -2), cut.smallest - width, -1)
    made = net(piece.contiguous(memory_format=torch.channels_last))
    if made.shape[-2:] != (piece.shape[-2] * scale, piece.shape[-1] * scale):
        size, into = (f"{x.shape[-1]}×{x.shape[-2]}" for x in (piece, made))
        raise UserError(f"the generator makes {into} of {size} pixels, and is not the ×{scale} that the run says")
    return made[..., : height * scale, : width * scale]


def _pad(piece: Tensor, missing: int, dim: int) -> Tensor:
    """`missing` rows or columns more at the end, by reflection without repeating the edge, as often as it takes."""
    if missing <= 0:
        return piece
    length = piece.shape[dim]
    period = max(1, 2 * (length - 1))
    where = torch.arange(length + missing, device=piece.device) % period
    return piece.index_select(dim, torch.where(where < length, where, period - where))


def _ramp(length: int, before: int, after: int, scale: int) -> Tensor:
    """Weights along one side of a tile: 1, but rising over the first 2 · `before` pixels and falling over the last
    2 · `after` as a half cosine. Those of two neighbours sum to 1."""
    weights = torch.ones(length * scale)
    for half, rising in ((before, True), (after, False)):
        if half:
            t = (torch.arange(2 * half * scale, dtype=torch.float64) + 0.5) / (2 * half * scale)
            rise = ((1 - torch.cos(math.pi * t)) / 2).float()
            if rising:
                weights[: len(rise)] = rise
            else:
                weights[-len(rise) :] = 1 - rise
    return weights


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
