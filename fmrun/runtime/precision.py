"""Devices and number formats: what `device` and `precision` of a config mean on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UserError


def choose_device(name: str, local_rank: int = 0, alone: bool = True) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; UserError where it is not there.

    `alone`: whether no other process shares the training; several cannot meet on an `mps` device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and alone:
            name = "mps"
        else:
            name = "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(f"--device: '{name}' needs an NVIDIA GPU and torch sees none; use --device cpu")
        index = device.index if device.index is not None else local_rank
        if index >= count:
            raise UserError(f"--device: there is no cuda:{index}; this machine has cuda:0 to cuda:{count - 1}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device: 'mps' needs a Mac with Apple silicon; use --device cpu")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype the nets compute in; UserError where the device cannot."""
    kind = device.type
    if name == "auto":
        return torch.bfloat16 if kind == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[name]
    if dtype == torch.float16 and kind != "cuda":
        raise UserError(f"precision 'fp16' needs an NVIDIA GPU, not {kind}; use -s precision=bf16 or fp32")
    if dtype == torch.bfloat16 and kind == "mps":
        raise UserError("precision 'bf16' is not supported on mps; use -s precision=fp32")
    if dtype == torch.float64 and kind != "cpu":
        raise UserError(f"precision 'fp64' is for exact comparisons on the CPU, not {kind}; add --device cpu")
    return dtype


def set_threads(count: int | None) -> None:
    """Compute on a CPU with so many threads; None leaves it to torch."""
    if count is not None:
        torch.set_num_threads(count)


def storage_dtype(precision: torch.dtype) -> torch.dtype:
    """The dtype weights, images and losses are held in."""
    return torch.float64 if precision == torch.float64 else torch.float32


def set_determinism(deterministic: bool, device: torch.device) -> None:
    """Bit-exact GPU kernels, or the fastest; and fp32 that is fp32, not TF32. `CUBLAS_WORKSPACE_CONFIG` has to be set
    before CUDA starts."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def deterministic_or_said() -> Iterator[None]:
    """A kernel that has no deterministic form becomes one sentence with the way out."""
    try:
        yield
    except RuntimeError as error:
        match = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if match is None:
            raise
        raise UserError(
            f"{match[1]} has no deterministic form on this device; add -s deterministic=false, and runs no longer resume to "
            "the bit"
        ) from error
