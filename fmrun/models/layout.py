"""The memory format that a net runs in, and copies of nets."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..feature_matching.errors import FeatureMatchingError
from ..feature_matching.walked import attempt, detach_weights, entries

LAST, FIRST = torch.channels_last, torch.contiguous_format


def layout_of(net: nn.Module) -> torch.memory_format:
    """The memory format that a net runs in: channels_last, but for one of the user's own that does not take it."""
    return getattr(net, "memory_format", LAST)


def placed(net: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The net on its device, in its memory format."""
    return net.to(device=device, dtype=dtype).to(memory_format=layout_of(net))


def twin_of(net: nn.Module) -> nn.Module:
    """A copy."""
    detach_weights(net)
    return copy.deepcopy(net)


def settle_layout(net: nn.Module, example: Tensor) -> None:
    """Note at the net if it runs in the ordinary memory format alone, as one that calls `view` after a convolution does."""
    twin = twin_of(net).to(memory_format=LAST)
    images = example.clone()
    images = (images.contiguous(memory_format=LAST) if images.ndim == 4 else images).requires_grad_()
    try:
        outputs = [tensor for _, tensor in entries(attempt(twin, images, ""))]
        sums = [tensor.sum() for tensor in outputs if tensor.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()
    except (FeatureMatchingError, RuntimeError):
        vars(net)["memory_format"] = FIRST
        net.register_forward_pre_hook(_ordinary)


def _ordinary(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
