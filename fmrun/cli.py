"""The command line: parse, call one function, return its exit code. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import UserError

if TYPE_CHECKING:
    import torch

    from .config import Config
    from .dist import World
    from .presets import Override
    from .report import Reporter
    from .runs import Run

app = typer.Typer(
    name="fmrun",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete_presets(incomplete: str) -> list[str]:
    from .presets import names

    return [name for name in names() if name.startswith(incomplete)]


def _complete_runs(incomplete: str) -> list[str]:
    from .runs import all_runs

    return [run.name for run in all_runs(Path("runs")) if run.name.startswith(incomplete)]


Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Preset to start from (default: dcgan-fm).", autocompletion=_complete_presets),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML or YAML file that lies on top of the preset.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "-s", "--set", metavar="KEY=VALUE", help="Set any field, e.g. -s train.batch_size=32.", show_default=False
    ),
]
Lambda = Annotated[str | None, typer.Option("--lambda-feature", metavar="NUMBER", help="feature_matching.weight")]
Balance = Annotated[str | None, typer.Option("--balance", metavar="MODE", help="feature_matching.balance")]
Layers = Annotated[str | None, typer.Option("--layers", metavar="LIST", help="feature_matching.layers, e.g. block1,-1")]
Steps = Annotated[str | None, typer.Option("--steps", metavar="N", help="train.steps")]
BatchSize = Annotated[str | None, typer.Option("--batch-size", metavar="N", help="train.batch_size")]
Data = Annotated[str | None, typer.Option("--data", metavar="PATH", help="data.path")]
Seed = Annotated[str | None, typer.Option("--seed", metavar="N", help="seed")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="device: auto, cpu, cuda, cuda:N, mps")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder that holds the runs.")]
RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="Run (default: the newest).", autocompletion=_complete_runs, show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

RUNS = Path("runs")

FREE_IN_PROBE = ("feature_matching.", "data.path", "data.root", "data.fit", "train.batch_size", "seed", "device")
"""What probing a run may look at otherwise than the run did: nothing here changes its nets."""


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


def _overrides(sets: list[str] | None, **shorthands: str | None) -> list[Override]:
    """Shorthands and `-s` as overrides; a name is that of the flag, with underscores."""
    from .presets import SHORTHANDS, Override, parse_set

    found = []
    for name, value in shorthands.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            found.append(Override(flag, SHORTHANDS[flag], value))
    return found + [parse_set(text) for text in sets or []]


@contextmanager
def _world(device: str) -> Iterator[tuple[World, Reporter]]:
    """The processes that share the work, and a reporter that speaks for the first."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic kernels need it
    from .dist import World
    from .report import Reporter

    world = World.join(device)
    try:
        yield world, Reporter(quiet_rank=not world.first)
    finally:
        world.leave()


@app.command()
def train(
    preset: Preset = None,
    config: ConfigFile = None,
    lambda_feature: Lambda = None,
    balance: Balance = None,
    layers: Layers = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run (default: PRESET-001, …).")] = None,
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
) -> int:
    """Train a new run. Without arguments: the preset dcgan-fm on bundled images."""
    from .presets import DEFAULT, flatten, resolve

    resolved = resolve(
        preset,
        config,
        _overrides(
            set_,
            lambda_feature=lambda_feature,
            balance=balance,
            layers=layers,
            steps=steps,
            batch_size=batch_size,
            data=data,
            seed=seed,
            device=device,
        ),
    )
    label = preset or (config.stem if config is not None else DEFAULT)
    with _world(resolved.device) as (world, report):
        from . import train as training

        if dry_run:
            final = training.dry_run(resolved, report, world)
            if world.first:
                _emit_json(final.model_dump(mode="json"))
            report.note(f"{len(flatten(final))} settings, all valid; to train: leave out --dry-run")
            return 0
        return training.start(
            resolved, runs_dir=runs_dir, name=name, preset=label, command=sys.argv, report=report, world=world
        )


