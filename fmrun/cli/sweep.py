"""`sweep`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import (
    RUNS,
    Balance,
    BatchSize,
    ConfigFile,
    Data,
    Device,
    Json,
    Lambda,
    Layers,
    Preset,
    RunsDir,
    Set,
    Steps,
    TrustCode,
    as_overrides,
)

if TYPE_CHECKING:
    from ..report import Reporter
    from ..sweep.launch import Launcher
    from ..sweep.plan import Planned, Sweep

LAUNCHERS = ("local", "slurm", "submitit")


def sweep(
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="FIELD=VALUE,VALUE…",
            help="Vary a field, e.g. --over feature_matching.weight=0,0.1,1; lists in brackets: --over layers=[block1],[all].",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N|LIST", help="How many (5: 0 to 4), or which (3,7,9).")
    ] = "5",
    preset: Preset = None,
    config: ConfigFile = None,
    lambda_feature: Lambda = None,
    balance: Balance = None,
    layers: Layers = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    data: Data = None,
    device: Device = None,
    set_: Set = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the sweep (default: one that the same command finds again)."),
    ] = None,
    runs_dir: RunsDir = RUNS,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, max=1024, help="Runs at a time (default: 1, or one a GPU).", show_default=False),
    ] = None,
    evaluate: Annotated[
        bool | None,
        typer.Option("--eval/--no-eval", help="Evaluate each run (default: if it can be).", show_default=False),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="KEY", help="Compare by this (default: KID, or what there is).")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option("--control", metavar="COMBINATION", help="Compare with this one (default: weight 0)."),
    ] = None,
    launcher: Annotated[
        str, typer.Option("--launcher", help="local, slurm, or submitit (its local executor).")
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="For the scheduler, e.g. partition=gpu.", show_default=False),
    ] = None,
    trust_code: TrustCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, train nothing.")] = False,
    json: Json = False,
) -> int:
    """Train a grid of settings over several seeds, and compare. The same command again goes on where it stopped."""
    from ..presets import DEFAULT
    from ..report import Reporter
    from ..sweep import grid, plan

    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher is '{launcher}'; allowed: {', '.join(LAUNCHERS)}")
    options = _slurm_options(slurm, launcher)
    overrides = as_overrides(
        set_,
        lambda_feature=lambda_feature,
        balance=balance,
        layers=layers,
        steps=steps,
        batch_size=batch_size,
        data=data,
        device=device,
    )
    overs = [grid.parse_over(text) for text in over or []]
    wanted = grid.parse_seeds(seeds)
    keys = [one.key for one in overs]
    found = grid.combinations(preset, config, overrides, overs, trust_code)
    label = preset or (config.stem if config is not None else DEFAULT)
    report = Reporter()
    target = plan.open_sweep(runs_dir, name or grid.default_name(label, found, keys))
    if dry_run:
        planned = target.add(found, keys, wanted)
        plan.control_of(target, control)
        _check(target, planned, launcher, trust_code)
        return _list(target, planned, json, report)
    with target.lock():
        target = plan.open_sweep(runs_dir, target.name)  # another command may have written it meanwhile
        planned = target.add(found, keys, wanted)
        plan.control_of(target, control)
        gpus = _check(target, planned, launcher, trust_code)
        at = _launcher(launcher, target, gpus, jobs, options)
        target.write(sys.argv)
        return _run(target, planned, at, report, preset, evaluate, metric, control, trust_code, json)


def _check(target: Sweep, planned: list[Planned], launcher: str, trust_code: bool) -> int:
    """Look at every combination that is still to be trained; how many GPUs the runs have here."""
    from ..sweep import preflight
    from ..sweep.plan import standing

    open_ = [
        p for p in planned if standing(p, target.combinations[p.combination].config) not in ("finished", "diverged")
    ]
    configs = {p.combination: target.settings(p.combination) for p in open_}
    return preflight.check(configs, launcher == "slurm", trust_code).gpus if configs else 0


def _list(target: Sweep, planned: list[Planned], json: bool, report: Reporter) -> int:
    from ..report import counted, emit, emit_json, format_table
    from ..sweep.plan import standing

    rows = []
    for one in planned:
        combination = target.combinations[one.combination]
        rows.append((one.name, target.label(one.combination), one.seed, standing(one, combination.config)))
    if json:
        columns = ("run", "combination", "label", "seed", "state")
        emit_json(
            {
                "sweep": target.name,
                "path": str(target.folder),
                "runs": [
                    dict(zip(columns, (run, one.combination, text, seed, state), strict=True))
                    for one, (run, text, seed, state) in zip(planned, rows, strict=True)
                ],
            }
        )
    else:
        emit(format_table(("run", "combination", "seed", "state"), rows))
    count = len({one.combination for one in planned})
    report.note(
        f"sweep {target.name}: {counted(len(planned), 'run')}, {counted(count, 'combination')} × "
        f"{counted(len(planned) // count, 'seed')}; to train: leave out --dry-run"
    )
    return 0


def _run(
    target: Sweep,
    planned: list[Planned],
    at: Launcher,
    report: Reporter,
    preset: str | None,
    evaluate: bool | None,
    metric: str | None,
    control: str | None,
    trust_code: bool,
    json: bool,
) -> int:
    from ..report import counted, emit, emit_json
    from ..sweep import launch, table
    from ..sweep.work import Stop, Worker

    report.note(f"sweep {target.name} in {target.folder}: {counted(len(planned), 'run')}")
    share = isinstance(at, launch.Local) and at.slots > 1
    with Stop().watching() as stop:
        worker = Worker(target, at, report, preset=preset, evaluate=evaluate, share_cores=share, trust_code=trust_code)
        outcome = worker.work(planned, stop)
    for run, why in outcome.failures.items():
        report.warn(f"run {run} failed: {why}")
    if outcome.signal:
        report.note("stopped; to go on, give the same command again")
        return outcome.exit_code
    comparison = table.compare(target, metric, control)
    if json:
        emit_json(table.to_json(comparison, outcome.failures))
    else:
        emit(table.text(comparison))
    for sentence in table.sentences(comparison):
        report.note(sentence)
    if outcome.failures:
        report.note("the same command tries again what failed")
    report.note(f"next: fmrun compare {target.folder}/*_seed-* --html {target.name}.html")
    return outcome.exit_code


def _launcher(name: str, target: Sweep, gpus: int, jobs: int | None, options: dict[str, Any]) -> Launcher:
    from ..sweep import launch

    if name == "local":
        return launch.Local(jobs or max(1, gpus), gpus)
    return launch.Submitit(name, target.folder / "submitit", jobs, options)


def _slurm_options(given: list[str] | None, launcher: str) -> dict[str, Any]:
    from ..config.fields import toml_value

    if given and launcher == "local":
        raise UserError("--slurm goes with --launcher slurm")
    options = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--slurm {text}: write it as --slurm KEY=VALUE, like --slurm partition=gpu")
        typed = toml_value(value.strip())
        options[key.strip()] = typed if typed is not None else value.strip()
    return options
