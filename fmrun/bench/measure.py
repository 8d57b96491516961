"""Counting and timing the steps of one pair, and the ratios between them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from ..memory import LiveBytes
from .ledger import Ledger, Operation
from .loop import loop_cost
from .machine import Rates, rates, seconds, timed, wait
from .variants import Bench, Variant

LEAST, MOST = 3, 25
"""Rounds."""

ROUNDS_SHARE = 0.6
"""Of the time for a pair after counting; the rest is for the loop."""

GPU_CHUNK = 0.05
"""Seconds of work that a GPU is given at once, so that starting it does not count."""

LOOP_STEPS = 8

OPERATORS = 12
"""Rows of a profile."""

RATIOS = {
    "fm_over_plain": ("fm", "plain"),
    "fm_key_over_plain": ("fm_key", "plain"),
    "fm_all_over_plain": ("fm_all", "plain"),
    "simultaneous_fm_over_plain": ("simultaneous_fm", "simultaneous_plain"),
    "simultaneous_fm_over_fm": ("simultaneous_fm", "fm"),
    "fm_over_textbook_plain": ("fm", "textbook_plain"),
    "textbook_over_fm": ("textbook_fm", "fm"),
    "textbook_nhwc_over_fm": ("textbook_fm_nhwc", "fm"),
    "textbook_plain_over_plain": ("textbook_plain", "plain"),
    "textbook_over_textbook_plain": ("textbook_fm", "textbook_plain"),
    "separate_over_fm": ("separate_nhwc", "fm"),
    "textbook_over_fm_bf16": ("textbook_fm", "fm_bf16"),
    "fm_over_plain_bf16": ("fm_bf16", "plain_bf16"),
    "fm_over_fm_bf16": ("fm", "fm_bf16"),
    "fm_over_fm_compiled": ("fm_bf16", "fm_compiled"),
    "textbook_over_fm_compiled": ("textbook_fm", "fm_compiled"),
    "fm_over_fm_reduced": ("fm_bf16", "fm_reduced"),
    "fm_over_fm_graphs": ("fm_bf16", "fm_graphs"),
    "textbook_over_fm_graphs": ("textbook_fm", "fm_graphs"),
}
"""Seconds of one step over those of another. A step with feature matching has its share of the steps that measure."""


@dataclass(frozen=True)
class Count:
    """What one step does."""

    passes: Mapping[str, Mapping[str, float]]
    """By net and kind, in units of one forward of that net; see `Unit.passes`."""
    flops: int
    bytes: int
    operations: Sequence[Operation]
    memory: int
    """Bytes of tensors at the fullest moment: those that stay, and those it makes."""

    def cost(self, g: float) -> float:
        """In units of one forward of the discriminator, g for the generator's."""
        own, generator = (sum(self.passes[net].values()) for net in ("discriminator", "generator"))
        return own + g * generator


