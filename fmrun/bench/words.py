"""What a bench says: tables, and sentences on what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import format_table


def hints(result: Mapping[str, Any]) -> list[str]:
    return []


def tables(result: Mapping[str, Any]) -> str:
    """Everything for the terminal."""
    return "\n\n".join([*(f"{_head(name, pair)}\n{_steps(pair)}\n\n{_stalls(pair)}" for name, pair in result["pairs"].items()), _ratios(result)])


def _head(name: str, pair: Mapping[str, Any]) -> str:
    return f"{name}: preset {pair['preset']}, {pair['size']} px, batch {pair['batch_size']}, {pair['rounds']} rounds"


def _steps(pair: Mapping[str, Any]) -> str:
    rows = [
        [
            step["words"],
            step["cost"],
            step["flops"] / 1e9,
            1000 * step["seconds"][1],
            1000 * step["seconds"][0],
            1000 * step["seconds"][2],
            step["images_per_second"],
            100 * step["product_share"],
            1000 * step["least_seconds"],
            step["memory_bytes"] / 1e6,
        ]
        for step in pair["steps"].values()
    ]
    return format_table(["step", "D forwards", "GFLOP", "ms", "from", "to", "images/s", "% of GEMM", "least ms", "MB"], rows)


def _stalls(pair: Mapping[str, Any]) -> str:
    rows = [[n, 1000 * s["seconds"], s["steps"], f"{s['setting']}={s['every']}", 100 * s["share"]] for n, s in pair["loop"]["stalls"].items()]
    return format_table(["between steps", "ms", "steps", "how often", "% of training"], rows)


def _ratios(result: Mapping[str, Any]) -> str:
    rows = []
    for name, value in result["ratios"].items():
        low, _, high = result["quartiles"].get(name, [None] * 3)
        rows.append([name, value, low, high, result["allowed"].get(name)])
    return format_table(["ratio", "median", "from", "to", "passes allow"], rows)
