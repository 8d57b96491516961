"""How far generated images are from real ones as distributions, computed from their features.

A score is a function of two clouds of feature vectors and of nothing else: the same features give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020
"""Of KID: as many draws of as many images (of all, where there are fewer), from `numpy.random.RandomState(SUBSET_SEED)`,
as torch-fidelity draws them by default."""

PRC_NEIGHBOUR, COVERAGE_NEIGHBOUR = 3, 5
"""The neighbour that decides how large a ball is: 3 in Kynkäänniemi et al. 2019, 5 in Naeem et al. 2020."""

LEAST = 10
"""Images a set needs at least for any score."""

SCORES = ("kid", "fid", "precision", "recall", "density", "coverage")

BLOCK = 2**22
"""Numbers in a block of a kernel matrix: as many as fit near the processor, whatever the number of images."""


class Cloud:
    """Feature vectors (N, D) of one set of images, and what comparing it with others needs, computed once."""

    def __init__(self, features: Tensor) -> None:
        wide = features if features.device.type == "cuda" else features.cpu()
        self.points = wide.double()
        self._sums: dict[tuple[int, int, int, bool], Tensor] = {}
        self._products: dict[int, tuple[Cloud, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def mean(self) -> Tensor:
        return self.points.mean(0)

    @cached_property
    def centred(self) -> Tensor:
        """A (N, D) with AᵀA the covariance."""
        return (self.points - self.mean) / (len(self) - 1) ** 0.5

    @cached_property
    def covariance(self) -> Tensor:
        return self.centred.T @ self.centred

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    @cached_property
    def radii(self) -> Tensor:
        """Squared distances (N, k) of each point to its nearest other ones, nearest first."""
        count = max(PRC_NEIGHBOUR, COVERAGE_NEIGHBOUR)
        found = []
        for rows, gram in blocks(self, self):
            distances = self._distances(rows, gram, self)
            distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
            found.append(distances.topk(count, largest=False).values)
        return torch.cat(found)

    @cached_property
    def squares(self) -> Tensor:
        return self.points.square().sum(1)

    def _distances(self, rows: slice, gram: Tensor, other: Cloud) -> Tensor:
        return (self.squares[rows, None] + other.squares - 2 * gram).clamp_min_(0)

    def kernel_sums(self, made: int, real: int, size: int, is_made: bool) -> Tensor:
        """Sums (SUBSETS,) of the kernel over all pairs of different members of each subset of this cloud."""
        key = made, real, size, is_made
        if key not in self._sums:
            member = _members(made, real, size)[0 if is_made else 1].to(self.points.device)
            total = self.points.new_zeros(SUBSETS)
            for rows, gram in blocks(self, self):
                total += _pair_sums(kernel(gram, self.points.shape[1]), member[rows], member)
            diagonal = kernel(self.squares, self.points.shape[1])
            self._sums[key] = total - diagonal @ member
        return self._sums[key]


def blocks(one: Cloud, other: Cloud) -> Iterator[tuple[slice, Tensor]]:
    """Scalar products (rows, M) of the points of `one` with all of `other`, a few rows at a time; kept where they are
    few, for each score asks for them again."""
    if len(one) * len(other) <= BLOCK:
        if id(other) not in one._products:
            one._products[id(other)] = other, one.points @ other.points.T
        yield slice(0, len(one)), one._products[id(other)][1]
        return
    step = max(1, BLOCK // len(other))
    for start in range(0, len(one), step):
        rows = slice(start, min(start + step, len(one)))
        yield rows, one.points[rows] @ other.points.T


def kernel(products: Tensor, dimension: int) -> Tensor:
    """k(x, y) = (xᵀy / D + 1)³ (Bińkowski et al. 2018, section 4)."""
    return (products / dimension + 1) ** 3


@lru_cache(maxsize=8)
def _members(made: int, real: int, size: int) -> tuple[Tensor, Tensor]:
    """Which images are in which subset: ones and zeros (made, SUBSETS) and (real, SUBSETS)."""
    rng = np.random.RandomState(SUBSET_SEED)
    ones = torch.zeros(made, SUBSETS, dtype=torch.float64), torch.zeros(real, SUBSETS, dtype=torch.float64)
    for i in range(SUBSETS):
        for member, count in zip(ones, (made, real), strict=True):
            member[rng.choice(count, size, replace=False), i] = 1
    return ones


def _pair_sums(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Σ_ij rows_is values_ij columns_js for each subset s."""
    return ((values @ columns) * rows).sum(0)


