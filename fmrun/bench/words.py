"""What a bench says: tables, and sentences on what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import format_table

SLACK = 1.05
"""By how much a step may exceed what its passes allow before it is spoken of."""

STALL = 0.02
"""Share of the training time that all interruptions together may take."""


def hints(result: Mapping[str, Any]) -> list[str]:
    """What the figures mean, and what to do next."""
    found = []
    machine = result["machine"]
    busy = [load for load in machine["load_average"] if load is not None and load > (machine["cores"] or 1)]
    if machine["device"] == "cpu" and busy:
        found.append(
            f"the machine was busy (load average {max(busy):.3g} on {machine['cores']} cores): trust the ratios, which "
            "compare steps made side by side, before milliseconds and images/s"
        )
    for name, pair in result["pairs"].items():
        found += _hints_of(name, pair, result)
    return found


def _hints_of(name: str, pair: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    prefix = "" if name == "dcgan" else f"{name}_"

    def ratio(key: str, what: str = "ratios") -> float | None:
        value = result[what].get(prefix + key)
        return None if value is None else float(value)

    found = []
    cost, allowed = ratio("fm_over_plain"), ratio("fm_over_plain", "allowed")
    assert cost is not None
    assert allowed is not None
    dearer = (
        "; the rest is the statistic itself, which fewer layers make cheaper (--layers)"
        if cost > SLACK * allowed
        else ""
    )
    found.append(
        f"{name}: feature matching makes a step {cost:.3g} times as long; its passes through the discriminator alone would "
        f"make it {allowed:.3g} times as long{dearer}"
    )
    textbook = ratio("textbook_over_fm")
    if textbook is not None:
        found.append(f"{name}: as published the same step takes {textbook:.3g} times as long as fmrun's")
    narrow = ratio("fm_over_fm_bf16")
    if narrow is not None and narrow > SLACK:
        found.append(f"{name}: train with -s precision=bf16: {narrow:.3g} times as fast here")
    loop = pair["loop"]
    if loop["stall_share"] > STALL:
        worst = max(loop["stalls"].values(), key=lambda stall: stall["share"])
        found.append(
            f"{name}: what happens between steps takes {100 * loop['stall_share']:.2g} % of training, most of it by "
            f"{worst['setting']}={worst['every']}; at twice that number it takes half as long"
        )
    step = pair["steps"]["fm"]
    if step["least_share"] < 0.5:
        found.append(
            f"{name}: the machine's measured rates would allow the step in {1000 * step['least_seconds']:.3g} ms, and it "
            f"takes {1000 * step['seconds'][1]:.4g}; a larger --batch-size wastes less (--profile says where time goes)"
        )
    return found


def tables(result: Mapping[str, Any]) -> str:
    """Everything for the terminal."""
    parts = [_machine(result["machine"])]
    for name, pair in result["pairs"].items():
        head = (
            f"{name}: preset {pair['preset']}, {pair['size']} px, batch {pair['batch_size']}, rounds {pair['rounds']}"
        )
        parts += [f"{head}, g {pair['g']['seconds']:.3g}\n{_steps(pair)}", _stalls(pair)]
        parts += [f"{step}\n{_profile(rows)}" for step, rows in pair.get("profile", {}).items()]
    return "\n\n".join([*parts, _ratios(result)])


def _machine(machine: Mapping[str, Any]) -> str:
    products = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {name}" for name, rate in machine["product_flops"].items())
    loads = " to ".join("?" if load is None else f"{load:.3g}" for load in machine["load_average"])
    return (
        f"{machine['name']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"load average {loads}\nmatrix products {products}; memory {machine['memory_bytes_per_second'] / 1e9:.3g} GB/s"
    )


def _steps(pair: Mapping[str, Any]) -> str:
    columns = ["step", "D forwards", "GFLOP", "GB", "ms", "quartiles", "images/s", "GEMM %", "least ms", "MB"]
    rows = []
    for step in pair["steps"].values():
        low, typical, high = (1000 * s for s in step["seconds"])
        rows.append(
            [
                step["words"],
                step["cost"],
                step["flops"] / 1e9,
                step["bytes"] / 1e9,
                typical,
                f"{low:.4g}-{high:.4g}",
                step["images_per_second"],
                100 * step["product_share"],
                1000 * step["least_seconds"],
                step["memory_bytes"] / 1e6,
            ]
        )
    return format_table(columns, rows)


def _stalls(pair: Mapping[str, Any]) -> str:
    loop = pair["loop"]
    rows = [
        [
            name,
            1000 * stall["seconds"],
            stall["steps"],
            f"{stall['setting']}={stall['every']}",
            100 * stall["share"],
        ]
        for name, stall in loop["stalls"].items()
    ]
    rows.append(["all", None, None, "", 100 * loop["stall_share"]])
    return format_table(["between steps", "ms", "steps", "how often", "training %"], rows)


def _profile(rows: Any) -> str:
    return format_table(
        ["operator", "calls", "ms", "time %"],
        [[row["operator"], row["calls"], 1000 * row["seconds"], 100 * row["share"]] for row in rows],
    )


def _ratios(result: Mapping[str, Any]) -> str:
    rows = []
    for name, value in result["ratios"].items():
        low, _, high = result["quartiles"].get(name, [None] * 3)
        quartiles = "" if low is None else f"{low:.3g}-{high:.3g}"
        own, allowed = (result[key].get(name) for key in ("device_ratios", "allowed"))
        rows.append([name, value, quartiles, own, allowed])
    return format_table(["ratio", "median", "quartiles", "of device time", "passes allow"], rows)