@app.command()
def resume(
    run: RunName = None,
    steps: Steps = None,
    device: Device = None,
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
) -> int:
    """Continue a run exactly where it stopped; --steps makes it longer."""
    from .presets import revise
    from .runs import find

    overrides = _overrides(set_, steps=steps, device=device)
    found = find(runs_dir, run)

    def change(saved: dict[str, Any]) -> Config:
        from .train import FREE_ON_RESUME

        return revise(saved, overrides, FREE_ON_RESUME)

    with _world(str(found.config().get("device", "auto")) if device is None else device) as (world, report):
        from . import train as training

        return training.resume(found, change, report=report, world=world)


@app.command("probe-layers")
def probe_layers(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Trained run to probe (default: none, the nets as a run of the preset would start).",
            autocompletion=_complete_runs,
            show_default=False,
        ),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    lambda_feature: Lambda = None,
    balance: Balance = None,
    layers: Layers = None,
    batch_size: BatchSize = None,
    data: Data = None,
    seed: Seed = None,
    device: Device = None,
    set_: Set = None,
    runs_dir: RunsDir = RUNS,
    no_data: Annotated[bool, typer.Option("--no-data", help="Shapes and costs only; reads no images.")] = False,
    json: Json = False,
) -> int:
    """List the discriminator's layers: what each costs, sees and would teach. A preset, a config, or a trained RUN."""
    from . import checkpoint
    from .presets import resolve, revise
    from .report import Reporter, emit
    from .runs import find

    report, found = Reporter(), None
    overrides = _overrides(
        set_,
        lambda_feature=lambda_feature,
        balance=balance,
        layers=layers,
        batch_size=batch_size,
        data=data,
        seed=seed,
        device=device,
    )
    if run is not None:
        if preset is not None or config is not None:
            raise UserError("give a run, or --preset and --config, not both")
        folder = find(runs_dir, run)
        resolved = revise(folder.config(), overrides, FREE_IN_PROBE)
        found, skipped = checkpoint.newest(folder.checkpoints)
        for sentence in skipped:
            report.warn(sentence)
        if found is None:
            raise UserError(f"run {folder.name} has no checkpoint yet; {folder.command('resume')} trains it on")
    else:
        resolved = resolve(preset, config, overrides, need_data=not no_data)
    from . import probe

    result = probe.probe(resolved, run_checkpoint=found, data=not no_data, report=report)
    if json:
        _emit_json(result)
    else:
        emit(probe.table(result))
    return 0


@app.command("data-preview")
def data_preview(
    preset: Preset = None,
    config: ConfigFile = None,
    data: Data = None,
    seed: Seed = None,
    set_: Set = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=64, help="Patches shown, or rows of images.")] = 4,
    out: Annotated[Path, typer.Option("--out", help="PNG file.")] = Path("data-preview.png"),
) -> int:
    """Draw what training would see: pairs of low and high resolution with their degradations, or real images."""
    from .presets import resolve
    from .report import emit
    from .state import TASKS

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is written as .png; give a name that ends in it")
    resolved = resolve(preset, config, _overrides(set_, data=data, seed=seed))
    task = TASKS[resolved.task]
    final, images, _ = task.open(resolved)
    task.draw_data(final, images, out, rows)
    emit(str(out))
    return 0


