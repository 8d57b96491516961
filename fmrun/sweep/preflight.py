"""Every combination checked as `fmrun train --dry-run` does, in a process of its own: the sweep itself holds no GPU and
stays small beside its runs."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FmrunError, UserError
from ..runs import to_json
from .launch import with_fmrun


@dataclass(frozen=True)
class Machine:
    """What the runs will find here."""

    device: str
    """`cpu`, `cuda`, `mps`: the kind of device that the first config asks for."""
    gpus: int
    """To be dealt out: 0 where there is none, or the config names one."""


def check(configs: Mapping[str, Mapping[str, Any]], elsewhere: bool = False, trust_code: bool = False) -> Machine:
    """Look at these configs, by name; UserError with what is wrong with the first that would not train.

    `elsewhere`: the runs will have another machine, and this one need not have their device.
    """
    with tempfile.TemporaryDirectory(prefix="fmrun-") as folder:
        files = [Path(folder) / f"{name}.json" for name in configs]
        for file, content in zip(files, configs.values(), strict=True):
            file.write_bytes(to_json(content))
        answer, code = _ask([*["--elsewhere"] * elsewhere, *["--trust-code"] * trust_code, *map(str, files)])
    try:
        found = json.loads(answer)
    except ValueError:
        raise UserError(
            f"the combinations could not be checked: the process that did ended with {code}; try one of them with "
            "fmrun train --dry-run"
        ) from None
    if found["problem"]:
        raise UserError(found["problem"])
    return Machine(found["device"], found["gpus"])


def _ask(arguments: Sequence[str]) -> tuple[str, int]:
    """What `main` answers in a process of its own, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fmrun.sweep.preflight", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=with_fmrun(os.environ),
    )
    return done.stdout, done.returncode


def main(arguments: Sequence[str]) -> str:
    """JSON: `problem` (a sentence, or null), `device`, `gpus`."""
    elsewhere, trust_code = "--elsewhere" in arguments, "--trust-code" in arguments
    files = [a for a in arguments if not a.startswith("--")]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in every command that computes
    import torch

    from .. import trust
    from ..dist import World
    from ..precision import choose_device
    from ..presets import from_json
    from ..report import Reporter
    from ..train import dry_run

    problem, device, pinned = None, "cpu", False
    for place, file in enumerate(files):
        name = Path(file).stem
        try:
            config = from_json(Path(file))
            trust.admit(trust.named_by(config, Path(file)), trust_code)
            if elsewhere:
                config = config.model_copy(update={"device": "cpu", "precision": "auto", "compile": False})
            if place == 0:
                device, pinned = choose_device(config.device).type, ":" in config.device
            dry_run(config, Reporter(quiet_rank=True), World())
        except FmrunError as error:
            problem = f"{name}: {error}"
            break
    gpus = torch.cuda.device_count() if device == "cuda" and not pinned else 0
    return json.dumps({"problem": problem, "device": device, "gpus": gpus})


if __name__ == "__main__":
    answer = os.dup(1)
    os.dup2(2, 1)  # what a user's own net prints is no part of the answer
    try:
        os.write(answer, main(sys.argv[1:]).encode())
    except KeyboardInterrupt:  # the sweep has it too, and says so
        sys.exit(130)
