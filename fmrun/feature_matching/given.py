"""Discriminators that say themselves what their features are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .discriminator import Discriminator, DiscriminatorOutput, Logits
from .errors import FeatureMatchingError
from .frozen import frozen
from .walked import WalkedDiscriminator, attempt, example_of, thirds


def discriminator_of(net: nn.Module, image: tuple[int, int, int], what: str = "the discriminator") -> nn.Module:
    """Any net from images (C, H, W) to logits as a `Discriminator`: itself where it is one, by its
    `forward_with_features` where it has that, else walked."""
    if isinstance(net, Discriminator):
        return net
    if callable(getattr(net, "forward_with_features", None)):
        return GivenDiscriminator(net, image, what)
    return WalkedDiscriminator(net, image, what)


class GivenDiscriminator(nn.Module):
    """A net whose `forward_with_features(images)` returns (logits, features), features a list, tuple or dict, in its order.

    Layers are called by the keys of the dict, or by their place. Every pass is a whole one.

    Args:
        net: the user's.
        image: shape (C, H, W) of the images it is tried with.
        what: what it is called in messages.
    """

    auto: str

    def __init__(self, net: nn.Module, image: tuple[int, int, int], what: str = "the discriminator"):
        super().__init__()
        self.net, self.what = net, what
        example = example_of(net, image, what)
        with torch.no_grad(), frozen(net):
            features = self._split(attempt(self._forward_with_features, example, what))[1]
        if not features:
            raise FeatureMatchingError(f"{what}: forward_with_features returns no features; return (logits, features)")
        self.feature_names = names = tuple(features)
        parts = thirds(names)
        last = {feature.shape[2:]: name for name, feature in features.items()}  # of each resolution
        ends = tuple(last.values()) if len(last) > 1 else tuple(part[-1] for part in parts)
        self.groups = {"early": tuple(parts[0]), "mid": tuple(parts[len(parts) // 2]), "key": ends, "all": names}
        self.auto = names[-1]

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        if not layers:
            return DiscriminatorOutput(self.net(image))
        judged, features = self._split(self._forward_with_features(image))
        chosen = {name: feature for name, feature in features.items() if name in layers}
        return DiscriminatorOutput(judged if logits else None, chosen)

    def _forward_with_features(self, image: Tensor) -> object:
        forward = self.net.forward_with_features
        assert callable(forward)
        return forward(image)

    def _split(self, output: object) -> tuple[Logits, dict[str, Tensor]]:
        if isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[1], Mapping | list | tuple):
            features = output[1]
            named = features.items() if isinstance(features, Mapping) else enumerate(features)
            by_name = {str(name): feature for name, feature in named}
            if all(isinstance(feature, Tensor) for feature in by_name.values()):
                return output[0], by_name
        raise FeatureMatchingError(
            f"{self.what}: forward_with_features must return (logits, features), features a list, tuple or dict of tensors"
        )
