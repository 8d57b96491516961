"""`sweep`: a grid of settings × seeds, each run in a process of its own, and their comparison."""

from __future__ import annotations

import json as json_
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..runtime.errors import DIVERGED, INTERNAL, OK, UserError
from . import options

if TYPE_CHECKING:
    from ..runtime.report import Reporter
    from ..sweep.item import Item

INDICES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "AWS_BATCH_JOB_ARRAY_INDEX")
"""Where job arrays of Slurm, Kubernetes and AWS Batch say which of them a job is."""


def sweep(
    context: typer.Context,
    number: Annotated[
        int | None,
        typer.Argument(metavar="[N]", help="With --item: which run, from 0 (default: what the job array says)."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE,VALUE…",
            help="Vary a field, e.g. --over feature_matching.weight=0,0.1,1; lists in brackets: --over layers=[block1],[all].",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N|LIST", help="How many (5: 0 to 4), or which (3,7,9).")] = "5",
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    lambda_feature: options.Lambda = None,
    balance: options.Balance = None,
    layers: options.Layers = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    data: options.Data = None,
    device: options.Device = None,
    set_: options.Set = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep (default: the preset and the varied fields).")
    ] = None,
    runs_dir: options.RunsDir = options.RUNS,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time (default: 1, or one per GPU).")] = None,
    evaluate: Annotated[
        bool | None, typer.Option("--eval/--no-eval", help="Evaluate each run (default: if it can be).")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print one line of JSON per run (name, argv), train nothing.")
    ] = False,
    item: Annotated[
        bool, typer.Option("--item", help="Train, resume or skip one run, the N-th of --plan, and evaluate it.")
    ] = False,
    launcher: Annotated[Literal["local", "slurm", "ray"], typer.Option(help="Where the runs are trained.")] = "local",
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the scheduler, e.g. partition=gpu.")
    ] = None,
    cpus_per_run: Annotated[float, typer.Option(min=0, help="Processor cores that Ray gives a run.")] = 1,
    gpus_per_run: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs that Ray gives a run, also a part of one (default: 1 where there are any)."),
    ] = None,
    trust_code: options.TrustCode = False,
    json: options.Json = False,
) -> int:
    """Train a grid of settings over several seeds, and compare. The same command again goes on where it stopped."""
    from ..config.presets import DEFAULT
    from ..runtime.report import Reporter, counted, emit
    from ..sweep import grid
    from ..sweep.item import Item

    overs = [grid.parse_over(text) for text in over or []]
    chosen = grid.parse_seeds(seeds)
    combinations = grid.combinations(preset, config, options.as_overrides(context), overs, trust_code)
    label = preset or (config.stem if config is not None else DEFAULT)
    folder = _folder(runs_dir, name or grid.default_name(label, [one.key for one in overs]))
    # seed by seed: a sweep that is stopped has compared what it could
    items = [Item(folder, one, seed, evaluate, trust_code) for seed in chosen for one in combinations]
    report = Reporter()
    argv = [word for word in sys.argv[1:] if word != "--plan"]
    if plan:
        for place, one in enumerate(items):
            emit(json_.dumps({"name": one.name, "argv": ["fmrun", *argv, "--item", str(place)]}))
        return OK
    if item:
        return _work(items[_place(number, len(items))], context, report)
    if number is not None:
        raise UserError(f"there is no place for '{number}': which run to train is given with --item {number}")
    for one in items:
        one.refuse_another()

    from ..sweep import launch, preflight

    open_ = {one.combination.name for one in items if one.state not in ("finished", "diverged")}
    checked = [one for one in combinations if one.name in open_]
    gpus, unscored = preflight.check(checked, launcher != "local") if checked else (0, "")
    if unscored and evaluate is None:
        report.warn(f"the runs will not be evaluated: {unscored}")
        items, argv = [replace(one, evaluate=False) for one in items], [*argv, "--no-eval"]
    where = runs_dir / folder.name
    report.note(f"sweep {folder.name} in {where}: {counted(len(items), 'run')}; what they say is in {where / 'logs'}")
    source = str(Path(__file__).parents[2])  # so that the processes of the runs import this fmrun
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), source)))
    waiting = [
        launch.Job((*argv, "--item", str(place)), folder / "logs" / f"{one.name}.log", one)
        for place, one in enumerate(items)
        if not one.done
    ]
    done, failed, children = len(items) - len(waiting), 0, launch.Children()
    if done:
        report.note(f"{done} of {counted(len(items), 'run')} done already")
    if launcher == "local":
        ended = launch.local(waiting, children, jobs or max(1, gpus), gpus)
    elif launcher == "slurm":
        ended = launch.slurm(waiting, children, folder / "submitit", jobs, _slurm_options(slurm))
    else:
        ended = launch.on_ray(waiting, children, cpus_per_run, gpus_per_run)
    with children.watching():
        for job in ended:
            state, so_far = job.item.state, f"({done + failed + 1} of {counted(len(items), 'run')})"
            if job.item.done or (state == "finished" and not evaluate):
                done += 1
                report.note(f"{job.item.name} {state} {so_far}")
                if not job.item.done:
                    report.warn(f"{job.item.name} is not evaluated: {job.why()}")
            elif not children.signal:
                failed += 1
                report.warn(f"{job.item.name} failed: {job.why()}; the same command tries it again {so_far}")
    if children.signal:
        report.note("stopped; to go on, give the same command again")
        return 128 + children.signal
    _compare(items, json, report)
    report.note(f"next: fmrun compare {where}/*_seed-* --html {folder.name}.html")
    return INTERNAL if failed else OK


