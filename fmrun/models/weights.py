"""Weights from a file into a net, with the mismatch in words."""

from __future__ import annotations

import pickle
import shlex
import struct
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..config.presets import render
from ..config.schema import Config
from ..runs.checkpoint import CorruptCheckpoint, read_meta
from ..runtime.errors import UserError, reading

NO_SHAPE = ("init", "train")
"""Settings of a net on which the shapes of its weights do not depend."""

LOAD_ERRORS = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(OSError, AssertionError, struct.error),
)
"""What half a file, or one that is something else, does to its reader."""


def read_state(file: Path, field: str) -> dict[str, Any]:
    """What a `.safetensors`, `.pth`, `.pt` or `.ckpt` file holds by name. Nothing in it is executed.

    Raises UserError, which names the setting `field` and the file.
    """
    kind = file.suffix.lower()
    if not file.is_file():
        raise UserError(f"{field}: there is no file '{file}'")
    if file.stat().st_size == 0:
        raise UserError(f"{field}: '{file}' is empty; copy or download it again")
    with reading(file):
        if kind == ".safetensors":
            try:
                return load_file(file)
            except SafetensorError as error:
                raise UserError(
                    f"{field}: '{file}' is not a readable .safetensors file ({first_line(error)}); fetch it again"
                ) from None
        if kind not in (".pth", ".pt", ".ckpt"):
            raise UserError(f"{field}: '{file}' is neither .safetensors nor .pth")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except LOAD_ERRORS as error:
            raise UserError(
                f"{field}: '{file}' is damaged or holds more than weights, and is not loaded, for that could execute what "
                f"is in it ({first_line(error)}); fetch it again, or convert it to .safetensors where you trust it"
            ) from None
    if not isinstance(content, dict):
        raise UserError(f"{field}: '{file}' holds a {type(content).__name__}, not named weights")
    return content


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def flags(settings: Mapping[str, Any]) -> str:
    """These settings on a command line."""
    return " ".join(f"-s {shlex.quote(render(key, value))}" for key, value in settings.items())


def load_weights(net: nn.Module, path: str, prefixes: Sequence[str], field: str, config: Config | None = None) -> None:
    """Load `net` from a `.safetensors` file of its state dict, or of a checkpoint that holds it under one of `prefixes`
    (the first found). Raises UserError if the file does not fit, with the settings that would make it fit where `config`
    is given and the file is a checkpoint."""
    file = Path(path)
    tensors = read_state(file, field)
    for prefix in prefixes:
        inner = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        if inner:
            tensors = inner
            break
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        reason = textwrap.shorten("; ".join(textwrap.shorten(line, 150) for line in str(error).splitlines()[1:]), 600)
        other = _other_settings(file, field, config) if config is not None else {}
        fix = f"add {flags(other)}" if other else "check type, width, norm, image size and scale"
        raise UserError(f"{field}: '{path}' holds another net than this config describes ({reason}): {fix}") from None


def _other_settings(file: Path, field: str, config: Config) -> dict[str, Any]:
    """Settings of the run that wrote a checkpoint, of the net in the section of `field` and the size of its images, where
    `config` has others."""
    try:
        then = read_meta(file).config
    except CorruptCheckpoint:
        return {}
    now, section = config.model_dump(mode="json"), field.partition(".")[0]
    keys = [(section, key) for key in now[section] if key not in NO_SHAPE]
    keys += [("data", key) for key in ("image_size", "channels", "scale")]
    known = [(name, key) for name, key in keys if key in then.get(name, {})]
    return {f"{name}.{key}": then[name][key] for name, key in known if then[name][key] != now[name][key]}
