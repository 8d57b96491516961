"""Super-resolution: upscaled photographs beside their originals, and bicubic upscaling beside both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from ..config import Config
from ..data.pairs import Pairs
from ..errors import UserError
from ..metrics.perceptual import METRICS, perceptual_metrics
from ..metrics.reals import shown
from ..report import Reporter, note_once
from ..sample import Source
from ..tasks.upscale import bicubic, restored, tile_field, upscaled
from . import Asked, Opener


class Measure:
    """Scores of upscalers on whole photographs, in tiles."""

    headline = "psnr_y"

    def __init__(self, asked: Asked, device: torch.device, report: Reporter):
        self.asked, self.device, self.report = asked, device, report
        for flag in ("extractor", "seed"):
            if getattr(asked, flag) is not None:
                raise UserError(f"--{flag} is for images from noise; upscaled images are compared with their originals")
        if asked.num is not None and asked.num < 1:
            raise UserError(f"--num {asked.num}: at least one photograph is needed")
        self.distances = perceptual_metrics(device)
        missing = [name for name in METRICS if name not in self.distances]
        if missing:
            report.note(f"without {', '.join(missing)}, whose weights or package are not on this machine")
        self._bicubic: dict[tuple[str, str | None, int, int], dict[str, float]] = {}
        self.open = Opener(report)

    def __call__(self, source: Source, config: Config) -> dict[str, Any]:
        final, pairs, name = self._pairs(config)
        channels, scale = source.config.data.channels, source.config.data.scale
        assert channels is not None
        field = tile_field(source.config, channels)
        count = min(self.asked.num or len(pairs), len(pairs))
        tell = self.report.counting("photographs upscaled and compared")
        made = restored(lambda low: upscaled(source.net, low, field, scale), pairs, count, self.distances, tell)
        degradation = _digest(pairs)
        beside = pairs.fingerprint, degradation, scale, count
        if beside not in self._bicubic:
            self._bicubic[beside] = restored(
                lambda low: bicubic(low.to(self.device, torch.float32), scale), pairs, count, self.distances
            )
        return {
            "settings": {
                "task": config.task,
                "data": name,
                "reals_sha256": pairs.fingerprint[:16],
                "num": count,
                "scale": final.data.scale,
                "low": pairs.made_by,
                "degradation": degradation,
            },
            "metrics": made,
            "floor": {},
            "bicubic": self._bicubic[beside],
        }

    def _pairs(self, config: Config) -> tuple[Config, Pairs, str]:
        """The config with what its data settle, the pairs measured on, and what they are called."""
        data = self.open(config)
        valid, pairs = data.valid, data.valid if data.valid is not None else data.train
        assert isinstance(pairs, Pairs)
        given = any(override.key == "data.path" for override in self.asked.overrides)
        kind = ", held out" if valid is not None else "" if given else ", trained on"
        if valid is None and not given:
            note_once("no photographs were held out of training: measuring on those the generator learned from")
        return data.config, pairs, shown(config.data.valid_path or config.data.path) + kind


def _digest(pairs: Pairs) -> str | None:
    """Eight digits of a SHA-256 of how low-resolution images are made; None where they are files, which the fingerprint of
    the pairs tells apart."""
    if pairs.degradation is None:
        return None
    return hashlib.sha256(json.dumps(pairs.degradation.acting(), sort_keys=True).encode()).hexdigest()[:8]


def rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: one a record, then bicubic upscaling of the same photographs."""
    names = list(records[0]["metrics"])

    def row(record: dict[str, Any], values: dict[str, float], *head: Any) -> list[Any]:
        return [*head, record["settings"]["num"], *(values.get(name) for name in names)]

    found = [row(r, r["metrics"], r["run"], r["step"], r["weights"], ", ".join(r["which"])) for r in records]
    beside = {tuple(r["settings"].values()): r for r in records}
    found += [row(r, r["bicubic"], "(bicubic)", None, "", "") for r in beside.values()]
    return ["run", "step", "weights", "which", "photographs", *names], found
