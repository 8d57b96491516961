"""`export`: the generator for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def export(
    run: options.RunName = None,
    out: Annotated[Path | None, typer.Option(help="A .safetensors or .onnx file (default: RUN.safetensors).")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The generator as trained, not its moving average.")] = False,
    runs_dir: options.RunsDir = options.RUNS,
    trust_code: options.TrustCode = False,
) -> int:
    """Write the generator alone, for other programs: safetensors, which spandrel (chaiNNer, ComfyUI) detects, or ONNX."""
    target = options.run_or_checkpoint(run, runs_dir)
    from ..runtime.report import Reporter, emit, escape
    from ..sample import sample as sampling
    from ..sample.export import export_source

    report = Reporter()
    source = sampling.open_source(
        target, raw=raw, device=options.choose_device("cpu"), report=report, trust_code=trust_code
    )
    name = target.stem if isinstance(target, Path) else target.name
    made = export_source(source, out or Path(f"{name}.safetensors"))
    report.note(f"exported {source.described(target)}")
    report.note(f"{made.what}, {made.size:,} bytes; read back, its images differ by at most {made.difference:.2g}")
    emit(escape(str(made.path)))
    return 0
