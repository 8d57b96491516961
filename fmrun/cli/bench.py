"""`bench`: what a step of training costs here."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .options import Json, Set, as_overrides


def bench(
    pair: Annotated[Literal["dcgan", "munet", "all"], typer.Option("--pair", help="Nets to measure.")] = "all",
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, help="Side of the images in pixels (default: 64; for munet the preset's)."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="Images per step (default: the preset's).")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times each step is measured.")] = 7,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16", "all"], typer.Option("--precision", help="Arithmetic of fmrun's steps.")
    ] = "all",
    set_: Set = None,
    json: Json = False,
) -> int:
    """Measure what a training step costs here: without feature matching, with it, and as published."""
    from .. import bench as benching
    from ..bench.words import tables
    from ..report import Reporter, emit, emit_json
    from .options import choose_device

    choose_device(device)
    result = benching.bench(
        pairs=("dcgan", "munet") if pair == "all" else (pair,),
        device=device,
        size=size,
        batch_size=batch_size,
        rounds=rounds,
        precision=precision,
        overrides=as_overrides(set_),
        report=Reporter(),
    )
    if json:
        emit_json(result)
    else:
        emit(tables(result))
    return 0
