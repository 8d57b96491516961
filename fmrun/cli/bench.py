"""`bench`: what a step of training costs here."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from . import options


def bench(
    context: typer.Context,
    pair: Annotated[Literal["dcgan", "munet", "all"], typer.Option(help="Nets to measure.")] = "all",
    batch_size: options.BatchSize = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each step is measured.")] = 7,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "all"], typer.Option(help="Arithmetic of fmrun's steps.")] = "all",
    set_: options.Set = None,
    json: options.Json = False,
) -> int:
    """Measure what a training step costs here: without feature matching, with it, and as published."""
    from .. import bench as benching
    from ..bench.words import tables
    from ..runtime.report import Reporter, emit, emit_json
    from . import options

    options.choose_device(device)
    pairs = list(benching.PAIRS) if pair == "all" else [pair]
    overrides = [override for override in options.as_overrides(context) if override.flag != "--device"]
    result = benching.bench(pairs, overrides, device=device, precision=precision, rounds=rounds, report=Reporter())
    if json:
        emit_json(result)
    else:
        emit(tables(result))
    return 0
