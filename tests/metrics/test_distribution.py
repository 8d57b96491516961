"""Scores of two clouds of features, against slow references, and against what must hold."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fmrun.metrics import distribution
from fmrun.metrics.distribution import SCORES, fid, kid, kid_error, neighbourhoods, scores


def two(
    made: int = 120, real: int = 90, dimension: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Positive features like those of a pretrained net, of two distributions that differ."""
    rng = torch.Generator().manual_seed(0)
    one, other = (torch.randn(n, dimension, generator=rng).abs() for n in (made, real))
    return (one * 1.2 + 0.1).to(dtype), other.to(dtype)


def slow_kid(made: np.ndarray, real: np.ndarray) -> float:
    """The published estimator, pair by pair, on the subsets stated."""
    rng = np.random.RandomState(distribution.SUBSET_SEED)
    size = min(distribution.SUBSET_SIZE, len(made), len(real))

    def k(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([[(float(np.dot(a, b)) / len(a) + 1) ** 3 for b in y] for a in x])

    found = []
    for _ in range(distribution.SUBSETS):
        x, y = (c[rng.choice(len(c), size, replace=False)] for c in (made, real))
        xx, yy = k(x, x), k(y, y)
        pairs = size * (size - 1)
        found.append((xx.sum() - np.trace(xx)) / pairs + (yy.sum() - np.trace(yy)) / pairs - 2 * k(x, y).mean())
    return float(np.mean(found))


def slow_fid(made: np.ndarray, real: np.ndarray) -> float:
    """With the square root of the product itself, which is not symmetric."""
    ca, cb = np.cov(made, rowvar=False), np.cov(real, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real.sum()
    return float(((made.mean(0) - real.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root)


def slow_neighbourhoods(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The definitions of Kynkäänniemi et al. 2019 (k = 3) and Naeem et al. 2020 (k = 5), point by point."""

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(((x - y) ** 2).sum()))

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(distance(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(x: np.ndarray, points: np.ndarray, radii: list[float]) -> list[bool]:
        return [distance(x, p) <= r for p, r in zip(points, radii, strict=True)]

    of_real, of_made = ([radius(c, i, 3) for i in range(len(c))] for c in (real, made))
    wide = [radius(real, i, 5) for i in range(len(real))]
    hits = np.array([inside(x, real, wide) for x in made])
    return {
        "precision": float(np.mean([any(inside(x, real, of_real)) for x in made])),
        "recall": float(np.mean([any(inside(x, made, of_made)) for x in real])),
        "density": hits.sum() / (5 * len(made)),
        "coverage": float(hits.any(0).mean()),
    }


def test_equal_to_slow_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a few rows at a time, and on random subsets smaller than the sets."""
    made, real = two(45, 30)
    one, other = (x.double().numpy() for x in (made, real))
    for rows, at_once, subsets, size in ((7, 44, 3, 20), (1024, 45, 3, 20), (1024, 4096, 4, 1000)):
        for name, value in (("ROWS", rows), ("AT_ONCE", at_once), ("SUBSETS", subsets), ("SUBSET_SIZE", size)):
            monkeypatch.setattr(distribution, name, value)
        found = scores(made, real)
        assert list(found) == list(SCORES)
        assert found["kid"] == pytest.approx(slow_kid(one, other), rel=1e-9)
        assert found["fid"] == pytest.approx(slow_fid(one, other), rel=1e-9)
        for name, value in slow_neighbourhoods(one, other).items():
            assert found[name] == pytest.approx(value, abs=1e-6), name
            assert 0 < value < 1 or name == "density"


def test_sets_no_larger_than_a_subset_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = two(30, 30)
    assert kid(made, real) == pytest.approx(slow_kid(made.double().numpy(), real.double().numpy()), rel=1e-9)
    monkeypatch.setattr(distribution, "SUBSET_SIZE", 29)
    assert kid(made, real) != pytest.approx(slow_kid(made.double().numpy()[:29], real.double().numpy()[:29]), rel=1e-3)


@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_the_standard_error_is_the_spread_over_other_images(stretch: float) -> None:
    """Of equal distributions, where the first order vanishes, and of others."""
    rng = torch.Generator().manual_seed(4)
    pairs = [[torch.randn(90, 16, generator=rng) * scale for scale in (stretch, 1.0)] for _ in range(300)]
    spread = np.std([kid(made, real) for made, real in pairs])
    told = np.array([kid_error(made, real) for made, real in pairs])
    assert np.sqrt((told**2).mean()) == pytest.approx(spread, rel=0.15)
    assert told.std() < 0.5 * told.mean()


def test_density_and_coverage_of_alike_sets_are_as_derived() -> None:
    """Naeem et al. 2020, section 3: of independent sets of one distribution, E density = 1 and
    E coverage = 1 - (N-1)…(N-k) / ((M+N-1)…(M+N-k)), N real and M generated images, in any dimension."""
    rng = torch.Generator().manual_seed(1)
    reals, mades, k = 150, 100, 5
    found = []
    for _ in range(60):
        made, real = (torch.randn(n, 4, generator=rng) for n in (mades, reals))
        found.append(neighbourhoods(made, real))
    below = np.prod([(reals - i) / (mades + reals - i) for i in range(1, k + 1)])
    coverage = np.array([f["coverage"] for f in found])
    density = np.array([f["density"] for f in found])
    assert coverage.mean() == pytest.approx(1 - below, abs=4 * coverage.std() / 60**0.5)
    assert density.mean() == pytest.approx(1, abs=4 * density.std() / 60**0.5)
    assert coverage.std() / 60**0.5 < 0.01


def test_an_outlier_among_the_reals_fools_precision_and_not_density() -> None:
    """The case that Naeem et al. 2020 (figure 1) made density for."""
    rng = torch.Generator().manual_seed(2)
    cluster = torch.randn(100, 2, generator=rng)
    real = torch.cat([cluster, torch.tensor([[30.0, 30.0]])])
    made = torch.tensor([[20.0, 20.0]]) + torch.randn(100, 2, generator=rng)
    found = neighbourhoods(made, real)
    assert found["precision"] == 1
    assert found["density"] == pytest.approx(1 / 5)
    assert found["coverage"] == pytest.approx(1 / 101)


def test_kid_is_unbiased() -> None:
    """Its mean over pairs of sets of one distribution is 0, and so some are below."""
    rng = torch.Generator().manual_seed(3)
    found = np.array([kid(*(torch.randn(20, 8, generator=rng) for _ in range(2))) for _ in range(100)])
    assert abs(found.mean()) < 3 * found.std() / 10
    assert found.min() < 0 < found.max()


def test_more_dimensions_than_images() -> None:
    made, real = two(30, 25, 200)
    one, other = (x.double().numpy() for x in (made, real))
    assert fid(made, real) == pytest.approx(slow_fid(one, other), rel=1e-5)
    assert fid(made, made) == pytest.approx(0, abs=1e-4)


def test_a_collapsed_generator_is_no_accident() -> None:
    """Equal images have balls of no size, and nothing divides by them."""
    _, real = two()
    found = scores(real[:1].expand(50, -1), real)
    assert all(np.isfinite(list(found.values())))
    assert found["recall"] <= 1 / len(real)
    assert found["coverage"] < 0.2
