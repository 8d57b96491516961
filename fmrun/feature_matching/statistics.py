"""Distances between the features of real and generated images: the six statistics of feature matching.

Every function takes features `real` and `fake` (B, …) of one layer, this process's slice of the global batch, and
returns a scalar of at least float32. `elements` is `"mean"` (averaged over the layer's elements) or `"sum"`. Gradient
flows to `fake`; `real` carries none in training. `ranks` makes batch statistics global.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .ranks import Ranks

STD_EPS = 1e-8
RATIONAL_QUADRATIC_ALPHAS = (0.1, 1.0, 10.0)
RBF_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def at_least_float32(x: Tensor) -> Tensor:
    """At least float32: batch statistics in half precision lose what they measure."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def pointwise(difference: Tensor, criterion: str, eps: float) -> Tensor:
    """|d|, d^2 or sqrt(d^2 + eps), element by element."""
    if criterion == "l1":
        return difference.abs()
    if criterion == "l2":
        return difference.square()
    return (difference.square() + eps).sqrt()


def reduce_elements(distance: Tensor, elements: str) -> Tensor:
    return distance.mean() if elements == "mean" else distance.sum()


def sample(
    real: Tensor, fake: Tensor, *, criterion: str = "l2", eps: float = 1e-6, elements: str = "mean", **_: object
) -> Tensor:
    """Mean over images of the distance between f(r_j) and f(g_j) (Wang et al. 2018, pix2pixHD, eq. 4)."""
    pointed = pointwise(at_least_float32(real) - at_least_float32(fake), criterion, eps)
    # not .mean(), whose gradient is written out, and in another order than that of the features in memory
    distance = pointed.sum() / pointed.numel()
    return distance if elements == "mean" else distance * real[0].numel()


class _SliceContext(Protocol):
    """What a forward of `_SliceMean` leaves for its backward."""

    count: int
    dtype: torch.dtype
    last: bool
    """Whether channels are last in memory."""


class _SliceMean(torch.autograd.Function):
    """Mean over the first dimension, in the order of memory, whose gradient is not written out for every image: autograd
    adds it to what else flows back with no tensor of the features' size in between."""

    @staticmethod
    def forward(ctx: _SliceContext, x: Tensor) -> Tensor:
        ctx.count, ctx.dtype = x.shape[0], x.dtype
        ctx.last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.permute(0, 2, 3, 1).mean(0, dtype=wide).permute(2, 0, 1) if ctx.last else x.mean(0, dtype=wide)

    @staticmethod
    def backward(ctx: _SliceContext, grad: Tensor) -> Tensor:
        grad = (grad / ctx.count).to(ctx.dtype)
        if ctx.last:  # the sum of this and what else flows back takes its order in memory
            grad = grad.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return grad.expand(ctx.count, *grad.shape)


def slice_mean(x: Tensor) -> Tensor:
    """E_b f at each position, over the first dimension of x (B, …), in at least float32."""
    mean: Tensor = _SliceMean.apply(x)
    return mean


def batch_mean(x: Tensor, ranks: Ranks) -> Tensor:
    """E_b f at each position, over the global batch."""
    return ranks.mean(slice_mean(x))


def batch_var(x: Tensor, mean: Tensor, ranks: Ranks) -> Tensor:
    """Unbiased variance over the global batch at each position."""
    count = x.shape[0] * ranks.size
    return ranks.mean(slice_mean((at_least_float32(x) - mean).square())) * (count / (count - 1))


