"""PatchGAN and the U-Net with spectral norm: shapes, features, what is run for them, and spectral norm of any layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fmrun.feature_matching.discriminator import Discriminator
from fmrun.models.norm import advance_spectral, hold_spectral, spectral_norm
from fmrun.models.patchgan import PatchGan
from fmrun.models.unet import UNet
from fmrun.runtime.errors import UserError

NORMS = ("batch", "instance", "spectral", "group", "none")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=rng(seed), dtype=dtype) * 2 - 1


def patchgan(norm: str = "batch", channels: int = 3, **settings) -> PatchGan:
    return PatchGan(channels, 4, norm, rng(), **settings)


BUILDS = {f"patchgan-{norm}": (lambda norm=norm: patchgan(norm)) for norm in NORMS} | {
    "unet": lambda: UNet(3, 4, rng())
}


@pytest.fixture(params=BUILDS)
def net(request):
    return BUILDS[request.param]()


def test_each_has_the_face_of_a_discriminator(net):
    assert isinstance(net, Discriminator)
    assert net.auto in net.feature_names
    assert set(net.groups) == {"early", "mid", "key", "all"}
    assert net.groups["all"] == net.feature_names
    assert all(set(group) <= set(net.feature_names) for group in net.groups.values())
    out = net(noise(2, 3, 40, 33), net.feature_names)
    assert tuple(out.features) == net.feature_names
    assert out.logits.shape[:2] == (2, 1)


def test_asking_for_layers_changes_neither_logits_nor_features(net):
    image = noise(2, 3, 40, 33)
    whole = net(image, net.feature_names)
    assert torch.equal(whole.logits, net(image).logits)
    for name in net.feature_names:
        alone = net(image, (name,), False)
        assert alone.logits is None
        assert list(alone.features) == [name]
        assert torch.equal(alone.features[name], whole.features[name])


def test_nothing_is_run_beyond_the_last_tap(net):
    run: list[str] = []
    convs = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    for name in convs:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: run.append(name))
    counts = []
    for name in net.feature_names:
        run.clear()
        net(noise(2, 3, 33, 33), (name,), False)
        assert run == convs[: len(run)]
        counts.append(len(run))
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == len(convs) - 1
    run.clear()
    net(noise(2, 3, 33, 33), (), False)
    assert run == []


def test_features_pass_a_gradient_and_equal_images_give_equal_ones(net):
    image = noise(2, 3, 33, 40).requires_grad_()
    out, again = (net(image, net.feature_names) for _ in range(2))
    for name, value in {**out.features, "logits": out.logits}.items():
        (gradient,) = torch.autograd.grad((value * noise(*value.shape, seed=2)).sum(), image, retain_graph=True)
        assert (gradient.abs().sum((0, 2, 3)) > 0).all(), name
        if name != "logits":
            assert torch.equal(value, again.features[name])


def test_r1_differentiates_twice(net):
    image = noise(2, 3, 33, 33).requires_grad_()
    (gradient,) = torch.autograd.grad(net(image).logits.mean(), image, create_graph=True)
    gradient.square().sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if name.endswith(("weight", "original"))]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


def test_bfloat16_and_compilation_give_the_same(net):
    image = noise(2, 3, 32, 33)
    plain = net(image, net.feature_names)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(image, net.feature_names)
    fast = torch.compile(net, backend="eager")(image, net.feature_names)
    for name in net.feature_names:
        size = plain.features[name].norm()
        assert (half.features[name].float() - plain.features[name]).norm() < 0.05 * size, name
        assert torch.allclose(fast.features[name], plain.features[name], atol=1e-5), name


# PatchGAN


@pytest.mark.parametrize(("channels", "norm"), list(itertools.product((1, 3, 4), NORMS)))
def test_patchgan_halves_but_for_the_last_two(channels, norm):
    out = patchgan(norm, channels)(noise(2, channels, 64, 48), ("block1", "block2.conv", "block4"))
    assert out.logits.shape == (2, 1, 6, 4)
    assert [tuple(f.shape[1:]) for f in out.features.values()] == [(4, 32, 24), (8, 16, 12), (32, 7, 5)]


@pytest.mark.parametrize(("blocks", "field"), [(2, 16), (3, 34), (4, 70), (5, 142)])
def test_a_logit_of_patchgan_sees_a_patch_of_the_published_size(blocks, field):
    net = patchgan("none", 1, blocks=blocks).double()
    side = 2 * field + 40
    image = noise(1, 1, side, side, dtype=torch.float64).requires_grad_()
    logits = net(image).logits
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], image)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == field


def test_patchgan_stops_widening_at_eight_times_and_names_its_groups():
    net = patchgan("none", 1, blocks=6)
    assert [block["conv"].out_channels for block in net.blocks] == [4, 8, 16, 32, 32, 32]
    assert net.groups["early"] == ("block1", "block2", "block3")
    assert net.groups["mid"] == ("block3", "block4")
    assert net.auto == "block6.conv"


def test_patchgan_norms_skip_the_first_block_but_spectral_covers_all():
    for norm in ("batch", "instance", "group"):
        net = patchgan(norm)
        assert ["norm" in block for block in net.blocks] == [False, True, True, True]
    net = patchgan("spectral")
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all(parametrize.is_parametrized(m, "weight") for m in convs)


def test_patchgan_refuses_images_too_small_for_its_blocks():
    assert patchgan()(noise(1, 3, 24, 24)).logits.shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"patchgan with 4 blocks judges images of at least 24 px, not 30 x 23"):
        patchgan()(noise(1, 3, 23, 30))


# U-Net


def published(net: UNet, x: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2021, for sides that are multiples of 8."""

    def act(t: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(t, 0.2)

    def up(t: torch.Tensor) -> torch.Tensor:
        return F.interpolate(t, scale_factor=2, mode="bilinear", align_corners=False)

    x0 = act(net.input(x))
    x1 = act(net.down[0](x0))
    x2 = act(net.down[1](x1))
    x3 = act(net.down[2](x2))
    x4 = act(net.up[0](up(x3))) + x2
    x5 = act(net.up[1](up(x4))) + x1
    x6 = act(net.up[2](up(x5))) + x0
    return net.head(act(net.refine[1](act(net.refine[0](x6)))))


def test_unet_is_the_published_net():
    net = UNet(3, 4, rng()).double()
    image = noise(2, 3, 32, 40, dtype=torch.float64)
    assert torch.allclose(net(image).logits, published(net, image), atol=1e-12)


@pytest.mark.parametrize(("channels", "size"), [(1, (33, 47)), (3, (8, 9)), (4, (17, 64))])
def test_unet_takes_any_size(channels, size):
    net = UNet(channels, 4, rng())
    out = net(noise(1, channels, *size), net.feature_names)
    assert out.logits.shape == (1, 1, *size)
    sizes = [size]
    for _ in range(3):
        sizes.append(tuple(-(-s // 2) for s in sizes[-1]))
    levels = [0, 1, 2, 3, 2, 1, 0, 0, 0]
    assert [tuple(f.shape[1:]) for f in out.features.values()] == [(4 * 2**level, *sizes[level]) for level in levels]


def test_unet_has_spectral_norm_on_all_but_its_first_and_last_convolution():
    net = UNet(3, 4, rng())
    for _ in range(60):
        advance_spectral(net)
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    normed = [name for name, m in convs.items() if parametrize.is_parametrized(m, "weight")]
    assert set(convs) - set(normed) == {"input", "head"}
    for name in normed:
        sigma = torch.linalg.matrix_norm(convs[name].weight.flatten(1), 2).item()
        assert sigma == pytest.approx(1, abs=0.02), name


def test_unet_refuses_tiny_images():
    with pytest.raises(UserError, match=r"unet judges images of at least 8 px, not 8 x 7"):
        UNet(1, 4, rng())(noise(1, 1, 7, 8))


# Spectral norm of layers of any kind


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(5, 3), noise(2, 5)),
        (nn.Conv1d(2, 4, 3), noise(1, 2, 8)),
        (nn.Conv2d(4, 4, 3, groups=4), noise(1, 4, 6, 6)),
        (nn.Conv3d(1, 2, 2), noise(1, 1, 3, 3, 3)),
        (Scale(), noise(3, 2)),
    ],
    ids=["linear", "conv1d", "grouped", "conv3d", "vector"],
)
def test_spectral_norm_divides_by_the_largest_singular_value(module, x):
    plain = module.weight.detach().clone()
    spectral_norm(module, rng())
    for _ in range(200):
        advance_spectral(module)
    sigma = torch.linalg.matrix_norm(plain.reshape(len(plain), -1), 2)
    assert torch.allclose(module.weight, plain / sigma, atol=1e-4)
    module(x).square().sum().backward()
    assert torch.isfinite(module.parametrizations.weight.original.grad).all()


@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_torchs_own_spectral_norms_can_be_held_between_updates(normalise):
    """Trap 4: by themselves they move with every forward in train mode."""
    torch.manual_seed(0)
    free = nn.Sequential(normalise(nn.Linear(64, 64)))
    x = noise(2, 64)
    assert not torch.equal(free(x), free(x))
    held = nn.Sequential(normalise(nn.Linear(64, 64)))
    hold_spectral(held)
    first = held(x)
    assert torch.equal(first, held(x))
    advance_spectral(held)
    second = held(x)
    assert not torch.equal(first, second)
    assert torch.equal(second, held(x))
    for _ in range(200):
        advance_spectral(held)
    held(x)
    assert torch.linalg.matrix_norm(held[0].weight, 2).item() == pytest.approx(1, abs=1e-3)
