"""Losses between an image and its original as pretrained nets see them.

Each module takes images (B, C, H, W) in [0, 1] (1, 3 or 4 channels) and returns a scalar of at least float32; gradient
flows to `image` only. What a net weighs little or saturates on is not clipped: an image outside [0, 1] is still pulled
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..config.losses import FeatureLossConfig, LpipsLossConfig, PretrainedLossConfig
from ..runtime.errors import UserError
from .pixel import distance
from .pretrained import BACKBONES, Features, as_rgb, choose_layers, load_features

CUSTOMARY: dict[str, dict[tuple[str, ...], tuple[float, ...]]] = {
    "vgg19": {("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4"): (0.1, 0.1, 1.0, 1.0, 1.0)},
    "convnext_tiny": {("stage2", "stage3"): (1.0, 0.5)},
}
"""Weights of sets of layers as the losses of these names have them; 1 each for all others."""


class FeatureLoss(nn.Module):
    """sum_k w_k d(f_k(image), f_k(target)), d the mean of |.|, (.)^2 or sqrt((.)^2 + eps) (Johnson et al. 2016, eq. 2;
    Wang et al. 2018, ESRGAN); under `reduction = "mean"` over sum_k w_k."""

    def __init__(self, features: nn.Module, weights: Sequence[float], criterion: str, eps: float, reduction: str):
        super().__init__()
        self.features, self.weights = features, tuple(weights)
        self.criterion, self.eps, self.reduction = criterion, eps, reduction

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            real = self.features(target)
        fake = self.features(image)
        total = torch.stack(
            [
                weight * distance(fake[layer], real[layer], criterion=self.criterion, eps=self.eps)
                for weight, layer in zip(self.weights, real, strict=True)
            ]
        ).sum()
        return total / sum(self.weights) if self.reduction == "mean" else total


def feature_loss(name: str, config: FeatureLossConfig, field: str) -> FeatureLoss:
    """The loss on the pretrained net `name`; `field` is the section that asks for it."""
    backbone = BACKBONES[name]
    layers = choose_layers(config.layers, backbone, field)
    weights = config.layer_weights or CUSTOMARY.get(name, {}).get(layers, (1.0,) * len(layers))
    weight_of = dict(zip(layers, weights, strict=True))
    ordered = {layer: index for layer, index in backbone.layers.items() if layer in weight_of}
    features = Features(load_features(backbone, config.weights, field), ordered)
    return FeatureLoss(features, [weight_of[k] for k in ordered], config.criterion, config.eps, config.reduction)


def _torchmetrics(field: str) -> None:
    try:
        import torchmetrics.functional.image  # noqa: F401
    except ImportError:
        raise UserError(f"{field} needs the package torchmetrics: pip install 'fmrun[perceptual]'") from None


class DistsLoss(nn.Module):
    """Deep image structure and texture similarity, mean over images (Ding et al. 2020), by torchmetrics."""

    def __init__(self, config: PretrainedLossConfig, field: str = "losses.dists"):
        super().__init__()
        _torchmetrics(field)
        from torchmetrics.functional.image import dists

        features = load_features(BACKBONES["vgg16"], config.weights, field)
        # its constructor calls vgg16 with weights to be downloaded, and takes nothing else
        theirs = dists.vgg16
        dists.vgg16 = lambda weights: SimpleNamespace(features=features)
        try:
            with torch.random.fork_rng(devices=[]):
                self.net = dists.DISTSNetwork()
        finally:
            dists.vgg16 = theirs
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        distances: Tensor = self.net(as_rgb(image), as_rgb(target), require_grad=True)
        return distances.mean()


class LpipsLoss(nn.Module):
    """Learned perceptual image patch similarity, mean over images (Zhang et al. 2018), by torchmetrics."""

    def __init__(self, config: LpipsLossConfig, field: str = "losses.lpips"):
        super().__init__()
        _torchmetrics(field)
        from torchmetrics.functional.image.lpips import _LPIPS

        backbone = BACKBONES[{"vgg": "vgg16", "alex": "alexnet"}[config.net]]
        features = load_features(backbone, config.weights, field)
        with torch.random.fork_rng(devices=[]):
            self.net = _LPIPS(net=config.net, pnet_rand=True)
        # its slices keep torchvision's numbers: slice2.4.weight is features.4.weight
        known = features.state_dict()
        self.net.net.load_state_dict({key: known[key.partition(".")[2]] for key in self.net.net.state_dict()})
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        distances: Tensor = self.net(as_rgb(image), as_rgb(target), normalize=True)
        return distances.mean()
