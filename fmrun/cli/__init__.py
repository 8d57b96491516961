"""The command line: parse, call one function, return its exit code. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, listing, looking, measuring, pictures, sweep, training
from .compare import compare

app = typer.Typer(
    name="fmrun",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
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


for command in (
    training.train,
    training.resume,
    looking.probe_layers,
    looking.data_preview,
    pictures.sample,
    measuring.eval,
    compare,
    sweep.sweep,
    bench.bench,
    pictures.export,
    listing.presets,
    listing.runs,
):
    app.command()(command)