class Measuring:
    """The steps of one pair, counted once, then timed in rounds."""

    def __init__(self, built: Bench, device: torch.device, known: Rates):
        self.started = time.monotonic()
        self.built, self.device, self.rates = built, device, known
        self.counts = {variant.name: self._count(variant) for variant in [*built.variants, *built.counted]}
        self.times: dict[str, list[float]] = {variant.name: [] for variant in built.variants}
        self.device_times: dict[str, list[float]] = {variant.name: [] for variant in built.variants}
        self.forwards: dict[str, list[float]] = {name: [] for name in built.forwards}
        self.repeats = dict.fromkeys(self.times, 1)
        if device.type == "cuda":
            for variant in built.variants:
                variant.run()
                self.repeats[variant.name] = max(1, round(GPU_CHUNK / seconds(variant.run, device)))

    def _count(self, variant: Variant) -> Count:
        """Count a step, which also warms it up."""
        variant.owner.forget()
        held = variant.owner.held()
        with variant.owner.eager(), Ledger() as ledger, LiveBytes(held) as live:
            variant.run()
        passes = {net: unit.passes(ledger) for net, unit in self.built.units.items()}
        made = max(live.course) if self.device.type != "cuda" else self._made_on_gpu(variant)
        return Count(passes, ledger.flops, ledger.bytes, ledger.operations, sum(t.nbytes for t in held) + made)

    def _made_on_gpu(self, variant: Variant) -> int:
        """The most bytes that a step takes besides what stays, as the allocator counts."""
        variant.run()
        variant.owner.forget()
        wait(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        variant.run()
        wait(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _rounds(self, rounds: int | None, until: float) -> int:
        """Make every step and a forward of each net once a round, every other round backwards."""
        done = 0
        while done < (rounds or MOST) and (rounds or done < LEAST or time.monotonic() < until):
            for variant in self.built.variants[:: 1 if done % 2 == 0 else -1]:
                wall, own = timed(variant.run, self.device, self.repeats[variant.name])
                self.times[variant.name].append(wall)
                self.device_times[variant.name].append(own)
            for name, forward in self.built.forwards.items():
                self.forwards[name].append(seconds(forward, self.device, 1 if self.device.type == "cpu" else 10))
            self.rates = self.rates.best(rates(self.device, tries=2))
            done += 1
        return done

    def result(self, rounds: int | None, budget: float, folder: Path) -> dict[str, Any]:
        """Time `rounds` rounds, or as many as fit in `budget` seconds. Gives

        - `preset`, `size`, `batch_size`, `rounds`, `matched` (layers by step), `precision` of the loop's run
        - `g`: a forward of the generator over one of the discriminator, in `seconds` and in `flops`
        - `steps`: see `_step`; `measuring`: see `_measuring`; `loop`: see `loop.loop_cost`
        - `ratios`, `quartiles`, `device_ratios` and `allowed`, by the names of `RATIOS`
        """
        built = self.built
        now = time.monotonic()
        done = self._rounds(rounds, now + ROUNDS_SHARE * max(0.0, budget - (now - self.started)))
        units = built.units
        g = {
            "seconds": median(_quotients(self.forwards["generator"], self.forwards["discriminator"])),
            "flops": units["generator"].flops / units["discriminator"].flops,
        }
        measuring = self._measuring(g["seconds"])
        chunk = 1 if self.device.type == "cpu" else max(2, self.repeats["fm"])
        loop = loop_cost(built.config, self.device, folder, chunk, LOOP_STEPS)
        found: dict[str, list[float]] = {}
        device_ratios, allowed = {}, {}
        for name, (over, under) in RATIOS.items():
            if over not in self.times or under not in self.times:
                continue
            # steps that measure, shared out among all
            over_share, under_share = (
                1 + measuring["surcharge"] if built.matched[v] and v in built.own else 1.0 for v in (over, under)
            )
            share = over_share / under_share
            found[name] = [share * q for q in _quotients(self.times[over], self.times[under])]
            device_ratios[name] = share * median(_quotients(self.device_times[over], self.device_times[under]))
            if built.precision[over] == built.precision[under]:
                allowed[name] = share * self.counts[over].cost(g["seconds"]) / self.counts[under].cost(g["seconds"])
        ratios = {name: median(quotients) for name, quotients in found.items()}
        ratios["fm_over_plain_memory"] = self.counts["fm"].memory / self.counts["plain"].memory
        ratios["loop_over_bare_step"] = loop["ratio"]
        return {
            "preset": built.preset,
            "size": built.size,
            "batch_size": built.config.train.batch_size,
            "rounds": done,
            "g": g,
            "matched": {name: list(layers) for name, layers in built.matched.items()},
            "steps": {v.name: self._step(v, g["seconds"]) for v in built.variants},
            "measuring": measuring,
            "loop": loop,
            "ratios": ratios,
            "device_ratios": device_ratios,
            "quartiles": {name: _quartiles(quotients) for name, quotients in found.items()},
            "allowed": allowed,
        }

    def _measuring(self, g: float) -> dict[str, float]:
        """Steps that measure the gradient share differentiate twice down to the images: `every` so many steps, at a
        `cost` in discriminator forwards; `surcharge` is what that adds to the average step."""
        every = self.built.config.feature_matching.measure_every
        cost = self.counts["fm_measuring"].cost(g)
        return {"every": every, "cost": cost, "surcharge": (cost / self.counts["fm"].cost(g) - 1) / every}

    def _step(self, variant: Variant, g: float) -> dict[str, Any]:
        """- `words`, `precision`; `seconds` per step (quartiles), and `device_seconds`: see `machine.timed`
        - `images_per_second`
        - `passes`: by net and kind, in forwards of that net; `cost`, all of them in forwards of the discriminator
        - `flops` (of convolutions and matrix products), `bytes` (read and written if no cache helped)
        - `product_share`: FLOPs per second over the measured rate of matrix products in its precision
        - `least_seconds`: what the measured rates allow, operation by operation, and `least_share` of the time taken
        - `memory_bytes`: of tensors, at the fullest moment
        """
        count, times = self.counts[variant.name], self.times[variant.name]
        typical = median(times)
        product = self.rates.products[torch.bfloat16 if variant.precision == "bf16" else torch.float32]
        least = sum(self.rates.seconds(*operation) for operation in count.operations)
        return {
            "words": variant.words,
            "precision": variant.precision,
            "seconds": _quartiles(times),
            "device_seconds": _quartiles(self.device_times[variant.name]),
            "images_per_second": self.built.config.train.batch_size / typical,
            "passes": count.passes,
            "cost": count.cost(g),
            "flops": count.flops,
            "bytes": count.bytes,
            "product_share": count.flops / typical / product,
            "least_seconds": least,
            "least_share": least / typical,
            "memory_bytes": count.memory,
        }

    def profile(self) -> dict[str, list[dict[str, Any]]]:
        """For the plain step and the one with feature matching, the operators that take the most time themselves."""
        activity = torch.profiler.ProfilerActivity
        gpu = self.device.type == "cuda"
        found = {}
        for variant in self.built.variants:
            if variant.name not in ("plain", "fm"):
                continue
            with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if gpu else [])]) as profiler:
                variant.run()
                wait(self.device)
            rows = profiler.key_averages()
            key = "self_device_time_total" if gpu else "self_cpu_time_total"
            whole = sum(getattr(row, key) for row in rows)
            top = sorted(rows, key=lambda row: -getattr(row, key))[:OPERATORS]
            found[variant.name] = [
                {
                    "operator": r.key,
                    "calls": r.count,
                    "seconds": getattr(r, key) / 1e6,
                    "share": getattr(r, key) / whole,
                }
                for r in top
            ]
        return found


def _quotients(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _quartiles(values: Iterable[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    values = list(values)
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
