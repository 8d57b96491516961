"""Pictures of the same latents, or photographs, by each group's generator."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..config import trust
from ..config.tables import TASKS
from ..data.grid import encode_png, grid
from ..runs.folder import Run
from ..runtime.errors import UserError, reading
from ..runtime.report import Reporter
from ..sample.sample import draw, named_code, open_source
from ..tasks.generate import latents
from .comparison import Comparison

COLUMNS = 6
"""Of a picture of images from noise, and its rows."""


class Picture(NamedTuple):
    group: str
    caption: str
    png: bytes


def pictures(
    comparison: Comparison, *, device: torch.device, report: Reporter, trust_code: bool = False
) -> list[Picture]:
    """A picture per group, by its run of the lowest seed that has not failed: of images from noise the first latents of
    seed 0, of super-resolution the last sheet that training drew. Groups of which there is none are warned of and left out."""
    groups, pictures = comparison.groups, []
    chosen = [min(group.members, key=lambda member: (member.failed, member.seed)) for group in groups]
    if not TASKS[comparison.task].has_targets:
        trust.admit([named for member in chosen for named in named_code(Run(Path(member.path)))], trust_code)
    for group, member in zip(groups, chosen, strict=True):
        run = Run(Path(member.path))
        try:
            if TASKS[comparison.task].has_targets:
                caption, png = _last_sheet(run)
            else:
                caption, png = _samples(run, device, report)
            pictures.append(Picture(group.name, f"{member.name}, {caption}", png))
        except UserError as error:
            report.warn(f"no picture of {group.name}: {error}")
    return pictures


def _samples(run: Run, device: torch.device, report: Reporter) -> tuple[str, bytes]:
    """By the averaged generator of the newest checkpoint."""
    source = open_source(run, raw=False, device=device, report=report)
    noise = latents(0, "sample", range(COLUMNS**2), source.config.generator.latent_dim)
    return f"step {source.step:,}, latents of seed 0", encode_png(grid(draw(source, noise), COLUMNS))


def _last_sheet(run: Run) -> tuple[str, bytes]:
    """As it lies there: nothing here decodes what others may have put into a run."""
    sheets = sorted(run.samples.glob(f"step-{'[0-9]' * 8}.png"))
    if not sheets:
        raise UserError(f"{run.name} has drawn no samples")
    with reading(sheets[-1]):
        if not sheets[-1].is_file():
            raise UserError(f"{sheets[-1]} is not a regular file")
        return f"step {int(sheets[-1].stem[5:]):,}: low resolution, bicubic, generated, original", sheets[
            -1
        ].read_bytes()
