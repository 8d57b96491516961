"""Every combination checked as `fmrun train --dry-run` does, in a process of its own: the sweep itself holds no GPU and
stays small beside its runs."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from ..runtime.errors import FmrunError, UserError
from ..runtime.report import divert_prints
from .grid import Combination


def check(*arguments: Any) -> tuple[int, str]:
    """What `_check` gives."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=divert_prints) as pool:
        return pool.submit(_check, *arguments).result()


def _check(combinations: Sequence[Combination], elsewhere: bool) -> tuple[int, str]:
    """How many GPUs there are to be shared out here (0 where the config names one), and why the runs cannot be evaluated
    (empty where they can).

    UserError with what is wrong with the first combination that would not train. `elsewhere`: the runs will have another
    machine, and this one need not have their device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in every command that computes
    import torch

    from ..config import trust
    from ..metrics.extractors import HOW, available
    from ..runtime.dist import World
    from ..runtime.precision import choose_device
    from ..runtime.report import Reporter
    from ..train.run import dry_run

    here = {"device": "cpu", "precision": "auto", "compile": False, "cuda_graphs": False} if elsewhere else {}
    gpus, unscored = 0, ""
    for one in combinations:
        config = one.config.model_copy(update=here)
        trust.admit(trust.targets(config), trust_code=True)  # as the process that started this one has
        try:
            if choose_device(config.device).type == "cuda" and ":" not in config.device:
                gpus = torch.cuda.device_count()
            dry_run(config, Reporter(quiet_rank=True), World())
        except FmrunError as error:
            raise UserError(f"{one.name}: {error}") from None
        if not config.has_targets and available() is None:
            unscored = f"there is no feature extractor on this machine: {HOW}"
    return gpus, unscored
