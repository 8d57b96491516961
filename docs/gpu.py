"""Settles in one go what only a GPU can: `make gpu`, or `make gpu DEVICE=cpu SMOKE=1` to see that every part runs.

Each part has a time limit, and its result is in docs/results/HARDWARE.json before the next one begins. Called again, it
goes on with the parts that have not succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # this and the next two: what commands import, once, before they are forked off this process

import fmrun.bench
import fmrun.train.run
from fmrun.__main__ import main as command_line
from fmrun.config.presets import describe, names, resolve
from fmrun.runtime.environment import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
FMRUN = (sys.executable, "-P", "-m", "fmrun")
TOTAL = 25 * 60
TAIL = 2000
"""Characters of what a part said that are kept."""


@dataclass(frozen=True)
class Part:
    """Something to be found out."""

    name: str
    seconds: int
    """After which it is stopped."""
    work: Callable[[Part], dict[str, Any]]


class Failed(Exception):
    """A command of a part did not end with 0; its text is what it said."""


def run(part: Part, *command: str) -> str:
    """What a command prints on stdout, as long as the part has time; Failed if it does not end well."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=part.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise Failed(f"stopped after {part.seconds} s: {' '.join(command)}\n{(out + err)[-TAIL:]}") from None
    if process.returncode:
        raise Failed(f"exit code {process.returncode}: {' '.join(command)}\n{(out + err)[-TAIL:]}")
    return out


def fmrun(part: Part, *arguments: str, fork: bool) -> str:
    """`run` of an fmrun command. On a CPU it is forked off this process, for torch takes seconds to import; a process that
    has touched a GPU cannot be."""
    if not fork:
        return run(part, *FMRUN, *arguments)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (pid := os.fork()) == 0:
            signal.alarm(part.seconds)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["fmrun", *arguments]
            try:
                command_line()
            except SystemExit as exit:
                os._exit(exit.code if isinstance(exit.code, int) else 1)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        said = out.read()
        if code:
            raise Failed(f"exit code {code}: fmrun {' '.join(arguments)}\n{(said + err.read())[-TAIL:]}")
        return said


def parts(device: str, smoke: bool, work: Path) -> Iterator[Part]:
    runs, fork = ("--runs-dir", str(work), "--device", device), device == "cpu"
    nets = ("-s", "generator.width=4", "-s", "discriminator.width=4", "-s", "eval.num=16")
    small = (*nets, "-s", "eval.kid_every=0", "--batch-size", "8") if smoke else ()

    def tests(part: Part) -> dict[str, Any]:
        out = run(
            part,
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "cuda",
            *(("tests/train/test_cuda_graphs.py",) if smoke else ("tests",)),
        )
        return {"said": out.strip().splitlines()[-1]}

    yield Part("tests marked cuda", 240, tests)

    for batch, precision in ((4, "fp32"),) if smoke else ((128, "fp32"), (128, "bf16"), (1024, "fp32"), (1024, "bf16")):

        def bench(part: Part, batch: int = batch, precision: str = precision) -> dict[str, Any]:
            sizes = (*nets, "-s", "data.image_size=32", "--rounds", "1") if smoke else ("--rounds", "20")
            asked = ("--pair", "dcgan", "--batch-size", str(batch), "--precision", precision)
            return json.loads(fmrun(part, "bench", *asked, *sizes, "--device", device, "--json", fork=fork))

        yield Part(f"bench, batch {batch}, {precision}", 150, bench)

    for name in ("dcgan-fm",) if smoke else names():

        def preset(part: Part, name: str = name) -> dict[str, Any]:
            photographs = ROOT / "fmrun/data/bundled/photos"
            own = () if resolve(name, None, [], need_data=False).data.image_size <= 32 else ("--data", str(photographs))
            run_name = f"preset-{name}"
            begun = time.monotonic()
            length = ("--steps", "2" if smoke else "200")
            fmrun(part, "train", "--preset", name, *length, *small, *own, *runs, "--name", run_name, fork=fork)
            row = json.loads((work / run_name / "metrics.jsonl").read_text().splitlines()[-1])
            picture = next(iter(sorted((work / run_name / "samples").glob("*.png"), reverse=True)))
            kept = RESULTS / "pictures" / f"{hardware(device)}-{name}.png"
            if not smoke:
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(picture.read_bytes())
            return {"what": describe(name), "seconds": time.monotonic() - begun, "last row": row, "picture": kept.name}

        yield Part(f"preset {name}", 45, preset)

    def resume(part: Part) -> dict[str, Any]:
        from safetensors.torch import load_file

        count = 4 if smoke else 60
        flags = ("--preset", "dcgan-fm", *small, *runs, "-s", "deterministic=true", "-s", "eval.kid_every=0")
        fmrun(part, "train", *flags, "--steps", str(count), "--name", "whole", fork=fork)
        fmrun(part, "train", *flags, "--steps", str(count // 2), "--name", "parts", fork=fork)
        fmrun(part, "resume", "parts", "--steps", str(count), *runs, fork=fork)
        file = f"checkpoints/step-{count:08d}.safetensors"
        whole, halves = (load_file(work / name / file) for name in ("whole", "parts"))
        differing = [key for key in whole if whole[key].numpy().tobytes() != halves[key].numpy().tobytes()]
        if differing:
            raise Failed(f"{len(differing)} of {len(whole)} tensors differ, first {differing[0]}")
        return {"tensors": len(whole), "steps": count, "equal to the bit": True}

    yield Part("resume in deterministic mode", 120, resume)

    def ranks(part: Part) -> dict[str, Any]:
        if device != "cpu" and torch.cuda.device_count() < 2:
            return {"said": "one GPU: two processes were not tried"}
        launch = (
            sys.executable,
            "-P",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "fmrun",
        )
        steps = ("--steps", "2" if smoke else "100")
        run(part, *launch, "train", "--preset", "dcgan-fm", *small, *steps, *runs, "--name", "ranks")
        return {"last row": json.loads((work / "ranks" / "metrics.jsonl").read_text().splitlines()[-1])}

    yield Part("two processes", 90, ranks)


def hardware(device: str) -> str:
    name = torch.cuda.get_device_name() if device != "cpu" else environment()["processor"] or "cpu"
    return re.sub(r"[^a-z0-9]+", "-", f"{name}".lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="every part, tiny")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: docs/results/HARDWARE.json)")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("there is no NVIDIA GPU here; to see that every part runs: make gpu DEVICE=cpu SMOKE=1", file=sys.stderr)
        return 2
    out = chosen.out or RESULTS / f"{hardware(chosen.device)}{'-smoke' * chosen.smoke}.json"
    found = json.loads(out.read_text()) if out.is_file() else {"parts": {}}
    found["machine"] = environment()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fmrun-gpu-") as folder:
        for part in parts(chosen.device, chosen.smoke, Path(folder)):
            if found["parts"].get(part.name, {}).get("done"):
                print(f"done before: {part.name}", file=sys.stderr)
                continue
            if time.monotonic() - begun > TOTAL - part.seconds:
                print(f"no time left for: {part.name}; call again", file=sys.stderr)
                continue
            start = time.monotonic()
            try:
                result = {"done": True, **part.work(part)}
            except Failed as error:
                result = {"done": False, "said": str(error)}
            result["seconds"] = round(time.monotonic() - start, 1)
            found["parts"][part.name] = result
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{'done' if result['done'] else 'FAILED'}: {part.name}, {result['seconds']} s", file=sys.stderr)
    print(out)
    return 0 if all(part["done"] for part in found["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
