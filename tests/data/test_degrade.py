"""How low-resolution images are made: against slow references, and every step of the chain by itself."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from fmrun.config.degradation import DegradationConfig
from fmrun.data.degrade import Blur, Jpeg, Noise, Resize, Sinc, Step, degrade, recipe
from fmrun.data.filters import bicubic_down, bicubic_up, filtered, gaussian, resized, sinc
from fmrun.data.pairs import BUNDLED

OFF: dict[str, Any] = {
    "blur": {"prob": 0},
    "sinc": {"prob": 0},
    "resize": {"up": 0, "down": 0},
    "noise": {"gaussian": 0, "poisson": 0},
    "jpeg": {"prob": 0},
}
SEEDS = st.integers(0, 2**32)


def photograph(name: str = "chelsea", split: str = "valid") -> np.ndarray:
    with Image.open(BUNDLED["photographs"] / split / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def chain(**options: Any) -> DegradationConfig:
    return DegradationConfig.model_validate({"kind": "chain", **options})


def steps(config: DegradationConfig, seed: int) -> tuple[Step, ...]:
    return recipe(config, np.random.default_rng(seed))


# bicubic


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def imresize(image: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's `imresize(image, 1 / scale)`, pixel by pixel as its documentation has it."""

    def along(rows: np.ndarray) -> np.ndarray:
        count = len(rows)
        mirrored = [*range(count), *reversed(range(count))]
        out = np.zeros((count // scale, *rows.shape[1:]))
        for i in range(len(out)):
            centre = (i + 1) * scale + 0.5 * (1 - scale)  # counted from 1
            first = math.floor(centre - 2 * scale)
            taps = range(first, first + 4 * scale + 2)
            weights = np.array([cubic((centre - tap) / scale) / scale for tap in taps])
            weights /= weights.sum()
            for tap, weight in zip(taps, weights, strict=True):
                out[i] += weight * rows[mirrored[(tap - 1) % (2 * count)]]
        return out

    whole = along(along(image.astype(np.float64)).swapaxes(0, 1)).swapaxes(0, 1)
    return np.floor(whole + 0.5 + 1e-9).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (13, 9)])
def test_bicubic_is_imresize(scale: int, size: tuple[int, int]) -> None:
    image = noise(size[0] * scale, size[1] * scale)
    np.testing.assert_array_equal(bicubic_down(image, scale), imresize(image, scale))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 9)])
def test_bicubic_upscaling_is_imresize(scale: int, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*size, 2))

    def along(rows: np.ndarray) -> np.ndarray:
        count = len(rows)
        mirrored = [*range(count), *reversed(range(count))]
        out = np.zeros((count * scale, *rows.shape[1:]))
        for i in range(len(out)):
            centre = (i + 0.5) / scale - 0.5
            for tap in range(math.floor(centre) - 2, math.floor(centre) + 4):
                out[i] += cubic(centre - tap) * rows[mirrored[tap % (2 * count)]]
        return out

    expected = along(along(image).swapaxes(0, 1)).swapaxes(0, 1)
    made = bicubic_up(torch.from_numpy(image).movedim(-1, 0)[None], scale)[0].movedim(0, -1)
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_does_not_depend_on_strips(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph()[:240, :240]
    whole = bicubic_down(image, scale)
    monkeypatch.setattr("fmrun.data.filters.STRIP", 2000)
    np.testing.assert_array_equal(bicubic_down(image, scale), whole)


# filters


@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    sigma=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)),
    angle=st.floats(0, math.pi),
)
@settings(max_examples=25, deadline=None)
def test_a_filter_is_a_convolution(height: int, width: int, sigma: tuple[float, float], angle: float) -> None:
    image = noise(height, width, 2).astype(np.float64)
    kernel = gaussian(sigma, angle)
    radius = len(kernel) // 2
    wide = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    slow = np.zeros_like(image)
    for i, row in enumerate(kernel[::-1, ::-1]):
        for j, weight in enumerate(row):
            slow += weight * wide[i : i + height, j : j + width]
    np.testing.assert_allclose(filtered(image, kernel), slow, atol=1e-9)


@given(sigma=st.floats(0.4, 4), ratio=st.floats(0.3, 1), angle=st.floats(0, math.pi))
@settings(max_examples=30, deadline=None)
def test_a_gaussian_has_the_variance_it_says(sigma: float, ratio: float, angle: float) -> None:
    kernel = gaussian((sigma, ratio * sigma), angle)
    assert kernel.sum() == pytest.approx(1)
    side = np.arange(len(kernel)) - len(kernel) // 2
    along = math.cos(angle) * side[None, :] + math.sin(angle) * side[:, None]
    if ratio * sigma > 0.8:  # narrower ones are too coarsely sampled
        assert (kernel * along**2).sum() == pytest.approx(sigma**2, rel=0.05)


