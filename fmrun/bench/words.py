"""A bench as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.report import counted, format_table


def tables(result: Mapping[str, Any]) -> str:
    """Everything that was measured."""
    machine = result["machine"]
    name = ", ".join(machine["gpus"]) if machine["device"].startswith("cuda") else machine["processor"]
    parts = [f"{name}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"]
    for name, pair in result["pairs"].items():
        rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {p}" for p, rate in pair["matmul_flops"].items())
        parts.append(
            f"{name}: {pair['size']} px, batch {pair['batch_size']}, {counted(pair['rounds'], 'round')}, g {pair['g']:.3g}; "
            f"matrix products {rates}"
        )
        rows = []
        for step, row in pair["steps"].items():
            low, middle, high = (1000 * s for s in row["seconds"])
            costs = [step, row["precision"], row["cost"], row["flops"] / 1e9, middle, f"{low:.4g}-{high:.4g}"]
            rows.append([*costs, row["images_per_second"], 100 * row["matmul_share"], row["memory_bytes"] / 1e6])
        columns = ["step", "precision", "D forwards", "GFLOP", "ms", "quartiles", "images/s", "of matmul rate %", "MB"]
        parts.append(format_table(columns, rows))
        rows = []
        for ratio, row in pair["ratios"].items():
            low, middle, high = row["quartiles"]
            rows.append([ratio, middle, f"{low:.3g}-{high:.3g}", row["passes"]])
        parts.append(format_table(["ratio", "median", "quartiles", "passes allow"], rows))
        cost = pair["training"]
        parts.append(
            f"training: {cost['over_step']:.4g} × its steps alone: {cost['loop_over_step']:.4g} × from step to step, and "
            f"{cost['pause_seconds']:.3g} s every {cost['pause_every']} steps for log, evaluation, grid and checkpoint"
        )
    return "\n\n".join(parts)
