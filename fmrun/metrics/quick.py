"""KID now and then during training, of few images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..config.schema import Config
from ..data.store import Images
from .distribution import LEAST, kid
from .extractors import HOW, available, open_extractor, suffix_of
from .reals import apart


def extractor_name(config: Config, device: torch.device) -> str | None:
    """The extractor that a run would be measured with; None if it is not, or there is none."""
    if config.has_targets or not config.eval.kid_every:
        return None
    if config.eval.kid_extractor != "auto":
        return config.eval.kid_extractor
    return available(("mobilenet_v2", "inception") if device.type == "cpu" else ("inception", "mobilenet_v2"))


def metric_name(extractor: str) -> str:
    """Its key in metrics.jsonl."""
    return f"eval/kid{suffix_of(extractor)}"


class TrainingKid:
    """KID between a run's generated images and real ones, which are looked at once.

    Args:
        config: the run's.
        extractor: its name.
        train: the images trained on, which generated ones are measured against.
        generated: makes so many images, uint8 (n, C, H, W), a few at a time.
        device: where the extractor runs.
    """

    def __init__(
        self,
        config: Config,
        extractor: str,
        train: Images,
        generated: Callable[[int], Iterable[Tensor]],
        device: torch.device,
    ) -> None:
        self.num, self._generated, self._device = config.eval.kid_num, generated, device
        self.extractor = open_extractor(extractor, device)
        self.name = metric_name(extractor)
        # not the images that `eval` measures against, for the checkpoint that this keeps is measured there
        self._real = self.extractor.all(apart(train, self.num).parts(), device)

    def __call__(self) -> dict[str, float]:
        """Measure; and how long that took. The same weights always give the same number."""
        start = time.monotonic()
        value = kid(self.extractor.all(self._generated(self.num), self._device), self._real)
        return {self.name: value, "time/kid_seconds": time.monotonic() - start}


def why_not(config: Config, train: Images, extractor: str | None) -> str | None:
    """A sentence on why KID is not measured in a run that would have it measured; None if it is, or nobody wants it."""
    if not 0 < config.eval.kid_every <= config.train.steps:
        return None
    if extractor is None:
        return f"KID is not measured in training, for there is no feature extractor on this machine: {HOW}"
    if len(train) < LEAST:
        return f"KID is not measured in training: {len(train)} real images are too few, at least {LEAST} are needed"
    return None
