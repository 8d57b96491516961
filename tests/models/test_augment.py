"""DiffAugment against one image at a time in numpy."""

import math

import numpy as np
import pytest
import torch

from fmrun.models.augment import NUMBERS, POLICIES, augment

LAST = 1 - 2**-24
"""The largest float32 below 1."""


def slow_color(image: np.ndarray, u: list[float]) -> np.ndarray:
    image = image + (u[0] - 0.5)
    grey = image.mean(axis=0)
    image = np.stack([grey + 2 * u[1] * (channel - grey) for channel in image])
    mean = image.mean()
    return mean + (0.5 + u[2]) * (image - mean)


def slow_translation(image: np.ndarray, u: list[float]) -> np.ndarray:
    """out[y][x] = in[y + dy][x + dx], dy and dx whole numbers in [-size/8, size/8], zero outside."""
    _, h, w = image.shape
    reach = [math.floor(s / 8 + 0.5) for s in (h, w)]
    dy, dx = (math.floor(u[3 + i] * (2 * reach[i] + 1)) - reach[i] for i in range(2))
    out = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            if 0 <= y + dy < h and 0 <= x + dx < w:
                out[:, y, x] = image[:, y + dy, x + dx]
    return out


def slow_cutout(image: np.ndarray, u: list[float]) -> np.ndarray:
    _, h, w = image.shape
    sizes = [math.floor(s / 2 + 0.5) for s in (h, w)]
    starts = [
        math.floor(u[5 + i] * (s + (1 if k % 2 == 0 else 0))) - k // 2
        for i, (s, k) in enumerate(zip((h, w), sizes, strict=True))
    ]
    out = image.copy()
    for y in range(h):
        for x in range(w):
            if starts[0] <= y < starts[0] + sizes[0] and starts[1] <= x < starts[1] + sizes[1]:
                out[:, y, x] = 0
    return out


SLOW = {"color": slow_color, "translation": slow_translation, "cutout": slow_cutout}


def example(channels: int = 3, size: tuple[int, int] = (8, 10)) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    image = torch.rand(16, channels, *size, generator=rng, dtype=torch.float64) * 2 - 1
    return image, torch.rand(16, NUMBERS, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 10), (28, 28), (9, 7)])
@pytest.mark.parametrize("policy", [("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")])
def test_equals_a_loop_over_images(policy, size, channels):
    image, u = example(channels, size)
    expected = []
    for one, numbers in zip(image.numpy(), u.tolist(), strict=True):
        for part in policy:
            one = SLOW[part](one, numbers)
        expected.append(one)
    assert np.allclose(augment(image, u, policy).numpy(), np.stack(expected), atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradient_flows(policy):
    image, u = example(size=(4, 4))
    assert torch.autograd.gradcheck(lambda x: augment(x, u[:2], (policy,)), (image[:2].requires_grad_(),))
    leaf = image.clone().requires_grad_()
    augment(leaf, u, (policy,)).square().sum().backward()
    assert (leaf.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_same_numbers_augment_two_images_alike():
    image, u = example()
    same = torch.cat([image[:1], image[:1]])
    out = augment(same, u[:1].expand(2, -1), tuple(POLICIES))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(*augment(same, u[:2], tuple(POLICIES)))


def test_no_policy_is_the_identity():
    image, _ = example()
    assert augment(image, None, ()) is image


@pytest.mark.parametrize("value", [0.0, LAST])
@pytest.mark.parametrize("policy", POLICIES)
def test_extreme_numbers_keep_every_image_finite_and_whole(policy, value):
    image = torch.ones(2, 3, 32, 32)
    out = augment(image, torch.full((2, NUMBERS), value), (policy,))
    assert out.shape == image.shape
    assert out.isfinite().all()


def test_translation_reaches_an_eighth_either_way_and_brings_in_zero():
    image = torch.ones(1, 1, 32, 32)
    for value, kept in ((0.0, slice(4, None)), (LAST, slice(None, -4))):
        expected = torch.zeros_like(image)
        expected[:, :, kept, kept] = 1
        assert torch.equal(augment(image, torch.full((1, NUMBERS), value), ("translation",)), expected)
    assert torch.equal(augment(image, torch.full((1, NUMBERS), 0.5), ("translation",)), image)


def test_cutout_takes_at_most_a_quarter_and_is_centred_anywhere():
    image = torch.ones(1, 1, 32, 32)
    areas = [int((augment(image, torch.full((1, NUMBERS), v), ("cutout",)) == 0).sum()) for v in (0.0, 0.5, LAST)]
    assert areas == [8 * 8, 16 * 16, 8 * 8]


def test_color_is_the_identity_in_the_middle():
    image, _ = example()
    assert torch.allclose(augment(image, torch.full((16, NUMBERS), 0.5, dtype=torch.float64), ("color",)), image)


def test_images_of_a_batch_do_not_see_each_other():
    image, u = example()
    alone = torch.cat([augment(image[i : i + 1], u[i : i + 1], tuple(POLICIES)) for i in range(len(image))])
    assert torch.allclose(augment(image, u, tuple(POLICIES)), alone, atol=1e-12)