def test_sinc_keeps_what_is_low_and_drops_what_is_high() -> None:
    kernel = sinc(0.5, 10)
    assert kernel.sum() == pytest.approx(1)
    x = np.arange(128)
    waves = {period: np.cos(2 * np.pi * x / period)[None, :, None].repeat(128, 0) for period in (16, 2.5)}
    kept = {period: filtered(wave, kernel)[40:-40, 40:-40].std() / wave.std() for period, wave in waves.items()}
    assert kept[16] == pytest.approx(1, abs=0.1)
    assert kept[2.5] < 0.1


@pytest.mark.parametrize("kernel", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 30), (9, 50), (80, 31)])
def test_resizing_does_not_shift(kernel: str, size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 1, 41)[:, None, None].repeat(61, 1).astype(np.float64)
    small = resized(ramp, size, kernel)
    assert small.shape == (*size, 1)
    assert small.mean() == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_allclose(small, 1 - small[::-1], atol=1e-6)


# recipes


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_ranges_are_respected(seed: int) -> None:
    ranges = {
        "blur": {"sigma": (0.7, 0.9)},
        "sinc": {"prob": 0.4, "cutoff": (0.5, 0.6)},
        "resize": {"factor": (0.8, 1.1), "kernels": ["area", "bicubic"]},
        "noise": {"sigma": (3, 4), "strength": (0.5, 0.6), "gaussian": 0.4, "poisson": 0.4},
        "jpeg": {"quality": (60, 62)},
    }
    for step in steps(chain(first=ranges, second=ranges, sinc={"cutoff": (0.5, 0.6)}, kernels=["bilinear"]), seed):
        match step:
            case Blur():
                assert all(0.7 <= sigma <= 0.9 for sigma in step.sigma)
                assert 0 <= step.angle <= math.pi
            case Sinc():
                assert 0.5 <= step.cutoff <= 0.6
                assert 3 <= step.radius <= 10
            case Resize() if step.kernel == "bilinear":
                assert (step.factor, step.of_low) == (1, True)
            case Resize():
                assert step.kernel in ("area", "bicubic")
                assert 0.8 <= step.factor <= 1.1
            case Noise():
                assert (0.5 <= step.amount <= 0.6) if step.poisson else (3 <= step.amount <= 4)
            case Jpeg():
                assert step.quality in (60, 61, 62)


def test_all_of_a_range_occurs_as_often_as_it_says() -> None:
    config = chain(passes=1, first={"resize": {"down": 0.5, "up": 0.25}})
    drawn = [steps(config, seed) for seed in range(600)]
    first = [[s for s in each if not (isinstance(s, Resize) and s.of_low)] for each in drawn]

    def share(test: Any) -> float:
        return float(np.mean([any(test(s) for s in each) for each in first]))

    assert share(lambda s: isinstance(s, Blur)) == pytest.approx(0.9, abs=0.05)  # ringing takes its place
    assert share(lambda s: isinstance(s, Blur) and s.sigma[0] != s.sigma[1]) == pytest.approx(0.45, abs=0.06)
    assert share(lambda s: isinstance(s, Resize) and s.factor < 1) == pytest.approx(0.5, abs=0.06)
    assert share(lambda s: isinstance(s, Resize) and s.factor > 1) == pytest.approx(0.25, abs=0.06)
    assert share(lambda s: isinstance(s, Noise) and s.poisson) == pytest.approx(0.5, abs=0.06)
    assert share(lambda s: isinstance(s, Noise) and s.grey) == pytest.approx(0.4, abs=0.06)
    qualities = {s.quality for each in drawn for s in each if isinstance(s, Jpeg)}
    assert (min(qualities), max(qualities)) == (30, 95)


def test_steps_come_in_the_published_order() -> None:
    always = {
        "blur": {"prob": 1},
        "sinc": {"prob": 0},
        "resize": {"down": 1, "up": 0},
        "noise": {"gaussian": 1, "poisson": 0},
        "jpeg": {"prob": 1},
    }
    config = chain(first=always, second=always, sinc={"prob": 1})
    orders = {tuple(type(step) for step in steps(config, seed)) for seed in range(40)}
    one = (Blur, Resize, Noise)
    assert orders == {(*one, Jpeg, *one, Jpeg, Resize, Sinc), (*one, Jpeg, *one, Resize, Sinc, Jpeg)}
    config = chain(passes=1, first=always, sinc={"prob": 1})
    orders = {tuple(type(step) for step in steps(config, seed)) for seed in range(40)}
    assert orders == {(*one, Jpeg, Resize, Sinc), (*one, Resize, Sinc, Jpeg)}


@pytest.mark.parametrize("which", OFF)
@pytest.mark.parametrize("part", ["first", "second"])
def test_switching_a_step_off_changes_nothing_else(part: str, which: str) -> None:
    kinds = {"blur": Blur, "sinc": Sinc, "resize": Resize, "noise": Noise, "jpeg": Jpeg}
    base: dict[str, Any] = {"sinc": {"prob": 0.5}}
    other = {**base, which: OFF[which]}
    for seed in range(20):
        before, after = (
            list(steps(chain(**{"first": base, "second": base, part: changed}), seed)) for changed in (base, other)
        )
        for step in after:
            if step in before:
                before.remove(step)
            else:  # the blur that ringing had taken the place of
                assert which == "sinc"
                assert isinstance(step, Blur)
        assert all(isinstance(step, kinds[which]) for step in before)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("passes", [1, 2])
