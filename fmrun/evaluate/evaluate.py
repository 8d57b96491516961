"""How good trained generators are: which checkpoints are measured, and what becomes of the scores.

A score never stands alone: it carries the data, the number of images, the extractor, the resolution, the resize filter
and what real images score against real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import trust
from ..config.presets import Override, from_json, revise
from ..config.schema import Config
from ..data.places import refuse_missing
from ..metrics.measures import lone_precision
from ..runs import checkpoint
from ..runs.folder import Run
from ..runtime.errors import UserError
from ..runtime.report import Reporter, format_cell
from ..runtime.table import Table
from ..sample.sample import load_source, named_code
from .asked import Asked, Scores

FREE = (
    "data.path",
    "data.root",
    "data.fit",
    "data.valid_path",
    "data.valid_fraction",
    "data.lr_path",
    "data.valid_lr_path",
    "data.skip_unreadable",
)
"""What may be measured on otherwise than the run trained: nothing here changes its generator."""


def evaluate(
    targets: Sequence[Run | Path], asked: Asked, device: torch.device, report: Reporter, trust_code: bool = False
) -> list[dict[str, Any]]:
    """Measure the chosen checkpoints of runs, or checkpoint files, and write what is found into the runs.

    Records as `Run.add_evaluation` takes them, with `run` (or the file's name) and `which`: what makes a checkpoint
    stand out among the run's (`best`, `last`).
    """
    configs = [_config(target, asked.overrides) for target in targets]
    trust.admit([named for target in targets for named in named_code(target)], trust_code)
    by_kind = {
        config.has_targets: (_name(target), config.task) for target, config in zip(targets, configs, strict=True)
    }
    if len(by_kind) > 1:
        said = " and ".join(f"{name} is of task '{task}'" for name, task in by_kind.values())
        raise UserError(f"{said}, which have no score in common; evaluate them in two commands")
    for target, config in zip(targets, configs, strict=True):
        way_out = "" if asked.other_images else f"; to measure {_name(target)} against other images: --data PATH"
        refuse_missing(config.data, config.task, way_out)
    wanted = [_wanted(target, asked) for target in targets]
    scores_of = _scores(configs[0], asked, device, report)
    records: list[dict[str, Any]] = []
    keys = {override.key for override in asked.overrides} - {"data.skip_unreadable"}
    as_trained = not any(key.startswith("data.") for key in keys)
    for target, config, paths in zip(targets, configs, wanted, strict=True):
        own: list[dict[str, Any]] = []
        for saved in _readable(target, paths, report):
            if as_trained and not own and saved.meta.data != scores_of.open(config).train.fingerprint:
                report.warn(
                    f"the images of {_name(target)} are not those it was trained on: what is held out of them now, the "
                    "generator may have learned from"
                )
            report.note(f"{_name(target)}, step {saved.step}: measuring")
            source = load_source(saved, Path("."), raw=False, device=device)
            record = {"step": saved.step, "weights": "ema", "default": asked.default, **scores_of(source, config)}
            if isinstance(target, Run):
                target.add_evaluation(record)
            own.append({"run": target.name, "which": [], **record})
            for sentence in lone_precision(f"{_name(target)}, step {saved.step}", record["metrics"]):
                report.warn(sentence)
        _mark(own, target, scores_of.headline)
        records += own
    return records


def _scores(config: Config, asked: Asked, device: torch.device, report: Reporter) -> Scores:
    """How generators of this task are measured; each way needs libraries that the other does not."""
    if config.has_targets:
        from .restored import RestoredScores

        return RestoredScores(asked, device, report)
    from .distribution import DistributionScores

    return DistributionScores(asked, device, report)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Rows of runs, then of what real images (or bicubic upscaling) reach; beside KID stands its standard error."""
    scores = dict.fromkeys(name for r in records for name, value in r["metrics"].items() if value is not None)
    with_error = {name for r in records for name in r.get("error", {})}
    names = [head for name in scores for head in ([name, f"{name} ±"] if name in with_error else [name])]

    def row(head: Sequence[Any], values: dict[str, Any], errors: dict[str, Any]) -> list[str]:
        both = values | {f"{name} ±": error for name, error in errors.items()}
        return [format_cell(cell) for cell in (*head, *(both.get(name) for name in names))]

    cells = []
    for r in records:
        head = [r["run"], r["step"], r["weights"], ", ".join(r["which"]), r["settings"]["num"]]
        cells.append(row(head, r["metrics"], r.get("error", {})))
    for r in {tuple(r["settings"].values()): r for r in records}.values():
        if "bicubic" in r:
            cells.append(row(["(bicubic)", None, "", "", r["settings"]["num"]], r["bicubic"], {}))
        else:
            head = ["(real images)", None, "", "floor", r["settings"]["reals"]]
            cells.append(row(head, r["floor"], r.get("floor_error", {})))
    images = "photographs" if "bicubic" in records[0] else "images"
    heads = ["run", "step", "weights", "which", images, *names]
    return Table(heads, cells, "l" + "r" * (len(heads) - 1)).text()


def _name(target: Run | Path) -> str:
    return target.name if isinstance(target, Path) else f"run {target.name}"


def _config(target: Run | Path, overrides: Sequence[Override]) -> Config:
    data = checkpoint.read_meta(target).config if isinstance(target, Path) else target.config()
    if not overrides:
        return from_json(data)
    return revise(data, overrides, FREE)


def _wanted(target: Run | Path, asked: Asked) -> list[Path]:
    """The checkpoints to measure, in the order of their steps; UserError if there are none such."""
    if isinstance(target, Path):
        if asked.steps:
            raise UserError(f"{target} is one checkpoint; --step is for runs")
        return [target]
    known = checkpoint.steps(target.checkpoints)
    if not known:
        raise target.no_checkpoint()
    missing = next((step for step in asked.steps if step not in known), None)
    if missing is not None:
        raise UserError(
            f"--step {missing}: run {target.name} has checkpoints of steps {', '.join(map(str, known))} only; more are "
            "kept by -s checkpoint.keep_every=N when training"
        )
    best = (target.status().get("best") or {}).get("step")
    steps = sorted(set(asked.steps)) or [step for step in known if step in (known[-1], best)]
    return [checkpoint.path_of(target.checkpoints, step) for step in steps]


def _readable(target: Run | Path, paths: Sequence[Path], report: Reporter) -> Iterator[checkpoint.Checkpoint]:
    """Checkpoints one by one; a damaged one is left out with a warning, unless all are."""
    broken = []
    for path in paths:
        try:
            yield checkpoint.read(path)
        except checkpoint.CorruptCheckpoint as error:
            broken.append(path)
            if len(broken) == len(paths):
                raise
            report.warn(f"{error}; it is left out")


def _mark(records: list[dict[str, Any]], target: Run | Path, headline: str) -> None:
    """Say which record is of the run's last checkpoint, and which the best of several."""
    if not isinstance(target, Run):
        return
    last = checkpoint.steps(target.checkpoints)[-1]
    for record in records:
        if record["step"] == last:
            record["which"].append("last")
    measured = [r for r in records if r["metrics"].get(headline) is not None]
    if len(measured) > 1:
        sign = -1 if headline.startswith("psnr") else 1
        min(measured, key=lambda r: sign * r["metrics"][headline])["which"].append("best")
