"""Which patches a draw consists of, and those patches on the device."""

from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch

from ..rng import numpy_generator
from .feed import order, placement
from .pair_set import Pairs, Spot
from .shelf import Packed
from .source import Images
from .stream import Stream

NUMBERS = 4
"""Random numbers for a patch: top, left, quarter turns, mirroring."""


class PairBatch(NamedTuple):
    """Low- and high-resolution patches, uint8 `(b, C, h, w)` and `(b, C, scale · h, scale · w)`."""

    low: torch.Tensor
    high: torch.Tensor


@lru_cache(maxsize=4)
def _numbers(seed: int, draw: int, global_batch: int) -> np.ndarray:
    numbers = numpy_generator(seed, "crop", draw).random((global_batch, NUMBERS))
    numbers.flags.writeable = False
    return numbers


class Patches:
    """The endless sequence of patches that a seed makes of pairs of images.

    Position p is in draw p // global_batch and, of its images, number p % global_batch. The image it is cut from
    follows `order`, each standing for `crops_per_image` positions; where it is cut, how it is turned and how it is
    degraded follow from the seed, the draw and the place in it alone.

    Args:
        pairs: what they are cut from.
        seed: of the run.
        global_batch: patches in a draw.
        patch_size: side of a high-resolution patch, a multiple of the scale.
        hflip: mirror half of them left to right.
        rotate: turn them by 0, 90, 180 or 270 degrees.
        crops_per_image: neighbouring positions that share an image; more than 1 saves decoding where images are
            streamed, at the price of batches that are less mixed.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        seed: int,
        global_batch: int,
        patch_size: int,
        hflip: bool,
        rotate: bool,
        crops_per_image: int = 1,
    ) -> None:
        assert patch_size % pairs.scale == 0, (patch_size, pairs.scale)
        self.pairs = pairs
        self.side = patch_size // pairs.scale
        self._seed, self._global_batch = seed, global_batch
        self._hflip, self._rotate, self._crops = hflip, rotate, crops_per_image

    def image(self, position: int) -> int:
        """The index of the pair that this position's patches are cut from."""
        return int(order(self._seed, len(self.pairs), position // self._crops, 1)[0])

    def spot(self, position: int, image: int) -> Spot:
        """Where this position's patch lies in `image`."""
        draw, place = divmod(position, self._global_batch)
        u = _numbers(self._seed, draw, self._global_batch)[place]
        height, width = self.pairs.low_sizes[image].tolist()
        steps = None
        if self.pairs.random:
            steps = self.pairs.recipe(numpy_generator(self._seed, "degrade", draw, place))
        return Spot(
            top=int(u[0] * (height - self.side + 1)),
            left=int(u[1] * (width - self.side + 1)),
            turns=int(4 * u[2]) if self._rotate else 0,
            mirror=bool(self._hflip and u[3] < 0.5),
            steps=steps,
        )

    def read(self, positions: np.ndarray) -> torch.Tensor:
        """The patches of these positions in one tensor, uint8 `(bytes,)`, for `split` to take apart."""
        low, high, channels = self.side, self.side * self.pairs.scale, self.pairs.channels
        count = len(positions)
        sizes = (count * low * low * channels, count * high * high * channels)
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        lows = out.numpy()[: sizes[0]].reshape(count, low, low, channels)
        highs = out.numpy()[sizes[0] :].reshape(count, high, high, channels)
        wanted: dict[int, list[int]] = {}
        for k, position in enumerate(positions.tolist()):
            wanted.setdefault(self.image(position), []).append(k)
        for image, places in wanted.items():
            spots = [self.spot(int(positions[k]), image) for k in places]
            for k, patch in zip(places, self.pairs.patches(image, spots, self.side), strict=True):
                lows[k], highs[k] = patch
        return out

    def split(self, flat: torch.Tensor, count: int) -> PairBatch:
        """What `read` gave for `count` positions, without copying; in channels-last memory."""
        low, high, channels = self.side, self.side * self.pairs.scale, self.pairs.channels
        cut = count * low * low * channels
        return PairBatch(
            flat[:cut].view(count, low, low, channels).permute(0, 3, 1, 2),
            flat[cut:].view(count, high, high, channels).permute(0, 3, 1, 2),
        )


class PairFeed:
    """The patches of each draw, for one rank.

    A draw is one global batch, and `rank_slice` is this rank's part of it. The same draw always gives the same patches,
    in any order of asking, wherever images are kept and however many workers there are; ascending draws from `start`
    are made ahead by workers when images are streamed or degraded at random.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        seed: int,
        global_batch: int,
        rank_slice: slice,
        device: torch.device | str,
        cache: str,
        workers: int,
        patch_size: int,
        hflip: bool,
        rotate: bool,
        start: int,
        crops_per_image: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self.placement = pair_placement(pairs, cache, self.device)
        self._global_batch = global_batch
        self._slice = rank_slice
        self._pin = self.device.type == "cuda"
        self._patches = Patches(
            pairs,
            seed=seed,
            global_batch=global_batch,
            patch_size=patch_size,
            hflip=hflip,
            rotate=rotate,
            crops_per_image=crops_per_image,
        )
        self._stream: Stream | None = None
        self._stores: tuple[_Store, _Store] | None = None
        if self.placement == "device":
            assert isinstance(pairs.low, Packed)
            assert isinstance(pairs.high, Packed)
            side = self._patches.side
            self._stores = (
                _Store(pairs.low, side, 1, self.device),
                _Store(pairs.high, side, pairs.scale, self.device),
            )
        elif self.placement == "none" or pairs.random:
            # a stream reads whatever has `read`; here "images" are positions
            self._stream = Stream(cast(Images, self._patches), self._positions, workers, start, self._pin)

    def batch(self, draw: int) -> PairBatch:
        """This rank's patches of global draw `draw`, on the device, a copy in channels-last memory."""
        positions = self._positions(draw)
        if self._stores is not None:
            return self._gather(positions)
        if self._stream is not None:
            flat = self._stream.read(draw)
        else:
            flat = self._patches.read(positions)
            flat = flat.pin_memory() if self._pin else flat
        return self._patches.split(flat.to(self.device, non_blocking=self._pin), len(positions))

    def close(self) -> None:
        """Stop the workers, if there are any, and let go of the images on the device."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._stores = None

    def _positions(self, draw: int) -> np.ndarray:
        return np.arange(draw * self._global_batch, (draw + 1) * self._global_batch)[self._slice]

    def _gather(self, positions: np.ndarray) -> PairBatch:
        assert self._stores is not None
        rows = []
        for position in positions.tolist():
            image = self._patches.image(position)
            spot = self._patches.spot(position, image)
            rows.append((image, spot.top, spot.left, spot.turns + 4 * spot.mirror))
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
        table = table.pin_memory().to(self.device, non_blocking=True) if self._pin else table.to(self.device)
        return PairBatch(*(store.gather(table) for store in self._stores))


def pair_placement(pairs: Pairs, cache: str, device: torch.device) -> str:
    """Where `pairs` will be kept: `device`, `ram` or `none` (streamed); `device` only what needs no more work than
    cutting out."""
    if not pairs.in_memory:
        return "none"
    if pairs.random:
        return "ram"
    # `placement` looks at `nbytes` and at whether `pixels` are there
    return placement(cast(Images, _Held(pairs.nbytes)), cache, device)


class _Held(NamedTuple):
    nbytes: int
    pixels: bool = True


class _Store:
    """Images on the device, from which patches are gathered without waiting for it."""

    def __init__(self, packed: Packed, side: int, scale: int, device: torch.device) -> None:
        self._pixels = packed.pixels.to(device)
        self._starts = torch.from_numpy(packed.starts).to(device)
        self._widths = torch.from_numpy(np.ascontiguousarray(packed.sizes[:, 1])).to(device)
        self._scale = scale
        grid = np.stack(np.meshgrid(np.arange(side * scale), np.arange(side * scale), indexing="ij"))
        turned = [np.rot90(grid, turns, axes=(1, 2)) for turns in range(4)]
        turned += [plane[:, :, ::-1] for plane in turned]
        # (8, 2, side, side): where each pixel of a turned patch comes from
        self._grids = torch.from_numpy(np.stack(turned)).to(device)

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """Patches `(b, C, side, side)` for rows of (image, top, left, turning)."""
        image, top, left, turning = table.unbind(1)
        rows, columns = self._grids[turning].unbind(1)
        rows = rows + (self._scale * top)[:, None, None]
        columns = columns + (self._scale * left)[:, None, None]
        index = self._starts[image][:, None, None] + rows * self._widths[image][:, None, None] + columns
        return self._pixels[index].permute(0, 3, 1, 2)
