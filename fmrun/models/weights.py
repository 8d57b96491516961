"""Weights from a file into a net, with the mismatch in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError, reading


def load_weights(net: nn.Module, path: str, prefixes: Sequence[str], field: str) -> None:
    """Load `net` from a `.safetensors` file of its state dict, or of a checkpoint that holds it under one of `prefixes`
    (the first found). Raises UserError if the file does not fit."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{field}: there is no file '{path}'")
    try:
        with reading(file):
            tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{field}: '{path}' is not a readable .safetensors file ({error})") from None
    for prefix in prefixes:
        inner = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        if inner:
            tensors = inner
            break
    own = net.state_dict()
    missing = [k for k in own if k not in tensors]
    extra = [k for k in tensors if k not in own]
    shapes = [
        f"{k} is {tuple(tensors[k].shape)} in the file and {tuple(own[k].shape)} here"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        reasons = [f"{len(missing)} missing ({missing[0]}, …)"] if missing else []
        reasons += [f"{len(extra)} unknown ({extra[0]}, …)"] if extra else []
        reasons += shapes[:1]
        raise UserError(
            f"{field}: '{path}' holds another net than this config describes: {'; '.join(reasons)}; "
            "check type, width, norm and image size"
        )
    net.load_state_dict(tensors)
