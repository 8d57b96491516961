"""Pictures of the same latents, or photographs, by each group's generator."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .. import checkpoint, trust
from ..errors import UserError
from ..grid import encode_png, grid
from ..report import Reporter
from ..runs import Run
from ..sample import draw, named_code, open_source
from ..tasks.generate import latents
from .comparison import Comparison
from .groups import Group, Member

BUDGET = 1_400_000
"""Bytes of pixels that all pictures of a page may hold together; a PNG is somewhat smaller."""

MOST = 64
"""Images in a grid."""

PHOTO_ROW = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Picture:
    """One group's picture."""

    group: str
    run: str
    step: int
    caption: str
    png: bytes
    width: int
    height: int


def pictures(
    comparison: Comparison, *, seed: int, device: torch.device, report: Reporter, trust_code: bool = False
) -> tuple[Picture, ...]:
    """A picture a group, in their order: of images from noise a grid of the latents of `seed`, of super-resolution the
    last sheet that training drew. Groups of which there is neither are warned of and left out."""
    groups = comparison.groups
    budget = BUDGET // len(groups)
    chosen = [_shown(group, groups) for group in groups]
    if comparison.task == "generate":
        trust.admit([named for member in chosen for named in named_code(Run(Path(member.path)))], trust_code)
    found = []
    for group, member in zip(groups, chosen, strict=True):
        run = Run(Path(member.path))
        picture = None
        if comparison.task == "generate" and checkpoint.steps(run.checkpoints):
            picture = _drawn(group, member, run, seed, budget, device, report)
        picture = picture or _last_sheet(group, member, run, comparison.task, budget)
        if picture is None:
            report.warn(f"{member.name} has neither a checkpoint nor a picture of its samples; it is not shown")
        else:
            found.append(picture)
    return tuple(found)


def _shown(group: Group, groups: Sequence[Group]) -> Member:
    """The run that stands for its group: one that has not failed, on the seed that most groups have."""
    seeds = [{m.seed for m in other.members} for other in groups]
    return min(group.members, key=lambda m: (m.failed, -sum(m.seed in have for have in seeds), m.seed))


def _drawn(
    group: Group, member: Member, run: Run, seed: int, budget: int, device: torch.device, report: Reporter
) -> Picture | None:
    """A grid by the averaged generator of the newest checkpoint; None where it cannot be read."""
    try:
        source = open_source(run, raw=False, device=device, report=report)
    except UserError as error:
        report.warn(str(error))
        return None
    data = source.config.data
    assert data.channels is not None
    side = max(2, min(math.isqrt(MOST), math.isqrt(budget // (data.channels * data.image_size**2))))
    noise = latents(seed, "sample", range(side * side), source.config.generator.latent_dim)
    sheet = grid(draw(source, noise), side)
    caption = f"step {source.step}, moving average, latents of seed {seed}"
    return Picture(group.name, member.name, source.step, caption, encode_png(sheet), sheet.shape[2], sheet.shape[1])


def _last_sheet(group: Group, member: Member, run: Run, task: str, budget: int) -> Picture | None:
    """The last sheet of samples that training drew, as many whole rows of it as the budget allows."""
    sheets = {int(m[1]): p for p in run.samples.glob("step-*.png") if (m := PHOTO_ROW.fullmatch(p.name))}
    if not sheets:
        return None
    step = max(sheets)
    try:
        with Image.open(sheets[step], formats=("PNG",)) as opened:
            sheet = opened.convert("RGB") if opened.mode not in ("L", "RGB") else opened.copy()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # no PNG, or a damaged one
        return None
    if task == "upscale":  # rows of four pictures, each with a gap of 4 pixels to its left and above
        row = (sheet.width - 4) // 4
        rows = max(1, min((sheet.height - 4) // row, budget // (sheet.width * row * len(sheet.getbands()))))
        sheet = sheet.crop((0, 0, sheet.width, rows * row + 4))
        caption = f"step {step}: low resolution, bicubic, generated, original"
    else:
        caption = f"step {step}, as drawn in training: its checkpoints are gone, and the latents are those of the run's own seed"
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return Picture(group.name, member.name, step, caption, buffer.getvalue(), *sheet.size)