def test_with_all_off_nothing_is_left_but_the_size(passes: int, channels: int) -> None:
    config = chain(passes=passes, first=OFF, second=OFF, sinc={"prob": 0}, kernels=["area"])
    image = noise(24, 32, channels)
    np.testing.assert_array_equal(degrade(image, steps(config, 5), 1), image)
    halved = degrade(image, steps(config, 5), 2)
    means = image.reshape(12, 2, 16, 2, channels).mean(axis=(1, 3))
    np.testing.assert_allclose(halved, means, atol=0.51)


@pytest.mark.parametrize("kind", [k for k in OFF if k != "resize"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_step_alone_does_something(kind: str, channels: int) -> None:
    on = {"blur": {"prob": 1, "sigma": (1, 2)}, "sinc": {"prob": 1}, "noise": {"sigma": (5, 9)}, "jpeg": {"prob": 1}}
    config = chain(passes=1, first={**OFF, kind: on[kind]}, sinc={"prob": 0})
    image = photograph()[100:148, 100:148, :channels]
    changed = degrade(image, steps(config, 1), 1)
    assert changed.shape == image.shape
    assert (changed != image).any()
    assert np.abs(changed.astype(int) - image).mean() < 30


@given(seed=SEEDS, scale=st.sampled_from([1, 2, 3, 4]), height=st.integers(1, 12), width=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_any_size_comes_out_exact(seed: int, scale: int, height: int, width: int) -> None:
    image = noise(height * scale, width * scale)
    low = degrade(image, steps(chain(), seed), scale)
    assert low.shape == (height, width, 3)
    assert low.dtype == np.uint8
    np.testing.assert_array_equal(low, degrade(image, steps(chain(), seed), scale))


def test_a_chain_keeps_the_picture_in_place() -> None:
    """The degraded image fits the bicubic one best where it is, not a pixel beside it."""
    image = photograph()[40:264, 100:324]
    straight = bicubic_down(image, 2).astype(float)
    mild = {"blur": {"sigma": (0.5, 1.5)}, "noise": {"sigma": (1, 4)}, "resize": {"factor": (0.5, 1.4)}}
    for seed in range(6):
        low = degrade(image, steps(chain(first=mild, second=mild), seed), 2).astype(float)
        errors = {
            (y, x): np.abs(np.roll(low, (y, x), (0, 1)) - straight)[4:-4, 4:-4].mean()
            for y in (-1, 0, 1)
            for x in (-1, 0, 1)
        }
        assert min(errors, key=lambda k: errors[k]) == (0, 0), seed


def test_noise_has_the_strength_it_says() -> None:
    grey = np.full((128, 128, 3), 128, np.uint8)

    def deviation(**step: Any) -> np.ndarray:
        low = degrade(grey, (Noise(seed=1, **step),), 1)
        return low.astype(float) - 128

    plain = deviation(poisson=False, amount=10.0, grey=False)
    assert plain.std() == pytest.approx(10, rel=0.03)
    assert abs(np.corrcoef(plain[..., 0].ravel(), plain[..., 1].ravel())[0, 1]) < 0.05
    same = deviation(poisson=False, amount=10.0, grey=True)
    np.testing.assert_array_equal(same[..., 0], same[..., 2])
    shot = deviation(poisson=True, amount=2.0, grey=False)
    assert shot.std() == pytest.approx(2 * math.sqrt(128), rel=0.03)
    assert abs(shot.mean()) < 0.5
    same = deviation(poisson=True, amount=1.0, grey=True)
    np.testing.assert_array_equal(same[..., 0], same[..., 1])


def test_jpeg_is_pillows() -> None:
    image = photograph()[:96, :96]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=40)
    np.testing.assert_array_equal(degrade(image, (Jpeg(40),), 1), np.asarray(Image.open(file)))


def test_transparency_is_neither_noisy_nor_compressed() -> None:
    image = noise(32, 32, 4)
    low = degrade(image, (Noise(False, 20.0, False, 1), Jpeg(30)), 1)
    np.testing.assert_array_equal(low[..., 3], image[..., 3])
    assert (low[..., :3] != image[..., :3]).any()


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("blur", {"sigma": (3, 1)}, "sigma is a range from its lower to its upper end, not 3 to 1"),
        ("jpeg", {"quality": (90, 30)}, "quality is a range"),
        ("resize", {"up": 0.6, "down": 0.6}, "up and down are shares of all images: their sum is 1.2"),
        ("resize", {"factor": (1.2, 1.5)}, "factor must reach from at most 1 to at least 1, not 1.2 to 1.5"),
        ("noise", {"gaussian": 0.6, "poisson": 0.6}, "gaussian and poisson are shares"),
        ("jpeg", {"quality": (0, 30)}, "greater than or equal to 1"),
        ("blur", {"probe": 1}, "Extra inputs"),
    ],
)
@pytest.mark.parametrize("part", ["first", "second"])
def test_bad_settings_are_refused(part: str, section: str, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        chain(**{part: {section: values}})
