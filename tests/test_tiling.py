"""Tiling: equal to the whole where the net's radius allows, smooth where it does not, in bounded memory."""

import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fmrun.errors import UserError
from fmrun.models.upscalers import build_upscaler, describe, tiling
from fmrun.tiling import FAR, Layout, bands, compare, layout, seam, upscale

TINY = {
    "compact": {"features": 8, "blocks": 3},
    "span": {"features": 8},
    "realplksr": {"features": 8, "blocks": 2, "kernel": 5},
    "esrgan": {"features": 4, "blocks": 1},
}


def tiny(arch: str, scale: int, **params):
    full = TINY[arch] | params
    net = build_upscaler(arch, scale, 3, torch.Generator().manual_seed(0), **full)
    return net, asdict(tiling(describe(arch, scale, 3, **full)))


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


class Nearest(nn.Module):
    """Looks at one pixel; says what it was given."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale, self.seen = scale, []

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
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
    net, how = tiny(arch, scale, **params)
    how["tile"] = 40
    image = picture(131, 97)
    found = seam(net, image, scale=scale, cut=layout(**how))
    assert max(found.max, found.elsewhere) < 5e-5, str(found)
    with torch.no_grad():
        whole = net.eval()(image)
    made = upscale(net, image, scale=scale, **how)
    assert ((made - whole).abs() * 255 < 0.01).all()


def test_without_enough_overlap_they_do_not():
    net, how = tiny("span", 2)
    assert seam(net, picture(90, 90), scale=2, cut=layout(**how, tile=40, overlap=2)).max > 1e-3


def test_blending_hides_what_statistics_of_the_whole_image_cannot_tell_tiles():
    net, how = tiny("realplksr", 2)
    assert how["radius"] is None
    # one half dark and flat, the other bright and busy: the worst case for statistics
    image = picture(192, 256)
    image[..., :128] = 0.1
    blended = seam(net, image, scale=2, cut=layout(**how, tile=64))
    hard = Layout(64, FAR, 0)
    with torch.no_grad():
        abrupt = compare(torch.cat(list(bands(net, image, scale=2, cut=hard)), -2), net.eval()(image), hard, 2)
    assert blended.edge < abrupt.edge / 3
    assert blended.edge < 1 / 255


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    scale=st.integers(1, 3),
    tile=st.integers(16, 64),
    overlap=st.integers(0, 30),
    radius=st.sampled_from([None, 0, 5, 40]),
    multiple=st.sampled_from([1, 2, 4]),
    smallest=st.sampled_from([1, 8, 16]),
)
def test_every_pixel_is_made_once_whatever_the_sizes(size, scale, tile, overlap, radius, multiple, smallest):
    net = Nearest(scale)
    image = picture(*size)
    cut = layout(radius, smallest, multiple, tile=tile, overlap=overlap)
    parts = list(bands(net, image, scale=scale, cut=cut))
    assert all(part.shape[-2] > 0 and part.shape[-2] % scale == 0 for part in parts)
    whole = Nearest(scale)(image)
    assert torch.allclose(torch.cat(parts, -2), whole, atol=1e-6)
    assert all(min(seen) >= smallest for seen in net.seen)
    limit = 2 * tile + 2 * overlap + 3 * multiple + smallest
    assert all(max(seen) <= limit for seen in net.seen)


def test_small_images_are_padded_for_the_net_by_reflection():
    class Picky(Nearest):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    net = Picky(2)
    image = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert upscale(net, image, scale=2, smallest=6).tolist() == [[[[1, 1, 2, 2, 3, 3]] * 2]]
    assert net.last.tolist() == [[[[1, 2, 3, 2, 1, 2]] * 6]]


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (9, 33)])
def test_any_size_goes_through_any_net(arch, size):
    for params in ({}, {"unshuffle": True} if arch == "esrgan" else {}):
        net, how = tiny(arch, 2, **params)
        made = upscale(net, picture(*size), scale=2, **how)
        assert made.shape == (1, 3, 2 * size[0], 2 * size[1])
        assert made.isfinite().all()


def test_modes_and_gradients_are_left_as_they_were_and_progress_is_told():
    net, how = tiny("span", 2)
    net.train()
    net.block_1.eval()
    told = []
    upscale(net, picture(70, 50), scale=2, tile=30, progress=lambda *done: told.append(done), **how)
    assert net.training
    assert not net.block_1.training
    assert told == [(i + 1, 6) for i in range(6)]
    net.train()(picture(8, 8)).mean().backward()  # weights are no tensors of inference


def test_low_precision_weights_get_images_of_their_type():
    net, how = tiny("compact", 2)
    made = upscale(net.to(torch.bfloat16), picture(40, 40), scale=2, **how)
    assert made.dtype == torch.float32


def test_what_cannot_be_is_said():
    net, how = tiny("compact", 2)
    with pytest.raises(UserError, match="is not the ×3 that the run says"):
        upscale(net, picture(20, 20), scale=3, **how)
    with pytest.raises(UserError, match="tile must be at least 16 pixels, not 8"):
        layout(10, tile=8)
    with pytest.raises(UserError, match="overlap must be 0 or more"):
        layout(10, overlap=-1)
    with pytest.raises(ValueError, match="fits in one tile"):
        seam(net, picture(20, 20), scale=2, cut=layout(**how))


MEMORY = """
import resource, sys, torch
from fmrun.tiling import bands, layout
class Net(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.interpolate(x, scale_factor=2)
torch.set_num_threads(1)
net = Net()
image = torch.zeros(1, 3, 2000, 1500)
list(bands(net, image[..., :400, :400], scale=2, cut=layout(10)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for band in bands(net, image, scale=2, cut=layout(10)):
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_is_that_of_a_band_not_of_the_result():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    whole = 4000 * 3000 * 3 * 4 / 2**20  # MiB
    assert float(done.stdout) < 0.8 * whole
