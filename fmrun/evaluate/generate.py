"""Images from noise: generated images as a distribution, beside real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import Config
from ..config.data import DataConfig
from ..data.images import open_data
from ..data.source import Images
from ..errors import UserError
from ..metrics.distribution import LEAST, SUBSET_SEED, SUBSETS, Cloud, scores, subset_size
from ..metrics.extractors import open_extractor
from ..metrics.reals import Library, Reals, choose_reals, shown
from ..report import Reporter
from ..sample import Source, images
from . import Asked

DEFAULT_NUM = 2000
"""Images generated where --num is not given; fewer where there are fewer real ones."""

NOISY = 500
"""Below so many images, scores say little."""


class GenerateMeasure:
    """Scores of generators of images, against real images that are read and looked at once for all of them."""

    def __init__(self, asked: Asked, device: torch.device, report: Reporter):
        self.asked, self.device, self.report = asked, device, report
        if asked.num is not None and asked.num < LEAST:
            raise UserError(
                f"--num {asked.num}: scores need at least {LEAST} images, and some hundreds to mean something"
            )
        self.extractor = open_extractor(asked.extractor, asked.extractor_weights, device, report.note)
        self.headline = "kid" + self.extractor.suffix
        self.library = Library(self.extractor, device, report.warn)
        self._opened: dict[tuple[DataConfig, int], tuple[Images, Images | None]] = {}
        self._floors: dict[tuple[str, str], dict[str, float]] = {}
        self._said: set[str] = set()

    def __call__(self, source: Source, config: Config) -> dict[str, Any]:
        seed = self.asked.seed or 0
        reals, count = self._reals(config)
        made = Cloud(self._features(source, seed, count))
        reference = self.library.cloud(reals.reference)
        settings = {
            "task": "generate",
            "data": reals.name,
            "reals": len(reference),
            "reals_sha256": self.library.fingerprint(reals.reference)[:16],
            "num": count,
            "extractor": self.extractor.name,
            "resolution": config.data.image_size,
            "resize": self._resize(config.data),
            "seed": seed,
            "kid_subsets": SUBSETS,
            "kid_subset_size": subset_size(count, len(reference)),
            "kid_seed": SUBSET_SEED,
        }
        return {
            "settings": settings,
            "metrics": self._named(scores(made, reference)),
            "floor": self._named(self._floor(reals)),
            "floor_on": reals.floor_name,
        }

    def _reals(self, config: Config) -> tuple[Reals, int]:
        """The real images of a run, and how many to generate beside them."""
        # which images are held out of a set depends on the run's seed
        seed = config.seed if config.data.valid_fraction else 0
        key = config.data, seed
        if key not in self._opened:
            self._opened[key] = open_data(config.data, seed, self.report.counting("checking images"))
        train, valid = self._opened[key]
        wanted = self.asked.num or DEFAULT_NUM
        count = self.asked.num or min(wanted, len(valid if valid is not None else train))
        given = any(override.key == "data.path" for override in self.asked.overrides)
        kind = "" if given else ", held out" if valid is not None else ", trained on"
        reals = choose_reals(shown(config.data.valid_path or config.data.path) + kind, train, valid, count)
        self._say(
            f"against {len(reals.reference)} real images ({reals.name}); the floor is the score of {reals.floor_name}, "
            "which are real too"
        )
        if valid is None and not given:
            self._say("no images were held out of training: measuring against those the generator learned from")
        if len(reals.reference) < count:
            self._say(f"there are only {len(reals.reference)} real images to measure {count} generated ones against")
        if count < NOISY:
            self._say(f"{count} images are few: differences below that between the floor and 0 are noise")
        return reals, count

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.report.note(sentence)

    def _features(self, source: Source, seed: int, count: int) -> torch.Tensor:
        features = self.extractor.all(images(source, seed, count), self.device)
        return features.to(self.device) if self.device.type == "cuda" else features

    def _floor(self, reals: Reals) -> dict[str, float]:
        one, other = (self.library.fingerprint(share) for share in reals.floor)
        if (one, other) not in self._floors:
            self._floors[one, other] = scores(*(self.library.cloud(share) for share in reals.floor))
        return self._floors[one, other]

    def _named(self, found: dict[str, float]) -> dict[str, float]:
        return {name + self.extractor.suffix: value for name, value in found.items()}

    def _resize(self, data: DataConfig) -> str:
        """How images came to the size the extractor sees; generated ones need only the second step."""
        own = "Lanczos, antialiased" if data.fit == "crop" else "none"
        if own == self.extractor.resize == "none":
            return "none"
        return f"data: {own}; extractor: {self.extractor.resize}"


def rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: one a record, then the floors."""
    names = [name for name in records[0]["metrics"] if any(r["metrics"].get(name) is not None for r in records)]
    columns = ["run", "step", "weights", "which", "images", *names]
    found = [
        [
            r["run"],
            r["step"],
            r["weights"],
            ", ".join(r["which"]),
            r["settings"]["num"],
            *(r["metrics"].get(name) for name in names),
        ]
        for r in records
    ]
    floors = {(r["settings"]["reals_sha256"], r["floor_on"]): r for r in records}
    for record in floors.values():
        floor = record["floor"]
        found.append(["(real images)", None, "", "floor", record["settings"]["reals"], *(floor.get(n) for n in names)])
    return columns, found
