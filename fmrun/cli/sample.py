"""`sample`: image grids, and upscaled photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import UserError
from . import options


def sample(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run, or a checkpoint file (default: the newest run).",
            autocompletion=options.complete_runs,
        ),
    ] = None,
    num: Annotated[int, typer.Option(min=1, max=100_000, help="Images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Image i of a seed is always the same.")] = 0,
    grid: Annotated[int | None, typer.Option(min=1, metavar="COLUMNS", help="Columns of the grid.")] = None,
    interpolate: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Walk from latent to latent in N pictures a row.")
    ] = None,
    individual: Annotated[bool, typer.Option("--individual", help="One file per image instead of a grid.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The generator as trained, not its moving average.")] = False,
    input_: Annotated[
        Path | None, typer.Option("--input", metavar="PATH", help="Photograph or folder to upscale.")
    ] = None,
    tile: Annotated[int | None, typer.Option(min=16, help="Side of the tiles of --input, in pixels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures of --input that are there.")] = False,
    out: Annotated[Path | None, typer.Option(help="PNG file or folder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
) -> int:
    """Draw image grids from a trained generator, or upscale photographs with one. Needs no training data."""
    target = options.run_or_checkpoint(run, runs_dir)
    from ..runtime.report import Reporter, emit, escape
    from ..sample import sample as sampling

    report = Reporter()
    source = sampling.open_source(
        target, raw=raw, device=options.choose_device(device), report=report, trust_code=trust_code
    )
    if input_ is not None:
        if (num, seed, grid, interpolate, individual) != (64, 0, None, None, False):
            raise UserError(
                "--num, --seed, --grid, --interpolate and --individual are for images from noise, not --input"
            )
        paths = sampling.upscale_input(source, input_, out=out, overwrite=overwrite, tile=tile, report=report)
    else:
        if tile is not None or overwrite:
            raise UserError("--tile and --overwrite go with --input")
        paths = sampling.draw_samples(
            source, num=num, seed=seed, columns=grid, interpolate=interpolate, individual=individual, out=out
        )
    report.note(f"made by {source.described(target)}")
    for path in paths:
        emit(escape(str(path)))
    return 0
