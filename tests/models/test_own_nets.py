"""Nets of the user's own, named in the config, through whole commands."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from support.commands import BARE, fmrun, good, rows, same_runs, same_tensors, saved, tiles, train
from support.pair_images import picture, save

RUNS = Path("runs")

MODULE = """
import torch
from torch import nn

class Maker(nn.Module):
    def __init__(self, *, latent_dim, width=4, size=28):
        super().__init__()
        self.size = size
        self.net = nn.Sequential(nn.Linear(latent_dim, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3),
                                 nn.Linear(width, size * size), nn.Tanh())

    def forward(self, z):
        return self.net(z).unflatten(1, (1, self.size, self.size))

class Judge(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(0.2),
                                 nn.Conv2d(width, width, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True),
                                 nn.Conv2d(width, 1, 3, 1, 1))

    def forward(self, x):
        return self.net(x)

class Doubler(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.PReLU(), nn.Conv2d(width, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x):
        return self.net(x) + nn.functional.interpolate(x, scale_factor=2, mode="nearest")

class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 12, 3, 1, 1),
                                 nn.PixelShuffle(2))

    def forward(self, x):
        return self.net(x)

class Spectral(nn.Module):
    def __init__(self, latent_dim=8):
        super().__init__()
        norm = torch.nn.utils.parametrizations.spectral_norm
        self.net = nn.Sequential(norm(nn.Linear(latent_dim, 16)), nn.ReLU(), norm(nn.Linear(16, 784)), nn.Tanh())

    def forward(self, z):
        return self.net(z).unflatten(1, (1, 28, 28))

class Crops(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 12, 1)

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.net(x), 2)[..., 2:, :]
"""

MAKER = ("-s", "generator.target=own_pair:Maker", "-s", "generator.params={latent_dim = 8, width = 6}")
JUDGE = (
    "-s",
    "discriminator.target=own_pair:Judge",
    "-s",
    "discriminator.params.channels=1",
    "-s",
    "discriminator.params.width=3",
)


@pytest.fixture(autouse=True)
def module(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("own_pair.py").write_text(MODULE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace / "home"))
    yield
    sys.modules.pop("own_pair", None)


def test_both_nets_train_resume_to_the_bit_dropout_included_and_sample() -> None:
    """Dropout draws from the global generators, which a resumed run has to find as an uninterrupted one does."""
    own = (*MAKER, *JUDGE, "-s", "log.every=3")
    train(*own, "--steps", "6", "--name", "whole")
    torch.manual_seed(99)
    train(*own, "--steps", "3", "--name", "parts")
    torch.manual_seed(7)
    good("resume", "parts", "--steps", "6")
    same_runs(RUNS / "whole", RUNS / "parts", 6)
    assert saved(RUNS / "whole", 6).tensors["generator.net.0.weight"].shape == (6, 8)
    assert saved(RUNS / "whole", 6).tensors["discriminator.net.net.0.weight"].shape == (3, 1, 3, 3)
    assert rows(RUNS / "whole")[-1]["fm/share"] == pytest.approx(1, rel=0.2)
    many, few = (Path(good("sample", "whole", "--num", n, "--out", f"{n}.png").out.strip()) for n in ("9", "2"))
    assert np.array_equal(tiles(many, 9, 8)[1], tiles(few, 2, 2)[1])


def test_arguments_come_from_a_file_too_and_single_ones_lie_on_top() -> None:
    Path("own.toml").write_text(
        '[generator]\ntarget = "own_pair:Maker"\n[generator.params]\nlatent_dim = 8\nwidth = 6\nsize = 28\n'
    )
    shown = good(
        "train", *BARE, "--config", "own.toml", "-s", "generator.params.width=5", "--trust-code", "--dry-run"
    ).out
    assert json.loads(shown)["generator"]["params"] == {"latent_dim": 8, "width": 5, "size": 28}
    shown = good(
        "train", *BARE, "--config", "own.toml", "-s", "generator.params.width=none", "--trust-code", "--dry-run"
    ).out
    assert json.loads(shown)["generator"]["params"] == {"latent_dim": 8, "size": 28}


def upscaling(*arguments: str | Path) -> tuple[str | Path, ...]:
    small = (
        "-s",
        "data.patch_size=32",
        "-s",
        "discriminator.width=4",
        "--batch-size",
        "2",
        "-s",
        "data.valid_fraction=0.4",
    )
    for i in range(5):
        save(Path(f"photographs/{i}.png"), picture(48, 44 + 2 * i, seed=i))
    return ("train", "--preset", "munet-x2-cpu", *small, "--data", "photographs", "--device", "cpu", *arguments)


def test_an_upscaler_trains_upscales_in_tiles_and_is_exported() -> None:
    own = ("-s", "generator.target=own_pair:Doubler", "-s", "generator.params={width = 5}")
    good(*upscaling(*own, "--steps", "2", "--name", "run"))
    assert rows(RUNS / "run")[-1]["eval/psnr_y"] > 5
    photo = np.random.default_rng(0).integers(0, 256, (75, 91, 3), dtype=np.uint8)
    Image.fromarray(photo).save("photo.png")
    made = Path(good("sample", "run", "--input", "photo.png", "--out", "large").out.strip())
    assert Image.open(made).size == (182, 150)
    good("export", "run", "--out", "net.safetensors")
    good("export", "run", "--out", "net.onnx")
    image = np.random.default_rng(1).random((1, 3, 20, 14), dtype=np.float32)
    (by_onnx,) = onnxruntime.InferenceSession("net.onnx").run(None, {"image": image})
    from own_pair import Doubler  # type: ignore[import-not-found]

    net = Doubler(5)
    from safetensors.torch import load_file

    net.load_state_dict(load_file("net.safetensors"))
    with torch.no_grad():
        assert np.allclose(by_onnx, net(torch.from_numpy(image)).numpy(), atol=1e-5)


def test_running_averages_of_an_upscaler_are_in_its_moving_average() -> None:
    good(*upscaling("-s", "generator.target=own_pair:Normed", "--steps", "3", "--name", "run"))
    tensors = saved(RUNS / "run", 3).tensors
    assert torch.equal(tensors["ema.net.1.running_var"], tensors["generator.net.1.running_var"])
    assert not torch.equal(tensors["ema.net.1.running_var"], torch.ones(4))


def test_what_a_forward_moves_is_moved_by_training_alone() -> None:
    """Checks at the start, also of a resumed run, and measurements leave a spectral norm's vectors where they are."""
    own = (
        "-s",
        "generator.target=own_pair:Spectral",
        "-s",
        "log.every=2",
        "-s",
        "eval.num=4",
        "-s",
        "data.valid_fraction=0.2",
    )
    train(*own, "--steps", "4", "--name", "whole", "-s", "eval.every=0")
    train(*own, "--steps", "2", "--name", "parts", "-s", "eval.every=1")
    good("resume", "parts", "--steps", "4", "-s", "eval.every=0")
    same_tensors(saved(RUNS / "whole", 4).tensors, saved(RUNS / "parts", 4).tensors)


