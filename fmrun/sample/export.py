"""The generator alone, for other programs: safetensors as spandrel detects them (hence chaiNNer and ComfyUI), and ONNX.

Whatever is written has been read by the program it is meant for, and gave the same images.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..models.upscalers import fuse_convolutions, title_of
from ..runtime.errors import FmrunError, UserError
from ..runtime.files import saving, write_atomic
from .sample import Source

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")
ONNX_OPSET = 18
ONNX_TOLERANCE = 1e-3
"""Largest difference, relative to the largest value, that another runtime's rounding may make."""
SIZES = ((23, 29), (24, 32), (32, 17))
"""Heights and widths of trial images. The first, for tracing, are multiples of nothing, for a net that pads its input
to a multiple must show that."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and read back."""

    path: Path
    what: str
    """`Compact x2, 3 channels`, or `48 tensors`."""
    size: int
    """In bytes."""
    difference: float
    """The largest difference between what the file and the net make of a random input."""


def export_source(source: Source, path: Path) -> Exported:
    """Write the generator of a run or checkpoint in the format that the ending of `path` names."""
    config, ending = source.config, path.suffix.lower()
    channels, scale = config.data.channels, config.data.scale
    assert channels is not None
    if ending not in (".safetensors", ".onnx"):
        raise UserError(f"--out {path}: give a name that ends in .safetensors or .onnx")
    if ending == ".onnx":
        size = {"channels": channels} if config.has_targets else {"latent_dim": config.generator.latent_dim}
        return export_onnx(source.net, path, **size)
    if config.has_targets and config.generator.target is None:
        return export_upscaler(source.net, path, scale=scale, channels=channels)
    return export_weights(source.net, path)


def export_upscaler(net: nn.Module, path: Path, *, scale: int, channels: int) -> Exported:
    """Write the weights of an upscaler, of one of spandrel's classes, so that spandrel finds out what they are.

    Raises UserError, and writes nothing, if spandrel takes the file for something else or for nothing.
    """
    from spandrel import MAIN_REGISTRY

    plain = _plain(net)
    data = _serialised(plain, path)
    meant = f"{title_of(plain)} x{scale}, {channels} channel{'s' if channels > 1 else ''}"
    try:
        with torch.random.fork_rng(devices=[]):
            descriptor: Any = MAIN_REGISTRY.load(safetensors.torch.load(data))
    except Exception as error:  # spandrel guesses from names and shapes, and trips where they deceive it
        raise UserError(
            f"{path} is not written: spandrel does not detect the generator, {meant} ({_reason(error)}); export to ONNX "
            "instead"
        ) from None
    facts = (descriptor.scale, descriptor.input_channels, descriptor.output_channels)
    if type(descriptor.model) is not type(plain) or facts != (scale, channels, channels):
        raise UserError(
            f"{path} is not written: spandrel takes the generator, {meant}, for {descriptor.architecture.name} "
            f"x{descriptor.scale}, {descriptor.input_channels} to {descriptor.output_channels} channels; export to ONNX instead"
        )
    image = _noise(channels, SIZES[0])
    with torch.no_grad():
        difference = float((descriptor.model.eval()(image) - plain(image)).abs().max())
    if difference != 0:
        raise FmrunError(
            f"{path} is not written: what spandrel loads from it makes other images than the run's generator "
            f"(largest difference {difference:.2g}); export to ONNX instead"
        )
    return _written(path, meant, data, difference)


def export_weights(net: nn.Module, path: Path) -> Exported:
    """Write the state dict of any generator under its own names: `generator.init` starts from such a file."""
    return _written(path, f"{len(net.state_dict())} tensors", _serialised(_plain(net), path), 0.0)


def _plain(net: nn.Module) -> nn.Module:
    """The net on the CPU, in eval mode, SPAN's convolutions of inference computed from those it was trained with."""
    fuse_convolutions(net)
    return net.to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _serialised(net: nn.Module, path: Path) -> bytes:
    state = {name: value.contiguous().clone() for name, value in net.state_dict().items()}
    if broken := next((name for name, value in state.items() if not value.isfinite().all()), None):
        raise UserError(f"{path} is not written: a value of {broken} is not a number; export an earlier checkpoint")
    return safetensors.torch.save(state, {"format": "pt"})


def _written(path: Path, what: str, data: bytes, difference: float) -> Exported:
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return Exported(path, what, len(data), difference)


def export_onnx(net: nn.Module, path: Path, *, channels: int | None = None, latent_dim: int = 0) -> Exported:
    """Write a generator as ONNX: an upscaler, from `image` (1, channels, height, width) to `upscaled`, of any height and
    width; without `channels` one of images, from `latent` (batch, latent_dim), normally distributed, to `image` in [-1, 1].
    Checked with onnxruntime at several sizes.

    Raises UserError without the packages of the extra `export`, and where the net cannot be traced.
    """
    if channels is not None:
        names, dynamic = ("image", "upscaled"), {2: "height", 3: "width"}
        examples = [_noise(channels, size) for size in SIZES]
    else:
        names, dynamic = ("latent", "image"), {0: "batch"}
        generator = torch.Generator().manual_seed(0)
        examples = [torch.randn(count, latent_dim, generator=generator) for count in (3, 1, 5)]
    if any(find_spec(package) is None for package in ONNX_PACKAGES):
        raise UserError('exporting to ONNX needs extra packages: pip install "fmrun[export]"')
    import onnxruntime
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    plain = _plain(net)
    for module in plain.modules():
        if hasattr(module, "update_params"):  # SPAN's would write into the weights at every call
            vars(module)["update_params"] = lambda: None
    try:
        with _silent():
            program = torch.onnx.export(
                plain,
                (examples[0],),
                dynamo=True,
                opset_version=ONNX_OPSET,
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=({**dynamic},),
                external_data=False,
                verbose=False,
            )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # they name source files of this machine
        data = program.model_proto.SerializeToString(deterministic=True)
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(
            f"{path} is not written: the generator cannot be traced for ONNX ({type(error).__name__}: {_reason(error)})"
        ) from error
    difference = 0.0
    for example in examples:
        (made,) = session.run(None, {names[0]: example.numpy()})
        with torch.no_grad():
            meant = plain(example)
        difference = max(difference, off := float((torch.from_numpy(made) - meant).abs().max()))
        if not off <= ONNX_TOLERANCE * max(1.0, float(meant.abs().max())):
            raise FmrunError(
                f"{path} is not written: for {names[0]} {tuple(example.shape)} ONNX's result is off by {off:.2g}"
            )
    return _written(path, f"ONNX, opset {ONNX_OPSET}, {names[0]} to {names[1]}", data, difference)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps the exporter's progress off stdout, which is for data, and its warnings to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _noise(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))
