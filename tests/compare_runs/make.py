"""How runs.json and golden.json were made, at commit 2a4cefe: python tests/compare_runs/make.py FOLDER

Run folders with configs of fmrun's own schema and made-up numbers, and what `compare` of that commit found in them. The
golden file holds that commit's figures, so it is not made again with a later version.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmrun.compare.comparison import Comparison, compare
from fmrun.compare.configs import flatten
from fmrun.compare.verdict import _adjusted, _paired
from fmrun.presets import Override, resolve
from fmrun.runs import Run

HERE = Path(__file__).parent
MACHINE = {"processor": "a processor", "gpus": [], "cores": 2, "threads": 1, "fmrun": "0.1.0", "torch": "2.11"}
MOBILENET = {"task": "generate", "data": "clothes", "num": 2000, "extractor": "mobilenet_v2", "resolution": 32}
PHOTOS = {"task": "upscale", "data": "photographs", "num": 8, "scale": 2}


def config(preset: str, seed: int, **fields: Any) -> dict[str, Any]:
    overrides = [Override("-s", key.replace("__", "."), str(value)) for key, value in fields.items()]
    overrides += [Override("-s", "seed", str(seed)), Override("-s", "data.channels", "1")]
    return json.loads(resolve(preset, None, overrides).model_dump_json())


def rows(rng: random.Random, end: int, matches: bool, quick: dict[str, float]) -> list[dict[str, Any]]:
    found = []
    for step in range(10, end + 1, 10):
        row: dict[str, Any] = {"step": step, "loss/d": rng.uniform(0.2, 1.4), "loss/g_adv": rng.uniform(1, 4)}
        row |= {"health/diversity": rng.uniform(0.5, 1.1), "time/images_per_second": rng.uniform(400, 600)}
        row |= {"fm/share": rng.uniform(0.08, 0.12), "fm/distance": None if step == 30 else 1 / step} if matches else {}
        if step % 20 == 0:
            row |= {key: value * rng.uniform(0.9, 1.1) + 1 / step for key, value in quick.items()}
        found.append(row)
    return found


def scores(rng: random.Random, names: dict[str, float], step: int) -> dict[str, float]:
    return {name: value * rng.uniform(0.93, 1.07) * (1 + 10 / step) for name, value in names.items()}


def generated(name: str, seed: int, kid: float, fields: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A run from noise. `own`: state, step, evaluated (steps), settings, reals, env, quick."""
    rng = random.Random(f"{name}-{seed}")
    step, settings = own.get("step", 100), own.get("settings", MOBILENET)
    suffix = "" if settings["extractor"] == "inception" else f"_{settings['extractor']}"
    names = {f"kid{suffix}": kid, f"fid{suffix}": 900 * kid, f"precision{suffix}": 0.6, f"recall{suffix}": 0.3}
    reals = own.get("reals", f"images-{seed}")
    floor = {key: value * 0.01 * (1 + seed) for key, value in names.items()}
    quick = {"eval/kid_mobilenet_v2": 1.5 * kid} if own.get("quick", True) else {}
    return {
        "name": f"{name}-seed{seed}",
        "config": config("dcgan", seed, **{"eval__kid_num": own.get("kid_num", 500), **fields}),
        "status": {"state": own.get("state", "finished"), "step": step, "steps": own.get("steps", 100)},
        "env": MACHINE | own.get("env", {}),
        "rows": rows(rng, step, bool(fields.get("feature_matching__weight")), quick),
        "evaluations": [
            {"step": at, "weights": weights, "settings": settings | {"reals_sha256": reals}, "floor": floor}
            | {"metrics": scores(rng, names, at)}
            for at in own.get("evaluated", (60, 100))
            for weights in own.get("weights", ("ema",))
        ],
    }


def upscaled(name: str, seed: int, psnr: float, fields: dict[str, Any], **own: Any) -> dict[str, Any]:
    rng = random.Random(f"{name}-{seed}")
    step, quick = own.get("step", 100), {"eval/psnr_y": psnr, "eval/psnr_y_bicubic": 30.0}
    return {
        "name": f"{name}-seed{seed}",
        "config": config("munet-x2-cpu", seed, **fields),
        "status": {"state": own.get("state", "finished"), "step": step, "steps": 100},
        "env": MACHINE,
        "rows": rows(rng, step, bool(fields.get("feature_matching__weight")), quick),
        "evaluations": [
            {"step": at, "weights": "ema", "settings": PHOTOS, "floor": {}, "bicubic": {"psnr_y": 30.5, "dists": 0.2}}
            | {"metrics": scores(rng, {"psnr_y": psnr, "dists": 0.1}, at)}
            for at in own.get("evaluated", (50, 100))
        ],
    }