def test_what_makes_no_other_experiment_may_change_on_resume() -> None:
    train("--steps", "1", "--name", "run")
    good("resume", "run", "--steps", "2", "-s", "deterministic=false")
    assert json.loads((RUNS / "run" / "config.json").read_text())["deterministic"] is False


WRONG = {
    "arguments without a net": (("-s", "generator.params.width=3"), "set target too"),
    "no table": ((*MAKER, "-s", "generator.params=3"), "generator.params is 3; it must be a table, like {depth = 3}"),
    "a date": ((*MAKER, "-s", "generator.params={day = 2024-01-01}"), "it must be a table"),
    "an argument it does not take": (
        (*MAKER, "-s", "generator.params.depth=3"),
        "got an unexpected keyword argument 'depth'",
    ),
    "a window without a munet": (
        (*MAKER, *JUDGE, "-s", "discriminator.window=4"),
        "discriminator.window is for type munet, not own_pair:Judge",
    ),
    "another size": ((*MAKER, "-s", "generator.params.size=32"), "and must make (2, 1, 28, 28)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_sentence(name: str) -> None:
    arguments, words = WRONG[name]
    done = fmrun("train", *BARE, *arguments)
    assert (done.code, done.out) == (2, "")
    (error,) = done.errors
    assert words in error
    assert not RUNS.exists()


def test_noise_is_refused_where_nets_run_twice() -> None:
    done = fmrun("train", *BARE, *MAKER, "-s", "train.accumulate=2")
    assert done.code == 2
    assert "a target here draws random numbers" in done.errors[0]


def test_an_upscaler_must_make_images_of_the_right_size() -> None:
    done = fmrun(*upscaling("-s", "generator.target=own_pair:Crops"))
    assert done.code == 2
    assert "makes (2, 3, 30, 32) of (2, 3, 16, 16), and must make (2, 3, 32, 32)" in done.errors[0]


def test_code_that_has_changed_since_is_one_sentence() -> None:
    train(*MAKER, "--steps", "1", "--name", "run")
    Path("own_pair.py").write_text(
        MODULE.replace("nn.Linear(width, size * size)", "nn.Linear(width, size * size, bias=False)")
    )
    del sys.modules["own_pair"]
    done = fmrun("resume", "run", "--steps", "2", "--trust-code")
    assert done.code == 2
    assert "the code of own_pair:Maker is not what run run was started with" in done.warnings[0]
    assert "the code of own_pair:Maker no longer makes the net that was trained" in done.errors[0]
    done = fmrun("sample", "run")
    assert done.code == 2
    assert "the code of own_pair:Maker no longer makes the net that was trained" in done.errors[0]
