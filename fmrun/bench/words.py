"""A bench as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import format_table


def tables(result: Mapping[str, Any]) -> str:
    """Everything that was measured."""
    machine = result["machine"]
    name = ", ".join(machine["gpus"]) if machine["device"].startswith("cuda") else machine["processor"]
    parts = [f"{name}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"]
    for name, pair in result["pairs"].items():
        rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {p}" for p, rate in pair["matmul_flops"].items())
        parts.append(
            f"{name}: {pair['size']} px, batch {pair['batch_size']}, {pair['rounds']} rounds, "
            f"g {pair['g']:.3g}; matrix products {rates}\n{_steps(pair)}"
        )
        parts += [_ratios(pair), _training(pair["training"])]
    return "\n\n".join(parts)


def _steps(pair: Mapping[str, Any]) -> str:
    columns = ["step", "precision", "D forwards", "GFLOP", "ms", "quartiles", "images/s", "of matmul rate %", "MB"]
    rows = []
    for name, step in pair["steps"].items():
        low, middle, high = (1000 * s for s in step["seconds"])
        costs = [name, step["precision"], step["cost"], step["flops"] / 1e9, middle, f"{low:.4g}-{high:.4g}"]
        rows.append([*costs, step["images_per_second"], 100 * step["matmul_share"], step["memory_bytes"] / 1e6])
    return format_table(columns, rows)


def _ratios(pair: Mapping[str, Any]) -> str:
    rows = [
        [name, ratio["quartiles"][1], f"{ratio['quartiles'][0]:.3g}-{ratio['quartiles'][2]:.3g}", ratio["passes"]]
        for name, ratio in pair["ratios"].items()
    ]
    return format_table(["ratio", "median", "quartiles", "passes allow"], rows)


def _training(cost: Mapping[str, Any]) -> str:
    return (
        f"training: {cost['over_step']:.4g} × its steps alone: {cost['loop_over_step']:.4g} × from step to step, and "
        f"{cost['pause_seconds']:.3g} s every {cost['pause_every']} steps for log, evaluation, grid and checkpoint"
    )
