"""Images from noise: generated images as a distribution, beside real ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..config.data import DataConfig
from ..data.store import Images
from ..errors import UserError
from ..metrics.classifier import Classifier, load_classifier
from ..metrics.distribution import LEAST, SUBSET_SEED, SUBSETS, kid_error, scores, subset_size
from ..metrics.extractors import open_extractor
from ..metrics.modes import STACKED_NUM, Kinds, choose_kinds, coverage
from ..metrics.reals import Library, Reals, choose_reals, share, shown
from ..report import Reporter, note_once
from ..sample import Source, images
from . import Asked, Opener

DEFAULT_NUM = 2000
"""Images generated where --num is not given; fewer where there are fewer real ones."""

NOISY = 500
"""Below so many images, scores say little."""


class Measure:
    """Scores of generators of images, against real images that are read and looked at once for all of them."""

    def __init__(self, asked: Asked, device: torch.device, report: Reporter):
        self.asked, self.device, self.report = asked, device, report
        if asked.num is not None and asked.num < LEAST:
            raise UserError(
                f"--num {asked.num}: scores need at least {LEAST} images, and some hundreds to mean something"
            )
        self.extractor = open_extractor(asked.extractor, device, report.note)
        self.headline = "kid" + self.extractor.suffix
        self.library = Library(self.extractor, device, report.counting("real images looked at"))
        self.open = Opener(report)
        self._floors: dict[tuple[str, str], tuple[dict[str, float], float]] = {}

    def __call__(self, source: Source, config: Config) -> dict[str, Any]:
        seed = self.asked.seed or 0
        reals, count = self._reals(config)
        data = source.config.data
        kinds = choose_kinds(data.path, data.channels or 0, data.image_size)
        counted = 0 if kinds is None else STACKED_NUM if kinds.channels == 3 else count
        features, histogram = self._look(source, seed, count, kinds, counted)
        reference = self.library.features(reals.reference)
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
            "seed": seed,
            "kid_subsets": SUBSETS,
            "kid_subset_size": subset_size(count, len(reference)),
            "kid_seed": SUBSET_SEED,
        }
        metrics, floor, floor_error = self._named(scores(features, reference)), *self._floor(reals)
        error = kid_error(features, reference)
        if kinds is not None:
            settings["modes_num"] = counted
            metrics |= coverage(histogram)
            floor = floor | self._real_modes(config, kinds, counted)
        errors = {"error": {self.headline: error}, "floor_error": {self.headline: floor_error}}
        return {"settings": settings, "metrics": metrics, "floor": floor, "floor_on": reals.floor_name, **errors}

    def _look(self, source: Source, seed: int, count: int, kinds: Kinds | None, counted: int) -> tuple[Tensor, Tensor]:
        """Features of the first `count` images of the seed, and how many of the first `counted` are of which kind."""
        features, seen, total = [], 0, max(count, counted)
        tell = self.report.counting("images made and looked at")
        histogram = torch.zeros(kinds.count if kinds else 0, dtype=torch.float64)
        for part in images(source, seed, total):
            if seen < count:
                features.append(self.extractor.all([part[: count - seen]], self.device))
            if kinds is not None and seen < counted:
                histogram += kinds.histogram(self.classifier, [part[: counted - seen]], self.device)
            seen += len(part)
            tell(seen, total)
        return torch.cat(features), histogram

    @cached_property
    def classifier(self) -> Classifier:
        return load_classifier(self.device)

    def _real_modes(self, config: Config, kinds: Kinds, counted: int) -> dict[str, float]:
        """What `coverage` finds among as many real images as there are, up to `counted`."""
        train, valid = self._images(config)
        pool = valid if valid is not None else train
        chosen = share(pool if len(pool) >= min(counted, len(train)) else train, counted)
        return coverage(kinds.histogram(self.classifier, chosen.parts(), self.device))

    def _images(self, config: Config) -> tuple[Images, Images | None]:
        data = self.open(config)
        assert isinstance(data.train, Images)
        assert data.valid is None or isinstance(data.valid, Images)
        return data.train, data.valid

    def _reals(self, config: Config) -> tuple[Reals, int]:
        """The real images of a run, and how many to generate beside them."""
        train, valid = self._images(config)
        count = self.asked.num or min(DEFAULT_NUM, len(valid if valid is not None else train))
        given = any(override.key == "data.path" for override in self.asked.overrides)
        kind = ", held out" if valid is not None else "" if given else ", trained on"
        reals = choose_reals(shown(config.data.valid_path or config.data.path) + kind, train, valid, count)
        note_once(
            f"against {len(reals.reference)} real images ({reals.name}); the floor is what real images score: "
            f"{reals.floor_name}"
        )
        if valid is None and not given:
            note_once("no images were held out of training: measuring against those the generator learned from")
        if len(reals.reference) < count:
            note_once(f"there are only {len(reals.reference)} real images to measure {count} generated ones against")
        if count < NOISY:
            note_once(f"{count} images are few: differences below that between the floor and 0 are noise")
        return reals, count

    def _floor(self, reals: Reals) -> tuple[dict[str, float], float]:
        """Scores of real images against others, and the standard error of their KID."""
        key = reals.floor[0].fingerprint, reals.floor[1].fingerprint
        if key not in self._floors:
            both = [self.library.features(share) for share in reals.floor]
            self._floors[key] = self._named(scores(*both)), kid_error(*both)
        return self._floors[key]

    def _named(self, found: dict[str, float]) -> dict[str, float]:
        return {name + self.extractor.suffix: value for name, value in found.items()}

    def _resize(self, data: DataConfig) -> str:
        """How images came to the size the extractor sees; generated ones need only the second step."""
        own = "Lanczos, antialiased" if data.fit == "crop" else "none"
        if own == self.extractor.resize == "none":
            return "none"
        return f"data: {own}; extractor: {self.extractor.resize}"


def rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: one a record, then the floors. Beside KID stands its standard error."""
    found_names = dict.fromkeys(name for record in records for name in record["metrics"])
    names = [name for name in found_names if any(r["metrics"].get(name) is not None for r in records)]
    with_error = {name for r in records for name in r.get("error", {})}
    heads = [head for name in names for head in ([name, f"{name} ±"] if name in with_error else [name])]

    def values(found: dict[str, Any], errors: dict[str, Any]) -> list[Any]:
        both = found | {f"{name} ±": error for name, error in errors.items()}
        return [both.get(head) for head in heads]

    cells = []
    for r in records:
        head = [r["run"], r["step"], r["weights"], ", ".join(r["which"]), r["settings"]["num"]]
        cells.append([*head, *values(r["metrics"], r.get("error", {}))])
    for r in {(r["settings"]["reals_sha256"], r["floor_on"]): r for r in records}.values():
        head = ["(real images)", None, "", "floor", r["settings"]["reals"]]
        cells.append([*head, *values(r["floor"], r.get("floor_error", {}))])
    return ["run", "step", "weights", "which", "images", *heads], cells
