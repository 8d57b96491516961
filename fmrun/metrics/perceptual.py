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
    "dists": lambda: DistsLoss(sections.PretrainedLossConfig(), FIELD),
    "lpips": lambda: LpipsLoss(sections.LpipsLossConfig(net="alex"), FIELD),
    "mobilenet": lambda: feature_loss("mobilenet_v2", sections.MobileNetLossConfig(), FIELD),
}


def perceptual_metrics(device: torch.device, name: str = "auto", most: int = len(METRICS)) -> dict[str, nn.Module]:
    """Distances of images (B, 3, H, W) in [0, 1] by name: the one asked for, or UserError names the file wanted; for
    `auto` those whose weights are on this machine, the first `most` of them; for `none` none."""
    if name not in ("auto", "none"):
        return {name: METRICS[name]().to(device)}
    nets: dict[str, nn.Module] = {}
    for each, make in METRICS.items():
        if name == "auto" and len(nets) < most:
            with usable():
                nets[each] = make().to(device)
    return nets
