"""`sweep`."""

from __future__ import annotations

import json as json_
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import INTERNAL, OK, UserError
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
    from ..sweep.item import Children, Item
    from ..sweep.launch import Ended

INDICES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "AWS_BATCH_JOB_ARRAY_INDEX")
"""Where job arrays of Slurm, Kubernetes and AWS Batch say which of them a job is."""


def sweep(
    number: Annotated[
        int | None,
        typer.Argument(
            metavar="[N]", help="With --item: which run, from 0 (default: what the job array says).", show_default=False
        ),
    ] = None,
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
    plan: Annotated[
        bool, typer.Option("--plan", help="Print one line of JSON per run (name, argv), train nothing.")
    ] = False,
    item: Annotated[
        bool, typer.Option("--item", help="Train, resume or skip one run, the N-th of --plan, and evaluate it.")
    ] = False,
    launcher: Annotated[
        Literal["local", "slurm", "ray"], typer.Option("--launcher", help="Where the runs are trained.")
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="For the scheduler, e.g. partition=gpu.", show_default=False),
    ] = None,
    cpus_per_run: Annotated[
        float, typer.Option("--cpus-per-run", min=0, help="Processor cores that Ray gives a run.")
    ] = 1,
    gpus_per_run: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-run",
            min=0,
            help="GPUs that Ray gives a run, also a part of one (default: 1 where there are any).",
            show_default=False,
        ),
    ] = None,
    trust_code: TrustCode = False,
    json: Json = False,
) -> int:
    """Train a grid of settings over several seeds, and compare. The same command again goes on where it stopped."""
    from ..presets import DEFAULT
    from ..report import Reporter, counted, emit
    from ..sweep import grid, launch, preflight
    from ..sweep.item import Children, Item, work

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
    chosen = grid.parse_seeds(seeds)
    combinations = grid.combinations(preset, config, overrides, overs, trust_code)
    label = preset or (config.stem if config is not None else DEFAULT)
    folder = _folder(runs_dir, name or grid.default_name(label, combinations, [one.key for one in overs]))
    # seed by seed: a sweep that is stopped has compared what it could
    items = [Item(folder, one, seed, evaluate, trust_code) for seed in chosen for one in combinations]
    report = Reporter()
    if plan:
        typed = ["fmrun", *(word for word in sys.argv[1:] if word != "--plan"), "--item"]
        for place, one in enumerate(items):
            emit(json_.dumps({"name": one.name, "argv": [*typed, str(place)]}))
        return OK
    source = str(Path(__file__).parents[2])  # so that the processes of the runs import this fmrun
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), source)))
    if item:
        one, children = items[_place(number, len(items))], Children()
        one.refuse_another()
        with children.watching():
            code = work(one, children, None, {})
        report.note(f"run {one.name} is {one.state}")
        return code
    if number is not None:
        raise UserError(f"there is no place for '{number}': which run to train is given with --item {number}")
    for one in items:
        one.refuse_another()
    gpus, unscored = 0, ""
    open_ = {one.combination.name for one in items if one.state not in ("finished", "diverged")}
    if checked := [one for one in combinations if one.name in open_]:
        gpus, unscored = preflight.check(preset, config, checked, trust_code, launcher != "local")
    if unscored and evaluate is None:
        report.warn(f"the runs will not be evaluated: {unscored}")
        items = [replace(one, evaluate=False) for one in items]
    where = runs_dir / folder.name
    report.note(f"sweep {folder.name} in {where}: {counted(len(items), 'run')}; what they say is in {where / 'logs'}")
    pending, children = [one for one in items if not one.done], Children()
    if launcher == "local":
        ended = launch.local(pending, children, jobs or max(1, gpus), gpus)
    elif launcher == "slurm":
        ended = launch.slurm(pending, children, folder / "submitit", jobs, options)
    else:
        ended = launch.on_ray(pending, children, cpus_per_run, gpus_per_run)
    failed = _follow(ended, len(items), len(items) - len(pending), children, report)
    if children.signal:
        report.note("stopped; to go on, give the same command again")
        return 128 + children.signal
    _compare(items, metric, control, json, report)
    report.note(f"next: fmrun compare {where}/*_seed-* --html {folder.name}.html")
    return INTERNAL if failed else OK


def _folder(runs_dir: Path, name: str) -> Path:
    """Where the runs lie."""
    from ..runs import check_new, check_spelling

    check_new(runs_dir, None)
    check_spelling(name, "sweep")
    if (runs_dir / name / "config.json").exists():
        raise UserError(f"--name {name}: there is a run of this name in {runs_dir}; give the sweep another")
    return (runs_dir / name).absolute()


def _place(number: int | None, count: int) -> int:
    """Which run `--item` means."""
    if number is None:
        said = [os.environ[name] for name in INDICES if os.environ.get(name, "").isdecimal()]
        if not said:
            raise UserError(
                f"--item: give the number of the run, 0 to {count - 1}, or start it in a job array that sets one of "
                f"{', '.join(INDICES)}"
            )
        number = int(said[0])
    if not 0 <= number < count:
        raise UserError(f"--item {number}: the runs of this sweep are 0 to {count - 1}; --plan lists them")
    return number


def _follow(ended: Ended, total: int, done: int, children: Children, report: Reporter) -> int:
    """Say of each run how it ended, and how far the sweep is; the number of those that failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ..report import counted

    failed = 0
    if done:
        report.note(f"{done} of {counted(total, 'run')} done already")
    columns = (BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        children.watching(),
        Progress(*columns, console=report.console, disable=report.console is None, expand=True, transient=True) as bar,
    ):
        task = bar.add_task("", total=total, completed=done)
        for item, said in ended:
            state, so_far = item.state, f"{done + failed + 1} of {counted(total, 'run')}"
            if state == "diverged" or (state == "finished" and (item.evaluated or not item.evaluate)):
                done += 1
                report.note(f"{item.name} {state} ({so_far})")
                if not item.done:
                    report.warn(f"{item.name} is not evaluated: {item.why()}")
            elif not children.signal:
                failed += 1
                report.warn(f"{item.name} failed: {said or item.why()}; the same command tries it again ({so_far})")
            bar.update(task, completed=done + failed)
    return failed


def _compare(items: list[Item], metric: str | None, control: str | None, json: bool, report: Reporter) -> None:
    """The table of `fmrun compare`."""
    from ..compare.comparison import compare, to_json
    from ..compare.table import text
    from ..report import emit, emit_json

    there = [one for one in items if one.run.config_file.is_file()]
    if len(there) < 2:
        return
    anchor = next((one.name for one in there if one.combination.name == control), control)
    comparison = compare([one.run for one in there], metric=metric, control=anchor)
    for sentence in comparison.warnings:
        report.warn(sentence)
    if json:
        emit_json(to_json(comparison))
    else:
        emit(text(comparison))


def _slurm_options(given: list[str] | None, launcher: str) -> dict[str, Any]:
    from ..config.base import toml_value

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
