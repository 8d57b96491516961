"""Every statistic against a slow reference written from its equation, in float64 and loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmrun.feature_matching.statistics import (
    RATIONAL_QUADRATIC_ALPHAS,
    RBF_BANDWIDTHS,
    STATISTICS,
    STD_EPS,
    random_directions,
)
from fmrun.runtime.dist import World

WORLD = World()
EPS = 1e-3
SHAPE = (5, 3, 2, 2)
CRITERIA = ("l1", "l2", "charbonnier")
ELEMENTS = ("mean", "sum")


def features(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    real = torch.randn(shape, generator=rng, dtype=torch.float64)
    fake = 0.7 * torch.randn(shape, generator=rng, dtype=torch.float64) + 0.3
    return real, fake


def directions(shape: tuple[int, ...] = SHAPE, count: int = 6) -> torch.Tensor:
    return random_directions(count, math.prod(shape[1:]), torch.Generator().manual_seed(9), torch.float64)


def point(d: float, criterion: str) -> float:
    return {"l1": abs(d), "l2": d * d, "charbonnier": math.sqrt(d * d + EPS)}[criterion]


def total(values: list[float], elements: str) -> float:
    return sum(values) / len(values) if elements == "mean" else sum(values)


def columns(x: torch.Tensor) -> list[list[float]]:
    """For each element of a layer its values over the batch."""
    return [list(column) for column in x.flatten(1).numpy().T.tolist()]


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def variance(values: list[float]) -> float:
    m = average(values)
    return sum((v - m) ** 2 for v in values) / (len(values) - 1)


def slow_sample(real, fake, criterion, elements):
    pairs = zip(columns(real), columns(fake), strict=True)
    return total([average([point(a - b, criterion) for a, b in zip(r, f, strict=True)]) for r, f in pairs], elements)


def slow_mean(real, fake, criterion, elements, estimator="batch"):
    values = []
    for r, f in zip(columns(real), columns(fake), strict=True):
        value = point(average(r) - average(f), criterion)
        if estimator == "unbiased":
            value -= (variance(r) + variance(f)) / len(r)
        values.append(value)
    return total(values, elements)


def slow_moments(real, fake, criterion, elements):
    values = []
    for r, f in zip(columns(real), columns(fake), strict=True):
        deviations = [math.sqrt(variance(v) + STD_EPS) for v in (r, f)]
        values.append(point(average(r) - average(f), criterion) + point(deviations[0] - deviations[1], criterion))
    return total(values, elements)


def slow_coral(real, fake, elements):
    """Channels are variables; every position of every image is an observation."""
    covariances = [np.cov(np.concatenate([i.reshape(i.shape[0], -1) for i in x.numpy()], axis=1)) for x in (real, fake)]
    d = real.shape[1]
    frobenius = sum((covariances[0][i][j] - covariances[1][i][j]) ** 2 for i in range(d) for j in range(d))
    return frobenius / (4 * d * d) if elements == "mean" else frobenius / 4


def slow_mmd(real, fake, elements, kernel, bandwidth=None):
    x, y = ([row.tolist() for row in t.flatten(1).numpy()] for t in (real, fake))
    n, d = len(x), len(x[0])
    scale = d if elements == "mean" else 1

    def square(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / scale

    if kernel == "rbf" and bandwidth is None:
        bandwidth = average([square(a, b) for a, b in itertools.permutations(x, 2)])

    def k(a, b):
        if kernel == "rbf":
            return sum(math.exp(-square(a, b) / (2 * s * bandwidth)) for s in RBF_BANDWIDTHS)
        return sum((1 + square(a, b) / (2 * alpha)) ** -alpha for alpha in RATIONAL_QUADRATIC_ALPHAS)

    within = [sum(k(a, b) for a, b in itertools.permutations(rows, 2)) / (n * (n - 1)) for rows in (x, y)]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / n**2


def slow_sliced(real, fake, elements):
    gaps = []
    for direction in directions(tuple(real.shape)).tolist():
        projected = [
            sorted(sum(v * w for v, w in zip(row, direction, strict=True)) for row in t.flatten(1).tolist())
            for t in (real, fake)
        ]
        gaps.append(average([(a - b) ** 2 for a, b in zip(*projected, strict=True)]))
    return average(gaps) * (real[0].numel() if elements == "sum" else 1)


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("match", ["sample", "mean", "moments"])
def test_pointwise_statistics_equal_their_references(match, criterion, elements):
    real, fake = features()
    slow = {"sample": slow_sample, "mean": slow_mean, "moments": slow_moments}[match]
    got = STATISTICS[match](real, fake, ranks=WORLD, criterion=criterion, eps=EPS, elements=elements)
    assert got.item() == pytest.approx(slow(real, fake, criterion, elements), rel=1e-12)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_unbiased_mean_equals_its_reference(elements):
    real, fake = features()
    got = STATISTICS["mean"](real, fake, ranks=WORLD, elements=elements, estimator="unbiased")
    assert got.item() == pytest.approx(slow_mean(real, fake, "l2", elements, "unbiased"), rel=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_running_mean_compares_with_the_mean_it_is_given(criterion):
    _, fake = features()
    given = torch.full(SHAPE[1:], 0.25, dtype=torch.float64)
    got = STATISTICS["mean"](
        fake * torch.nan, fake, ranks=WORLD, criterion=criterion, eps=EPS, estimator="running", real_mean=given
    )
    expected = total([point(0.25 - average(f), criterion) for f in columns(fake)], "mean")
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("shape", [SHAPE, (6, 4)])
def test_coral_equals_its_reference(shape, elements):
    real, fake = features(shape=shape)
    got = STATISTICS["coral"](real, fake, ranks=WORLD, elements=elements)
    assert got.item() == pytest.approx(slow_coral(real, fake, elements), rel=1e-12)


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize(("kernel", "bandwidth"), [("rational_quadratic", None), ("rbf", None), ("rbf", 0.8)])
def test_mmd_equals_its_reference(kernel, bandwidth, elements):
    real, fake = features()
    given = None if bandwidth is None else torch.tensor(bandwidth, dtype=torch.float64)
    got = STATISTICS["mmd"](real, fake, ranks=WORLD, elements=elements, kernel=kernel, bandwidth=given)
    assert got.item() == pytest.approx(slow_mmd(real, fake, elements, kernel, bandwidth), rel=1e-10)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_sliced_equals_its_reference(elements):
    real, fake = features()
    got = STATISTICS["sliced"](real, fake, ranks=WORLD, directions=directions(), elements=elements)
    assert got.item() == pytest.approx(slow_sliced(real, fake, elements), rel=1e-12)


def test_directions_are_of_unit_length_and_reproducible():
    rows = directions()
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows), dtype=torch.float64))
    assert torch.equal(rows, directions())


VARIANTS = {
    **{f"{m} {c}": (m, {"criterion": c, "eps": EPS}) for m in ("sample", "mean", "moments") for c in CRITERIA},
    "mean unbiased": ("mean", {"estimator": "unbiased"}),
    "mean running": ("mean", {"estimator": "running", "real_mean": torch.zeros(SHAPE[1:], dtype=torch.float64)}),
    "coral": ("coral", {}),
    "mmd rational quadratic": ("mmd", {}),
    "mmd rbf": ("mmd", {"kernel": "rbf"}),
    "sliced": ("sliced", {"directions": directions()}),
}


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_with_respect_to_generated_features(name, elements):
    match, options = VARIANTS[name]
    real, fake = features(3)
    assert torch.autograd.gradcheck(
        lambda f: STATISTICS[match](real, f, ranks=WORLD, elements=elements, **options), (fake.requires_grad_(),)
    )


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize(
    "name",
    ["sample l1", "sample l2", "mean l1", "mean l2", "moments l1", "moments l2", "coral", "sliced"],
)
def test_equal_features_have_distance_zero(name, elements):
    match, options = VARIANTS[name]
    for x in (features()[0], features()[0].float(), features()[0].bfloat16()):
        given = {
            k: v.to(torch.promote_types(x.dtype, torch.float32)) if k == "directions" else v for k, v in options.items()
        }
        assert STATISTICS[match](x, x.clone(), ranks=WORLD, elements=elements, **given).item() == 0.0


def test_charbonnier_of_equal_features_is_the_root_of_eps_not_eps():
    x, _ = features()
    got = STATISTICS["sample"](x, x, criterion="charbonnier", eps=1e-6)
    assert got.item() == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_features_give_float32_statistics(name):
    match, options = VARIANTS[name]
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    real, fake = (x.bfloat16() for x in features())
    fake.requires_grad_()
    got = STATISTICS[match](real, fake, ranks=WORLD, **single)
    assert got.dtype == torch.float32
    exact = STATISTICS[match](real.double(), fake.double(), ranks=WORLD, **options)
    assert got.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-6)
    got.backward()
    assert fake.grad.dtype == torch.bfloat16
    assert fake.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in VARIANTS if not n.startswith("sample")])
def test_batch_statistics_do_not_care_which_images_meet(name):
    match, options = VARIANTS[name]
    real, fake = features()
    order = torch.tensor([3, 0, 4, 1, 2])
    a, b = (STATISTICS[match](real, f, ranks=WORLD, **options).item() for f in (fake, fake[order]))
    assert a == pytest.approx(b, rel=1e-10)


def test_sample_pairs_images():
    real, fake = features()
    a, b = (STATISTICS["sample"](real, f).item() for f in (fake, fake.roll(1, 0)))
    assert a != pytest.approx(b, rel=1e-3)


def test_sample_on_unpaired_images_prefers_all_images_alike():
    """Its expectation holds the variance of the generated features: the mean image beats the true distribution."""
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2000, 4, generator=rng) for _ in range(2))
    mean = torch.zeros_like(fake)
    for match, prefers_the_mean in (("sample", True), ("mmd", False), ("sliced", False), ("moments", False)):
        options = {"ranks": WORLD, "directions": random_directions(8, 4, rng, torch.float32)}
        collapsed, diverse = (STATISTICS[match](real[:500], f[:500], **options) for f in (mean, fake))
        assert bool(collapsed < diverse) == prefers_the_mean, match


def test_unbiased_mean_is_unbiased_and_the_plain_one_is_not():
    rng = torch.Generator().manual_seed(1)
    batch, width, rounds = 4, 8, 3000
    shift = 0.2
    plain, unbiased = [], []
    for _ in range(rounds):
        real = torch.randn(batch, width, generator=rng, dtype=torch.float64)
        fake = 2 * torch.randn(batch, width, generator=rng, dtype=torch.float64) + shift
        plain.append(STATISTICS["mean"](real, fake, ranks=WORLD).item())
        unbiased.append(STATISTICS["mean"](real, fake, ranks=WORLD, estimator="unbiased").item())
    error = 4 * np.std(unbiased) / math.sqrt(rounds)
    assert error < 0.1
    assert np.mean(unbiased) == pytest.approx(shift**2, abs=error)
    assert np.mean(plain) == pytest.approx(shift**2 + (1 + 4) / batch, abs=error)


@pytest.mark.parametrize("kernel", ["rational_quadratic", "rbf"])
def test_mmd_of_equal_distributions_is_zero_on_average(kernel):
    rng = torch.Generator().manual_seed(2)
    bandwidth = torch.tensor(2.0, dtype=torch.float64)
    values = [
        STATISTICS["mmd"](
            *torch.randn(2, 4, 5, generator=rng, dtype=torch.float64).unbind(),
            ranks=WORLD,
            kernel=kernel,
            bandwidth=bandwidth,
        ).item()
        for _ in range(1500)
    ]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(len(values)))
    assert min(values) < 0 < max(values)


def test_mmd_of_identical_features_and_its_gradient_are_finite():
    """Real images that are all alike leave no distance to take a bandwidth from."""
    x = torch.ones(4, 3)
    fake = torch.ones(4, 3, requires_grad=True)
    for kernel in ("rational_quadratic", "rbf"):
        (gradient,) = torch.autograd.grad(STATISTICS["mmd"](x, fake, ranks=WORLD, kernel=kernel), fake)
        assert torch.isfinite(gradient).all()


# What a gradient costs


@pytest.mark.parametrize("match", ["mean", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_back_in_the_order_of_the_features_in_memory(match, dtype):
    """Another order would have every layer below copied into the right one, or run a slower kernel."""
    real, fake = (torch.randn(4, 8, 6, 6).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    leaf = fake.requires_grad_()
    feature = leaf * 1
    for criterion in ("l2", "l1", "charbonnier"):
        onwards = (feature * real).sum()  # made first, as the layers above a feature are, and so differentiated last
        distance = STATISTICS[match](real, feature, ranks=WORLD, criterion=criterion)
        (gradient,) = torch.autograd.grad(distance + onwards, feature, retain_graph=True)
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        assert not gradient.is_contiguous()


def test_the_gradient_of_a_batch_mean_is_not_written_out_for_every_image():
    real, fake = (torch.randn(64, 8, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
    leaf = fake.requires_grad_()
    distance = STATISTICS["mean"](real, leaf, ranks=WORLD)
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        (gradient,) = torch.autograd.grad(distance, leaf)
    assert gradient.shape == leaf.shape
    assert max(made) == leaf[0].numel() * 4
