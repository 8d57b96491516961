"""Gather what a folder of runs found into one small JSON file: python docs/study/collect.py RUNS_DIR > docs/study/runs.json

Every run needs `fmrun eval` behind it, on the same real images for all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from fmrun.health import collapsed
from fmrun.runs import Run, all_runs


def condition(config: dict[str, Any]) -> str:
    """What sets a run apart from the others of the study, but for its seed: `plain`, `mean, share 0.1`."""
    matching = config["feature_matching"]
    if not matching["weight"]:
        return "plain"
    kind = "share" if matching["balance"] == "gradient" else "raw λ"
    return f"{matching['match']}, {kind} {matching['weight']:g}"


def described(run: Run) -> dict[str, Any]:
    config, rows = run.config(), run.metrics()
    shares = [row["fm/share"] for row in rows[len(rows) // 2 :] if row.get("fm/share") is not None]
    return {
        "name": run.name,
        "condition": condition(config),
        "seed": config["seed"],
        "state": run.state,
        "collapsed": collapsed(rows),
        "diversity": rows[-1].get("health/diversity"),
        "share": median(shares) if shares else None,
        "scores": {
            str(record["step"]): {name: round(value, 7) for name, value in record["metrics"].items()}
            for record in run.evaluations()
        },
    }


def same(values: list[Any], what: str) -> Any:
    """The one value that all runs have."""
    if any(value != values[0] for value in values):
        raise SystemExit(f"the runs differ in {what}: they cannot be compared")
    return values[0]


def collect(folder: Path) -> dict[str, Any]:
    runs = all_runs(folder)
    evaluations = [record for run in runs for record in run.evaluations()]
    if not evaluations:
        raise SystemExit(f"no run in {folder} has been evaluated")
    configs, environments = [run.config() for run in runs], [run.env() for run in runs]
    train = same([config["train"] for config in configs], "train")
    nets = same([[config[net] for net in ("generator", "discriminator")] for config in configs], "their nets")
    return {
        "data": same([Path(config["data"]["path"]).name for config in configs], "their data"),
        "image_size": same([config["data"]["image_size"] for config in configs], "their size"),
        "steps": train["steps"],
        "batch_size": train["batch_size"],
        "width": [net["width"] for net in nets],
        "norm": nets[1]["norm"],
        "layers": same([c["feature_matching"]["layers"] for c in configs if c["feature_matching"]["weight"]], "layers"),
        "evaluation": same([record["settings"] for record in evaluations], "how they were evaluated"),
        "floor": same([record["floor"] for record in evaluations], "their floor"),
        "environment": {
            key: same([env.get(key) for env in environments], key) for key in ("torch", "processor", "threads", "gpus")
        },
        "runs": [described(run) for run in sorted(runs, key=lambda run: run.name)],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(json.dumps(collect(Path(sys.argv[1])), indent=1, ensure_ascii=False))
