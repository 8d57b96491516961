"""The perceptual distance of validation: the one asked for, the first there is, or none."""

import pytest
import torch
from torch import nn

from fmrun.config.schema import Config
from fmrun.metrics import perceptual
from fmrun.runtime.dist import World
from fmrun.runtime.errors import UserError
from fmrun.tasks.upscale import UpscaleData, UpscaleMonitor
from fmrun.train.state import State

CPU = torch.device("cpu")


class Distance(nn.Module):
    def forward(self, image: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return (image - original).abs().mean()


def missing() -> nn.Module:
    raise UserError("eval.perceptual: the weights are missing: put vgg16.pth into the cache")


@pytest.fixture
def only_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "METRICS", {"dists": missing, "lpips": missing, "mobilenet": Distance})


def test_which_are_had(only_the_last: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(perceptual.perceptual_metrics(CPU, "auto", 1)) == ["mobilenet"]
    assert perceptual.perceptual_metrics(CPU, "none") == {}
    with pytest.raises(UserError, match=r"vgg16\.pth"):
        perceptual.perceptual_metrics(CPU, "dists")
    monkeypatch.setattr(perceptual, "METRICS", {"dists": missing})
    assert perceptual.perceptual_metrics(CPU) == {}


@pytest.mark.usefixtures("only_the_last")
def test_it_is_measured_on_whole_images_beside_bicubic() -> None:
    config = Config.model_validate(
        {
            "task": "upscale",
            "data": {"path": "bundled:photographs", "patch_size": 32, "channels": 3},
            "generator": {"type": "compact", "features": 4, "blocks": 1},
            "discriminator": {"type": "munet", "width": 4},
            "losses": {"l1": {}},
            "train": {"batch_size": 2},
        }
    )
    state = State(config, CPU, World())
    data = UpscaleData(config)
    monitor = UpscaleMonitor(state.task, data)
    row = monitor.held_out(1)
    assert set(row) == set(monitor.names)
    assert {"eval/mobilenet", "eval/mobilenet_bicubic", "eval/ssim_y_bicubic"} <= set(row)
    low, high = data.valid.pair(0)
    bicubic = (monitor.bicubic(low) * 255).round() / 255
    assert row["eval/mobilenet_bicubic"] == pytest.approx(float((bicubic - high[None] / 255).abs().mean()), rel=1e-5)
