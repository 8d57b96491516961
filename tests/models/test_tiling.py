"""Tiling: equal to the whole where the net's radius allows, smooth where it does not, in bounded memory."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import fmrun  # noqa: F401, its module sets what the fork server imports
from torch import nn

from fmrun.models.tiling import FAR, Tiles, bands, running, upscale
from fmrun.models.upscalers import Tiling, build_upscaler, tiling, upscaler_for
from fmrun.runtime.errors import UserError

TINY = {
    "compact": {"features": 8, "blocks": 3},
    "span": {"features": 8},
    "realplksr": {"features": 8, "blocks": 2, "kernel": 5},
    "esrgan": {"features": 4, "blocks": 1},
}


def tiny(arch: str, scale: int, **params):
    full = TINY[arch] | params
    net = build_upscaler(arch, scale, 3, torch.Generator().manual_seed(0), **full).eval()
    return net, tiling(upscaler_for(arch, scale, 3, **full))


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


class Nearest(nn.Module):
    """Looks at one pixel; says what it was given."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale, self.seen = scale, []

    def forward(self, x):
        self.seen.append(x)
        return x.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


@pytest.mark.parametrize(
    ("arch", "scale", "params"),
    [
        ("compact", 1, {}),
        ("compact", 3, {}),
        ("span", 2, {}),
        ("span", 4, {"norm": True}),
        ("esrgan", 4, {}),
        ("esrgan", 2, {"unshuffle": True}),
        ("realplksr", 2, {"layer_norm": True}),
    ],
)
def test_tiles_equal_the_whole_up_to_rounding(arch, scale, params):
    net, field = tiny(arch, scale, **params)
    image, tiles = picture(131, 97), Tiles.of(field, 40)
    assert tiles.feather == 0
    assert len(tiles.strips(131)) > 2
    with torch.no_grad():
        whole = net(image)
    assert ((upscale(net, image, scale=scale, tiles=tiles) - whole).abs() * 255 < 0.01).all()
    narrow = upscale(net, image, scale=scale, tiles=Tiles(field, 40, 0))
    assert (narrow - whole).abs().max() > 1e-4, "without overlap they do not"


def test_blending_hides_seams_of_nets_with_whole_image_statistics():
    net, field = tiny("realplksr", 2)
    assert field.radius is None
    # one half dark and flat, the other bright and busy: the worst case for statistics
    image = picture(192, 256)
    image[..., :128] = 0.1
    soft, hard = Tiles.of(field, 64), Tiles(Tiling(0, 1), 64, FAR)
    assert (soft.feather, hard.feather) == (FAR, 0)
    with torch.no_grad():
        whole = net(image)
    blended, abrupt = (step_at_borders(upscale(net, image, scale=2, tiles=t) - whole, hard, 2) for t in (soft, hard))
    assert blended < abrupt / 3
    assert blended < 1 / 255


def step_at_borders(error: torch.Tensor, tiles: Tiles, scale: int) -> float:
    """The largest change from one input pixel to the next, in the mean along a tile's side, near a border of tiles."""
    coarse, found = nn.functional.avg_pool2d(error[0], scale), 0.0
    for along, across in ((1, 2), (2, 1)):
        for border in (strip.last for strip in tiles.strips(coarse.shape[across])[:-1]):
            for strip in tiles.strips(coarse.shape[along]):
                side = coarse.narrow(along, strip.first, strip.last - strip.first)
                begin = max(0, border - FAR)
                near = side.narrow(across, begin, min(border + FAR, side.shape[across]) - begin).mean(dim=along)
                found = max(found, float(near.diff(dim=-1).abs().max()))
    return found


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    scale=st.integers(1, 3),
    side=st.integers(16, 64),
    overlap=st.integers(0, 30),
    radius=st.sampled_from([None, 0, 5, 40]),
    multiple=st.sampled_from([1, 2, 4]),
    smallest=st.sampled_from([1, 8, 16]),
)
def test_every_pixel_is_made_once_whatever_the_sizes(size, scale, side, overlap, radius, multiple, smallest):
    net, image = Nearest(scale), picture(*size)
    tiles = Tiles(Tiling(radius, smallest, multiple), side, overlap)
    parts = list(bands(running(net), lambda y, x: image[..., y, x], size, scale=scale, tiles=tiles))
    assert all(part.shape[-2] > 0 and part.shape[-2] % scale == 0 for part in parts)
    assert torch.allclose(torch.cat(parts, -2), Nearest(scale)(image), atol=1e-6)
    assert all(min(seen.shape[-2:]) >= smallest for seen in net.seen)
    limit = 2 * side + 2 * overlap + 3 * multiple + smallest
    assert all(max(seen.shape[-2:]) <= limit for seen in net.seen)


def test_small_images_are_padded_for_the_net():
    net = Nearest(2)
    made = upscale(net, torch.tensor([[[[1.0, 2.0, 3.0]]]]), scale=2, tiles=Tiles.of(Tiling(0, 6)))
    assert made.tolist() == [[[[1, 1, 2, 2, 3, 3]] * 2]]
    assert net.seen[0].tolist() == [[[[1, 2, 3, 3, 3, 3]] * 6]]


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (9, 33)])
def test_any_size_goes_through_any_net(arch, size):
    for params in ({}, {"unshuffle": True} if arch == "esrgan" else {}):
        net, field = tiny(arch, 2, **params)
        made = upscale(net, picture(*size), scale=2, tiles=Tiles.of(field))
        assert made.shape == (1, 3, 2 * size[0], 2 * size[1])
        assert made.isfinite().all()


def test_low_precision_weights_get_images_of_their_type():
    net, field = tiny("compact", 2)
    made = upscale(net.to(torch.bfloat16), picture(40, 40), scale=2, tiles=Tiles.of(field))
    assert made.dtype == torch.float32


def test_a_tile_too_small_for_the_net_is_refused():
    with pytest.raises(UserError, match="--tile must be at least 16 pixels for this generator, not 8"):
        Tiles.of(Tiling(10, 1), 8)


def measure(found: str) -> None:
    """Write by how many MiB this process grows where a large image is made."""

    def all_bands(height: int, width: int) -> None:
        field = Tiles.of(Tiling(10, 1))
        for _ in bands(
            lambda x: nn.functional.interpolate(x, scale_factor=2),
            lambda y, x: torch.zeros(1, 3, y.stop - y.start, x.stop - x.start),
            (height, width),
            scale=2,
            tiles=field,
        ):
            pass

    import resource

    torch.set_num_threads(1)
    all_bands(400, 400)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    all_bands(4000, 1500)
    Path(found).write_text(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_is_that_of_a_band_not_of_the_result(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=measure, args=(str(tmp_path / "found"),))
    process.start()
    process.join()
    whole = 8000 * 3000 * 3 * 4 / 2**20  # MiB
    assert float((tmp_path / "found").read_text()) < 0.5 * whole
