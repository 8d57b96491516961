"""Generators for super-resolution, by spandrel's classes: what is saved under their names is found by spandrel, and so
by the programs that use it (chaiNNer, ComfyUI). spandrel brings torchvision and dozens of architectures, and is imported
where a net is made or read, for images from noise need none of it.

All of them take and give images (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import UserError
from .weights import LOAD_ERRORS, first_line, flags, read_state

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Tiling:
    """What it takes to upscale an image in tiles. In pixels of the small image."""

    radius: int | None
    """How far an output pixel looks on every side; tiles that overlap by it equal the whole. None: everywhere."""
    smallest: int
    """The smallest side a tile may have."""
    multiple: int = 1
    """Tiles must begin at multiples of this."""


@dataclass(frozen=True)
class Architecture:
    """An architecture: the settings it offers, and their defaults."""

    title: str
    """Name of spandrel's class."""
    package: str
    """Of spandrel's architectures."""
    scales: tuple[int, ...]
    channels: tuple[int, ...]
    params: Params
    """Parameters that a user may set, and their defaults."""
    names: Mapping[str, str]
    """What they are called in spandrel's class."""
    plain: Params = field(default_factory=dict)
    """Settings of spandrel's class that fmrun leaves as they are."""

    @property
    def net(self) -> type[nn.Module]:
        """spandrel's class."""
        return getattr(import_module(f"spandrel.architectures.{self.package}"), self.title)


ARCHITECTURES: dict[str, Architecture] = {
    "compact": Architecture(
        *("Compact", "Compact", (1, 2, 3, 4), (1, 3, 4)),
        params={"features": 64, "blocks": 16},
        names={"features": "num_feat", "blocks": "num_conv"},
    ),
    "span": Architecture(
        *("SPAN", "SPAN", (1, 2, 3, 4), (1, 3, 4)),
        params={"features": 48, "norm": False},
        names={"features": "feature_channels", "norm": "norm"},
    ),
    "realplksr": Architecture(
        *("RealPLKSR", "PLKSR", (1, 2, 3, 4), (3,)),
        params={"features": 64, "blocks": 28, "kernel": 17, "layer_norm": False, "dysample": False},
        names={
            **{"features": "dim", "blocks": "n_blocks", "kernel": "kernel_size"},
            **{"layer_norm": "layer_norm", "dysample": "dysample"},
        },
        plain={"split_ratio": 0.25, "use_ea": True},
    ),
    "esrgan": Architecture(
        *("ESRGAN", "ESRGAN", (1, 2, 4), (1, 3, 4)),
        params={"features": 64, "blocks": 23, "unshuffle": False},
        names={"features": "num_filters", "blocks": "num_blocks"},
        plain={"plus": False},
    ),
}

GROUPS = 4
"""Groups of RealPLKSR's norms, which a file does not tell."""

ESRGAN_RESIDUE = 0.1
"""Factor on the first weights of ESRGAN's dense blocks (Wang et al. 2018, sec. 3.2)."""


@dataclass(frozen=True)
class Upscaler:
    """One net of `ARCHITECTURES`, described completely."""

    arch: str
    scale: int
    channels: int
    params: Params

    def __str__(self) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in self.params.items() if v is not False)
        return f"{ARCHITECTURES[self.arch].title} x{self.scale}, {_channels(self.channels)}, {settings}"


def title_of(net: nn.Module) -> str:
    """What an architecture is called."""
    return next((a.title for a in ARCHITECTURES.values() if type(net) is a.net), type(net).__name__)


def _channels(count: int) -> str:
    return f"{count} channel{'s' if count > 1 else ''}"


def upscaler_for(arch: str, scale: int, channels: int, **params: Any) -> Upscaler:
    """The upscaler that these settings mean; a parameter that is None or not given has the architecture's default.

    Raises UserError, saying what there is, for what the architecture cannot do.
    """
    a = ARCHITECTURES[arch]
    if scale not in a.scales:
        raise UserError(
            f"generator: {a.title} upscales by {', '.join(f'x{n}' for n in a.scales)}, not x{scale}; choose another type"
        )
    full = {key: default if params.get(key) is None else params[key] for key, default in a.params.items()}
    if channels not in a.channels:
        raise UserError(
            f"generator: {a.title} takes images of {', '.join(map(str, a.channels))} channels, not {channels}; "
            "choose another type, or set data.channels"
        )
    if arch == "span" and full["norm"] and channels != 3:
        raise UserError(f"generator.norm: SPAN's is for 3 channels, not {channels}; set it to false")
    if arch == "realplksr" and full["features"] % GROUPS:
        raise UserError(f"generator.features: RealPLKSR's must be a multiple of {GROUPS}, not {full['features']}")
    if arch == "realplksr" and full["kernel"] % 2 == 0:
        raise UserError(f"generator.kernel: RealPLKSR's must be odd, not {full['kernel']}")
    if arch == "esrgan" and full["unshuffle"] and scale == 4:
        raise UserError("generator.unshuffle: ESRGAN's is for x1 and x2, not x4; set it to false")
    return Upscaler(arch, scale, channels, full)


def build_upscaler(arch: str, scale: int, channels: int, generator: torch.Generator, **params: Any) -> nn.Module:
    """A new net of spandrel's class, in train mode, with first weights from `generator`; see `upscaler_for`."""
    upscaler = upscaler_for(arch, scale, channels, **params)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        net = _make(upscaler)
    if arch == "esrgan":
        with torch.no_grad():
            for name, p in net.named_parameters():
                if ".RDB" in name:
                    p.mul_(ESRGAN_RESIDUE)
    return net


