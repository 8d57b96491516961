"""`eval`: how good trained generators are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options


def eval(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN…]",
            help="Runs, or checkpoint files (default: the newest run).",
            autocompletion=options.complete_runs,
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option(help="Images generated (default: 2000), or upscaled (default: all).")
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="inception or mobilenet_v2 (default: the first whose weights are here).",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Real images to measure against (default: the run's held-out images, else those trained on).",
        ),
    ] = None,
    step: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Checkpoint of this step; may be repeated (default: the last, and the best kept)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    set_: options.Set = None,
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
    json: options.Json = False,
) -> int:
    """Score generators against real images: KID, FID, precision and recall, density and coverage; or PSNR, SSIM and
    perceptual distances of upscaled photographs. The scores are written into the runs."""
    targets = [options.run_or_checkpoint(name, runs_dir) for name in dict.fromkeys(runs or [])]
    targets = targets or [options.run_or_checkpoint(None, runs_dir)]
    from ..config.presets import Override, parse_set
    from ..evaluate.asked import Asked
    from ..evaluate.evaluate import evaluate, table
    from ..runtime.report import Reporter, emit, emit_json

    overrides = [parse_set(text) for text in set_ or []]
    if data is not None:
        own: dict[str, Any] = {"data.path": data, "data.valid_path": None, "data.valid_fraction": 0.0}
        own |= {"data.lr_path": None, "data.valid_lr_path": None}
        overrides = [Override("--data", key, value) for key, value in own.items()] + overrides
    asked = Asked(num=num, extractor=extractor, overrides=overrides, steps=tuple(step or ()))
    report = Reporter()
    records = evaluate(targets, asked, options.choose_device(device), report, trust_code)
    if json:
        emit_json(records)
        return 0
    emit(table(records))
    names = [target.name for target in targets if not isinstance(target, Path)]
    if len(names) > 1:
        where = f" --runs-dir {runs_dir}" if runs_dir != options.RUNS else ""
        report.note(f"next: fmrun compare {' '.join(names)}{where} --html compare.html")
    return 0
