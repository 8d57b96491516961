"""The generator alone, for other programs: safetensors as spandrel detects them (hence chaiNNer and ComfyUI), and ONNX.

Whatever is written has been read back by the program it is meant for, and gave the same images.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import FmrunError, UserError
from .models.upscalers import ARCHITECTURES
from .runs import saving, write_atomic
from .sample import Source

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WRAPPERS = ("_orig_mod", "module")
"""Under what `torch.compile`, data parallelism and weight averaging keep the net they wrap."""

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_OPSET = 18
ONNX_TOLERANCE = 1e-3
"""Largest difference, relative to the largest value, that another runtime's rounding may make."""
EXAMPLE = (23, 29)
"""Height and width for tracing: multiples of nothing, for a net that pads its input to a multiple must show that."""
CHECKED_SIZES = (EXAMPLE, (24, 32), (32, 17))


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


def export_upscaler(
    net: nn.Module, path: Path, *, architecture: str, scale: int, channels: int, precision: Precision = "fp32"
) -> Exported:
    """Write the weights of an upscaler so that spandrel finds out what they are.

    Args:
        net: of spandrel's class, on any device, compiled or not; left as it is.
        path: ends in .safetensors; replaced if it exists, wholly or not at all.
        architecture: as spandrel calls it: its name or id, or the class's.
        precision: of the weights in the file. In fp32 the file makes exactly the images that the net makes.

    Raises UserError, and writes nothing, if spandrel takes the file for something else or for nothing.
    """
    _want(path, ".safetensors")
    plain = unwrapped(net)
    _fold(plain)
    tensors = _tensors(plain, precision, path)
    data = safetensors.torch.save(tensors, {"format": "pt"})
    with _draft(path, data) as draft:
        what, loaded = _detected(draft, type(plain), architecture, scale, channels, path)
        image = _noise(1, channels, 24, 32)
        with torch.no_grad():
            made, meant = loaded(image), plain(image)
            plain.load_state_dict(tensors)
            _fold(plain)  # from the rounded ones, where precision is less than fp32
            same = torch.equal(made, plain(image))
        difference = float((made - meant).abs().max())
        if not same or not made.isfinite().all():
            raise FmrunError(
                f"{path} is not written: what spandrel loads from it makes other images than the run's generator "
                f"(largest difference {difference:.2g}); export to ONNX instead"
            )
    return Exported(path, what, len(data), difference)


def export_weights(net: nn.Module, path: Path, *, precision: Precision = "fp32") -> Exported:
    """Write the state dict of any generator, under its own names: `generator.init` starts from such a file."""
    _want(path, ".safetensors")
    plain = unwrapped(net)
    tensors = _tensors(plain, precision, path)
    data = safetensors.torch.save(tensors, {"format": "pt"})
    with _draft(path, data) as draft:
        found = safetensors.torch.load_file(draft)
        if found.keys() != tensors.keys() or not all(torch.equal(found[key], tensors[key]) for key in found):
            raise FmrunError(f"{path} is not written: the disk gives back other bytes than it got")
    state = plain.state_dict()
    moved = [(state[key] - value.to(state[key].dtype)).abs().max() for key, value in tensors.items() if value.numel()]
    return Exported(path, f"{len(tensors)} tensors", len(data), float(max(moved, default=0.0)))


def export_onnx(net: nn.Module, path: Path, *, scale: int, channels: int) -> Exported:
    """Write an upscaler as ONNX, from `image` (1, channels, height, width) to `upscaled`, of any height and width; checked
    with onnxruntime at several.

    Raises UserError without the packages of the extra `export`, and where the net cannot be traced.
    """
    plain = unwrapped(net)
    _fold(plain)
    sizes = {2: "height", 3: "width"}
    examples = [_noise(1, channels, *size) for size in CHECKED_SIZES]
    shape: list[int | str] = [1, channels, *(name if scale == 1 else f"{scale}*{name}" for name in sizes.values())]
    return _onnx(plain, path, examples, ("image", "upscaled"), sizes, shape)


def export_latents_onnx(net: nn.Module, path: Path, *, latent_dim: int) -> Exported:
    """Write a generator of images as ONNX, from `latent` (batch, latent_dim), normally distributed, to `image` in
    [-1, 1]; see `export_onnx`."""
    plain = unwrapped(net)
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randn(count, latent_dim, generator=generator) for count in (3, 1, 5)]
    with torch.no_grad():
        shape: list[int | str] = ["batch", *plain(examples[0]).shape[1:]]
    return _onnx(plain, path, examples, ("latent", "image"), {0: "batch"}, shape)


def export_source(source: Source, path: Path, precision: str) -> Exported:
    """Write the generator of a run or checkpoint in the format that the ending of `path` names."""
    config, ending = source.config, path.suffix.lower()
    channels, scale = config.data.channels, config.data.scale
    assert channels is not None
    if ending not in (".safetensors", ".onnx"):
        raise UserError(f"--out {path}: give a name that ends in .safetensors or .onnx")
    if ending == ".onnx" and precision != "fp32":
        raise UserError("--precision is for .safetensors; ONNX is written in fp32")
    if config.has_targets:
        if ending == ".onnx":
            return export_onnx(source.net, path, scale=scale, channels=channels)
        if config.generator.target is not None:
            return export_weights(source.net, path, precision=cast(Precision, precision))
        title = ARCHITECTURES[config.generator.type].title
        return export_upscaler(
            source.net, path, architecture=title, scale=scale, channels=channels, precision=cast(Precision, precision)
        )
    if ending == ".onnx":
        return export_latents_onnx(source.net, path, latent_dim=config.generator.latent_dim)
    return export_weights(source.net, path, precision=cast(Precision, precision))