def mean(
    real: Tensor,
    fake: Tensor,
    *,
    ranks: Ranks,
    criterion: str = "l2",
    eps: float = 1e-6,
    elements: str = "mean",
    estimator: str = "batch",
    real_mean: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Distance between E_b f(r) and E_b f(g) at each position (Salimans et al. 2016, eq. 2).

    `estimator = "unbiased"` subtracts what the sampling noise of both means adds to the squared distance,
    (Var_r + Var_g) / B; `"running"` compares with `real_mean`.
    """
    real_mean = batch_mean(real, ranks) if real_mean is None else real_mean
    fake_mean = batch_mean(fake, ranks)
    distance = pointwise(real_mean - fake_mean, criterion, eps)
    if estimator == "unbiased":
        noise = batch_var(real, real_mean, ranks) + batch_var(fake, fake_mean, ranks)
        distance = distance - noise / (fake.shape[0] * ranks.size)
    return reduce_elements(distance, elements)


def moments(
    real: Tensor,
    fake: Tensor,
    *,
    ranks: Ranks,
    criterion: str = "l2",
    eps: float = 1e-6,
    elements: str = "mean",
    **_: object,
) -> Tensor:
    """Distance between means plus distance between standard deviations (dos Santos et al. 2019, GFMN, eq. 2)."""
    real_mean, fake_mean = batch_mean(real, ranks), batch_mean(fake, ranks)
    real_std = (batch_var(real, real_mean, ranks) + STD_EPS).sqrt()
    fake_std = (batch_var(fake, fake_mean, ranks) + STD_EPS).sqrt()
    distance = pointwise(real_mean - fake_mean, criterion, eps) + pointwise(real_std - fake_std, criterion, eps)
    return reduce_elements(distance, elements)


def _channel_covariance(x: Tensor, ranks: Ranks) -> Tensor:
    rows = at_least_float32(x).flatten(2).movedim(1, 2).flatten(0, 1) if x.ndim > 2 else at_least_float32(x)
    centred = rows - ranks.mean(rows.mean(0))
    count = rows.shape[0] * ranks.size
    return ranks.mean(centred.T @ centred / rows.shape[0]) * (count / (count - 1))


def coral(real: Tensor, fake: Tensor, *, ranks: Ranks, elements: str = "mean", **_: object) -> Tensor:
    """||C_r - C_g||_F^2 / 4d^2, C the covariance of the d channels over images and positions (Sun & Saenko 2016, eq. 1).

    `elements = "sum"` leaves out the 1/d^2.
    """
    difference = (_channel_covariance(real, ranks) - _channel_covariance(fake, ranks)).square()
    return reduce_elements(difference, elements) / 4


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T).clamp(min=0)


def mmd(
    real: Tensor,
    fake: Tensor,
    *,
    ranks: Ranks,
    elements: str = "mean",
    kernel: str = "rational_quadratic",
    bandwidth: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Unbiased MMD^2 between the features of images (Gretton et al. 2012, eq. 3); may be negative.

    `rational_quadratic`: sum over alpha of (1 + d^2 / 2 alpha)^-alpha (Binkowski et al. 2018); `rbf`: sum over s of
    exp(-d^2 / 2 s m), m the mean d^2 between distinct real images unless `bandwidth` is given. d^2 is averaged over a
    layer's elements under `elements = "mean"`.
    """
    x, y = ranks.gather(at_least_float32(real).flatten(1)), ranks.gather(at_least_float32(fake).flatten(1))
    count = x.shape[0]
    scale = 1 / x.shape[1] if elements == "mean" else 1.0
    xx, yy, xy = (_squared_distances(a, b) * scale for a, b in ((x, x), (y, y), (x, y)))
    others = ~torch.eye(count, dtype=torch.bool, device=x.device)
    if kernel == "rbf" and bandwidth is None:
        # not xx[others]: its size would have to come from the device
        bandwidth = (xx.detach() * others).sum() / (count * (count - 1))
        bandwidth = bandwidth.clamp(min=torch.finfo(xx.dtype).tiny)

    def similarity(d2: Tensor) -> Tensor:
        if kernel == "rbf":
            assert bandwidth is not None
            return torch.stack([(-d2 / (2 * s * bandwidth)).exp() for s in RBF_BANDWIDTHS]).sum(0)
        return torch.stack([(1 + d2 / (2 * a)) ** -a for a in RATIONAL_QUADRATIC_ALPHAS]).sum(0)

    def off_diagonal(k: Tensor) -> Tensor:
        return (k * others).sum() / (count * (count - 1))

    return off_diagonal(similarity(xx)) + off_diagonal(similarity(yy)) - 2 * similarity(xy).mean()


def random_directions(count: int, dimension: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`count` directions on the unit sphere of `dimension`, as rows."""
    rows = torch.randn(count, dimension, generator=generator, device=generator.device, dtype=dtype)
    return F.normalize(rows, dim=1)


def sliced(
    real: Tensor, fake: Tensor, *, ranks: Ranks, directions: Tensor | None = None, elements: str = "mean", **_: object
) -> Tensor:
    """Squared sliced Wasserstein-2 distance: E over directions of the mean squared gap between sorted projections
    (Bonneel et al. 2015; Deshpande et al. 2018).

    With unit `directions` (P, d) the expectation already is the average over d elements; `elements = "sum"`
    multiplies by d.
    """
    assert directions is not None
    x = ranks.gather(at_least_float32(real).flatten(1) @ directions.T)
    y = ranks.gather(at_least_float32(fake).flatten(1) @ directions.T)
    distance = (x.sort(0).values - y.sort(0).values).square().mean()
    return distance if elements == "mean" else distance * directions.shape[1]


class Statistic(Protocol):
    """Takes the options that it has of these, and leaves the others alone."""

    def __call__(
        self,
        real: Tensor,
        fake: Tensor,
        *,
        ranks: Ranks,
        criterion: str,
        eps: float,
        elements: str,
        estimator: str,
        real_mean: Tensor | None,
        kernel: str,
        directions: Tensor | None,
    ) -> Tensor: ...


STATISTICS: dict[str, Statistic] = {
    "sample": sample,
    "mean": mean,
    "moments": moments,
    "coral": coral,
    "mmd": mmd,
    "sliced": sliced,
}
