"""Images from noise: generated images as a distribution, beside real ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config.data import DataConfig
from ..config.schema import Config
from ..metrics.distribution import LEAST, SUBSET_SEED, SUBSETS, kid_error, scores, subset_size
from ..metrics.extractors import open_extractor, suffix_of
from ..metrics.modes import STACKED_NUM, Classifier, Modes, choose_modes, coverage, load_classifier
from ..metrics.reals import Reals, Share, choose_reals, share
from ..runtime.errors import UserError
from ..runtime.report import Reporter, note_once
from ..sample.sample import Source, images
from .asked import Asked, Opener

DEFAULT_NUM = 2000
"""Images generated where --num is not given; fewer where there are fewer real ones."""

SEED = 0
"""Of the latents."""

NOISY = 500
"""Below so many images, scores say little."""


class DistributionScores:
    """Scores of generators of images, against real images that are read and looked at once for all of them."""

    def __init__(self, asked: Asked, device: torch.device, report: Reporter):
        self.asked, self.device, self.report = asked, device, report
        if asked.num is not None and asked.num < LEAST:
            raise UserError(
                f"--num {asked.num}: scores need at least {LEAST} images, and some hundreds to mean something"
            )
        self.extractor = open_extractor(asked.extractor, device)
        self.headline = "kid" + suffix_of(self.extractor.name)
        self._known: dict[str, Tensor] = {}
        self.open = Opener(asked, report)
        self._floors: dict[tuple[str, str], tuple[dict[str, float], float]] = {}

    def __call__(self, source: Source, config: Config) -> dict[str, Any]:
        reals, count = self._reals(config)
        data = source.config.data
        modes = choose_modes(data.path, data.channels or 0, data.image_size)
        counted = 0 if modes is None else STACKED_NUM if modes.channels == 3 else count
        features, histogram = self._look(source, count, modes, counted)
        reference = self._features(reals.reference)
        settings = {
            "task": config.task,
            "data": reals.name,
            "reals": len(reference),
            "reals_sha256": reals.reference.fingerprint[:16],
            "num": count,
            "extractor": self.extractor.name,
            "extractor_weights": self.extractor.weights,
            "resolution": config.data.image_size,
            "resize": self._resize(config.data),
            "seed": SEED,
            "kid_subsets": SUBSETS,
            "kid_subset_size": subset_size(count, len(reference)),
            "kid_seed": SUBSET_SEED,
        }
        metrics, floor, floor_error = self._named(scores(features, reference)), *self._floor(reals)
        error = kid_error(features, reference)
        if modes is not None:
            settings["modes_num"] = counted
            metrics |= coverage(histogram)
            floor = floor | self._real_modes(config, modes, counted)
        errors = {"error": {self.headline: error}, "floor_error": {self.headline: floor_error}}
        return {"settings": settings, "metrics": metrics, "floor": floor, "floor_on": reals.floor_name, **errors}

    def _look(self, source: Source, count: int, modes: Modes | None, counted: int) -> tuple[Tensor, Tensor]:
        """Features of the first `count` images, and how many of the first `counted` are of which kind."""
        features, seen, total = [], 0, max(count, counted)
        tell = self.report.counting("images made and looked at")
        histogram = torch.zeros(modes.count if modes else 0, dtype=torch.float64)
        for part in images(source, SEED, total):
            if seen < count:
                features.append(self.extractor.all([part[: count - seen]], self.device))
            if modes is not None and seen < counted:
                histogram += modes.histogram(self.classifier, [part[: counted - seen]], self.device)
            seen += len(part)
            tell(seen, total)
        return torch.cat(features), histogram

    def _features(self, share: Share) -> Tensor:
        """Features (N, D) of real images, which are looked at once."""
        if share.fingerprint not in self._known:
            tell = self.report.counting("real images looked at")

            def parts() -> Iterator[Tensor]:
                """The parts; each is told of when the next is asked for."""
                done = 0
                for part in share.parts():
                    yield part
                    done += len(part)
                    tell(done, len(share))

            self._known[share.fingerprint] = self.extractor.all(parts(), self.device)
        return self._known[share.fingerprint]

    @cached_property
    def classifier(self) -> Classifier:
        return load_classifier(self.device)

    def _real_modes(self, config: Config, modes: Modes, counted: int) -> dict[str, float]:
        """What `coverage` finds among as many real images as there are, up to `counted`."""
        train, (pool, _) = self.open(config).train, self.open.pool(config)
        chosen = share(pool if len(pool) >= min(counted, len(train)) else train, counted)
        return coverage(modes.histogram(self.classifier, chosen.parts(), self.device))

    def _reals(self, config: Config) -> tuple[Reals, int]:
        """The real images of a run, and how many to generate beside them."""
        data, (pool, name) = self.open(config), self.open.pool(config)
        count = self.asked.num or min(DEFAULT_NUM, len(pool))
        reals = choose_reals(name, data.train, data.valid, count)
        note_once(
            f"against {len(reals.reference)} real images ({reals.name}); the floor is what real images score: "
            f"{reals.floor_name}"
        )
        if len(reals.reference) < count:
            note_once(f"there are only {len(reals.reference)} real images to measure {count} generated ones against")
        if count < NOISY:
            note_once(f"{count} images are few: differences below that between the floor and 0 are noise")
        return reals, count

    def _floor(self, reals: Reals) -> tuple[dict[str, float], float]:
        """Scores of real images against others, and the standard error of their KID."""
        key = reals.floor[0].fingerprint, reals.floor[1].fingerprint
        if key not in self._floors:
            both = [self._features(share) for share in reals.floor]
            self._floors[key] = self._named(scores(*both)), kid_error(*both)
        return self._floors[key]

    def _named(self, scores: dict[str, float]) -> dict[str, float]:
        return {name + suffix_of(self.extractor.name): value for name, value in scores.items()}

    def _resize(self, data: DataConfig) -> str:
        """How images came to the size the extractor sees; generated ones need only the second step."""
        own = "Lanczos, antialiased" if data.fit == "crop" else "none"
        if own == self.extractor.resize == "none":
            return "none"
        return f"data: {own}; extractor: {self.extractor.resize}"
