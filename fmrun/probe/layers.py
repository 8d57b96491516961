"""What each layer of a discriminator costs and how much of the image it sees; for any net with its face."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..runtime.rng import torch_generator
from ..tasks import DiscriminatorRole

GLOBAL = "global"
UNKNOWN = "unknown"
EDGE = 1e-12
"""Gradients smaller than this, relative to the largest, are rounding."""

LARGEST = 256
"""Pixels beyond which no input is enlarged to four times the image, to find where a receptive field ends."""


def receptive_fields(
    net: nn.Module, image: tuple[int, int, int], seed: int, tell: Callable[[], None] = lambda: None
) -> dict[str, int | str | None]:
    """Pixels (the longer side) that the central unit of each layer depends on, by the support of its gradient.

    `"global"` where it reaches the border of every size offered: the image's, twice and (up to 256 px) four times that.
    In a net that takes no other size, global is what sees the whole image, and a field cut off by the border counts as
    what is left of it; `"unknown"` where it does not run in double precision. None where no gradient arrives. Batch norm is
    in eval mode; group norm is global, as it is. `tell` is called for each layer whose field has been found.
    """
    rng = torch_generator(seed, "probe", 1)
    twin: Any = copy.deepcopy(net).to("cpu", torch.float64).eval()
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, twin.parameters()):  # what begins at zero belongs to the net too
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.02)
    twin.requires_grad_(False)
    channels, size = image[0], image[1]
    sizes = [size, 2 * size] + [4 * size] * (4 * size <= LARGEST)
    fields: dict[str, int | str | None] = dict.fromkeys(twin.feature_names, UNKNOWN)
    left = list(fields)
    for pixels in sizes:
        pixel_values = torch.randn(3, channels, pixels, pixels, generator=rng, dtype=torch.float64).requires_grad_()
        further = []
        for features in _features(twin, pixel_values, left):
            for name, feature in features.items():
                extent, inside = _support(feature, pixel_values, rng)
                fields[name] = (extent if extent < pixels else GLOBAL) if extent else None
                if inside or not extent:
                    tell()
                elif pixels < sizes[-1]:
                    further.append(name)
                else:
                    fields[name] = GLOBAL
        left = further
    return fields


def _features(net: Any, image: Tensor, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Features of these names by one forward, or by one each where not all of them can be had of such an image."""
    taken = [tuple(names)] if names else []
    for layers in taken:
        try:
            yield net(image, layers, False).features
        except Exception:  # a net of the user's own may refuse a size or double precision in any way
            taken += [(name,) for name in layers] if len(layers) > 1 else []


def _support(feature: Tensor, images: Tensor, rng: torch.Generator) -> tuple[int, bool]:
    """Of the rows and columns of `images` (B, C, H, W) on which the centre of `feature` (B, C, …) depends: how many there
    are, the more of the two, and whether they stay off the border."""
    centre = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2] if feature.ndim == 4 else feature
    if not centre.requires_grad:
        return 0, True
    direction = torch.randn(centre.shape, generator=rng, dtype=torch.float64).to(centre)
    (gradient,) = torch.autograd.grad((centre * direction).sum(), images, retain_graph=True, materialize_grads=True)
    strength = gradient.abs().sum((0, 1))
    touched = strength > EDGE * strength.max()
    if not touched.any():
        return 0, True
    lines = [touched.any(dim).nonzero().flatten() for dim in (1, 0)]
    inside = all(int(at[0]) > 0 and int(at[-1]) < len(touched) - 1 for at in lines)
    return max(int(at[-1] - at[0]) + 1 for at in lines), inside


@torch.no_grad()
def flops(net: Any, image: Tensor) -> tuple[dict[str, int], dict[str, torch.Size], int]:
    """Per image: FLOPs of a forward that ends at each layer, the layer's shape, FLOPs of the whole forward. On a CPU they
    include those of `Doubling`, which is a convolution there and sums elsewhere: 1 to 3 % of a U-Net's or a MUNet's."""
    costs, shapes = {}, {}
    for name in net.feature_names:
        with FlopCounterMode(display=False) as counter:
            feature = net(image, (name,), False).features[name]
        costs[name], shapes[name] = counter.get_total_flops() // len(image), feature.shape[1:]
    with FlopCounterMode(display=False) as counter:
        net(image)
    return costs, shapes, counter.get_total_flops() // len(image)


def activation_bytes(role: DiscriminatorRole, layer: str, images: Tensor, batch_size: int) -> int:
    """Memory that a pass which ends at `layer` keeps for its backward, for `batch_size` images: all that grows with
    the batch, so weights in no form. The frozen discriminator's, in the precision of training."""

    def kept(count: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        inputs = images[:count].clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            feature = role(inputs, role.mildest(inputs), (layer,), logits=False).features[layer]
        del feature
        return sum(storage.nbytes() for storage in storages.values())

    return (kept(4) - kept(2)) * batch_size // 2
