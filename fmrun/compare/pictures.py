"""Pictures of the same latents, or photographs, by each group's generator."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .. import trust
from ..config.tables import TASKS
from ..errors import UserError
from ..grid import encode_png, grid
from ..report import Reporter
from ..runs import Run
from ..sample import draw, named_code, open_source
from ..tasks.generate import latents
from .comparison import Comparison, Group, Member

BUDGET = 1_400_000
"""Bytes of pixels that all pictures of a page may hold together; a PNG is somewhat smaller."""


class Picture(NamedTuple):
    group: str
    caption: str
    png: bytes


def pictures(
    comparison: Comparison, *, seed: int, device: torch.device, report: Reporter, trust_code: bool = False
) -> list[Picture]:
    """A picture per group: of images from noise at most 8 × 8 of the latents of `seed`, of super-resolution the last sheet
    that training drew. Groups of which there is none are warned of and left out."""
    groups, budget, found = comparison.groups, BUDGET // len(comparison.groups), []
    chosen = [_representative(group, groups) for group in groups]
    if not TASKS[comparison.task].has_targets:
        trust.admit([named for member in chosen for named in named_code(Run(Path(member.path)))], trust_code)
    for group, member in zip(groups, chosen, strict=True):
        run = Run(Path(member.path))
        try:
            if TASKS[comparison.task].has_targets:
                caption, png = _last_sheet(run, budget)
            else:
                caption, png = _samples(run, seed, budget, device, report)
            found.append(Picture(group.name, f"{member.name}, {caption}", png))
        except UserError as error:
            report.warn(f"no picture of {group.name}: {error}")
    return found


def _representative(group: Group, groups: Sequence[Group]) -> Member:
    """The run that stands for its group: one that has not failed, on the seed that most groups have."""
    seeds = [{m.seed for m in other.members} for other in groups]
    return min(group.members, key=lambda m: (m.failed, -sum(m.seed in have for have in seeds), m.seed))


def _samples(run: Run, seed: int, budget: int, device: torch.device, report: Reporter) -> tuple[str, bytes]:
    """By the averaged generator of the newest checkpoint."""
    source = open_source(run, raw=False, device=device, report=report)
    data = source.config.data
    assert data.channels is not None
    side = min(8, max(2, math.isqrt(budget // (data.channels * data.image_size**2))))
    noise = latents(seed, "sample", range(side * side), source.config.generator.latent_dim)
    return f"step {source.step:,}, latents of seed {seed}", encode_png(grid(draw(source, noise), side))


def _last_sheet(run: Run, budget: int) -> tuple[str, bytes]:
    """As many whole rows as the budget allows, each of four pictures with a gap of 4 pixels to the left and above."""
    sheets = sorted(run.samples.glob(f"step-{'[0-9]' * 8}.png"))
    if not sheets:
        raise UserError(f"{run.name} has drawn no samples")
    try:
        with Image.open(sheets[-1], formats=("PNG",)) as opened:
            sheet = opened.convert("L" if opened.mode == "L" else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{sheets[-1]} cannot be read: {error}") from error
    side = (sheet.width - 4) // 4
    rows = max(1, min((sheet.height - 4) // side, budget // (sheet.width * side * len(sheet.getbands()))))
    buffer = io.BytesIO()
    sheet.crop((0, 0, sheet.width, rows * side + 4)).save(buffer, format="PNG", optimize=True)
    return f"step {int(sheets[-1].stem[5:]):,}: low resolution, bicubic, generated, original", buffer.getvalue()
