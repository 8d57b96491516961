"""A comparison as one HTML file that needs nothing else: no network, and no script to be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__
from ..report import Reporter
from ..runs import saving, write_atomic
from . import sections
from .comparison import Comparison
from .markup import View, _, colours
from .pictures import Picture, pictures
from .summary import summary
from .verdict import verdict

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content-Security-Policy: the browser itself refuses anything from elsewhere."""


def write(
    comparison: Comparison,
    path: Path,
    *,
    seed: int,
    device: torch.device,
    report: Reporter,
    trust_code: bool = False,
) -> None:
    """Write the page, whole or not at all. Raises SaveError when the disk refuses."""
    drawn = pictures(comparison, seed=seed, device=device, report=report, trust_code=trust_code)
    text = page(comparison, drawn)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())


def page(comparison: Comparison, drawn: Sequence[Picture] = ()) -> str:
    """The whole page."""
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    view = View(comparison, verdict(comparison), tuple(colours(comparison)))
    names = ", ".join(group.name for group in comparison.groups)
    body = "".join(
        [
            sections.head(view),
            summary(view),
            sections.differences(view),
            sections.curves(view),
            sections.pictures(view, drawn),
            sections.runs(view),
            sections.measures(view),
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{_(f"{names} compared")}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>fmrun {__version__}</footer>
<dialog id="large"><form method="dialog"><button aria-label="Close">×</button></form><figure></figure></dialog>
<div id="tip" hidden></div>
<script>
{script}</script>
</body>
</html>
"""
