"""How far generated images are from real ones as distributions, computed from their features (N, D).

KID, FID, precision and recall are torch-fidelity's, in float64. A score is a function of two clouds of feature vectors
and of nothing else: the same features give the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config.tables import METRICS

SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020
"""Of KID, torch-fidelity's defaults: the mean over as many draws of as many images. Sets of no more than SUBSET_SIZE
images are compared whole, which every draw of all of them would give again."""

COVERAGE_NEIGHBOUR = 5
"""The neighbour that decides how large a ball is in density and coverage (Naeem et al. 2020)."""

AT_ONCE = 4096
"""Images whose kernel or distances are held as a whole: 134 MB a matrix."""

LEAST = 10
"""Images a set needs at least for any score."""

SCORES = tuple(name for name, row in METRICS.items() if row.of_features)
ROWS = 1024
"""Of a matrix of distances, computed at a time."""


def subset_size(made: int, real: int) -> int:
    return min(SUBSET_SIZE, made, real)


def kid(made: Tensor, real: Tensor) -> float:
    """Kernel Inception Distance (Bińkowski et al. 2018): the unbiased squared maximum mean discrepancy under a cubic
    kernel. Unbiased at any number of images, hence below 0 now and then."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kernel_poly, kid_features_to_metric

    size = subset_size(len(made), len(real))
    subsets = 1 if len(made) == len(real) == size else SUBSETS
    made, real = made.double(), real.double()
    if max(len(made), len(real)) > AT_ONCE:
        sizes = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": SUBSET_SEED}
        return kid_features_to_metric(made, real, **sizes, verbose=False)[KEY_METRIC_KID_MEAN]
    # the same, with the kernel of two images computed once and not in every subset that has both
    x, y = made.numpy(), real.numpy()
    in_x, in_y = np.zeros((len(x), subsets)), np.zeros((len(y), subsets))
    rng = np.random.RandomState(SUBSET_SEED)
    for i in range(subsets):
        for members in (in_x, in_y):
            members[rng.choice(len(members), size, replace=False), i] = 1

    def pairs(one: np.ndarray, other: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Sums of the kernel over the pairs within each subset; of a set with itself, over different images."""
        kernel = kernel_poly(one, other)
        if one is other:
            np.fill_diagonal(kernel, 0)
        return ((kernel @ right) * left).sum(0)

    within = pairs(x, x, in_x, in_x) + pairs(y, y, in_y, in_y)
    return float((within / (size * (size - 1)) - 2 * pairs(x, y, in_x, in_y) / size**2).mean())


def kid_error(made: Tensor, real: Tensor) -> float:
    """Standard error of KID under other images from the same two distributions, N and M of them.

    As a U-statistic (Serfling 1980, section 5.2) its variance is 4 var a / N + 4 var b / M, with
    a_i = mean_j k(x_i, x_j) - mean_j k(x_i, y_j) and b_i likewise, and half of what these vary for being means of few
    too many: 2 (s_xx / N + s_xy / M) / N, s the variance of the kernel that is neither its rows' nor its columns'.
    """
    x, y = made.double(), real.double()

    def means(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Mean kernel of each of `one` with all (other) images of `other`, and the mean of its square over all."""
        sums, squares, count = [], one.new_zeros(()), len(other) - (one is other)
        for start in range(0, len(one), ROWS):
            chunk = (one[start : start + ROWS] @ other.T / one.shape[1] + 1).pow(3)
            if one is other:
                chunk.diagonal(start).zero_()
            sums.append(chunk.sum(1))
            squares += chunk.square().sum()
        return torch.cat(sums) / count, squares / (len(one) * count)

    (xx, xx_square), (xy, xy_square), (yy, yy_square), (yx, _) = means(x, x), means(x, y), means(y, y), means(y, x)
    s_xx, s_xy, s_yy = (
        square - rows.mean() ** 2 - rows.var() - columns.var()
        for square, rows, columns in ((xx_square, xx, xx), (xy_square, xy, yx), (yy_square, yy, yy))
    )
    a = (xx - xy).var() - (s_xx / len(x) + s_xy / len(y)) / 2
    b = (yy - yx).var() - (s_yy / len(y) + s_xy / len(x)) / 2
    return float(2 * (a / len(x) + b / len(y)).clamp_min(0).sqrt())


def fid(made: Tensor, real: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to both (Heusel et al. 2017), with Inception's features called FID:
    ‖μ_g − μ_r‖² + tr(Σ_g + Σ_r − 2 (Σ_g Σ_r)^½). Biased upwards the more, the fewer the images."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(cloud.double()) for cloud in (made, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def neighbourhoods(made: Tensor, real: Tensor) -> dict[str, float]:
    """`precision` and `recall` (Kynkäänniemi et al. 2019, k = 3): the fraction of generated images in the balls of real ones,
    and of real images in those of generated ones. `density` and `coverage` (Naeem et al. 2020): in how many balls of real
    images a generated one lies, by how many it would if they were alike, and the share of real balls that are hit."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    made, real = made.double(), real.double()
    by_parts = max(len(made), len(real)) > AT_ONCE
    scores_in_float32 = prc_features_to_metric(made, real, prc_batch_size=AT_ONCE, save_cpu_ram=by_parts, verbose=False)
    k = COVERAGE_NEIGHBOUR
    balls = torch.cat([torch.cdist(chunk, real).kthvalue(k + 1).values for chunk in real.split(ROWS)])
    hits = [torch.cdist(chunk, real) < balls for chunk in made.split(ROWS)]
    return {
        "precision": round(scores_in_float32["precision"] * len(made)) / len(made),  # they come in float32
        "recall": round(scores_in_float32["recall"] * len(real)) / len(real),
        "density": sum(int(hit.sum()) for hit in hits) / (k * len(made)),
        "coverage": float(torch.stack([hit.any(0) for hit in hits]).any(0).double().mean()),
    }


def scores(made: Tensor, real: Tensor) -> dict[str, float]:
    """All of SCORES, of two clouds of at least LEAST points on the CPU."""
    assert min(len(made), len(real)) >= LEAST, (len(made), len(real))
    return {"kid": kid(made, real), "fid": fid(made, real), **neighbourhoods(made, real)}