def subset_size(made: int, real: int) -> int:
    return min(SUBSET_SIZE, made, real)


def kid(made: Cloud, real: Cloud) -> float:
    """Kernel Inception Distance (Bińkowski et al. 2018): the unbiased squared maximum mean discrepancy under a cubic
    kernel, averaged over random subsets. Unbiased at any number of images, hence below 0 now and then."""
    size = subset_size(len(made), len(real))
    sizes = len(made), len(real), size
    of_made, of_real = (member.to(made.points.device) for member in _members(*sizes))
    crossed = made.points.new_zeros(SUBSETS)
    for rows, gram in blocks(made, real):
        crossed += _pair_sums(kernel(gram, made.points.shape[1]), of_made[rows], of_real)
    within = made.kernel_sums(*sizes, is_made=True) + real.kernel_sums(*sizes, is_made=False)
    return float((within / (size * (size - 1)) - 2 * crossed / size**2).mean())


def fid(made: Cloud, real: Cloud) -> float:
    """Fréchet distance of the Gaussians fitted to both (Heusel et al. 2017), with Inception's features called FID:
    ‖μ_g − μ_r‖² + tr(Σ_g + Σ_r − 2 (Σ_g Σ_r)^½). Biased upwards the more, the fewer the images."""
    if min(len(made), len(real)) < made.points.shape[1]:
        # with Σ_g = AᵀA and Σ_r = BᵀB, the eigenvalues of (Σ_g Σ_r)^½ are the singular values of ABᵀ
        shared = torch.linalg.svdvals(made.centred @ real.centred.T).sum()
    else:
        # (Σ_g Σ_r)^½ and (Σ_r^½ Σ_g Σ_r^½)^½ have the same eigenvalues, and the latter is symmetric
        product = real.root @ made.covariance @ real.root
        shared = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    apart = (made.mean - real.mean).square().sum()
    return float(apart + made.centred.square().sum() + real.centred.square().sum() - 2 * shared)


def neighbourhoods(made: Cloud, real: Cloud) -> dict[str, float]:
    """`precision` and `recall` (Kynkäänniemi et al. 2019): the share of generated images in the balls of real ones, and
    of real images in those of generated ones. `density` and `coverage` (Naeem et al. 2020): in how many balls of real
    images a generated one lies, by how many it would if they were alike, and the share of real balls that are hit."""
    ball, wide = real.radii[:, PRC_NEIGHBOUR - 1], real.radii[:, COVERAGE_NEIGHBOUR - 1]
    reach = made.radii[:, PRC_NEIGHBOUR - 1]
    inside, within = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.points.device)
    covered = torch.zeros_like(recalled)
    for rows, gram in blocks(made, real):
        distances = made._distances(rows, gram, real)
        inside += int((distances <= ball).any(1).sum())
        recalled |= (distances <= reach[rows, None]).any(0)
        hit = distances < wide
        within += int(hit.sum())
        covered |= hit.any(0)
    return {
        "precision": inside / len(made),
        "recall": float(recalled.double().mean()),
        "density": within / (COVERAGE_NEIGHBOUR * len(made)),
        "coverage": float(covered.double().mean()),
    }


def scores(made: Cloud, real: Cloud) -> dict[str, float]:
    """All of SCORES; both clouds of at least LEAST points."""
    assert min(len(made), len(real)) >= LEAST, (len(made), len(real))
    return {"kid": kid(made, real), "fid": fid(made, real), **neighbourhoods(made, real)}
