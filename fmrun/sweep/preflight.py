"""Every combination checked as `fmrun train --dry-run` does, in a process of its own: the sweep itself holds no GPU and
stays small beside its runs."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..errors import FmrunError, UserError
from ..presets import resolve
from .grid import Combination


def check(*arguments: Any) -> tuple[int, str]:
    """What `_check` gives, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_divert) as pool:
        try:
            return pool.submit(_check, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "the combinations could not be checked: the process that did was killed; try one of them with "
                "fmrun train --dry-run"
            ) from None


def _divert() -> None:
    """What a user's own net prints is no part of the sweep's data."""
    os.dup2(2, 1)


def _check(
    preset: str | None,
    config_file: Path | None,
    combinations: Sequence[Combination],
    trust_code: bool,
    elsewhere: bool,
) -> tuple[int, str]:
    """How many GPUs there are to be shared out here (0 where the config names one), and why the runs cannot be evaluated
    (empty where they can).

    UserError with what is wrong with the first combination that would not train. `elsewhere`: the runs will have another
    machine, and this one need not have their device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in every command that computes
    import torch

    from ..dist import World
    from ..metrics.extractors import HOW, available
    from ..precision import choose_device
    from ..report import Reporter
    from ..train import dry_run

    here = {"device": "cpu", "precision": "auto", "compile": False, "cuda_graphs": False} if elsewhere else {}
    gpus, unscored = 0, ""
    for one in combinations:
        try:
            config = resolve(preset, config_file, one.overrides, trust_code=trust_code).model_copy(update=here)
            if choose_device(config.device).type == "cuda" and ":" not in config.device:
                gpus = torch.cuda.device_count()
            dry_run(config, Reporter(quiet_rank=True), World())
        except FmrunError as error:
            raise UserError(f"{one.name}: {error}") from None
        if not config.has_targets and available() is None:
            unscored = f"there is no feature extractor on this machine: {HOW}"
    return gpus, unscored
