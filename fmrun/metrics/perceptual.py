"""Perceptual distances between an image and its original, on pretrained nets; less is better."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..config import losses as sections
from ..losses.perceptual import DistsLoss, LpipsLoss, feature_loss
from ..losses.pretrained import usable

FIELD = "eval.perceptual"

METRICS: dict[str, Callable[[], nn.Module]] = {
    "dists": lambda: DistsLoss(sections.DistsLossConfig(), FIELD),
    "lpips": lambda: LpipsLoss(sections.LpipsLossConfig(net="alex"), FIELD),
    "mobilenet": lambda: feature_loss("mobilenet_v2", sections.MobileNetLossConfig(), FIELD),
}


def perceptual_metric(name: str, device: torch.device) -> tuple[str, nn.Module] | None:
    """A distance of images (B, 3, H, W) in [0, 1], and its name; of the first whose weights are there for `auto`, which
    may be none. Raises UserError, naming the file wanted, for one that is asked for and cannot be had."""
    if name == "none":
        return None
    if name != "auto":
        return name, METRICS[name]().to(device)
    for each, make in METRICS.items():
        with usable():
            return each, make().to(device)
    return None


def perceptual_metrics(device: torch.device) -> dict[str, nn.Module]:
    """All of METRICS whose weights are on this machine."""
    found = {}
    for name, make in METRICS.items():
        with usable():
            found[name] = make().to(device)
    return found