def _work(item: Item, context: typer.Context, report: Reporter) -> int:
    """Train or resume the run, or wait while another process does, and evaluate it; its exit code."""
    if hasattr(signal, "SIGUSR2"):  # Slurm sends it to every process of a job; the one that started this answers it
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    item.refuse_another()
    code = OK
    while code == OK and not item.done:
        state = item.state
        if state == "running":
            time.sleep(0.1)
            continue
        if state == "open" and (threads := item.run.env().get("threads")):
            os.environ["OMP_NUM_THREADS"] = str(threads)  # with another number a run is not the same to the bit
        try:
            code = call(context, item.command)
        except UserError as error:
            if state == "finished" and item.evaluate is None:
                report.error(str(error))
                break
            if item.state == state:  # else another process was faster
                raise
        if state == "finished":  # and evaluated, as far as it can be
            break
    report.note(f"run {item.name} is {item.state}")
    return code or (DIVERGED if item.state == "diverged" else OK)


def call(context: typer.Context, command: list[str]) -> int:
    """A command of fmrun in this process; its exit code."""
    code = context.find_root().command.main(command, "fmrun", standalone_mode=False)
    assert isinstance(code, int)
    return code


def _folder(runs_dir: Path, name: str) -> Path:
    """Where the runs lie."""
    from ..runs.folder import check_new, check_spelling

    check_new(runs_dir, None)
    check_spelling(name, "sweep")
    if (runs_dir / name / "config.json").exists():
        raise UserError(f"--name {name}: there is a run of this name in {runs_dir}; give the sweep another")
    return (runs_dir / name).absolute()


def _place(number: int | None, count: int) -> int:
    """Which run `--item` means."""
    indices = [os.environ[name] for name in INDICES if os.environ.get(name, "").isdecimal()]
    place = int(indices[0]) if number is None and indices else number
    if place is None or not 0 <= place < count:
        raise UserError(
            f"--item: give the number of the run, 0 to {count - 1} (--plan lists them), or start it in a job array that "
            f"sets one of {', '.join(INDICES)}"
        )
    return place


def _compare(items: list[Item], json: bool, report: Reporter) -> None:
    """The table of `fmrun compare`."""
    from ..compare.comparison import compare
    from ..compare.table import text, to_data
    from ..runtime.report import emit, emit_json

    runs = [one.run for one in items if one.run.config_file.is_file()]
    if len(runs) < 2:
        return
    comparison = compare(runs)
    for sentence in comparison.warnings:
        report.warn(sentence)
    if json:
        emit_json(to_data(comparison))
    else:
        emit(text(comparison))


def _slurm_options(texts: list[str] | None) -> dict[str, Any]:
    from ..config.base import toml_value

    options = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--slurm {text}: write it as --slurm KEY=VALUE, like --slurm partition=gpu")
        typed = toml_value(value.strip())
        options[key.strip()] = typed if typed is not None else value.strip()
    return options
