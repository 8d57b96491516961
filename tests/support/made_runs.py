"""Run folders made up for comparisons: configs, metrics and evaluations without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmrun.config.schema import Config
from fmrun.runs.folder import Run

SETTINGS = {
    "task": "generate",
    "data": "clothes",
    "num": 2000,
    "extractor": "mobilenet_v2",
    "resolution": 32,
    "seed": 0,
}

MACHINE = {"processor": "a processor", "gpus": [], "cores": 2, "threads": 1}


def config(**fields: Any) -> dict[str, Any]:
    """The default config as a run writes it; `train__steps=5` sets `train.steps`."""
    default = json.loads(Config.model_validate({"data": {"channels": 1}}).model_dump_json())
    return nested({key.replace("__", "."): value for key, value in fields.items()}, default)


def nested(flat: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some fields set, by their dotted names."""
    tree = json.loads(json.dumps(base))
    for key, value in flat.items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section[part]
        section[last] = value
    return tree


def made_run(
    folder: Path,
    name: str,
    *,
    kid: Mapping[int, float] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    state: str = "finished",
    env: Mapping[str, Any] = MACHINE,
    settings: Mapping[str, Any] = SETTINGS,
    **fields: Any,
) -> Run:
    """A run called `name` in `folder`, whose KID at these steps was measured."""
    run = Run(folder / name)
    run.samples.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.config_file.write_text(json.dumps(config(**fields)))
    run.env_file.write_text(json.dumps(env))
    run.write_status(state=state, step=100, steps=100)
    for row in rows or read_outs():
        run.append_metrics(row)
    for step, value in (kid or {}).items():
        run.add_evaluation(
            {
                "step": step,
                "weights": "ema",
                "settings": settings,
                "metrics": {"kid_mobilenet_v2": value},
                "floor": {"kid_mobilenet_v2": 0.001},
            }
        )
    return run


def read_outs(count: int = 10, **fixed: float) -> list[dict[str, Any]]:
    """Rows of metrics, a tenth of training each."""
    return [
        {
            "step": 10 * i,
            "loss/d": 1 / i,
            "loss/g_adv": 2 + 0.1 * i,
            "health/diversity": 0.09 * i,
            "time/images_per_second": 500.0,
        }
        | fixed
        for i in range(1, count + 1)
    ]
