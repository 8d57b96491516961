"""`runs`: list them, or show one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from ..runs.folder import Run


def runs(
    run: options.RunName = None,
    runs_dir: options.RunsDir = options.RUNS,
    json: options.Json = False,
) -> int:
    """List the runs, or show one."""
    from ..runs.folder import all_runs, find
    from ..runtime.report import Reporter, emit, emit_json, escape, format_table

    if run is not None:
        description = _describe_run(find(runs_dir, run))
        if json:
            emit_json(description)
        else:
            for key, value in description.items():
                if value is not None:
                    emit(escape(f"{key}: {value}"))
        return 0
    descriptions = [_describe_run(r) for r in all_runs(runs_dir)]
    runs_in = {file.parent.parent for file in runs_dir.glob("*/*/config.json")}
    sweeps = sorted(folder for folder in runs_in if not (folder / "config.json").exists())
    for folder in sweeps:
        Reporter().note(f"a sweep: {folder.name}; its runs: fmrun runs --runs-dir {folder}")
    if json:
        emit_json(descriptions)
    elif descriptions:
        columns = ("name", "state", "step", "steps", "started")
        rows = [
            [*(r[c] for c in columns[:-1]), r["started"] and f"{r['started'][:16].replace('T', ' ')} UTC"]
            for r in descriptions
        ]
        emit(format_table(columns, rows))
    elif not sweeps:
        Reporter().note(f"there are no runs in {runs_dir} yet; fmrun train makes one")
    return 0


def _describe_run(run: Run) -> dict[str, Any]:
    from ..runs.checkpoint import steps

    status = run.status()
    keys = ("step", "steps", "started", "updated", "exit_code", "message", "best")
    return {
        "name": run.name,
        "state": run.state,
        **{key: status.get(key) for key in keys},
        "checkpoints": steps(run.checkpoints),
        "command": " ".join(run.env().get("command", [])),
        "path": str(run.path),
    }
