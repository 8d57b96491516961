"""`eval`: how good trained generators are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import RUNS, Json, RunsDir, Set, TrustCode, choose_device, complete_runs, run_or_checkpoint


def eval(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN…]",
            help="Runs, or checkpoint files (default: the newest run).",
            show_default=False,
            autocompletion=complete_runs,
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option("--num", help="Images generated (default: 2000), or upscaled (default: all).", show_default=False),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            "--extractor",
            metavar="NAME",
            help="inception, mobilenet_v2 or package.module:Class (default: the first whose weights are here).",
            show_default=False,
        ),
    ] = None,
    extractor_weights: Annotated[
        Path | None,
        typer.Option("--extractor-weights", metavar="FILE", help="Weights of --extractor.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Real images to measure against (default: the run's held-out images, else those trained on).",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The generator as trained, not its moving average.")] = False,
    step: Annotated[
        list[int] | None,
        typer.Option("--step", metavar="N", help="Checkpoint of this step; may be repeated.", show_default=False),
    ] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Every checkpoint kept (default: the last, and the best kept).")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Of the generated images, as for sample (default: 0).", show_default=False),
    ] = None,
    modes: Annotated[
        bool | None,
        typer.Option(
            "--modes/--no-modes",
            help="Count the kinds of clothing made (default: where the data is Fashion-MNIST, or stacked).",
            show_default=False,
        ),
    ] = None,
    modes_num: Annotated[
        int | None,
        typer.Option(
            "--modes-num",
            min=1,
            help="Images they are counted among (default: --num; 26000 where stacked).",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
    trust_code: TrustCode = False,
    json: Json = False,
) -> int:
    """Score generators against real images: KID, FID, precision and recall, density and coverage; or PSNR, SSIM and
    perceptual distances of upscaled photographs. The scores are written into the runs."""
    targets = [run_or_checkpoint(name, runs_dir) for name in dict.fromkeys(runs or [])]
    targets = targets or [run_or_checkpoint(None, runs_dir)]
    from .. import trust

    if extractor is not None and ":" in extractor:
        trust.admit([trust.Target("--extractor", extractor, typed=True)])
    from .. import evaluate as work
    from ..presets import Override, parse_set
    from ..report import Reporter, emit, emit_json

    overrides = [parse_set(text) for text in set_ or []]
    if data is not None:
        own: dict[str, Any] = {"data.path": data, "data.valid_path": None, "data.valid_fraction": 0.0}
        own |= {"data.lr_path": None, "data.valid_lr_path": None}
        overrides = [Override("--data", key, value) for key, value in own.items()] + overrides
    asked = work.Asked(
        num=num,
        extractor=extractor,
        extractor_weights=extractor_weights,
        overrides=overrides,
        raw=raw,
        steps=tuple(step or ()),
        all_checkpoints=all_checkpoints,
        seed=seed,
        modes=modes,
        modes_num=modes_num,
    )
    report = Reporter()
    records = work.evaluate(targets, asked, choose_device(device), report, trust_code)
    if json:
        emit_json(records)
        return 0
    emit(work.table(records))
    names = [target.name for target in targets if not isinstance(target, Path)]
    if len(names) > 1:
        where = f" --runs-dir {runs_dir}" if runs_dir != RUNS else ""
        report.note(f"next: fmrun compare {' '.join(names)}{where} --html compare.html")
    return 0
