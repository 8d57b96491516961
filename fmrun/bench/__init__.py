"""`bench`: what a training step costs, beside the published one and the how-to's, measured in turns in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..config.presets import Override, resolve
from ..config.schema import Config
from ..runtime.allocator import keep_freed_memory
from ..runtime.environment import environment
from ..runtime.errors import UserError
from ..runtime.precision import choose_device, choose_precision, set_determinism
from ..runtime.report import Reporter, counted
from ..tasks import kind
from .baselines import Baseline
from .count import StepCounter, passes, units
from .steps import OwnStep, training_cost
from .timing import in_turns, matrix_product, quartiles, quotients

PAIRS = {
    "dcgan": ("dcgan-64", "dcgan-64", "all"),
    "munet": ("munet-x2-cpu", "munet-x2", "key"),
}
"""Preset on a CPU and on a GPU, and the layers matched."""

SET_HERE = (
    *("device", "precision", "task", "compile", "compile_mode", "cuda_graphs", "deterministic"),
    *("data.path", "data.channels", "data.valid_fraction", "feature_matching.weight", "train.update"),
    *("train.accumulate", "train.d_updates", "train.g_updates", "discriminator.type", "discriminator.target"),
)
"""Fields that tell the steps apart, or that the baselines do not know."""

RATIOS = (
    ("matching", "plain"),
    ("simultaneous", "simultaneous_plain"),
    ("simultaneous", "matching"),
    ("matching", "howto_plain"),
    *((other, own) for other in ("published", "published_nhwc") for own in ("matching", "simultaneous")),
    *((other, "matching") for other in ("howto", "howto_nhwc")),
    ("matching_bf16", "plain_bf16"),
    *((other, "matching_bf16") for other in ("matching", "published", "howto")),
    *((other, own) for own in ("compiled", "reduce_overhead", "cuda_graphs") for other in ("matching_bf16", "howto")),
)
"""Seconds of one step over those of another."""

TRAINED = 9
"""Steps of the training loop that are timed."""

IMAGES = 1200
"""Made-up images that the DCGAN is trained on there, half of them held out: the bundled ones are smaller."""


def bench(
    pairs: Sequence[str], overrides: Sequence[Override], *, device: str, precision: str, rounds: int, report: Reporter
) -> dict[str, Any]:
    """Measure the named pairs, with further fields of their configs in `overrides`; what `--json` prints:

    - `machine`: hardware, versions, threads
    - `pairs`: by name, what `measure_pair` gives

    Raises UserError for a device, size or precision there is not, and for a field in `SET_HERE`.
    """
    for override in overrides:
        if override.key in SET_HERE:
            raise UserError(
                f"{override.flag}: bench sets {override.key} by itself; leave it out, or choose by --pair, --device and "
                "--precision"
            )
    place = choose_device(device)
    precisions = [precision]
    if precision == "all":
        precisions = ["fp32"] if place.type == "mps" else ["fp32", "bf16"]
    choose_precision(precisions[-1], place)
    set_determinism(False, place)
    keep_freed_memory()
    pairs_measured = {}
    with tempfile.TemporaryDirectory(prefix="fmrun-bench-") as folder:
        configs = {name: _config(name, place, Path(folder), overrides) for name in pairs}
        for name, config in configs.items():
            report.note(f"measuring {name}: {counted(rounds, 'round')}")
            pairs_measured[name] = measure_pair(config, place, precisions, rounds, Path(folder))
    known = {key: value for key, value in environment().items() if key != "host"}
    return {"machine": {"device": str(place), **known}, "pairs": pairs_measured}


def _config(name: str, device: torch.device, folder: Path, overrides: Sequence[Override]) -> Config:
    """The preset of a pair as it would be trained."""
    cpu, gpu, layers = PAIRS[name]
    values: dict[str, Any] = {"device": str(device), "deterministic": False, "data.channels": 3}
    values["feature_matching.layers"] = [layers]
    if name == "dcgan":
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, 128, 128, 3), dtype=np.uint8)
        np.savez(path := folder / "images.npz", images=images)
        values |= {"data.path": str(path), "data.valid_fraction": 0.5}
    common = [Override("bench", key, value) for key, value in values.items()]
    return resolve(gpu if device.type == "cuda" else cpu, None, [*common, *overrides])


def steps_of(
    config: Config, device: torch.device, precisions: Sequence[str]
) -> Iterator[tuple[str, OwnStep | Baseline]]:
    """Every step that is timed, each with weights of its own; names in any precision but the first end in it."""
    off: dict[str, Any] = {"feature_matching": config.feature_matching.model_copy(update={"weight": 0.0})}
    at_once: dict[str, Any] = {"train": config.train.model_copy(update={"update": "simultaneous"})}

    def own(precision: str, **fields: Any) -> OwnStep:
        return OwnStep(config.model_copy(update={"precision": precision, **fields}), device)

    first, last = precisions[0], precisions[-1]
    yield "plain", own(first, **off)
    yield "matching", own(first)
    yield "simultaneous_plain", own(first, **off, **at_once)
    yield "simultaneous", own(first, **at_once)
    for precision in precisions[1:]:
        yield f"plain_{precision}", own(precision, **off)
        yield f"matching_{precision}", own(precision)
    if device.type == "cuda":
        yield "compiled", own(last, compile=True)
        yield "reduce_overhead", own(last, compile=True, compile_mode="reduce-overhead")
        yield "cuda_graphs", own(last, cuda_graphs=True)
    for ending, memory_format in (("", torch.contiguous_format), ("_nhwc", torch.channels_last)):
        for method in (Baseline.published, Baseline.howto_plain, Baseline.howto):
            yield method.__name__ + ending, Baseline(own("fp32"), method, memory_format)


def measure_pair(
    config: Config, device: torch.device, precisions: Sequence[str], rounds: int, folder: Path
) -> dict[str, Any]:
    """Count every step once and time it in `rounds` rounds; then time a run in `folder`. Gives

    - `size`, `batch_size`, `rounds`, `layers` (those matched)
    - `g`: time of a forward of the generator over that of one of the discriminator
    - `matmul_flops`: FLOP/s of matrix products, by precision
    - `steps`: by name, `precision`, `passes` (by net and direction), `cost` (all of them, in discriminator forwards),
      `flops`, `memory_bytes` (of tensors that the step makes, at the fullest moment), `seconds` (quartiles),
      `images_per_second`, `matmul_share` (its FLOP/s over those of matrix products in its precision)
    - `ratios`: by name, `quartiles` over rounds of the quotient within a round, and `passes`, what it would be if passes
      through the nets were all that takes time (None between precisions)
    - `training`: see `training_cost`
    """
    data = kind(config.task).open(config)
    config = data.config
    steps = dict(steps_of(config, device, precisions))
    own = steps["matching"]
    assert isinstance(own, OwnStep)
    forwards = own.forwards()
    unit = units(forwards)
    counters = {name: count(step, device) for name, step in steps.items()}
    products = {p: matrix_product(device, choose_precision(p, device)) for p in {"fp32", *precisions}}
    without_graph = {net: torch.no_grad()(forward) for net, forward in forwards.items()}
    times = in_turns({**steps, **without_graph, **{p: product for p, (product, _) in products.items()}}, device, rounds)
    g = median(quotients(times["generator"], times["discriminator"]))
    rates = {p: [flops / t for t in times[p]] for p, (_, flops) in products.items()}
    timed: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        flops, through = counters[name].flops, {net: passes(counters[name], unit[net]) for net in unit}
        timed[name] = {
            "precision": step.precision,
            "passes": through,
            "cost": sum(through["discriminator"].values()) + g * sum(through["generator"].values()),
            "flops": flops,
            "memory_bytes": counters[name].peak,
            "seconds": quartiles(times[name]),
            "images_per_second": config.train.batch_size / median(times[name]),
            "matmul_share": median(quotients([flops / t for t in times[name]], rates[step.precision])),
        }
    ratios = {}
    for over, under in RATIOS:
        if over in steps and under in steps:
            alike = steps[over].precision == steps[under].precision
            ratios[f"{over}_over_{under}"] = {
                "quartiles": quartiles(quotients(times[over], times[under])),
                "passes": timed[over]["cost"] / timed[under]["cost"] if alike else None,
            }
    return {
        "size": own.batch.real.shape[-1],
        "batch_size": config.train.batch_size,
        "rounds": rounds,
        "layers": list(own.layers),
        "g": g,
        "matmul_flops": {p: median(rate) for p, rate in rates.items()},
        "steps": timed,
        "ratios": ratios,
        "training": training_cost(
            config.model_copy(update={"precision": precisions[0 if device.type == "cpu" else -1]}),
            data,
            device,
            folder,
            TRAINED,
        ),
    }


def count(step: OwnStep | Baseline, device: torch.device) -> StepCounter:
    """What a warm step does; on a GPU `peak` is what the allocator gives out, scratch memory of kernels included."""
    step()
    with step.eager(), StepCounter() as counter:
        step()
    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        counter.peak = torch.cuda.max_memory_allocated(device) - before
    return counter
