"""MUNet: the documented features, what each costs and sees, and the traps of a discriminator of several branches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from fmrun.feature_matching.discriminator import Discriminator
from fmrun.models import munet
from fmrun.models.base import Doubling, init_normal
from fmrun.models.munet import BINOMIAL as TAPS
from fmrun.models.munet import MUNet, WindowAttention, log_spectrum, luma, sobel
from fmrun.models.norm import advance_spectral
from fmrun.models.unet import BILINEAR
from fmrun.runtime.errors import UserError

TEN = ("input", "enc1", "enc2", "enc3", "enc4", "bottleneck", "spatial", "frequency", "patch", "fusion")
BINOMIAL = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(channels: int = 3, width: int = 4, seed: int = 0, **settings) -> MUNet:
    return MUNet(channels, width, rng(seed), **settings)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=rng(seed), dtype=dtype) * 2 - 1


def halved(size: int, times: int) -> int:
    for _ in range(times):
        size = -(-size // 2)
    return size


def expected_shapes(n: int, mult: tuple[int, ...], height: int, width: int) -> dict[str, tuple[int, int, int]]:
    full = (n, height, width)
    shapes = {"input": full}
    for i, m in enumerate(mult, 1):
        shapes[f"enc{i}"] = (n * m, halved(height, i), halved(width, i))
    shapes["bottleneck"] = shapes[f"enc{len(mult)}"]
    return shapes | dict.fromkeys(("spatial", "frequency", "patch", "fusion"), full)


# Features


def test_the_ten_features_have_their_documented_order_groups_and_indices():
    net = tiny()
    assert isinstance(net, Discriminator)
    assert net.feature_names == TEN
    assert net.groups["early"] == tuple(TEN[i] for i in (1, 2, 3))
    assert net.groups["mid"] == tuple(TEN[i] for i in (4, 5, 6))
    assert net.groups["key"] == tuple(TEN[i] for i in (1, 3, 5, 9))
    assert net.groups["all"] == TEN
    assert net.auto == "fusion"


def test_the_gradient_branch_comes_last_and_moves_no_index():
    assert tiny(gradient=True).feature_names == (*TEN, "gradient")


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_groups_name_existing_layers_for_any_number_of_stages(depth):
    net = tiny(ch_mult=(1, 2, 2, 2, 2)[:depth])
    assert net.feature_names == (
        *("input", *(f"enc{i}" for i in range(1, depth + 1))),
        *("bottleneck", "spatial", "frequency", "patch", "fusion"),
    )
    for group in net.groups.values():
        assert group
        assert set(group) <= set(net.feature_names)
    assert "enc1" in net.groups["early"]
    assert {"bottleneck", "spatial"} <= set(net.groups["mid"])
    out = net(noise(1, 3, 35, 32), net.feature_names)
    assert tuple(out.features) == net.feature_names
    assert out.logits.shape == (1, 1, 35, 32)


@pytest.mark.parametrize(
    ("channels", "size"), [(3, (64, 32)), (3, (33, 47)), (1, (37, 32)), (4, (32, 33)), (2, (32, 32))]
)
def test_shapes_for_any_size_and_number_of_channels(channels, size):
    net = tiny(channels, gradient=True)
    out = net(noise(2, channels, *size), net.feature_names)
    assert out.logits.shape == (2, 1, *size)
    assert tuple(out.features) == net.feature_names
    shapes = expected_shapes(4, (1, 2, 4, 8), *size) | {"gradient": (4, *size)}
    assert {name: tuple(f.shape[1:]) for name, f in out.features.items()} == shapes


def test_images_below_32_px_are_refused():
    with pytest.raises(UserError, match=r"munet judges images of at least 32 px, not 40 x 31"):
        tiny()(noise(1, 3, 31, 40))


@pytest.mark.parametrize("gradient", [False, True])
def test_asking_for_layers_changes_neither_logits_nor_features(gradient):
    net = tiny(gradient=gradient)
    image = noise(2, 3, 33, 40)
    whole = net(image, net.feature_names)
    assert torch.equal(whole.logits, net(image).logits)
    for name in net.feature_names:
        alone = net(image, (name,), False)
        assert alone.logits is None
        assert list(alone.features) == [name]
        assert torch.equal(alone.features[name], whole.features[name])
    assert net(image, (), False).features == {}


def test_features_come_in_the_nets_order_whatever_the_order_asked_in():
    assert tuple(tiny()(noise(1, 3, 32, 32), ("fusion", "input", "enc2"), False).features) == (
        "input",
        "enc2",
        "fusion",
    )


# Only what is asked for is run

NEEDS = {
    "input": {"input"},
    "enc1": {"input", "encoder.0"},
    "enc2": {"input", "encoder.0", "encoder.1"},
    "enc3": {"input", "encoder.0", "encoder.1", "encoder.2"},
    "enc4": {"input", "encoder"},
    "bottleneck": {"input", "encoder", "bottleneck"},
    "spatial": {"input", "encoder", "bottleneck", "decoder"},
    "frequency": {"frequency"},
    "patch": {"input", "encoder.0", "encoder.1", "patch"},
    "fusion": {"input", "encoder", "bottleneck", "decoder", "frequency", "patch", "gradient", "weigh", "fusion"},
    "gradient": {"gradient"},
}


@pytest.mark.parametrize("tap", NEEDS)
def test_a_tap_runs_only_the_convolutions_it_depends_on(tap):
    net = tiny(gradient=True)
    run: set[str] = set()
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in convs.items():
        module.register_forward_hook(lambda *_, name=name: run.add(name))
    net(noise(1, 3, 32, 32), (tap,), False)
    needed = NEEDS[tap]
    assert run == {name for name in convs if any(name == n or name.startswith(f"{n}.") for n in needed)}


def test_layer_cost_grows_along_the_net_and_side_branches_are_cheap():
    net, image = tiny(width=8), noise(1, 3, 64, 64)

    def flops(taps: tuple[str, ...], logits: bool = False) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(image, taps, logits)
        return counter.get_total_flops()

    cost = {name: flops((name,)) for name in net.feature_names}
    chain = [cost[name] for name in TEN[:7]] + [cost["fusion"], flops((), True)]
    assert chain == sorted(chain)
    assert len(set(chain)) == len(chain)
    assert cost["patch"] < cost["bottleneck"]
    assert cost["frequency"] < cost["spatial"]
    assert flops(()) == 0
    assert flops(("enc1", "enc3")) == cost["enc3"]


# Gradients


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_features_and_logits_pass_a_gradient_to_every_image_channel(channels):
    net = tiny(channels, gradient=True)
    image = noise(1, channels, 33, 40).requires_grad_()
    out = net(image, net.feature_names)
    for name, value in {**out.features, "logits": out.logits}.items():
        (gradient,) = torch.autograd.grad((value * noise(*value.shape, seed=2)).sum(), image, retain_graph=True)
        assert (gradient.abs().sum((0, 2, 3)) > 0).all(), name
        assert (gradient != 0).float().mean() > 0.9, name


@pytest.mark.parametrize("tap", [*TEN, "gradient"])
def test_gradients_at_the_image_are_those_of_finite_differences(tap):
    net = tiny(2, 2, gradient=True).double()
    image = noise(1, 2, 32, 33, dtype=torch.float64)
    direction, step = noise(*image.shape, seed=3, dtype=torch.float64), 1e-6
    weights = noise(*net(image, (tap,), False).features[tap].shape, seed=4, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return (net(x, (tap,), False).features[tap] * weights).sum()

    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    measured = (value(image + step * direction) - value(image - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(measured.item(), rel=1e-4, abs=1e-9)


def test_r1_differentiates_twice_through_every_branch():
    net = tiny(gradient=True).double()
    image = noise(2, 3, 33, 33, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(net(image).logits.mean(), image, create_graph=True)
    gradient.square().sum().backward()
    for name, p in net.named_parameters():
        if name not in ("fusion.bias", "head.bias"):  # constant in the gradient, or nearly
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert p.grad.abs().sum() > 0, name


def test_a_flat_image_gives_finite_first_and_second_derivatives():
    """Where magnitudes are 0 a plain root or norm has none."""
    net = tiny(gradient=True)
    image = torch.zeros(1, 3, 33, 33, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(image).logits.mean(), image, create_graph=True)
    gradient.square().sum().backward()
    assert torch.isfinite(gradient).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_equal_images_give_equal_features_in_train_mode():
    net = tiny(gradient=True).train()
    image = noise(2, 3, 32, 32)
    real, fake = net(image, net.feature_names), net(image.clone(), net.feature_names)
    assert all(torch.equal(real.features[name], fake.features[name]) for name in net.feature_names)


def test_later_layers_leave_tapped_features_as_they_were():
    net = tiny(gradient=True)
    image = noise(1, 3, 32, 32)
    features = net(image, net.feature_names).features
    assert all(f._version == net(image, (n,), False).features[n]._version for n, f in features.items())


# Fixed kernels and spectral norm


def test_the_resampling_kernel_is_binomial_whatever_is_done_to_the_net():
    net = tiny()
    assert net.upsample.kernel.tolist() == BINOMIAL
    init_normal(net, rng(7))
    net.apply(lambda m: [nn.init.normal_(p) for p in m.parameters(recurse=False)])
    net.load_state_dict(tiny(seed=5).state_dict())
    assert net.upsample.kernel.tolist() == BINOMIAL
    assert copy.deepcopy(net).double().upsample.kernel.tolist() == BINOMIAL
    assert not any(p is net.upsample.kernel for p in net.parameters())


def stuffed(x: torch.Tensor, kernel: list[float], size: tuple[int, int]) -> torch.Tensor:
    """Zeros between the pixels of x, whose border is repeated, then `kernel` along each side, times 2."""
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[..., ::2, ::2] = x
    taps = 2 * torch.tensor(kernel, dtype=x.dtype)
    first = 4 - len(kernel) // 2
    for dim in (2, 3):
        wide = (wide.unfold(dim, len(taps), 1) * taps).sum(-1)
    return wide[..., first : first + size[0], first : first + size[1]]


FORMS = [Doubling._convolved, Doubling._summed]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(10, 14), (9, 13)])
@pytest.mark.parametrize("taps", [[1, 4, 6, 4, 1], [1, 3, 3, 1]])
def test_doubling_is_zero_stuffing_and_the_kernel_on_every_device(monkeypatch, taps, size, form):
    monkeypatch.setattr(Doubling, "_convolved", form)
    net = Doubling(taps).double()
    x = noise(2, 3, 5, 7, dtype=torch.float64).requires_grad_()
    weight = noise(2, 3, *size, dtype=torch.float64, seed=1)
    got, slow = net(x, size), stuffed(x, [t / sum(taps) for t in taps], size)
    assert got.shape == slow.shape
    assert torch.allclose(got, slow, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad((y * weight).sum(), x) for y in (got, slow))
    assert torch.allclose(a, b, atol=1e-12)
    assert torch.allclose(net(torch.ones_like(x), size), torch.ones_like(got), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_doubling_with_bilinear_taps_is_bilinear_interpolation(monkeypatch, form):
    monkeypatch.setattr(Doubling, "_convolved", form)
    x = noise(1, 2, 5, 6)
    slow = F.interpolate(x, scale_factor=2, mode="bilinear")
    assert torch.allclose(Doubling(BILINEAR)(x, (10, 12)), slow, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_doubling_is_channels_last_and_keeps_the_precision(form):
    x = noise(2, 3, 5, 7).to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        made = form(Doubling(TAPS).to(dtype), x.to(dtype))
        assert made.dtype == dtype
        assert made.is_contiguous(memory_format=torch.channels_last)


def test_every_convolution_has_spectral_norm_one():
    net = tiny(gradient=True)
    for _ in range(60):
        advance_spectral(net)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 1 + 8 + 3 + 8 + 3 + 2 + 2 + 3
    for conv in convs:
        assert parametrize.is_parametrized(conv, "weight")
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_first_weights_follow_from_the_generator_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        a = tiny(seed=3).state_dict()
        torch.manual_seed(2)
        b, other = tiny(seed=3).state_dict(), tiny(seed=4).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], other[n]) for n in a)


# Attention


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11), (3, 9), (1, 1), (4, 2)])
def test_attention_is_full_attention_within_each_window(height, width):
    channels, window = 6, 4
    net = WindowAttention(channels, window).double()
    x = noise(2, channels, height, width, dtype=torch.float64)
    rows, columns = min(window, height), min(window, width)
    slow = torch.empty_like(x)
    q, k, v = net.qkv(x).chunk(3, 1)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            area = (..., slice(top, min(top + rows, height)), slice(left, min(left + columns, width)))
            a, b, c = (t[area].flatten(2).transpose(1, 2) for t in (q, k, v))
            a, b = (t / (t.square().sum(-1, keepdim=True) + munet.EPS).sqrt() for t in (a, b))
            mixed = (a @ b.transpose(1, 2) * net.sharpness.exp()).softmax(-1) @ c
            slow[area] = mixed.transpose(1, 2).unflatten(2, slow[area].shape[2:])
    assert torch.allclose(net(x), net.out(slow), atol=1e-12)


def test_heads_share_the_channels():
    net = WindowAttention(96, 4)
    assert net.heads == 3
    assert net(noise(1, 96, 6, 6)).shape == (1, 96, 6, 6)
    assert WindowAttention(7, 4).heads == 1


def saved_bytes(net: MUNet, size: int, tap: str) -> int:
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    image = noise(1, 3, size, size).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        feature = net(image, (tap,), False).features[tap]
    del feature
    return sum(storages.values())


def test_memory_is_linear_in_the_pixels_up_to_512_px():
    net = tiny(width=2, ch_mult=(1, 2, 2))
    net.requires_grad_(False)
    for tap in ("bottleneck", "fusion"):
        assert saved_bytes(net, 512, tap) < 4.1 * saved_bytes(net, 256, tap)
    scores: list[int] = []
    softmax = torch.Tensor.softmax

    def counted(t: torch.Tensor, dim: int) -> torch.Tensor:
        scores.append(t.numel())
        return softmax(t, dim)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.Tensor, "softmax", counted)
        for size in (256, 512):
            net(noise(1, 3, size, size), ("bottleneck",), False)
    assert scores == [net.bottleneck.attention.heads * (size // 8) ** 2 * 8**2 for size in (256, 512)]


# Branches


def test_luma_is_bt601_for_rgb_and_the_mean_otherwise():
    image = noise(2, 3, 4, 5)
    assert torch.allclose(
        luma(image), (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    )
    for channels in (1, 2, 4):
        image = noise(2, channels, 4, 5)
        assert torch.allclose(luma(image), image.mean(1, keepdim=True))


def test_the_spectrum_is_float32_under_bfloat16_and_float64_stays():
    x = noise(1, 1, 7, 10)
    with torch.autocast("cpu", torch.bfloat16):
        half = log_spectrum(x.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half, log_spectrum(x.bfloat16().float()))
    assert log_spectrum(x.double()).dtype == torch.float64


def test_the_spectrum_is_centred_and_logarithmic():
    x = noise(1, 1, 6, 9, dtype=torch.float64)
    logarithm, real, imaginary = log_spectrum(x)[0]
    slow = torch.fft.fft2(x[0, 0], norm="ortho")
    assert torch.allclose(logarithm[3, 4], torch.log1p(slow[0, 0].abs()), atol=1e-4)
    assert torch.allclose((real.square() + imaginary.square()).sqrt(), logarithm, atol=1e-3)
    assert torch.allclose(logarithm[3, 5], torch.log1p(slow[0, 1].abs()), atol=1e-4)


def test_sobel_is_the_gradient_magnitude():
    ramp = torch.arange(6.0).expand(1, 2, 5, 6) * 3
    assert torch.allclose(sobel(ramp)[..., 1:-1], torch.tensor(3.0))
    assert torch.allclose(sobel(ramp.transpose(2, 3))[:, :, 1:-1], torch.tensor(3.0))
    assert torch.allclose(sobel(torch.full((1, 1, 4, 4), 7.0)), torch.tensor(munet.EPS).sqrt())


def test_fusion_weights_decide_pixel_by_pixel_and_sum_to_one():
    net = tiny(gradient=True).double()
    image = noise(1, 3, 32, 32, dtype=torch.float64)
    features = net(image, net.feature_names).features
    branches = [features[name] for name in ("spatial", "frequency", "patch", "gradient")]
    weights = net.weigh(torch.cat(branches, 1)).softmax(1)
    assert weights.shape == (1, 4, 32, 32)
    mixed = sum(b * w for b, w in zip(branches, weights.split(1, 1), strict=True))
    assert torch.allclose(features["fusion"], net.fusion(mixed))
    assert torch.allclose(net(image).logits, net.head(F.leaky_relu(features["fusion"], 0.2)))


# Precision, memory format, compilation


def test_bfloat16_judges_like_float32():
    net = tiny(width=8)
    image = noise(2, 3, 33, 40)
    whole = net(image, net.feature_names)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(image, net.feature_names)
    for name in net.feature_names:
        error = (half.features[name].float() - whole.features[name]).norm() / whole.features[name].norm()
        assert error < 0.03, name
    leaf = image.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        net(leaf).logits.float().mean().backward()
    assert torch.isfinite(leaf.grad).all()


def test_channels_last_gives_the_same_and_stays_channels_last():
    net = tiny(gradient=True).double()
    image = noise(2, 3, 32, 48, dtype=torch.float64)
    plain = net(image, net.feature_names)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    out = last(image.contiguous(memory_format=torch.channels_last), net.feature_names)
    for name in net.feature_names:
        assert torch.allclose(out.features[name], plain.features[name], atol=1e-12)
        assert out.features[name].is_contiguous(memory_format=torch.channels_last), name


def test_compiled_it_gives_the_same_whatever_is_tapped():
    net = tiny(gradient=True, ch_mult=(1, 2))
    fast = torch.compile(net, backend="eager")
    image = noise(1, 3, 33, 32)
    for taps, logits in ((("patch",), False), (net.feature_names, True)):
        plain, out = net(image, taps, logits), fast(image, taps, logits)
        assert (out.logits is None) == (not logits)
        assert tuple(out.features) == tuple(plain.features)
        assert all(torch.allclose(out.features[n], plain.features[n], atol=1e-6) for n in plain.features)


def test_names_in_the_state_dict_are_stable():
    """Files that users have saved depend on them."""

    def conv(*names: str) -> set[str]:
        tails = ("bias", "parametrizations.weight.original", *(f"parametrizations.weight.0.{v}" for v in "uv"))
        return {f"{name}.{tail}" for name in names for tail in tails}

    keys = conv(
        *("input", "encoder.0.down", "encoder.0.conv", "bottleneck.attention.qkv", "bottleneck.attention.out"),
        *("bottleneck.conv", "decoder.0.narrow", "decoder.0.conv", "frequency.0", "frequency.1", "frequency.2"),
        *("patch.0", "patch.1", "weigh", "fusion", "head"),
    )
    assert set(tiny(ch_mult=(2,)).state_dict()) == keys | {"bottleneck.gate", "bottleneck.attention.sharpness"}
