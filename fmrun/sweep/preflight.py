"""Every combination checked as `fmrun train --dry-run` does, on the CPU: the sweep itself holds no GPU."""

import os
from collections.abc import Sequence

from ..errors import FmrunError, UserError
from .grid import Combination


def check(combinations: Sequence[Combination], elsewhere: bool) -> tuple[int, str]:
    """How many GPUs there are to be shared out here (0 where the config names one), and why the runs cannot be evaluated
    (empty where they can).

    UserError with what is wrong with the first combination that would not train. `elsewhere`: the runs will have another
    machine, and this one need not have their device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in every command that computes
    import torch

    from ..dist import World
    from ..metrics.extractors import HOW, available
    from ..precision import choose_device, choose_precision
    from ..report import Reporter, divert_prints
    from ..train import dry_run

    divert_prints()  # what a user's own net prints is no part of the sweep's data
    gpus, unscored = 0, ""
    for one in combinations:
        config = one.config
        try:
            if not elsewhere:
                device = choose_device(config.device)
                choose_precision(config.precision, device)
                gpus = torch.cuda.device_count() if device.type == "cuda" and ":" not in config.device else 0
            here = {"device": "cpu", "precision": "auto", "compile": False, "cuda_graphs": False}
            dry_run(config.model_copy(update=here), Reporter(quiet_rank=True), World())
        except FmrunError as error:
            raise UserError(f"{one.name}: {error}") from None
        if config.task == "generate" and available() is None:
            unscored = f"there is no feature extractor on this machine: {HOW}"
    return gpus, unscored
