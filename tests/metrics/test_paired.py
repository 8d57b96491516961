"""PSNR and SSIM of luma, against their formulas written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fmrun.metrics.paired import WINDOW, luma_bt601, psnr_y, ssim_y


def pair(channels: int, height: int = 29, width: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An original with structure and a distorted copy, (1, C, H, W) in [0, 1], float64."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [0.5 + 0.3 * np.sin(0.4 * x + k) * np.cos(0.3 * y) for k in range(channels)]
    original = np.stack(planes) + rng.normal(0, 0.05, (channels, height, width))
    image = 0.9 * original + 0.03 + rng.normal(0, 0.04, original.shape)
    return tuple(torch.from_numpy(np.clip(a, 0, 1))[None] for a in (image, original))  # type: ignore[return-value]


def luma(image: torch.Tensor) -> list[list[float]]:
    """Matlab's rgb2ycbcr on the first, or three equal, channels."""
    planes = image[0].tolist()
    red, green, blue = planes[:3] if len(planes) > 1 else planes * 3
    return [
        [16 + 65.481 * r + 128.553 * g + 24.966 * b for r, g, b in zip(*rows, strict=True)]
        for rows in zip(red, green, blue, strict=True)
    ]


def inside(values: list[list[float]], border: int) -> list[list[float]]:
    return [row[border : len(row) - border] for row in values[border : len(values) - border]]


def slow_psnr(image: torch.Tensor, original: torch.Tensor, border: int) -> float:
    a, b = (inside(luma(x), border) for x in (image, original))
    squares = [(p - q) ** 2 for u, v in zip(a, b, strict=True) for p, q in zip(u, v, strict=True)]
    return 10 * math.log10(255**2 / (math.fsum(squares) / len(squares)))


def slow_ssim(image: torch.Tensor, original: torch.Tensor, border: int) -> float:
    """Wang et al. 2004: the mean over all windows that lie inside."""
    a, b = (inside(luma(x), border) for x in (image, original))
    near = range(-5, 6)
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in near for j in near}
    whole = math.fsum(weights.values())
    values = []
    for y in range(5, len(a) - 5):
        for x in range(5, len(a[0]) - 5):

            def mean(f) -> float:
                return math.fsum(w / whole * f(a[y + i][x + j], b[y + i][x + j]) for (i, j), w in weights.items())  # noqa: B023

            ma, mb = mean(lambda p, q: p), mean(lambda p, q: q)
            va = mean(lambda p, q: (p - ma) ** 2)  # noqa: B023
            vb = mean(lambda p, q: (q - mb) ** 2)  # noqa: B023
            cov = mean(lambda p, q: (p - ma) * (q - mb))  # noqa: B023
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("border", [0, 3])
def test_psnr_is_its_formula(channels: int, border: int) -> None:
    image, original = pair(channels)
    assert psnr_y(image, original, border).item() == pytest.approx(slow_psnr(image, original, border), abs=1e-10)


@pytest.mark.parametrize(("channels", "border"), [(3, 0), (1, 2), (4, 4)])
def test_ssim_is_its_formula(channels: int, border: int) -> None:
    image, original = pair(channels)
    assert ssim_y(image, original, border).item() == pytest.approx(slow_ssim(image, original, border), abs=1e-10)


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    image, original = pair(3, 40, 52)
    a, b = (np.array(luma(x)) for x in (image, original))
    _, similarity = metrics.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )
    expected = similarity[5:-5, 5:-5].mean()
    assert ssim_y(image, original, 0).item() == pytest.approx(expected, abs=1e-10)
    expected = metrics.peak_signal_noise_ratio(a, b, data_range=255)
    assert psnr_y(image, original, 0).item() == pytest.approx(expected, abs=1e-10)


def test_equal_images() -> None:
    image, _ = pair(3)
    assert psnr_y(image, image, 2).item() == math.inf
    assert ssim_y(image, image, 2).item() == pytest.approx(1, abs=1e-12)


def test_each_image_is_measured_by_itself_in_double_precision() -> None:
    pairs = [pair(3, seed=seed) for seed in range(3)]
    image, original = (torch.cat(x).float() for x in zip(*pairs, strict=True))
    for metric in (psnr_y, ssim_y):
        together = metric(image, original, 2)
        assert together.dtype == torch.float64
        for i in range(3):
            alone = metric(image[i : i + 1].double(), original[i : i + 1].double(), 2)
            assert together[i].item() == pytest.approx(alone.item(), abs=1e-12)


def test_the_border_and_alpha_do_not_count() -> None:
    image, original = pair(4)
    spoilt = image.clone()
    spoilt[:, 3] = 0
    spoilt[..., :2, :] = 0
    spoilt[..., -1:] = 1
    for metric in (psnr_y, ssim_y):
        assert metric(spoilt, original, 2).item() == metric(image, original, 2).item()
        assert metric(spoilt, original, 1).item() != metric(image, original, 1).item()


def test_luma_has_the_range_of_video_and_grey_is_three_equal_channels() -> None:
    black, white = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    assert luma_bt601(black).item() == 16
    assert luma_bt601(white).item() == pytest.approx(235, abs=1e-4)
    grey = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(luma_bt601(grey), luma_bt601(grey.expand(1, 3, 5, 5)), rtol=0, atol=1e-12)


def test_the_smallest_image_that_can_be_measured() -> None:
    side = WINDOW + 2 * 2
    image, original = pair(3, side, side)
    assert math.isfinite(ssim_y(image, original, 2).item())
