"""`bench`: what a step of training costs, measured in turns in one process.

Times on a shared machine move by tens of per cent from second to second. So every round makes one step of every kind,
one after the other, and a ratio is the median over rounds of the quotient within a round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..allocator import keep_freed_memory
from ..errors import UserError
from ..models.dcgan import KERNELS
from ..models.munet import SMALLEST
from ..precision import choose_device, choose_precision, set_determinism
from ..presets import Override, resolve
from ..report import Reporter
from .machine import describe, load_average, rates
from .measure import Measuring
from .variants import BF16, FP32, PAIRS, build
from .words import hints

BUDGET = 130.0
"""Seconds for all pairs together where the number of rounds is not given."""

SET_HERE = {
    "device": "give --device",
    "precision": "give --precision",
    "train.batch_size": "give --batch-size",
    "data.image_size": "give --size",
    "data.patch_size": "give --size",
    **dict.fromkeys(
        (
            "task",
            "compile",
            "compile_mode",
            "cuda_graphs",
            "deterministic",
            "data.path",
            "data.channels",
            "data.valid_fraction",
            "train.update",
        ),
        "leave it out",
    ),
    **dict.fromkeys(
        ("train.accumulate", "train.d_updates", "train.g_updates"), "the textbook knows one update of each"
    ),
    **dict.fromkeys(("discriminator.type", "discriminator.target"), "the textbook's steps are of the preset's nets"),
    "feature_matching.weight": "it measures with feature matching and without",
    "feature_matching.layers": "it measures the groups 'all' and 'key'",
}
"""Fields that tell the steps apart, or the machine, and what to do instead of setting them."""


def bench(
    *,
    pairs: Sequence[str],
    device: str = "auto",
    size: int | None = None,
    batch_size: int | None = None,
    rounds: int | None = None,
    precision: str = "all",
    profile: bool = False,
    report: Reporter,
    overrides: Sequence[Override] = (),
) -> dict[str, Any]:
    """Measure the named pairs (`dcgan`, `munet`); what `--json` prints:

    - `machine`: hardware, versions, threads, measured rates of matrix products and memory, load average before and after
    - `pairs`: by name, what `Measuring.result` says
    - `ratios`: of seconds, and of bytes where the name ends in `_memory`, see `measure.RATIOS`; MUNet's begin with
      `munet_`; `quartiles` over rounds; `device_ratios`, the same of what the device itself spent (`machine.timed`);
      `allowed`, what they would be if passes through the nets were all that costs time
    - `hints`: sentences

    `overrides` are further fields of fmrun's configs. Raises UserError for a device, size or precision there is not,
    and for a field that tells the steps apart.
    """
    _check_free(overrides)
    place = choose_device(device)
    _check_sizes(pairs, size)
    precisions = _precisions(precision, place)
    for name in pairs:
        resolve(PAIRS[name].preset(place), None, overrides, need_data=False)  # said before anything is measured
    set_determinism(False, place)
    keep_freed_memory()
    before = load_average()
    machine_rates = rates(place)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fmrun-bench-") as folder:
        for name in pairs:
            report.note(f"measuring {name}" + ("" if rounds else f": about {BUDGET / len(pairs):.0f} s"))
            built = build(PAIRS[name], Path(folder), place, size, batch_size, precisions, overrides)
            measuring = Measuring(built, place, machine_rates)
            found[name] = measuring.result(rounds, BUDGET / len(pairs), Path(folder))
            machine_rates = machine_rates.best(measuring.rates)
            if profile:
                found[name]["profile"] = measuring.profile()
    result: dict[str, Any] = {
        "machine": {**describe(place, machine_rates), "load_average": [before, load_average()]},
        "pairs": found,
    }
    for key in ("ratios", "quartiles", "device_ratios", "allowed"):
        result[key] = {
            ("" if name == "dcgan" else f"{name}_") + ratio: value
            for name in pairs
            for ratio, value in found[name].pop(key).items()
        }
    result["hints"] = hints(result)
    return result


def _check_free(overrides: Sequence[Override]) -> None:
    for override in overrides:
        if override.key in SET_HERE:
            raise UserError(f"{override.flag}: bench sets {override.key} by itself; {SET_HERE[override.key]}")


def _check_sizes(pairs: Sequence[str], size: int | None) -> None:
    if size is None:
        return
    if "dcgan" in pairs and size not in KERNELS:
        raise UserError(
            f"--size {size}: dcgan makes images of {', '.join(map(str, KERNELS))} px; give one of these, or --pair munet"
        )
    if "munet" in pairs and (size < SMALLEST or size % 2):
        raise UserError(
            f"--size {size}: munet is measured on patches of an even number of pixels, at least {SMALLEST}"
            + ("; give 32, 64 or 128, or --pair dcgan" if "dcgan" in pairs else "")
        )


def _precisions(precision: str, device: torch.device) -> tuple[str, ...]:
    """Those to measure; the first is the one that is compared with all the others."""
    if precision == "all":
        return (FP32,) if device.type == "mps" else (FP32, BF16)
    choose_precision(precision, device)
    return (precision,)
