"""The scripts of docs/examples run, and the how-to's is fmrun's own step."""

import contextlib
import importlib.util
import io
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from support.helpers import draws_of, tiny_state
from torch import nn

from fmrun import FeatureMatching
from fmrun.feature_matching.walked import WalkedDiscriminator
from fmrun.models import dcgan
from fmrun.tasks import generate

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
LR = 2.0**-12
"""fmrun holds learning rates in float32."""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str) -> str:
    """What the script says, run in this process."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *arguments]), contextlib.redirect_stdout(out):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return out.getvalue()


def test_each_is_short_and_the_how_to_marks_three_lines() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
    text = (EXAMPLES / "dcgan_howto.py").read_text()
    assert [text.count(f"  # {i}: ") for i in (1, 2, 3, 4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("folder", [False, True])
def test_the_how_to_runs(tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    data = ()
    if folder:
        data = ("--data", "pictures")
        (tmp_path / "pictures" / "any").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 36), (30 * i, 90, 10)).save(tmp_path / "pictures" / "any" / f"{i}.png")
    said = run("dcgan_howto", *data, "--steps", "2", "--batch", "4", "--width", "4")
    assert ", share 1.00" in said
    assert (tmp_path / "fake.png").stat().st_size > 0


def test_a_network_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "distances: fine" in run("own_network", "--steps", "2", "--width", "4")
    state = torch.load(tmp_path / "own_network.pt")
    assert state["matching"]["strength.measured"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_lightning_module_runs(tmp_path: Path, precision: str) -> None:
    lightning = pytest.importorskip("lightning")
    Gan = example("lightning_module").Gan
    module = Gan(width=4)
    images = torch.utils.data.TensorDataset(torch.rand(16, 1, 16, 16))
    trainer = lightning.Trainer(
        max_steps=8,
        max_epochs=-1,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=8))
    assert trainer.global_step == 8
    assert trainer.callback_metrics["fm/share"].item() == pytest.approx(1, rel=0.5)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    saved = torch.load(tmp_path / "module.ckpt", weights_only=False)["state_dict"]
    assert saved["matching.strength.balance"] == module.matching.strength.balance


@pytest.mark.parametrize("steps", [1, 3])
def test_the_how_to_is_fmruns_step_on_the_same_weights_and_data(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    howto = example("dcgan_howto")
    torch.manual_seed(0)
    netG, netD = howto.generator(1, 4, 6).double(), howto.discriminator(1, 4).double()

    class Maps(nn.Module):
        """fmrun's latents have no height and width."""

        def __init__(self) -> None:
            super().__init__()
            self.net = howto.generator(1, 4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x[:, :, None, None])

    monkeypatch.setattr(
        dcgan, "discriminator", lambda c, image, rng: WalkedDiscriminator(howto.discriminator(1, 4), image)
    )
    monkeypatch.setattr(generate, "KIND", replace(generate.KIND, generator=lambda config, channels: Maps()))
    state = tiny_state(
        data__image_size=32,
        train__batch_size=8,
        feature_matching={"weight": 1.0, "match": "mean", "layers": ["key"], "balance": "gradient"},
        optim={net: {"lr": LR, "betas": (0.5, 0.999)} for net in ("generator", "discriminator")},
    )
    ours = state.task.generator, state.task.discriminators[0].net
    for net, theirs in zip(ours, (netG, netD), strict=True):
        net.net.load_state_dict(theirs.state_dict())
    draws = [draws_of(state, step) for step in range(steps)]
    batches = [(draw[0][0].real.contiguous(), draw[0][0].noise[:, :, None, None]) for draw in draws]
    matching = FeatureMatching(netD, (1, 32, 32), layers="key", match="mean", weight=1.0)
    howto.train(netG, netD, matching, batches, LR)
    for draw in draws:
        state.advance(draw)
    mine = state.task.discriminators[0].matching
    assert mine.layers == matching.layers
    for name, value in mine.strength.state_dict().items():
        assert torch.allclose(value.double(), matching.strength.state_dict()[name].double(), rtol=1e-9), name
    for net, theirs in zip(ours, (netG, netD), strict=True):
        for name, value in theirs.state_dict().items():
            got = net.net.state_dict()[name]
            scale = float(value.abs().max())
            assert torch.allclose(got.double(), value.double(), rtol=1e-9, atol=1e-9 * scale), name
