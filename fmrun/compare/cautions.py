"""What a reader of a comparison has to beware of, a sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison

DATA = re.compile(r"data\.(path|image_size|scale|channels|lr_path|degradation\..*)")
"""Fields in which runs must agree to learn the same."""


def cautions(comparison: Comparison, environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The sentences; `environments` are env.json of the runs."""
    data = [field for field in comparison.differences if DATA.fullmatch(field)]
    if data:
        yield f"the runs learn from different data ({', '.join(data)}): their measures say little about each other"
    for group in comparison.groups:
        failed = [m for m in group.members if m.failed]
        if failed:
            states = " or ".join(dict.fromkeys(m.state for m in failed))
            steps = ", ".join(str(m.step) for m in failed)
            yield f"{len(failed)} of {len(group.members)} runs of {group.name} {states} (at step {steps}): not counted"
        for m in group.members:
            if not m.failed and m.state != "finished":
                yield f"{m.name} is {m.state} at step {m.step} of {m.steps}: what it shows is not its end"
    versions = sorted({f"fmrun {env.get('fmrun')} and torch {env.get('torch')}" for env in environments})
    if len(versions) > 1:
        yield f"the runs were trained by different versions ({', '.join(versions)}), which may differ in what they learn"
    column, ends = comparison.column, {m.step for group in comparison.groups for m in group.members if not m.failed}
    if (
        column is not None
        and comparison.by == "last"
        and column.step is not None
        and max(ends, default=0) > column.step
    ):
        yield f"{column.label} is compared at step {column.step}, the last at which all that count have it"
