"""Nets of the user's own, named by `target = "package.module:Class"` or `"path/to/file.py:Class"`: found, made, and tried."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..config.trust import Target, admitted
from ..feature_matching.discriminator import Discriminator
from ..feature_matching.errors import FeatureMatchingError
from ..feature_matching.given import discriminator_of
from ..feature_matching.walked import attempt, example_of, materialise, out_of_place, said
from ..runtime.errors import UserError, nearest
from ..runtime.report import divert_prints
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
    requested = Target(field, target, params)
    module_name, name, code = requested.module, requested.attribute, admitted(requested)
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
    except Exception as error:
        hint = "; only files that import statements name are found" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(
            f"{field}.target: importing '{module_name}' from {code.said} fails: {said(error)}{hint}"
        ) from error
    finally:
        sys.argv = arguments
    make = getattr(module, name, None)
    if make is None:
        classes = [k for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, nn.Module)]
        raise UserError(f"{field}.target: '{module_name}' has no '{name}'{nearest(name, classes)}")
    if not callable(make) or (inspect.isclass(make) and not issubclass(make, nn.Module)):
        raise UserError(f"{field}.target: '{target}' is not a torch.nn.Module")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            net = make(**params)
        except Exception as error:
            raise UserError(f"{field}.target: making '{target}' of {field}.params fails: {said(error)}") from error
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
        targets = " or ".join(net.target for net in (config.generator, config.discriminator) if net.target is not None)
        what = str(error).strip().splitlines()[-1].strip()
        code = (
            f"the code of {targets} no longer makes the net that was trained"
            if targets
            else "the checkpoint is another's"
        )
        raise UserError(f"{code} ({what}); put it back as it was") from None


@user_errors()
def custom_generator(
    target: str,
    params: Mapping[str, Any],
    generator: torch.Generator,
    examples: Sequence[tuple[Tensor, Sequence[int]]],
) -> nn.Module:
    """The user's own generator, once it is known to make of each of the `examples` (B, …), latents or images, images of
    the shape (B, C, H, W) beside it.

    It takes latents as (B, n) or as (B, n, 1, 1), and images of any size. Raises UserError if it does not.
    """
    net = load_target(target, params, "generator", generator)
    what = f"generator.target: '{target}'"
    first = examples[0][0]
    if first.ndim == 2 and not _takes(net, *examples[0], what):
        maps = net.register_forward_pre_hook(_as_maps)
        if not _takes(net, *examples[0], what):
            maps.remove()
    materialise(net, first, what)
    settle_layout(net, first)
    for example, shape in examples:
        if not _makes(net, example, shape):
            with torch.no_grad():
                made = attempt(twin_of(net), example, what)
            got = tuple(made.shape) if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(f"{what} makes {got} of {tuple(example.shape)}, and must make {tuple(shape)}")
    _check_trainable(net, what)
    return net


def _check_trainable(net: nn.Module, what: str) -> None:
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError(f"{what} has no weights to train; make its parameters nn.Parameters that require gradients")


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


@user_errors()
def custom_discriminator(
    target: str,
    params: Mapping[str, Any],
    generator: torch.Generator,
    image: tuple[int, int, int],
) -> nn.Module:
    """The user's own discriminator of images (C, H, W): as it is if it has the face of fmrun's, else walked.

    Raises UserError if it cannot be made, does not take such images, gives no logits, or has nothing to train.
    """
    net = load_target(target, params, "discriminator", generator)
    what = f"discriminator.target: '{target}'"
    if not isinstance(net, Discriminator):
        example = example_of(net, image, what)
        hold_spectral(net)
        out_of_place(net)
        settle_layout(net, example)
        layout = layout_of(net)
        net = discriminator_of(net, image, what)
        vars(net)["memory_format"] = layout
    _check_trainable(net, what)
    return net
