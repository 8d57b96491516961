"""`probe-layers`: the discriminator's layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..runtime.errors import UserError
from . import options

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
            autocompletion=options.complete_runs,
        ),
    ] = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    lambda_feature: options.Lambda = None,
    balance: options.Balance = None,
    layers: options.Layers = None,
    batch_size: options.BatchSize = None,
    data: options.Data = None,
    seed: options.Seed = None,
    device: options.Device = None,
    set_: options.Set = None,
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
    no_data: Annotated[bool, typer.Option("--no-data", help="Shapes and costs only; reads no images.")] = False,
    json: options.Json = False,
) -> int:
    """List the discriminator's layers: what each costs, sees and would teach. A preset, a config, or a trained RUN."""
    from ..config import trust
    from ..config.presets import resolve, revise
    from ..data.places import refuse_missing
    from ..runs.folder import find
    from ..runtime.report import Reporter, emit, emit_json

    report, latest = Reporter(), None
    overrides = options.as_overrides(context)
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
        from ..runs import checkpoint

        latest, skipped = checkpoint.newest(folder.checkpoints)
        for sentence in skipped:
            report.warn(sentence)
        if latest is None:
            raise folder.no_checkpoint()
    else:
        resolved = resolve(preset, config, overrides, need_data=not no_data, trust_code=trust_code)
    if not no_data:
        refuse_missing(resolved.data, resolved.task, "" if run is None else "; give others with --data, or --no-data")
    from ..probe import probe

    result = probe.probe(resolved, run_checkpoint=latest, data=not no_data, report=report)
    if json:
        emit_json(result)
    else:
        emit(probe.layer_table(result))
    return 0
