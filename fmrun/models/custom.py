"""Nets of the user's own, named by `target = "package.module:Class"` or `"path/to/file.py:Class"`: found, made, and tried."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError, nearest
from ..feature_matching.discriminator import Discriminator
from ..feature_matching.errors import FeatureMatchingError
from ..feature_matching.given import discriminator_of
from ..feature_matching.walked import attempt, example_of, materialise, out_of_place, said
from ..report import divert_prints
from ..trust import Target, admitted
from .layout import layout_of, settle_layout, twin_of
from .norm import hold_spectral


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside, and in functions that are decorated with it, what feature matching refuses is a UserError."""
    try:
        yield
    except FeatureMatchingError as error:
        raise UserError(str(error)) from error


def load_target(target: str, params: Mapping[str, Any], field: str, generator: torch.Generator) -> nn.Module:
    """The net that `target` ("package.module:Class", or a function that returns a net) makes of the keyword arguments
    `params`, with first weights from `generator`.

    Raises UserError, naming `field`, if this user has not allowed it (`trust`), if there is no such thing, or if it does
    not take these arguments.
    """
    wanted = Target(field, target, params)
    module_name, name, code = wanted.module, wanted.attribute, admitted(wanted)
    code.make_importable()
    divert_prints()
    arguments, sys.argv = sys.argv, [module_name]  # a script must not take fmrun's for its own
    try:
        module = importlib.import_module(module_name)
    except SystemExit:
        raise UserError(
            f"{field}.target: importing '{module_name}' ends the program: put what it does when it is run as a script behind "
            "if __name__ == '__main__'"
        ) from None
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"{field}.target: there is no module '{error.name}' in {code.said}") from None
        beside = code.folder is not None and any(code.folder.glob(f"{(error.name or '').partition('.')[0]}*"))
        hint = "; only files that import statements name are found" if error.name and beside else ""
        raise UserError(f"{field}.target: importing '{module_name}' fails: {said(error)}{hint}") from error
    except Exception as error:
        raise UserError(f"{field}.target: importing '{module_name}' fails: {said(error)}") from error
    finally:
        sys.argv = arguments
    make = getattr(module, name, None)
    if make is None:
        classes = [k for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, nn.Module)]
        raise UserError(f"{field}.target: '{module_name}' has no '{name}'{nearest(name, classes)}")
    if not callable(make) or (inspect.isclass(make) and not issubclass(make, nn.Module)):
        raise UserError(f"{field}.target: '{target}' is not a torch.nn.Module")
    _check_arguments(make, params, f"{field}.params: '{target}'")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            net = make(**params)
        except Exception as error:
            raise UserError(f"{field}.target: making '{target}' fails: {said(error)}") from error
    if not isinstance(net, nn.Module):
        raise UserError(
            f"{field}.target: '{target}' makes something of type {type(net).__name__}, not a torch.nn.Module"
        )
    return net


@contextmanager
def expecting_old_code(config: Config) -> Iterator[None]:
    """Inside, weights are loaded into the nets that a checkpoint's config describes; UserError if they do not fit, as where a
    class of the user's own has changed."""
    try:
        yield
    except RuntimeError as error:
        targets = [net.target for net in (config.generator, config.discriminator) if net.target is not None]
        what = str(error).strip().splitlines()[-1].strip()
        if not targets:
            raise UserError(
                f"the checkpoint's weights do not fit the nets that its own config describes ({what})"
            ) from None
        raise UserError(
            f"the code of {' or '.join(targets)} no longer makes the net that was trained ({what}); put it back as it was"
        ) from None


def _check_arguments(make: Any, params: Mapping[str, Any], what: str) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**params)
    except TypeError as error:
        shown = str(signature.replace(return_annotation=inspect.Signature.empty))
        raise UserError(f"{what} does not take what it is given ({error}); it takes {shown}") from None


