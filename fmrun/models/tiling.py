"""Upscaling in overlapping tiles: an image of any size in memory that depends on its width and the tile alone.

A net sees, for every output pixel, the input within its radius. Tiles that reach at least that far beyond the area
they answer for give what the whole image gives, up to rounding. Where the radius is too large for that, or the net
holds statistics of the whole image, neighbouring tiles are blended over a band instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.errors import UserError
from .upscalers import Tiling

REACH = 384
"""Side of what the net is given at once unless the caller says otherwise, in input pixels."""
FAR = 64
"""Overlap for nets that see further than this, or everything; blended over as many pixels."""


class Strip(NamedTuple):
    """One tile along one side of an image, in input pixels."""

    begin: int
    end: int
    """What the net is given."""
    first: int
    last: int
    """What of its output is used."""
    before: int
    after: int
    """How much of that is blended with the tile before and the one after."""

    def kept(self, scale: int) -> slice:
        return slice((self.first - self.begin) * scale, (self.last - self.begin) * scale)

    def weights(self, scale: int) -> Tensor:
        """1, rising as a half cosine over `before` and falling over `after`; those of two neighbours sum to 1."""
        count = (self.last - self.first) * scale
        at = torch.arange(count) + 0.5
        rising, falling = at / max(self.before * scale, 0.5), (count - at) / max(self.after * scale, 0.5)
        return (1 - (math.pi * torch.minimum(rising, falling).clamp(max=1)).cos()) / 2


@dataclass(frozen=True)
class Tiles:
    """How an image is cut, in input pixels."""

    view: Tiling
    side: int
    """Of the area a tile answers for, at most."""
    overlap: int
    """How far a tile reaches beyond that area."""

    @classmethod
    def of(cls, view: Tiling, side: int | None = None) -> Tiles:
        """Tiles that equal the whole for a radius up to `FAR`; `side` is chosen so that the net is given about `REACH`."""
        overlap = FAR if view.radius is None else min(view.radius, FAR)
        least = max(16, view.smallest, view.multiple)
        if side is not None and side < least:
            raise UserError(f"--tile must be at least {least} pixels for this generator, not {side}")
        return cls(view, side or max(FAR, REACH - 2 * overlap, least), overlap)

    @property
    def feather(self) -> int:
        """Width of the band across a border over which two tiles are blended; 0 where they equal the whole."""
        exact = self.view.radius is not None and self.view.radius <= self.overlap
        return 0 if exact else min(self.overlap, self.side) // 2 * 2

    def strips(self, length: int) -> list[Strip]:
        """Areas as even as possible, none smaller than what is blended."""
        multiple, half = self.view.multiple, self.feather // 2
        least = max(self.feather, self.view.smallest, multiple) + multiple
        count = max(1, min(math.ceil(length / self.side), length // least))
        edges = [0, *(round(i * length / count / multiple) * multiple for i in range(1, count)), length]
        return [
            Strip(
                begin=max(0, top - self.overlap) // multiple * multiple,
                end=min(length, bottom + self.overlap),
                first=max(0, top - half),
                last=min(length, bottom + half),
                before=2 * half if top else 0,
                after=2 * half if bottom < length else 0,
            )
            for top, bottom in pairwise(edges)
        ]


@torch.no_grad()
def bands(
    run: Callable[[Tensor], Tensor],
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    *,
    scale: int,
    tiles: Tiles,
) -> Iterator[Tensor]:
    """`run` of a whole image, from the top down, as bands (1, C', rows, W · scale) on the CPU that together are the whole.

    Args:
        run: from (1, C, h, w) to (1, C', h · scale, w · scale), float32.
        read: the part (1, C, h, w) of the image at these rows and columns.
        size: height H and width W of the image.
    """
    carried: Tensor | None = None
    columns = tiles.strips(size[1])
    for y in tiles.strips(size[0]):
        band: Tensor | None = None
        for x in columns:
            piece = read(slice(y.begin, y.end), slice(x.begin, x.end))
            made = run(_padded(piece, tiles.view.smallest))[..., y.kept(scale), x.kept(scale)].cpu()
            if band is None:
                band = made.new_zeros(1, made.shape[1], made.shape[2], size[1] * scale)
            band[..., x.first * scale : x.last * scale] += made * x.weights(scale)
        assert band is not None
        band *= y.weights(scale)[:, None]
        if carried is not None:
            band[..., : carried.shape[-2], :] += carried
        ready = (y.last - y.first - y.after) * scale
        carried = band[..., ready:, :].clone()
        yield band[..., :ready, :]


def upscale(net: nn.Module, image: Tensor, *, scale: int, tiles: Tiles) -> Tensor:
    """`net(image)`, float32 (1, C', H · scale, W · scale) on the CPU, made in tiles of an image (1, C, H, W) in the net's
    range. The net runs as it is: see that it is in eval mode."""
    made = bands(
        running(net), lambda y, x: image[..., y, x], (image.shape[-2], image.shape[-1]), scale=scale, tiles=tiles
    )
    return torch.cat(list(made), dim=-2)


def running(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Runs `net` where its weights are, on images of any type and place; float32."""
    weight = next(net.parameters(), torch.zeros(()))

    def run(image: Tensor) -> Tensor:
        return net(image.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last)).float()

    return run


def _padded(piece: Tensor, smallest: int) -> Tensor:
    """At least `smallest` on either side: the last rows or columns again."""
    height, width = piece.shape[-2:]
    more = (0, max(0, smallest - width), 0, max(0, smallest - height))
    return F.pad(piece, more, mode="replicate") if any(more) else piece
