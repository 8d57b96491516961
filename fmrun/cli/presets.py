"""`presets`: list them, or show one."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one.", autocompletion=options.complete_presets)] = None,
    json: options.Json = False,
) -> int:
    """List the presets, or show one resolved."""
    from ..config import presets as library
    from ..runtime.report import emit, emit_json, format_table

    if name is not None:
        library.load(name)  # its error, without a flag that was not typed
        config = library.resolve(name, None, [], need_data=False)
        if json:
            emit_json(config.model_dump(mode="json"))
        else:
            for key, value in library.flatten(config).items():
                emit(library.render(key, value))
        return 0
    rows = [(n, library.describe(n)) for n in library.names()]
    if json:
        emit_json([{"name": n, "description": text, "default": n == library.DEFAULT} for n, text in rows])
    else:
        emit(format_table(("preset", "what it is"), rows))
    return 0
