"""Super-resolution: upscaled photographs beside their originals, and bicubic upscaling beside both."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..config.schema import Config
from ..data.store import Images
from ..metrics.perceptual import METRICS, perceptual_metrics
from ..runtime.errors import UserError
from ..runtime.report import Reporter
from ..sample.sample import Source
from ..tasks.upscale import bicubic, restored, tile_field, upscaled
from .asked import Asked, Opener


class RestoredScores:
    """Scores of upscalers on whole photographs, in tiles."""

    headline = "psnr_y"

    def __init__(self, asked: Asked, device: torch.device, report: Reporter):
        self.asked, self.device, self.report = asked, device, report
        if asked.extractor is not None:
            raise UserError("--extractor is for images from noise; upscaled images are compared with their originals")
        if asked.num is not None and asked.num < 1:
            raise UserError(f"--num {asked.num}: at least one photograph is needed")
        self.distances = perceptual_metrics(device)
        missing = [name for name in METRICS if name not in self.distances]
        if missing:
            report.note(f"without {', '.join(missing)}, whose weights or package are not on this machine")
        self._bicubic: dict[tuple[str, str | None, int, int], dict[str, float]] = {}
        self.open = Opener(asked, report)

    def __call__(self, source: Source, config: Config) -> dict[str, Any]:
        pairs, name = self.open.pool(config)
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
                "scale": scale,
                "low": pairs.made_by,
                "degradation": degradation,
            },
            "metrics": made,
            "floor": {},
            "bicubic": self._bicubic[beside],
        }


def _digest(pairs: Images) -> str | None:
    """Eight digits of a SHA-256 of how low-resolution images are made; None where they are files, which the fingerprint of
    the pairs tells apart."""
    if pairs.degradation is None:
        return None
    return hashlib.sha256(json.dumps(pairs.degradation.acting(), sort_keys=True).encode()).hexdigest()[:8]
