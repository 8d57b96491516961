"""`probe-layers` and `data-preview`: what there is, before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .options import (
    RUNS,
    Balance,
    BatchSize,
    ConfigFile,
    Data,
    Device,
    Json,
    Lambda,
    Layers,
    Preset,
    RunsDir,
    Seed,
    Set,
    TrustCode,
    as_overrides,
    complete_runs,
)

FREE_IN_PROBE = (
    *("feature_matching.", "data.path", "data.root", "data.fit", "data.skip_unreadable"),
    *("train.batch_size", "seed", "device"),
)
"""What probing a run may look at otherwise than the run did: nothing here changes its nets."""


def probe_layers(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Trained run to probe (default: none, the nets as a run of the preset would start).",
            autocompletion=complete_runs,
        ),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    lambda_feature: Lambda = None,
    balance: Balance = None,
    layers: Layers = None,
    batch_size: BatchSize = None,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
    trust_code: TrustCode = False,
    no_data: Annotated[bool, typer.Option("--no-data", help="Shapes and costs only; reads no images.")] = False,
    json: Json = False,
) -> int:
    """List the discriminator's layers: what each costs, sees and would teach. A preset, a config, or a trained RUN."""
    from .. import trust
    from ..data.places import refuse_missing
    from ..presets import resolve, revise
    from ..report import Reporter, emit, emit_json
    from ..runs import find

    report, found = Reporter(), None
    overrides = as_overrides(context)
    if run is not None:
        if preset is not None or config is not None:
            raise UserError("give a run, or --preset and --config, not both")
        folder = find(runs_dir, run)
        resolved = revise(folder.config(), overrides, FREE_IN_PROBE)
        trust.admit(trust.targets(resolved, str(folder.config_file), folder.code()), trust_code)
        if any(
            override.key == "data.path" for override in overrides
        ):  # none of the run's other folders belongs to these images
            gone: dict[str, Any] = {"valid_path": None, "valid_lr_path": None, "lr_path": None, "valid_fraction": 0.0}
            resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update=gone)})
        from .. import checkpoint

        found, skipped = checkpoint.newest(folder.checkpoints)
        for sentence in skipped:
            report.warn(sentence)
        if found is None:
            raise folder.no_checkpoint()
    else:
        resolved = resolve(preset, config, overrides, need_data=not no_data, trust_code=trust_code)
    if not no_data:
        refuse_missing(resolved.data, resolved.task, "" if run is None else "; give others with --data, or --no-data")
    from .. import probe

    result = probe.probe(resolved, run_checkpoint=found, data=not no_data, report=report)
    if json:
        emit_json(result)
    else:
        emit(probe.table(result))
    return 0


def data_preview(
    context: typer.Context,
    preset: Preset = None,
    config: ConfigFile = None,
    data: Data = None,
    seed: Seed = None,
    set_: Set = None,
    rows: Annotated[int, typer.Option(min=1, max=64, help="Patches shown, or rows of images.")] = 4,
    trust_code: TrustCode = False,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("data-preview.png"),
) -> int:
    """Draw what training would see: pairs of low and high resolution with their degradations, or real images."""
    from ..data.places import refuse_missing
    from ..presets import resolve
    from ..report import emit, escape

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is written as .png; give a name that ends in it")
    resolved = resolve(preset, config, as_overrides(context), trust_code=trust_code)
    refuse_missing(resolved.data, resolved.task)
    from ..files import clean
    from ..tasks import kind

    images = kind(resolved.task).open(resolved)
    clean(out.parent)
    images.draw(out, rows)
    emit(escape(str(out)))
    return 0
