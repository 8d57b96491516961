"""`train` and `resume`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import (
    RUNS,
    Balance,
    BatchSize,
    ConfigFile,
    Data,
    Device,
    Lambda,
    Layers,
    Preset,
    RunName,
    RunsDir,
    Seed,
    Set,
    Steps,
    TrustCode,
    as_overrides,
    joined,
)

if TYPE_CHECKING:
    from ..config import Config


def train(
    context: typer.Context,
    preset: Preset = None,
    config: ConfigFile = None,
    lambda_feature: Lambda = None,
    balance: Balance = None,
    layers: Layers = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: PRESET-001, …).")] = None,
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
    trust_code: TrustCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
) -> int:
    """Train a new run. Without arguments: the preset dcgan-fm on bundled images."""
    from ..data.places import refuse_missing
    from ..presets import DEFAULT, changes, flatten, from_json, resolve
    from ..report import emit_json
    from ..runs import check_new, numbered, of_job

    resolved = resolve(preset, config, as_overrides(context), trust_code=trust_code)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun may have restarted this, and the run be its own
        check_new(runs_dir, name)
    refuse_missing(resolved.data, resolved.task)
    label = preset or (config.stem if config is not None else DEFAULT)
    with joined(resolved.device) as (world, report):
        from .. import train as training

        if restarted := world.from_first(of_job(runs_dir, name, world.job) if world.first else None):
            report.note(f"the processes were restarted; they go on with run {restarted.name}")
            return training.resume(restarted, from_json, report=report, world=world)
        with world.on_first_rank() as first:
            if first:
                check_new(runs_dir, name)
        if dry_run:

            def show(final: Config) -> None:
                if world.first:
                    emit_json(final.model_dump(mode="json"))

            training.dry_run(resolved, report, world, show)
            base, differing = changes(resolved, preset, config)
            where = runs_dir / name if name is not None else numbered(runs_dir, label)
            report.note(f"goes to: {where}")
            report.note(f"differs from preset {base} in: {', '.join(differing) or 'nothing'}")
            report.note(f"{len(flatten(resolved))} settings, all valid; to train: leave out --dry-run")
            return 0
        return training.start(
            resolved, runs_dir=runs_dir, name=name, preset=label, command=sys.argv, report=report, world=world
        )


def resume(
    context: typer.Context,
    run: RunName = None,
    steps: Steps = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the run's images are now, if they were moved.")
    ] = None,
    device: Device = None,
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
    trust_code: TrustCode = False,
) -> int:
    """Continue a run exactly where it stopped; --steps makes it longer."""
    from .. import trust
    from ..data.places import located
    from ..presets import FREE_ON_RESUME, HORIZONS, PLACES, revise
    from ..runs import find

    overrides = as_overrides(context)
    free = FREE_ON_RESUME + HORIZONS + (PLACES if data is not None else PLACES[1:])
    place = next((override for override in overrides if override.key == "data.path"), None)
    if data is None and place is not None:
        raise UserError(
            f"{place.flag}: where the run's images were moved to is said by --data PATH; with other images it would be another "
            "experiment: fmrun train"
        )
    found = find(runs_dir, run)

    def change(saved: dict[str, Any]) -> Config:
        config = revise(saved, overrides, free)
        trust.admit(trust.targets(config, str(found.config_file), found.code()), trust_code)
        return config.model_copy(update={"data": located(config.data, config.task)})

    with joined(str(found.config().get("device", "auto")) if device is None else device) as (world, report):
        from .. import train as training

        return training.resume(found, change, report=report, world=world)