@user_errors()
def custom_generator(
    target: str,
    params: Mapping[str, Any],
    generator: torch.Generator,
    examples: Sequence[tuple[Tensor, Sequence[int]]],
    field: str = "generator",
) -> nn.Module:
    """The user's own generator, once it is known to make of each of the `examples` (B, …), latents or images, images of
    the shape (B, C, H, W) beside it.

    It takes latents as (B, n) or as (B, n, 1, 1), and images of any size, or of sides that are multiples of something and
    not too small, which `sides_of` tells. Raises UserError if it does not.
    """
    net = load_target(target, params, field, generator)
    what = f"{field}.target: '{target}'"
    first = examples[0][0]
    if first.ndim == 2 and not _takes(net, *examples[0], what):
        maps = net.register_forward_pre_hook(_as_maps)
        if not _takes(net, *examples[0], what):
            maps.remove()
    materialise(net, first, what)
    settle_layout(net, first)
    for example, shape in examples:
        multiple = next((m for m in MULTIPLES if _makes(net, *_enlarged(example, shape, m))), None)
        if first.ndim == 4 and example is not first and multiple is not None:
            _Sides(multiple, shape[2] // example.shape[2]).guard(net)
        elif not _makes(net, example, shape):
            with torch.no_grad():
                made = attempt(twin_of(net), example, what)
            got = tuple(made.shape) if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(f"{what} makes {got} of {tuple(example.shape)}, and must make {tuple(shape)}")
    if first.ndim == 4:
        scale, multiple = examples[0][1][2] // first.shape[2], sides_of(net)[1]
        corners = ((side, first[..., :side, :side]) for side in MULTIPLES if side >= multiple)
        net.smallest = next(  # type: ignore[assignment]
            (m for m, x in corners if _makes(net, x, (*examples[0][1][:2], scale * m, scale * m))), first.shape[2]
        )
    _check_trainable(net, what)
    return net


def _check_trainable(net: nn.Module, what: str) -> None:
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError(f"{what} has no weights to train; make its parameters nn.Parameters that require gradients")


MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


def sides_of(net: nn.Module) -> tuple[int, int]:
    """The smallest side of the images that an upscaler of the user's own takes, and what their sides are multiples of."""
    return getattr(net, "smallest", 1), getattr(net, "multiple", 1)


class _Sides:
    """Pads images for an upscaler whose sides have to be multiples, and crops what it makes of them."""

    def __init__(self, multiple: int, scale: int) -> None:
        self.multiple, self.scale = multiple, scale
        self.made: tuple[int, int] = (0, 0)

    def guard(self, net: nn.Module) -> None:
        net.multiple = self.multiple  # type: ignore[assignment]
        if self.multiple > 1:
            net.register_forward_pre_hook(self.pad)
            net.register_forward_hook(self.crop)

    def pad(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        height, width = arguments[0].shape[2:]
        self.made = (self.scale * height, self.scale * width)
        more = (0, -width % self.multiple, 0, -height % self.multiple)
        return (F.pad(arguments[0], more, mode="replicate") if any(more) else arguments[0], *arguments[1:])

    def crop(self, module: nn.Module, arguments: tuple[Any, ...], image: Tensor) -> Tensor:
        return image[..., : self.made[0], : self.made[1]]


def _as_maps(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Latents (B, n) as (B, n, 1, 1)."""
    return tuple(a[:, :, None, None] if isinstance(a, Tensor) and a.ndim == 2 else a for a in arguments)


def _takes(net: nn.Module, latents: Tensor, shape: Sequence[int], what: str) -> bool:
    try:
        materialise(net, latents, what)
    except FeatureMatchingError:
        return False
    return _makes(net, latents, shape)


@torch.no_grad()
def _makes(net: nn.Module, example: Tensor, shape: Sequence[int]) -> bool:
    try:
        made = attempt(twin_of(net), example, "")
    except FeatureMatchingError:
        return False
    return isinstance(made, Tensor) and tuple(made.shape) == tuple(shape)


def _enlarged(example: Tensor, shape: Sequence[int], multiple: int) -> tuple[Tensor, Sequence[int]]:
    """An image whose sides are the next multiples, and what is to be made of it."""
    if example.ndim != 4:
        return example, shape
    scale = shape[2] // example.shape[2]
    height, width = (-(-side // multiple) * multiple for side in example.shape[2:])
    return example.new_full((*example.shape[:2], height, width), 0.5), (*shape[:2], scale * height, scale * width)


@user_errors()
def custom_discriminator(
    target: str,
    params: Mapping[str, Any],
    generator: torch.Generator,
    image: tuple[int, int, int],
    field: str = "discriminator",
) -> nn.Module:
    """The user's own discriminator of images (C, H, W): as it is if it has the face of fmrun's, else walked.

    Raises UserError if it cannot be made, does not take such images, gives no logits, or has nothing to train.
    """
    net = load_target(target, params, field, generator)
    what = f"{field}.target: '{target}'"
    if not isinstance(net, Discriminator):
        example = example_of(net, image, what)
        hold_spectral(net)
        out_of_place(net)
        settle_layout(net, example)
        layout = layout_of(net)
        net = discriminator_of(net, image, what)
        net.memory_format = layout  # type: ignore[assignment]
    _check_trainable(net, what)
    return net