def unwrapped(net: nn.Module) -> nn.Module:
    """A copy of the net itself, without what was wrapped around it: on the CPU, in float32, in eval mode."""
    inner = net
    while wrapper := next((name for name in WRAPPERS if name in inner._modules), None):
        if wrapper == "module" and set(inner._modules) != {"module"}:
            break
        inner = inner.get_submodule(wrapper)
    with torch.random.fork_rng(devices=[]):
        plain = copy.deepcopy(inner)
    for parent in list(plain.modules()):
        parent._compiled_call_impl = None  # what `net.compile()` leaves
        for name, child in parent.named_children():
            if "_orig_mod" in child._modules:
                setattr(parent, name, child.get_submodule("_orig_mod"))
    plain = plain.to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    return plain.requires_grad_(False)


def _fold(net: nn.Module) -> None:
    """Compute SPAN's convolutions of inference from those it was trained with, once instead of at every call."""
    for module in net.modules():
        if callable(update := getattr(type(module), "update_params", None)):
            update(module)
            module.update_params = lambda: None  # type: ignore[assignment]


def _tensors(net: nn.Module, precision: Precision, path: Path) -> dict[str, Tensor]:
    dtype = DTYPES[precision]
    tensors = {}
    for name, value in net.state_dict().items():
        kept = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        if not kept.isfinite().all():
            why = f"does not fit in {precision}; export in fp32" if value.isfinite().all() else "is not a number"
            raise UserError(f"{path} is not written: a value of {name} {why}")
        tensors[name] = kept.contiguous().clone()
    return tensors


def _detected(
    file: Path, kind: type[nn.Module], architecture: str, scale: int, channels: int, path: Path
) -> tuple[str, nn.Module]:
    """What spandrel sees in the file, in words, and the net it makes of it, or a UserError."""
    from spandrel import ModelLoader

    meant = f"{architecture} x{scale}, {channels} channel{'s' if channels > 1 else ''}"
    try:
        with torch.random.fork_rng(devices=[]):
            found: Any = ModelLoader(device="cpu").load_from_file(file)
    except Exception as error:  # spandrel guesses from names and shapes, and trips where they deceive it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not written: spandrel does not detect the generator, {meant} ({reason}); export to ONNX instead"
        ) from None
    loaded: nn.Module = found.model.eval()
    names = {found.architecture.id, found.architecture.name, type(loaded).__name__}
    same_name = architecture.lower() in {name.lower() for name in names}
    facts = (found.scale, found.input_channels, found.output_channels)
    if not same_name or type(loaded) is not kind or facts != (scale, channels, channels):
        raise UserError(
            f"{path} is not written: spandrel takes the generator, {meant}, for {found.architecture.name} "
            f"x{found.scale}, {found.input_channels} to {found.output_channels} channels; export to ONNX instead"
        )
    return meant, loaded.float()


@contextlib.contextmanager
def _draft(path: Path, data: bytes) -> Iterator[Path]:
    """The file under another name, which it keeps until it has been found good."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}.draft{path.suffix}")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(draft, data)
    try:
        yield draft
        with saving(path):
            os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _onnx(
    net: nn.Module,
    path: Path,
    examples: list[Tensor],
    names: tuple[str, str],
    dynamic: dict[int, str],
    shape: list[int | str],
) -> Exported:
    _want(path, ".onnx")
    if any(find_spec(package) is None for package in ONNX_PACKAGES):
        raise UserError('exporting to ONNX needs extra packages: pip install "fmrun[export]"')
    try:
        with _silent():
            program = torch.onnx.export(
                net,
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
        model = program.model_proto
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{path} is not written: the generator cannot be traced for ONNX ({type(error).__name__}: {reason})"
        ) from error
    data = _tidied(model, shape)
    with _draft(path, data) as draft:
        difference = _onnx_difference(net, draft, examples, names[0], path)
    return Exported(path, f"ONNX, opset {ONNX_OPSET}, {names[0]} to {names[1]}", len(data), difference)


def _tidied(model: Any, shape: list[int | str]) -> bytes:
    """The bytes of an ONNX model without the tracer's notes (which name source files), its output's sizes in words."""
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for value in model.graph.value_info:
        value.ClearField("metadata_props")
    for function in model.functions:
        for node in function.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
    for value in model.graph.initializer:
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    for dim, size in zip(model.graph.output[0].type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(size, str):
            dim.dim_param = size
    model.producer_name, model.producer_version = "fmrun", ""
    return model.SerializeToString(deterministic=True)


def _onnx_difference(net: nn.Module, file: Path, examples: list[Tensor], name: str, path: Path) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    worst = 0.0
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for example in examples:
            (made,) = session.run(None, {name: example.numpy()})
            with torch.no_grad():
                meant = net(example)
            difference = float((torch.from_numpy(made) - meant).abs().max())
            worst = max(worst, difference)
            if not difference <= ONNX_TOLERANCE * max(1.0, float(meant.abs().max())):
                raise FmrunError(
                    f"{path} is not written: for {name} {tuple(example.shape)} ONNX's result is off by {difference:.2g}"
                )
    except FmrunError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FmrunError(f"{path} is not written: onnxruntime cannot run it ({reason})") from error
    return worst


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


def _want(path: Path, suffix: str) -> None:
    if path.suffix != suffix or path.is_dir():
        raise UserError(f"--out {path}: give a file name ending in {suffix}")


def _noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))