def everything() -> list[dict[str, Any]]:
    def matching(match: str, **more: Any) -> dict[str, Any]:
        return {"feature_matching__weight": 0.1, "feature_matching__match": match, **more}

    plain, inception = {"feature_matching__weight": 0}, MOBILENET | {"extractor": "inception", "num": 5000}
    balanced = matching("mean", feature_matching__balance="gradient")
    found = [generated("plain", seed, 0.02, plain, weights=("ema", "raw")) for seed in range(5)]
    found += [generated("mean", seed, 0.012, balanced) for seed in range(3)]
    found += [generated("mean", 3, 0.05, balanced, state="diverged", step=60, evaluated=(60,))]
    found += [generated("mean", 4, 0.012, balanced, state="stopped", step=60, evaluated=(60,))]
    found += [generated("sample", seed, 0.022, matching("sample")) for seed in range(3)]
    found += [generated("sample", 3, 0.022, matching("sample"), reals="others", kid_num=300)]
    found += [generated("long", s, 0.011, matching("mmd"), step=200, steps=200, evaluated=(60, 200)) for s in (0, 1)]
    found += [generated("other", s, 0.02, matching("sliced"), settings=inception, quick=False) for s in (0, 1)]
    found += [generated("begun", 0, 0.02, matching("coral"), state="running", step=20, evaluated=())]
    found += [upscaled("sr-plain", seed, 32.0, plain) for seed in range(3)]
    found += [upscaled("sr-mean", seed, 33.5, matching("mean")) for seed in range(2)]
    found += [upscaled("sr-mean", 2, 9.0, matching("mean"), state="failed", step=50, evaluated=(50,))]
    return found


def lay_out(folder: Path, runs: list[dict[str, Any]]) -> None:
    for made in runs:
        run = Run(folder / made["name"])
        run.path.mkdir(parents=True)
        for file, what in ((run.config_file, "config"), (run.env_file, "env"), (run.status_file, "status")):
            file.write_text(json.dumps(made[what]))
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in made["rows"]))
        run.evaluations_file.write_text(json.dumps({"evaluations": made["evaluations"]}))


ASKED: list[dict[str, Any]] = [
    {"groups": ["plain", "mean", "sample", "long", "other", "begun"]},
    {"groups": ["plain", "mean", "sample", "long", "other", "begun"], "by": "best"},
    {"groups": ["plain", "mean", "sample"], "metric": "fid"},
    {"groups": ["plain", "mean", "sample"], "metric": "recall", "control": "sample"},
    {"groups": ["plain", "mean"]},
    {"groups": ["mean", "sample", "long"]},
    {"groups": ["mean", "sample", "long"], "by": "best"},
    {"groups": ["plain", "other"]},
    {"groups": ["sr-plain", "sr-mean"]},
    {"groups": ["sr-plain", "sr-mean"], "by": "best", "control": "sr-mean", "metric": "dists"},
]


def figures(found: Comparison, whole: bool) -> dict[str, Any]:
    """Pairs by the column that decides; and, `whole`, all that does not depend on which that is."""
    column = found.column
    anchor = found.control if found.control in found.ranking else found.ranking[0]
    assert column is not None
    adjusted = _adjusted(found, column, anchor)
    pairs = [
        {"group": i, "difference": asdict(pair.difference), "p": pair.p, "holm": adjusted[i]}
        for i in found.ranking
        if i != anchor and (pair := _paired(found, column, i, anchor)) is not None
    ]
    numbers: dict[str, Any] = {"decides": found.headline, "anchor": anchor, "pairs": pairs}
    if not whole:
        return numbers
    return numbers | {
        "groups": [
            [g.name, [m.name for m in g.members], g.control, g.share, g.diversity, g.images_per_second]
            for g in found.groups
        ],
        "columns": [{k: v for k, v in asdict(c).items() if k != "about"} for c in found.columns],
        "curves": [
            [c.key, [[[p.step, p.mean, p.low, p.high, p.count] for p in points] for points in c.groups]]
            for c in found.curves[: found.telling]
        ],
        "differences": [[d.field, list(d.values), list(d.acts), d.folded] for d in found.differences],
    }


def main(folder: Path) -> None:
    runs = everything()
    lay_out(folder, runs)
    golden = []
    for asked in ASKED:
        chosen = [Run(folder / r["name"]) for r in runs if r["name"].rpartition("-seed")[0] in asked["groups"]]
        options = {key: value for key, value in asked.items() if key != "groups"}
        golden.append({"asked": asked, **figures(compare(chosen, **options), whole=not options)})
    bases: dict[str, dict[str, Any]] = {}
    for made in runs:  # a config is kept as what differs from its task's first
        base = flatten(bases.setdefault(made["config"]["task"], made["config"]))
        made["task"] = made["config"]["task"]
        made["set"] = {key: value for key, value in flatten(made.pop("config")).items() if base[key] != value}
    lines = ",\n".join(json.dumps(run) for run in runs)
    text = f'{{"commit": "2a4cefe",\n"configs": {json.dumps(bases)},\n"runs": [\n{lines}\n]}}\n'
    (HERE / "runs.json").write_text(text)
    (HERE / "golden.json").write_text("[\n" + ",\n".join(map(json.dumps, golden)) + "\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