def _make(u: Upscaler) -> nn.Module:
    a, channels, scale = ARCHITECTURES[u.arch], u.channels, u.scale
    params = {a.names[key]: value for key, value in u.params.items() if key in a.names}
    if u.arch in ("compact", "span"):
        return a.net(num_in_ch=channels, num_out_ch=channels, upscale=scale, **params)
    if u.arch == "realplksr":
        return a.net(upscaling_factor=scale, norm_groups=GROUPS, **params)
    assert u.arch == "esrgan"
    n = _shuffle(u)
    return a.net(in_nc=channels * n**2, out_nc=channels, scale=scale * n, shuffle_factor=n if n > 1 else None, **params)


def _shuffle(u: Upscaler) -> int:
    """By how much ESRGAN shrinks the image before it begins (Real-ESRGAN's x2 and x1 are its x4)."""
    return 4 // u.scale if u.params["unshuffle"] else 1


def tiling(u: Upscaler) -> Tiling:
    """How far the net sees, from its layers."""
    p = u.params
    if u.arch == "compact":
        return Tiling(p["blocks"] + 2, 1)
    if u.arch == "span":
        return Tiling(2 + 6 * 3 + 1, 1)
    if u.arch == "realplksr":
        if not p["layer_norm"]:
            return Tiling(None, 1)
        radius = 2 + p["blocks"] * (2 + p["kernel"] // 2 + 1)
        return Tiling(radius + p["dysample"], 1)
    assert u.arch == "esrgan"
    shuffle = _shuffle(u)
    inner = u.scale * shuffle
    doublings = sum(1 / 2**i for i in range(1, int(math.log2(inner)) + 1))
    radius = 2 + 15 * p["blocks"] + doublings + 2 / inner
    return Tiling(math.ceil(radius) * shuffle + shuffle - 1, 2 * shuffle, shuffle)


def read_pretrained(path: str | Path) -> tuple[nn.Module, Upscaler]:
    """The net in a `.safetensors`, `.pth`, `.pt` or `.ckpt` file, in train mode, and what it is, found out by spandrel.
    Nothing in the file is executed.

    Raises UserError, saying what the file is, if it is not an upscaler that fmrun can train.
    """
    from spandrel import MAIN_REGISTRY, UnsupportedModelError

    file = Path(path)
    weights = _unwrapped(read_state(file, "generator.init"), file)
    try:
        with torch.random.fork_rng(devices=[]):
            descriptor = MAIN_REGISTRY.load(weights)
    except UnsupportedModelError:
        raise UserError(f"generator.init: '{path}' is no upscaler that spandrel knows") from None
    except LOAD_ERRORS as error:  # spandrel looks at the tensors' names and shapes, and trusts them
        raise UserError(
            f"generator.init: '{path}' looks like an upscaler but is damaged ({first_line(error)})"
        ) from None
    net: Any = descriptor.model
    arch = next((key for key, a in ARCHITECTURES.items() if type(net) is a.net), None)
    what = f"generator.init: '{path}' is a {title_of(net)} x{descriptor.scale}"
    if arch is None:
        raise UserError(f"{what}, and fmrun trains {', '.join(a.title for a in ARCHITECTURES.values())}")
    a, hyperparameters = ARCHITECTURES[arch], net.hyperparameters
    odd = [
        f"{key} {hyperparameters[key]}" for key, value in a.plain.items() if hyperparameters.get(key, value) != value
    ]
    if descriptor.input_channels != descriptor.output_channels:
        odd.append(f"{descriptor.input_channels} channels going in and {descriptor.output_channels} coming out")
    if descriptor.scale not in a.scales or odd:
        raise UserError(f"{what}{f' with {odd[0]}' if odd else ''}, which fmrun does not train")
    params = {key: hyperparameters[theirs] for key, theirs in a.names.items()}
    if arch == "esrgan":
        params["unshuffle"] = hyperparameters["shuffle_factor"] is not None
    return net.float().train().requires_grad_(), Upscaler(arch, descriptor.scale, descriptor.input_channels, params)


def load_pretrained(path: str | Path, *, scale: int, channels: int, arch: str, params: Params) -> nn.Module:
    """The net in a file, in train mode. Raises UserError, saying what the file is, if it is not what is asked for; a
    parameter that is None is not asked for."""
    net, u = read_pretrained(path)
    compared = {
        "generator.type": (arch, u.arch),
        "data.scale": (scale, u.scale),
        "data.channels": (channels, u.channels),
        **{f"generator.{key}": (value, u.params.get(key)) for key, value in params.items() if value is not None},
    }
    wrong = {key: (want, have) for key, (want, have) in compared.items() if want != have}
    if wrong:
        wants = ", ".join(f"{key.partition('.')[2]} {want}" for key, (want, _) in wrong.items())
        fix = flags({key: have for key, (_, have) in wrong.items()})
        raise UserError(f"generator.init: '{path}' is {u}, and the config asks for {wants}: add {fix}")
    return net


def fuse_convolutions(net: nn.Module) -> None:
    """Compute SPAN's convolutions of inference from those it is trained with; they are part of its state."""
    for module in net.modules():
        if callable(update := getattr(module, "update_params", None)):
            update()


def _unwrapped(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """Weights without what trainers put around and before their names; of an fmrun checkpoint, the averaged ones."""
    for prefix in ("ema.", "generator."):
        inner = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        if inner:
            return inner
    from spandrel import canonicalize_state_dict

    weights = canonicalize_state_dict(content)
    for prefix in ("net_g.", "ema_model.", "_orig_mod.", "module."):
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"generator.init: '{file}' holds no weights that spandrel can find in it")
    return weights
