"""What a discriminator gives to be matched: logits, and the features of any of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""(C, H, W)."""

HEAD = "head"
"""The logits as a layer: in no group, and without an index."""

Logits = Tensor | tuple[Tensor, ...]
"""(B,) or (B, 1, h, w); several such where a discriminator judges at several scales, which count alike."""


def scales(logits: Logits) -> tuple[Tensor, ...]:
    return logits if isinstance(logits, tuple) else (logits,)


def at_each_scale(work: Callable[[Tensor], Tensor], logits: Logits) -> Logits:
    return tuple(map(work, logits)) if isinstance(logits, tuple) else work(logits)


def mean_logit(logits: Logits) -> Tensor:
    """Mean over the elements of each scale, and over scales."""
    return torch.stack([scale.mean() for scale in scales(logits)]).mean()


@dataclass(frozen=True)
class DiscriminatorOutput:
    """What a discriminator was asked for: logits or None; features by name, in order."""

    logits: Logits | None
    features: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Discriminator(Protocol):
    """A net that judges images and can be read at any of its layers."""

    feature_names: tuple[str, ...]
    """In the order they are computed; an index into it names the same layer."""
    groups: Mapping[str, tuple[str, ...]]
    """`early`, `mid`, `key` and `all`."""
    auto: str
    """The last intermediate convolution: the one that feeds the head."""

    def __call__(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        """Judge `image` (B, C, H, W) in [-1, 1], computing only what the layers and logits asked for depend on."""
        ...


class Forward(Protocol):
    """What passes images through a discriminator: the network, also compiled."""

    def __call__(self, image: Tensor, layers: tuple[str, ...], logits: bool, /) -> DiscriminatorOutput: ...


def truncated_forward(
    net: Forward, images: Tensor, layers: tuple[str, ...], logits: bool = True
) -> DiscriminatorOutput:
    """Features of `layers`, and logits where wanted, by one forward of `images` (B, C, H, W) that goes no further than
    they need. The head's feature is (B, n), or the map (B, 1, h, w)."""
    if HEAD not in layers or HEAD in getattr(net, "calls", ()):  # a net may have a layer of this name
        return net(images, layers, logits)
    out = net(images, tuple(name for name in layers if name != HEAD), True)
    assert out.logits is not None
    maps = [scale if scale.ndim > 1 else scale[:, None] for scale in scales(out.logits)]
    head = maps[0] if len(maps) == 1 else torch.cat([m.flatten(1) for m in maps], 1)
    return DiscriminatorOutput(out.logits if logits else None, {**out.features, HEAD: head})