@app.command()
def sample(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run, or a checkpoint file (default: the newest run).",
            show_default=False,
            autocompletion=_complete_runs,
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", min=1, max=100_000, help="Images.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Image i of a seed is always the same.")] = 0,
    grid: Annotated[int | None, typer.Option("--grid", min=1, metavar="COLUMNS", help="Columns of the grid.")] = None,
    interpolate: Annotated[
        int | None,
        typer.Option("--interpolate", min=2, metavar="N", help="Walk from latent to latent in N pictures a row."),
    ] = None,
    individual: Annotated[bool, typer.Option("--individual", help="One file an image instead of a grid.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The generator as trained, not its moving average.")] = False,
    input_: Annotated[
        Path | None,
        typer.Option("--input", metavar="PATH", help="Photograph or folder to upscale.", show_default=False),
    ] = None,
    tile: Annotated[int | None, typer.Option("--tile", min=16, help="Side of the tiles of --input, in pixels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures of --input that are there.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="PNG file or folder.", show_default=False)] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    runs_dir: RunsDir = RUNS,
) -> int:
    """Draw image grids from a trained generator, or upscale photographs with one. Needs no training data."""
    target = _run_or_checkpoint(run, runs_dir)
    from . import sample as sampling
    from .report import Reporter, emit

    report = Reporter()
    source = sampling.open_source(target, raw=raw, device=_device(device), report=report)
    if input_ is not None:
        if (num, seed, grid, interpolate, individual) != (64, 0, None, None, False):
            raise UserError(
                "--num, --seed, --grid, --interpolate and --individual are for images from noise, not --input"
            )
        paths = sampling.upscale_input(source, input_, out=out, overwrite=overwrite, tile=tile, report=report)
    else:
        if tile is not None or overwrite:
            raise UserError("--tile and --overwrite go with --input")
        paths = sampling.sample(
            source, num=num, seed=seed, columns=grid, interpolate=interpolate, individual=individual, out=out
        )
    for path in paths:
        emit(str(path))
    return 0


def _device(name: str) -> torch.device:
    from .precision import choose_device
    from .presets import Override, resolve

    resolve(None, None, [Override("--device", "device", name)])  # its error, in its words
    return choose_device(name)


def _run_or_checkpoint(name: str | None, runs_dir: Path) -> Run | Path:
    from .runs import find

    if name is not None and name.endswith(".safetensors"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no checkpoint file '{name}'")
        return path
    return find(runs_dir, name)


@app.command()
def export(
    run: RunName = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A .safetensors or .onnx file (default: RUN.safetensors).", show_default=False),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="Of .safetensors: fp32, fp16 or bf16.")] = "fp32",
    raw: Annotated[bool, typer.Option("--raw", help="The generator as trained, not its moving average.")] = False,
    runs_dir: RunsDir = RUNS,
) -> int:
    """Write the generator alone, for other programs: safetensors, which spandrel (chaiNNer, ComfyUI) detects, or ONNX."""
    target = _run_or_checkpoint(run, runs_dir)
    from . import sample as sampling
    from .export import DTYPES, export_source
    from .report import Reporter, emit

    if precision not in DTYPES:
        raise UserError(f"--precision is '{precision}'; allowed: {', '.join(DTYPES)}")
    report = Reporter()
    source = sampling.open_source(target, raw=raw, device=_device("cpu"), report=report)
    name = target.stem if isinstance(target, Path) else target.name
    made = export_source(source, out or Path(f"{name}.safetensors"), precision)
    report.note(f"{made.what}, {made.size:,} bytes; read back, its images differ by at most {made.difference:.2g}")
    emit(str(made.path))
    return 0


@app.command()
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Show this one.", autocompletion=_complete_presets, show_default=False)
    ] = None,
    json: Json = False,
) -> int:
    """List the presets, or show one resolved."""
    from . import presets as library
    from .report import emit, format_table

    if name is not None:
        config = library.resolve(name, None, [], need_data=False)
        if json:
            _emit_json(config.model_dump(mode="json"))
        else:
            for key, value in library.flatten(config).items():
                emit(library.render(key, value))
        return 0
    rows = [(n, library.describe(n)) for n in library.names()]
    if json:
        _emit_json([{"name": n, "description": text, "default": n == library.DEFAULT} for n, text in rows])
    else:
        emit(format_table(("preset", "what it is"), rows))
    return 0


@app.command()
def runs(
    run: RunName = None,
    runs_dir: RunsDir = RUNS,
    json: Json = False,
) -> int:
    """List the runs, or show one."""
    from .report import Reporter, emit, format_table
    from .runs import all_runs, find

    if run is not None:
        shown = _describe_run(find(runs_dir, run))
        if json:
            _emit_json(shown)
        else:
            for key, value in shown.items():
                if value is not None:
                    emit(f"{key}: {value}")
        return 0
    found = [_describe_run(r) for r in all_runs(runs_dir)]
    if json:
        _emit_json(found)
    elif found:
        columns = ("name", "state", "step", "steps", "started")
        rows = [[*(r[c] for c in columns[:-1]), f"{str(r['started'])[:16].replace('T', ' ')} UTC"] for r in found]
        emit(format_table(columns, rows))
    else:
        Reporter().note(f"there are no runs in {runs_dir} yet; fmrun train makes one")
    return 0


def _describe_run(run: Run) -> dict[str, Any]:
    from .checkpoint import steps

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


def _emit_json(value: Any) -> None:
    from .report import emit_json

    emit_json(value)
