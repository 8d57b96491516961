"""Pixel and frequency losses against slow float64 references, and when and how strongly each acts."""

import math

import numpy as np
import pytest
import torch
from support.helpers import WORLD
from torch import Tensor

from fmrun.config.schema import LossesConfig
from fmrun.losses import image as image_losses
from fmrun.losses import pixel
from fmrun.losses.frequency import focal_frequency
from fmrun.losses.image import FUNCTIONS, ImageLosses
from fmrun.runtime.dist import World
from fmrun.runtime.errors import UserError

SHAPE = (3, 2, 8, 12)


def numbers(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(seed: int, target: Tensor, least: float = 0.1) -> Tensor:
    """Images that differ from `target` by at least `least` everywhere, for gradients away from kinks."""
    size = least + 0.3 * numbers(seed, tuple(target.shape))
    sign = torch.where(numbers(seed + 1, tuple(target.shape)) < 0.5, -1.0, 1.0)
    return target + sign * size


def every(shape):
    return np.ndindex(*shape)


# ---- pixels


@pytest.mark.parametrize(
    ("loss", "each"),
    [
        (FUNCTIONS["l1"], abs),
        (FUNCTIONS["l2"], lambda d: d * d),
        (FUNCTIONS["charbonnier"], lambda d: math.sqrt(d * d + 1e-12)),
        (lambda a, b: FUNCTIONS["charbonnier"](a, b, eps=0.01), lambda d: math.sqrt(d * d + 0.01)),
    ],
)
def test_pixel_losses(loss, each):
    image, target = numbers(0), numbers(1)
    d = (image - target).numpy()
    expected = sum(each(float(d[i])) for i in every(SHAPE)) / d.size
    assert loss(image, target).item() == pytest.approx(expected, rel=1e-12)
    apart_ = apart(3, target).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (apart_,))


def test_half_precision_is_widened():
    image, target = numbers(0).bfloat16(), numbers(1).bfloat16()
    for loss in FUNCTIONS.values():
        got = loss(image, target)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(loss(image.double(), target.double()).item(), rel=1e-4)


def slow_log(size: int, sigma: float) -> np.ndarray:
    half = size // 2
    kernel = np.zeros((size, size))
    for y, x in every(kernel.shape):
        r2 = (y - half) ** 2 + (x - half) ** 2
        kernel[y, x] = (r2 - 2 * sigma**2) / sigma**4 * math.exp(-r2 / (2 * sigma**2))
    return kernel - kernel.sum() / kernel.size


@pytest.mark.parametrize(
    ("size", "sigma", "criterion", "eps"), [(7, 1.0, "charbonnier", 1e-12), (5, 1.5, "l1", 0), (3, 0.7, "l2", 0)]
)
def test_hfen(size, sigma, criterion, eps):
    image, target = numbers(0), numbers(1)
    kernel, half = slow_log(size, sigma), size // 2
    responses = []
    for x in (image, target):
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (half, half), (half, half)))
        response = np.zeros(SHAPE)
        for b, c, i, j in every(SHAPE):
            response[b, c, i, j] = (padded[b, c, i : i + size, j : j + size] * kernel).sum()
        responses.append(response)
    d = responses[0] - responses[1]
    expected = {"l1": np.abs(d), "l2": d**2, "charbonnier": np.sqrt(d**2 + eps)}[criterion].mean()
    got = pixel.hfen(image, target, kernel_size=size, sigma=sigma, criterion=criterion, eps=eps)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_hfen_gradient_and_autocast():
    image, target = numbers(0, (1, 2, 6, 6)).requires_grad_(), numbers(1, (1, 2, 6, 6))
    assert torch.autograd.gradcheck(lambda x: pixel.hfen(x, target, eps=1e-3), (image,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pixel.hfen(image.float(), target.float())
    assert got.item() == pytest.approx(pixel.hfen(image, target).item(), rel=1e-5)


def test_hfen_sees_no_flat_difference_but_edges():
    flat = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    inner = pixel.F.conv2d(flat + 0.5, pixel.laplacian_of_gaussian(7, 1.0, flat)[None, None])
    assert inner.abs().max() < 1e-14


# ---- frequencies


def slow_spectrum(x: np.ndarray) -> np.ndarray:
    """Orthonormal two-dimensional Fourier transform by its definition."""
    height, width = x.shape
    rows, columns = np.arange(height), np.arange(width)
    left = np.exp(-2j * np.pi * np.outer(rows, rows) / height)
    right = np.exp(-2j * np.pi * np.outer(columns, columns) / width)
    return left @ x @ right / math.sqrt(height * width)


def slow_focal(image, target, alpha=1.0, patch_factor=1, average=True, log=False, batch=False) -> float:
    a, t = image.numpy(), target.numpy()
    images, channels, height, width = a.shape
    h, w, p = height // patch_factor, width // patch_factor, patch_factor
    spectra = np.zeros((2, images, p * p, channels, h, w), dtype=complex)
    for k, x in enumerate((a, t)):
        for b, i, j, c in every((images, p, p, channels)):
            spectra[k, b, i * p + j, c] = slow_spectrum(x[b, c, i * h : (i + 1) * h, j * w : (j + 1) * w])
    if average:
        spectra = spectra.mean(1, keepdims=True)
    d = np.abs(spectra[0] - spectra[1])
    weight = d**alpha
    weight = np.log(weight + 1) if log else weight
    weight = weight / (weight.max() if batch else weight.max((-2, -1), keepdims=True))
    return 50 * (weight * d**2).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.0},
        {"alpha": 1.7},
        {"patch_factor": 2},
        {"average_spectrum": False},
        {"average_spectrum": False, "batch_weights": True},
        {"average_spectrum": False, "log_weights": True, "patch_factor": 4, "alpha": 0.5},
    ],
)
def test_focal_frequency(options):
    image, target = numbers(0), numbers(1)
    names = {"average_spectrum": "average", "log_weights": "log", "batch_weights": "batch"}
    expected = slow_focal(image, target, **{names.get(k, k): v for k, v in options.items()})
    assert focal_frequency(image, target, **options).item() == pytest.approx(expected, rel=1e-10)


