"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import FmrunError, UserError, reading

if TYPE_CHECKING:
    import torch

    from ..config.presets import Override
    from ..runs.folder import Run
    from ..runtime.dist import World
    from ..runtime.report import Reporter


def complete_presets(incomplete: str) -> list[str]:
    from ..config.presets import names

    return [name for name in names() if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    from ..runs.folder import run_names

    return [name for name in run_names(Path("runs")) if name.startswith(incomplete)]


Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Preset to start from (default: dcgan-fm).", autocompletion=complete_presets),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML or YAML file that lies on top of the preset.")]
Set = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Set any field, e.g. -s train.batch_size=32."),
]
Lambda = Annotated[
    str | None,
    typer.Option(
        "--lambda-feature",
        metavar="NUMBER",
        help="Strength of feature matching, λ; 0 turns it off (feature_matching.weight).",
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        "--balance",
        metavar="MODE",
        help="`gradient`: λ is a share of the adversarial gradient; `none`: a factor on the raw distance (feature_matching.balance).",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="LIST",
        help="Discriminator layers to match, e.g. key or block1,-1 (feature_matching.layers).",
    ),
]
Steps = Annotated[str | None, typer.Option("--steps", metavar="N", help="Steps to train (train.steps).")]
BatchSize = Annotated[
    str | None, typer.Option("--batch-size", metavar="N", help="Images per update (train.batch_size).")
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="Images to learn from: a folder, a file or a named set (data.path)."),
]
Seed = Annotated[str | None, typer.Option("--seed", metavar="N", help="Seed of everything random (seed).")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (device).")
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder that holds the runs.")]
RunName = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Run (default: the newest).", autocompletion=complete_runs)
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Run the code that the config or run names (nets of your own), and remember it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

RUNS = Path("runs")


def as_overrides(context: typer.Context) -> list[Override]:
    """The shorthands and `-s` that were given to a command."""
    from ..config.overrides import SHORTHANDS
    from ..config.presets import Override, parse_set

    params = context.params
    typed = ((flag, key, params.get(flag[2:].replace("-", "_"))) for flag, key in SHORTHANDS.items())
    overrides = [Override(flag, key, value) for flag, key, value in typed if value is not None]
    return overrides + [parse_set(text) for text in params.get("set_") or []]


@contextmanager
def joined(device: str) -> Iterator[tuple[World, Reporter]]:
    """The processes that share the work, and a reporter that speaks for the first."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic kernels need it
    from ..runtime.dist import World
    from ..runtime.report import Reporter

    world = World.join(device)
    try:
        yield world, Reporter(quiet_rank=not world.first)
    except FmrunError as error:
        if error.everywhere is None:
            error.everywhere = True
        raise
    finally:
        world.leave()


def choose_device(name: str) -> torch.device:
    from ..config.presets import Override, resolve
    from ..runtime.precision import choose_device as choose

    resolve(None, None, [Override("--device", "device", name)])  # its error, in its words
    return choose(name)


def run_or_checkpoint(name: str | None, runs_dir: Path) -> Run | Path:
    from ..runs.folder import find

    if name is not None and name.endswith(".safetensors"):
        path = Path(name)
        with reading(name):
            if not path.is_file():
                raise UserError(f"there is no checkpoint file '{name}'")
        return path
    return find(runs_dir, name)
