"""`compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..runtime.errors import UserError
from . import options


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Two runs or more.", autocompletion=options.complete_runs),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with curves and pictures.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each figure as PDF and PNG.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all measurements as a table; `-`: to stdout.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="KEY", help="What decides, e.g. kid (default: by task).")
    ] = None,
    by: Annotated[
        Literal["last", "best"], typer.Option(help="Which of its values: at the last step, or the best.")
    ] = "last",
    control: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Compare the others with this (default: the one without feature matching).",
            autocompletion=options.complete_runs,
        ),
    ] = None,
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
    json: options.Json = False,
) -> int:
    """Show what differs between runs, which is better and how they got there. Runs that differ in their seed are averaged."""
    from ..compare.comparison import compare as read
    from ..compare.table import text, to_data
    from ..runs.folder import find
    from ..runtime.files import saving, write_atomic
    from ..runtime.report import Reporter, emit, emit_json

    if html is not None and (html.is_dir() or html.suffix.lower() not in (".html", ".htm")):
        raise UserError(f"--html {html}: a page is a file whose name ends in .html")
    if json and csv == Path("-"):
        raise UserError("--json and --csv -: only one can go to stdout; give --csv FILE")
    report = Reporter()
    comparison = read([find(runs_dir, run) for run in runs or []], metric, by, control)
    for sentence in comparison.warnings:
        report.warn(sentence)
    if html is not None:
        from ..compare.page import write_page

        write_page(comparison, html, device=options.choose_device("auto"), report=report, trust_code=trust_code)
        report.note(f"the page is {html}: open it in a browser")
    if figures is not None:
        from ..compare.page import write_figures

        write_figures(comparison, figures)
    table = comparison.measurements.to_csv(index=False) if csv is not None else ""
    if csv is not None and csv != Path("-"):
        with saving(csv):
            write_atomic(csv, table.encode())
    if json:
        emit_json(to_data(comparison))
    else:
        emit(table.rstrip("\n") if csv == Path("-") else text(comparison))
    return 0
