"""`make gpu` settles on a GPU what has never run; here every part of it runs, tiny, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from support.helpers import tiny_state
from torch import nn

from fmrun.feature_matching.discriminator import DiscriminatorOutput
from fmrun.tasks.pair import _Kept

SCRIPT = Path(__file__).parents[2] / "docs" / "gpu.py"


def settle(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--smoke", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_part_runs_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.write_text(json.dumps({"parts": {"tests marked cuda": {"done": True}, "preset dcgan-fm": {"done": False}}}))
    done = settle(out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert all(part["done"] for part in found["parts"].values())
    assert found["parts"]["resume in deterministic mode"]["equal to the bit"]
    assert found["parts"]["two processes"]["last row"]["step"] == 2
    assert "howto_over_matching" in found["parts"]["bench, batch 4, fp32"]["pairs"]["dcgan"]["ratios"]
    assert found["machine"]["torch"] == torch.__version__
    assert "done before: tests marked cuda" in done.stderr


def test_outputs_of_recorded_memory_are_copied_out_of_it() -> None:
    """A replayed graph writes to the same memory the next time."""
    net = tiny_state().task.discriminators[0].net
    memory: dict[str, torch.Tensor] = {}

    class Replayed(nn.Module):
        def forward(self, image: torch.Tensor, taps: tuple[str, ...], logits: bool) -> DiscriminatorOutput:
            out = net(image, taps, logits)
            for name, value in {"logits": out.logits, **out.features}.items():
                memory[name] = value.detach() if name not in memory else memory[name].copy_(value.detach())
            return DiscriminatorOutput(memory["logits"], {name: memory[name] for name in taps})

    kept, rng = _Kept(Replayed()), torch.Generator().manual_seed(0)
    images = torch.randn(2, 4, 1, 28, 28, generator=rng, dtype=torch.float64)
    first = kept(images[0], ("block1",), True)
    kept(images[1], ("block1",), True)
    expected = net(images[0], ("block1",), True)
    assert torch.equal(first.logits, expected.logits)
    assert torch.equal(first.features["block1"], expected.features["block1"])
