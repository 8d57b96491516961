"""The command line: parse, call one function, return its exit code. Nothing heavy is imported before a command runs.

Each file of this folder that has a function of its own name is a command.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated

import typer

from .. import __version__

ORDER = ("train", "resume", "probe_layers", "data_preview", "sample", "eval", "compare", "sweep", "bench", "export")
"""In which the help lists commands; others follow."""

app = typer.Typer(
    name="fmrun",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        print(f"fmrun {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train GANs with and without feature matching, and see what it does.

    Start with: fmrun train
    """


for name in (*ORDER, *(module.name for module in iter_modules(__path__) if module.name not in ORDER)):
    if command := getattr(import_module(f".{name}", __name__), name, None):
        app.command()(command)
