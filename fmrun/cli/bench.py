"""`bench`: what a step of training costs here."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Set, as_overrides


class Pairs(StrEnum):
    dcgan = "dcgan"
    munet = "munet"
    all = "all"


class Precisions(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    all = "all"


def bench(
    pair: Annotated[Pairs, typer.Option("--pair", help="Nets to measure.")] = Pairs.all,
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, help="Side of the images in pixels (default: 64; for munet the preset's)."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="Images per step (default: the preset's).")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Times each step is made (default: as fit in two minutes).")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    precision: Annotated[Precisions, typer.Option("--precision", help="Arithmetic of fmrun's steps.")] = Precisions.all,
    set_: Set = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also list the operators that take the most time.")
    ] = False,
    json: Json = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON to this file.")] = None,
) -> int:
    """Measure what a training step costs here: without feature matching, with it, and as published."""
    from ..errors import UserError
    from ..report import Reporter, emit, emit_json, to_json_text

    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file in it, like {out / 'bench.json'}")
    from .. import bench as benching
    from ..bench.words import tables
    from .options import choose_device

    choose_device(device)
    report = Reporter()
    result = benching.bench(
        pairs=("dcgan", "munet") if pair is Pairs.all else (pair.value,),
        device=device,
        size=size,
        batch_size=batch_size,
        rounds=rounds,
        precision=precision.value,
        profile=profile,
        overrides=as_overrides(set_),
        report=report,
    )
    if out is not None:
        try:
            out.write_text(to_json_text(result) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror}; give another file") from None
    if json:
        emit_json(result)
    else:
        emit(tables(result))
    for sentence in result["hints"]:
        report.note(sentence)
    return 0
