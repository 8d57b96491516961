"""`data-preview`: what training would see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import UserError
from . import options


def data_preview(
    context: typer.Context,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    data: options.Data = None,
    seed: options.Seed = None,
    set_: options.Set = None,
    rows: Annotated[int, typer.Option(min=1, max=64, help="Patches shown, or rows of images.")] = 4,
    trust_code: options.TrustCode = False,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("data-preview.png"),
) -> int:
    """Draw what training would see: pairs of low and high resolution with their degradations, or real images."""
    from ..config.presets import resolve
    from ..data.places import refuse_missing
    from ..runtime.report import emit, escape

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is written as .png; give a name that ends in it")
    resolved = resolve(preset, config, options.as_overrides(context), trust_code=trust_code)
    refuse_missing(resolved.data, resolved.task)
    from ..runtime.files import clean
    from ..tasks import kind

    images = kind(resolved.task).open(resolved)
    clean(out.parent)
    images.draw(out, rows)
    emit(escape(str(out)))
    return 0