def test_focal_frequency_gradient_holds_the_weight_fixed():
    image, target = numbers(0, (2, 1, 4, 6)).requires_grad_(), numbers(1, (2, 1, 4, 6))
    spectrum = torch.fft.fft2((image - target).mean(0), norm="ortho").abs().detach()
    weight = spectrum / spectrum.max()

    def frozen(x: Tensor) -> Tensor:
        return 50 * (weight * torch.fft.fft2((x - target).mean(0), norm="ortho").abs().square()).mean()

    assert torch.autograd.gradcheck(frozen, (image,))
    got, expected = (torch.autograd.grad(f(image), image)[0] for f in (lambda x: focal_frequency(x, target), frozen))
    assert torch.allclose(got, expected, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda x: focal_frequency(x, target, alpha=0.0), (image,))


def test_focal_frequency_under_half_precision_autocast():
    image, target = numbers(0).float().requires_grad_(), numbers(1).float()
    expected = focal_frequency(image, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = focal_frequency(image, target)
        (gradient,) = torch.autograd.grad(got, image)
        half = focal_frequency(image.bfloat16(), target.bfloat16())
    assert got.dtype == half.dtype == gradient.dtype == torch.float32
    assert got.item() == expected.item()
    assert half.item() == pytest.approx(expected.item(), rel=0.05)


def test_equal_images_have_no_frequency_loss():
    image = numbers(0).requires_grad_()
    loss = focal_frequency(image, image.detach())
    assert loss == 0
    assert torch.autograd.grad(loss, image)[0].abs().max() == 0


def test_patches_that_do_not_fit():
    with pytest.raises(UserError) as caught:
        focal_frequency(numbers(0), numbers(1), patch_factor=5)
    assert str(caught.value) == (
        "losses.frequency.patch_factor is 5, which does not divide the images' height and width, 8 x 12"
    )


class HalfOfTwo(World):
    """One of two processes, the other of which holds `others`."""

    def __init__(self, others: Tensor):
        super().__init__(0, 2)
        self.others = others

    def mean(self, x: Tensor) -> Tensor:
        return (x + self.others) / 2


def test_the_spectrum_is_averaged_over_the_global_batch():
    image, target = numbers(0, (4, 1, 8, 8)), numbers(1, (4, 1, 8, 8))
    world = HalfOfTwo((image[2:] - target[2:]).mean(0, keepdim=True))
    got = focal_frequency(image[:2], target[:2], world=world)
    assert got.item() == pytest.approx(focal_frequency(image, target).item(), rel=1e-12)


# ---- what acts when


ALL = ("l1", "l2", "charbonnier", "frequency", "hfen")


def losses(batch_size: int = 3, world: World = WORLD, **sections) -> ImageLosses:
    config = LossesConfig.model_validate(sections)
    return ImageLosses(config, torch.device("cpu"), world, batch_size=batch_size, precision=torch.float64)


def signed(x: Tensor) -> Tensor:
    return x * 2 - 1


def acting(term: ImageLosses, image: Tensor, target: Tensor, step: int = 0) -> dict[str, Tensor]:
    """What acts at `step`, of images in [-1, 1]."""
    weights = term.weights(step)
    return term(image, target, [name for name, weight in weights.items() if weight > 0], weights)


@pytest.mark.parametrize("name", ALL)
def test_a_weight_acts_once_and_values_are_compared_in_zero_to_one(name):
    image, target = numbers(0), numbers(1)
    got = acting(losses(**{name: {"weight": 0.1}}), signed(image), signed(target))
    assert list(got) == [name]
    assert got[name].item() == pytest.approx(0.1 * image_losses.FUNCTIONS[name](image, target).item(), rel=1e-9)


def test_options_reach_the_function():
    image, target = numbers(0), numbers(1)
    term = losses(
        charbonnier={"eps": 0.01}, hfen={"kernel_size": 5, "sigma": 2.0, "criterion": "l2"}, frequency={"alpha": 0.0}
    )
    got = acting(term, signed(image), signed(target))
    assert got["charbonnier"].item() == pytest.approx(
        FUNCTIONS["charbonnier"](image, target, eps=0.01).item(), rel=1e-9
    )
    hfen = pixel.hfen(image, target, kernel_size=5, sigma=2.0, criterion="l2")
    assert got["hfen"].item() == pytest.approx(hfen.item(), rel=1e-9)
    assert got["frequency"].item() == pytest.approx(focal_frequency(image, target, alpha=0.0).item(), rel=1e-9)


def test_start_and_ramp(monkeypatch):
    calls = []
    monkeypatch.setitem(
        image_losses.FUNCTIONS, "l1", lambda a, b: calls.append(1) or pixel.distance(a, b, criterion="l1")
    )
    term = losses(l1={"weight": 2.0, "start_step": 10, "ramp": 4}, l2={"weight": 0.0})
    image, target = signed(numbers(0)), signed(numbers(1))
    whole = 2 * pixel.distance(numbers(0), numbers(1), criterion="l1").item()
    assert [term.weights(step) for step in (9, 10)] == [{"l1": 0.0}] * 2
    assert [acting(term, image, target, step) for step in (9, 10)] == [{}] * 2
    assert calls == [], "nothing is computed before it acts"
    for step, share in ((11, 0.25), (13, 0.75), (14, 1.0), (10_000, 1.0)):
        assert acting(term, image, target, step)["l1"].item() == pytest.approx(share * whole, rel=1e-9)


@pytest.mark.parametrize("name", ["l1", "l2", "charbonnier", "hfen"])
def test_a_sum_is_over_the_global_batch_however_it_is_cut(name):
    image, target = numbers(0, (4, 1, 8, 8)), numbers(1, (4, 1, 8, 8))
    term = losses(batch_size=4, **{name: {"reduction": "sum"}})
    whole = acting(term, signed(image), signed(target))[name].item()
    expected = image_losses.FUNCTIONS[name](image, target).item() * image.numel()
    assert whole == pytest.approx(expected, rel=1e-9)
    halves = [acting(term, signed(image[i : i + 2]), signed(target[i : i + 2]))[name].item() for i in (0, 2)]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-9)


def test_terms_are_differentiated_one_after_the_other():
    image, target = (signed(numbers(i)).requires_grad_(i == 0) for i in range(2))
    terms = acting(losses(**{name: {} for name in ALL}), image, target)
    assert set(terms) == set(ALL)
    parts = [torch.autograd.grad(term, image)[0] for term in terms.values()]
    assert all(part.abs().max() > 0 for part in parts)


def test_which_losses_are_of_the_whole_batch():
    assert losses(l1={}, frequency={}).config.of_batch == ("frequency",)
    assert losses(l1={}, frequency={"average_spectrum": False}).config.of_batch == ()
    assert losses(frequency={"average_spectrum": False, "batch_weights": True}).config.of_batch == ("frequency",)
    assert losses(l1={}).config.of_batch == ()


def test_inside_autocast_everything_stays_in_single_precision():
    term = losses(**{name: {} for name in ALL})
    image, target = (signed(numbers(i)).float() for i in range(2))
    plain = acting(term, image, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = acting(term, image, target)
    assert {name: value.item() for name, value in plain.items()} == {n: v.item() for n, v in inside.items()}
