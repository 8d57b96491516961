"""A command by two processes, and whether two runs are one."""

from __future__ import annotations

import math
from pathlib import Path

from .commands import Background, Done, free_port, rows, saved


def two(*arguments: str) -> tuple[Done, Done]:
    """The command by two processes with the environment that torchrun gives them, and without its start-up time."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [Background(*arguments, env={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    first, second = (rank.end(120) for rank in ranks)
    assert first.code == second.code, first.err + second.err
    return first, second


def closeness(one: Path, other: Path, step: int, rel: float) -> None:
    """Losses of every read-out and all parameters equal within `rel`."""
    compared = 0
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(("loss/", "fm/", "health/")):
                assert math.isclose(a[key], b[key], rel_tol=rel, abs_tol=rel * 1e-3), (a["step"], key, a[key], b[key])
                compared += 1
    assert compared
    left, right = saved(one, step).tensors, saved(other, step).tensors
    assert left.keys() == right.keys()
    for name in left:
        if name.startswith("window"):
            continue
        x, y = left[name].double(), right[name].double()
        scale = float(x.abs().max()) or 1.0
        assert float((x - y).abs().max()) <= rel * scale, name
