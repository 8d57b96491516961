"""`resume`: a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import UserError
from . import options

if TYPE_CHECKING:
    from ..config.schema import Config


def resume(
    context: typer.Context,
    run: options.RunName = None,
    steps: options.Steps = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the run's images are now, if they were moved.")
    ] = None,
    device: options.Device = None,
    set_: options.Set = None,
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
) -> int:
    """Continue a run exactly where it stopped; --steps makes it longer."""
    from ..config import trust
    from ..config.presets import FREE_ON_RESUME, HORIZONS, PLACES, revise
    from ..data.places import located
    from ..runs.folder import find

    overrides = options.as_overrides(context)
    free = FREE_ON_RESUME + HORIZONS + (PLACES if data is not None else PLACES[1:])
    place = next((override for override in overrides if override.key == "data.path"), None)
    if data is None and place is not None:
        raise UserError(
            f"{place.flag}: where the run's images were moved to is said by --data PATH; with other images it would be another "
            "experiment: fmrun train"
        )
    its_run = find(runs_dir, run)

    def change(saved: dict[str, Any]) -> Config:
        config = revise(saved, overrides, free)
        trust.admit(trust.targets(config, str(its_run.config_file), its_run.code()), trust_code)
        return config.model_copy(update={"data": located(config.data, config.task)})

    with options.joined(str(its_run.config().get("device", "auto")) if device is None else device) as (world, report):
        from ..train import run as training

        return training.resume(its_run, change, report=report, world=world)
