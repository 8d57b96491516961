"""`train`: a new run."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..config.schema import Config


def train(
    context: typer.Context,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    lambda_feature: options.Lambda = None,
    balance: options.Balance = None,
    layers: options.Layers = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    data: options.Data = None,
    seed: options.Seed = None,
    device: options.Device = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: PRESET-001, …).")] = None,
    set_: options.Set = None,
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
) -> int:
    """Train a new run. Without arguments: the preset dcgan-fm on bundled images."""
    from ..config.presets import DEFAULT, changes, flatten, from_json, resolve
    from ..data.places import refuse_missing
    from ..runs.folder import check_new, numbered, of_job
    from ..runtime.report import emit_json

    resolved = resolve(preset, config, options.as_overrides(context), trust_code=trust_code)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun may have restarted this, and the run be its own
        check_new(runs_dir, name)
    refuse_missing(resolved.data, resolved.task)
    label = preset or (config.stem if config is not None else DEFAULT)
    with options.joined(resolved.device) as (world, report):
        from ..train import run as training

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
