"""Networks as people have them, brought as they stand: each trains, is killed, resumes to the bit and samples, or is one
sentence that says what to write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import BARE, Done, fmrun, forget, good, rows, same_runs
from torch import Tensor

from fmrun.feature_matching.walked import WalkedDiscriminator

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn

def convs(*channels, act=nn.LeakyReLU):
    layers = []
    for a, b in zip(channels, channels[1:]):
        layers += [nn.Conv2d(a, b, 4, 2, 1), act()]
    return nn.Sequential(*layers)
"""

VIEW = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.fc = convs(1, 4, 8), nn.Linear(8 * 7 * 7, 1)
    def forward(self, x):
        x = self.main(x)
        return self.fc(x.view(x.size(0), -1))
"""

RETURNS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = convs(1, 4), convs(4, 8), nn.Conv2d(8, 1, 7)
    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        logits = self.head(b)
        return {}
"""

SCALES = """
class Patch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = convs(1, 4), convs(4, 8), nn.Conv2d(8, 1, 3)
    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return {}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList([Patch(), Patch()])
    def forward(self, x):
        return [self.nets[0](x), self.nets[1](F.avg_pool2d(x, 2))]
"""

BLOCKS = """
class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.one, self.two, self.skip = nn.Conv2d(a, b, 3, 1, 1), nn.Conv2d(b, b, 3, 1, 1), nn.Conv2d(a, b, 1)
        self.act = nn.ReLU(inplace=True)
    def forward(self, x):
        return F.avg_pool2d(self.skip(x) + self.two(self.act(self.one(x))), 2)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 1, 1)
        self.blocks = nn.Sequential(Block(4, 8), Block(8, 8))
        self.head = nn.Linear(8, 1)
        nn.init.zeros_(self.head.weight)
    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).sum((2, 3)))
"""

FUNCTIONAL = """
class EqualConv(nn.Module):
    def __init__(self, a, b, size, stride):
        super().__init__()
        self.weight, self.stride = nn.Parameter(torch.randn(b, a, size, size)), stride
        self.scale = (a * size * size) ** -0.5
    def forward(self, x):
        return F.leaky_relu(F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=1), 0.2)

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([EqualConv(1, 4, 4, 2), EqualConv(4, 8, 4, 2), EqualConv(8, 8, 3, 1)])
        self.weight = nn.Parameter(torch.randn(1, 8 * 49) / 20)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.linear(x.flatten(1), self.weight)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Body()
    def forward(self, x):
        return self.net(x)
"""

OLD_SPECTRAL = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        sn = nn.utils.spectral_norm
        self.main = nn.Sequential(sn(nn.Conv2d(1, 8, 4, 2, 1)), nn.LeakyReLU(0.1, True), sn(nn.Conv2d(8, 8, 4, 2, 1)),
                                  nn.LeakyReLU(0.1, True))
        self.fc = sn(nn.Linear(8 * 49, 1))
    def forward(self, x):
        return self.fc(self.main(x).reshape(len(x), -1))
"""

TWO_HEADS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.classes, self.head = convs(1, 4, 8), nn.Sequential(nn.Conv2d(8, 8, 7), nn.ReLU()), nn.Conv2d(8, 1, 7)
    def forward(self, x):
        x = self.main(x)
        self.classes(x)
        return self.head(x)
"""

SIGMOID = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(*convs(1, 4, 8), nn.Conv2d(8, 1, 7), nn.Sigmoid())
    def forward(self, x):
        return self.main(x).view(-1)
"""

PROBABILITY_TOO = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(*convs(1, 4, 8), nn.Conv2d(8, 1, 7))
    def forward(self, x):
        logit = self.main(x)
        return torch.sigmoid(logit), logit
"""

PICKY = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.LazyConv2d(4, 4, 2, 1), nn.LeakyReLU(), nn.LazyConv2d(8, 4, 2, 1), nn.LeakyReLU())
        self.fc = nn.LazyLinear(1)
        print("made")
    def forward(self, x):
        assert x.shape[1:] == (1, 28, 28) and x.dtype == torch.float32, "28 px in single precision"
        print("called")
        return self.fc(self.main(x).flatten(1))
"""

WORKS: dict[str, tuple[str, tuple[str, ...], str]] = {
    # code, layers listed, the automatic one
    "view after a convolution": (VIEW, ("main.0", "main.1", "main.2", "main.3"), "main.2"),
    "logits, features": (RETURNS.format("logits, [a, b]"), ("a.0", "a.1", "b.0", "b.1"), "b.0"),
    "features, logits": (RETURNS.format("[a, b, logits]"), ("a.0", "a.1", "b.0", "b.1"), "b.0"),
    "a mapping": (RETURNS.format("{'features': [a, b], 'logits': logits}"), ("a.0", "a.1", "b.0", "b.1"), "b.0"),
    "maps at two scales": (
        SCALES.format("self.head(b)"),
        tuple(f"nets.{i}.{part}" for i in "01" for part in ("a.0", "a.1", "b.0", "b.1")),
        "nets.1.b.0",
    ),
    "features and a map at two scales": (
        SCALES.format("[a, b, self.head(b)]"),
        tuple(f"nets.{i}.{part}" for i in "01" for part in ("a.0", "a.1", "b.0", "b.1")),
        "nets.1.b.0",
    ),
    "residual blocks, a head of zeros": (
        BLOCKS,
        (
            "stem",
            *(f"blocks.{i}{part}" for i in "01" for part in (".skip", ".one", ".act", ".two", "")),
        ),
        "blocks.1",
    ),
    "functional convolutions in a wrapper": (
        FUNCTIONAL,
        ("net.layers.0", "net.layers.1", "net.layers.2"),
        "net.layers.2",
    ),
    "the older spectral norm": (OLD_SPECTRAL, ("main.0", "main.1", "main.2", "main.3"), "main.2"),
    "a second head that is not used": (TWO_HEADS, ("main.0", "main.1", "main.2", "main.3"), "main.2"),
    "a sigmoid at the end": (SIGMOID, ("main.0", "main.1", "main.2", "main.3"), "main.2"),
    "a probability beside the logit": (PROBABILITY_TOO, ("main.0", "main.1", "main.2", "main.3"), "main.2"),
    "lazy, of one size and type, and talkative": (PICKY, ("main.0", "main.1", "main.2", "main.3"), "main.2"),
}

OWN = ("-s", "discriminator.target=brought.py:Net", "-s", "generator.width=4")


def bring(code: str) -> None:
    Path("brought.py").write_text(HEAD + code)


@pytest.mark.parametrize("name", WORKS)
def test_a_network_is_probed_trained_killed_resumed_and_sampled(name: str) -> None:
    code, layers, auto = WORKS[name]
    bring(code)
    flags = (*BARE, *OWN, "--lambda-feature", "0.5", "-s", "log.every=5", "-s", "checkpoint.every=6")
    probed = json.loads(
        good("probe-layers", *BARE[:2], *OWN, "--data", "images.npz", "--batch-size", "8", *BARE[-2:], "--json").out
    )
    assert tuple(layer["name"] for layer in probed["layers"]) == layers
    assert probed["auto"] == auto
    assert all(layer["gradient"] for layer in probed["layers"])
    done = good("train", *flags, "--steps", "10", "--name", "whole")
    assert not [line for line in done.warnings if "blind" in line or "no other generator loss" in line]
    assert all(0.3 < row["fm/share"] < 0.7 for row in rows(RUNS / "whole"))
    assert all(abs(row["loss/d"]) < 20 for row in rows(RUNS / "whole"))
    shutil.copytree(RUNS / "whole", RUNS / "killed")
    forget(RUNS / "killed", 6)
    good("resume", "killed")
    same_runs(RUNS / "whole", RUNS / "killed", 10)
    picture = good("sample", "whole", "--num", "4").out.strip()
    assert Path(picture).is_file()


def test_the_start_is_the_same_every_time() -> None:
    """Dropout, noise and power iterations of the user's own included."""
    bring(OLD_SPECTRAL.replace("nn.LeakyReLU(0.1, True))", "nn.Dropout2d(0.5))", 1))
    flags = ("train", *BARE, *OWN, "--lambda-feature", "0.5", "--dry-run")

    first = good(*flags).err
    for seed in range(3):
        torch.manual_seed(seed)
        assert good(*flags).err == first


def test_in_which_memory_format_a_network_runs_is_said() -> None:
    bring(VIEW)
    said = good("train", *BARE, *OWN, "--dry-run").err
    assert "discriminator: in the ordinary memory format (NCHW), for brought.py:Net does not take channels_last" in said
    bring(VIEW.replace("x.view(x.size(0), -1)", "x.flatten(1)"))
    assert "memory format" not in good("train", *BARE, *OWN, "--dry-run").err


def test_a_sigmoid_at_the_end_is_warned_of_with_two_ways_out() -> None:
    bring(SIGMOID)
    (warning,) = [w for w in good("train", *BARE, *OWN, "--dry-run").warnings if "ends in a sigmoid" in w]
    assert "return them without the sigmoid, or add -s losses.gan.type=lsgan" in warning
    assert "ends in a sigmoid" not in good("train", *BARE, *OWN, "-s", "losses.gan.type=lsgan", "--dry-run").err
    bring(PROBABILITY_TOO)
    assert "ends in a sigmoid" not in good("train", *BARE, *OWN, "--dry-run").err


def test_what_a_network_prints_is_no_data() -> None:
    bring(PICKY)
    done = good("probe-layers", *BARE[:2], *OWN, "--no-data", "--json", *BARE[-2:])
    json.loads(done.out)
    assert "made\n" in done.err
    assert "called\n" in done.err


def test_any_module_can_be_named_and_blocks_are_preferred() -> None:
    bring(BLOCKS)
    flags = ("train", *BARE, *OWN, "--lambda-feature", "0.5", "--steps", "1")
    good(*flags, "--layers", "key", "--name", "key")
    assert [k for k in rows(RUNS / "key")[-1] if k.startswith(("fm/stem", "fm/blocks"))] == [
        "fm/stem",
        "fm/blocks.0",
        "fm/blocks.1",
    ]
    bring(
        TWO_HEADS.replace("self.main(x)", "self.pool(self.main(x))").replace(
            "super().__init__()", "super().__init__()\n        self.pool = nn.AvgPool2d(3, 1, 1)"
        )
    )
    good(*flags, "--layers", "pool,main", "--name", "pool")
    assert {"fm/pool", "fm/main.3"} < rows(RUNS / "pool")[-1].keys()
    (error,) = fmrun(*flags, "--layers", "classes").errors
    assert "there is no layer 'classes'" in error


def test_scales_count_alike_in_every_loss() -> None:
    """The mean over scales of the mean over each one's map, whatever its size."""
    from fmrun.losses.adversarial import D_LOSSES, G_LOSSES, squared_gradient

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 1, 8, 8, generator=generator, requires_grad=True)

    def judged(factor: float) -> tuple[Tensor, Tensor]:
        return factor * image[:, :, 1:], (factor * image).square().mean((2, 3))

    real, fake = judged(1.0), judged(-0.7)
    for name, loss in D_LOSSES.items():
        expected = (loss(real[0], fake[0]) + loss(real[1], fake[1])) / 2
        torch.testing.assert_close(loss(real, fake), expected)
        torch.testing.assert_close(
            G_LOSSES[name](fake, real), (G_LOSSES[name](fake[0], real[0]) + G_LOSSES[name](fake[1], real[1])) / 2
        )
    per_image = (real[0].mean((1, 2, 3)) + real[1].mean(1)) / 2
    (gradient,) = torch.autograd.grad(per_image.sum(), image, retain_graph=True)
    torch.testing.assert_close(squared_gradient(real, image), gradient.square().sum((1, 2, 3)).mean())


REFUSED: dict[str, tuple[str, str]] = {
    "an auxiliary classifier": (
        RETURNS.format("logits, a.mean((2, 3)).repeat(1, 3)"),
        "returns [0] (2, 1, 1, 1), [1] (2, 12) for 2 images, and it is not clear which are the logits: return them alone, or as ",
    ),
    "no weights": (
        "class Net(nn.Module):\n    def forward(self, x):\n        return F.relu(x).mean((1, 2, 3))\n",
        "has no module before its head",
    ),
    "frozen": (
        VIEW + "\nInner = Net\ndef Net():\n    return Inner().requires_grad_(False)\n",
        "has no weights to train",
    ),
    "a script with arguments": (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--epochs', required=True)\nparser.parse_args()\n"
        + VIEW,
        "importing 'brought' ends the program: put what it does when it is run as a script behind if __name__ == '__main__'",
    ),
    "a script that exits": ("import sys\nsys.exit(0)\n" + VIEW, "importing 'brought' ends the program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_sentence(name: str) -> None:
    code, words = REFUSED[name]
    bring(code)
    done = fmrun("train", *BARE, *OWN)
    assert (done.code, done.out) == (2, ""), done.err
    (error,) = done.errors
    assert words in error


def test_a_script_does_not_see_the_arguments_of_fmrun() -> None:
    bring(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--size', default=3)\nparser.parse_args()\n"
        + VIEW
    )
    good("train", *BARE, *OWN, "--dry-run")


# ---- generators


MAPS = """
class Net(nn.Module):
    def __init__(self, latent_dim=8):
        super().__init__()
        self.main = nn.Sequential(nn.ConvTranspose2d(latent_dim, 8, 7), nn.BatchNorm2d(8), nn.ReLU(True),
                                  nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ReLU(True), nn.ConvTranspose2d(4, 1, 4, 2, 1))
    def forward(self, z):
        return torch.tanh(self.main(z)).view(z.size(0), -1, 28, 28)
"""


def test_a_generator_may_take_latents_as_maps_and_the_ordinary_layout() -> None:
    bring(MAPS)
    own = ("-s", "generator.target=brought.py:Net", "-s", "discriminator.width=4")
    train = ("train", *BARE, *own, "--steps", "4", "-s", "checkpoint.every=2")
    good(*train, "--name", "whole")
    good("train", *BARE, *own, "--steps", "2", "--name", "parts")
    good("resume", "parts", "--steps", "4")
    same_runs(RUNS / "whole", RUNS / "parts", 4, 2)
    assert Path(good("sample", "whole", "--num", "3", "--interpolate", "3").out.strip()).is_file()
    good("export", "whole", "--out", "net.onnx")


# ---- where it lies


def test_a_path_names_a_file_and_a_run_finds_it_from_another_folder(workplace: Path) -> None:
    Path("nets/of mine").mkdir(parents=True)
    bring(VIEW)
    Path("brought.py").rename("nets/of mine/brought.py")
    own = ("-s", "discriminator.target=nets/of mine/brought.py:Net", "-s", "generator.width=4")
    good("train", *BARE, *own, "--steps", "1", "--name", "run")
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    good("sample", "run", "--runs-dir", "../runs", "--num", "2")
    good("resume", "run", "--runs-dir", "../runs", "--steps", "2")
    Path("../nets/of mine/brought.py").rename("../gone.py")
    done: Done = fmrun("resume", "run", "--runs-dir", "../runs", "--steps", "3")
    (error,) = done.errors
    assert f"nor in {workplace / 'nets/of mine'}, where it was when the run was started" in error


# ---- found in the graph


class _Both(torch.nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.a, self.b, self.wrap = torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 1, 3), wrap

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        return self.wrap(a, self.b(a))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, y: (a, y),
        lambda a, y: (y, a),
        lambda a, y: [a, y],
        lambda a, y: {"feats": (a,), "score": y},
        lambda a, y: (torch.sigmoid(y), y, a),
        lambda a, y: {"features": a, "rest": {"deep": y}},
    ],
)
def test_the_logits_are_what_the_others_feed_into(wrap: Any) -> None:
    net = WalkedDiscriminator(_Both(wrap), (1, 8, 8))
    image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(image).logits, net.net.b(net.net.a(image)))


# ---- found by others


WEIGHT_NORM = VIEW.replace("convs(1, 4, 8), nn.Linear(8 * 7 * 7, 1)", "nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 4, 4, 4)), "
                           "nn.LeakyReLU()), nn.Linear(4 * 49, 1)")  # fmt: skip

STD = VIEW.replace(
    "x = self.main(x)",
    "x = self.main(x)\n        std = x.view(min(4, len(x)), -1, *x.shape[1:]).std(0).mean()\n        x = x + std",
)

ONCE = """
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient
""" + RETURNS.format("logits").replace("b = self.b(a)", "b = self.b(Once.apply(a))")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("code", [WEIGHT_NORM, STD], ids=["the older weight norm", "a batch that divides by four"])
def test_a_network_meets_batches_as_it_is_trained_with_and_copies(code: str) -> None:
    bring(code)
    held = ("-s", "data.valid_fraction=0.4", "-s", "eval.every=2")
    good("train", *BARE, *OWN, "--lambda-feature", "0.5", "--steps", "2", "--name", "run", *held)
    assert "eval/d_valid" in rows(RUNS / "run")[-1]
    good("resume", "run", "--steps", "3")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Lazy modules")
@pytest.mark.parametrize("lazy", [False, True])
def test_a_generator_may_be_lazy_or_have_the_older_weight_norm(lazy: bool) -> None:
    first = "nn.LazyConvTranspose2d(8, 7)" if lazy else "nn.utils.weight_norm(nn.ConvTranspose2d(latent_dim, 8, 7))"
    bring(MAPS.replace("nn.ConvTranspose2d(latent_dim, 8, 7)", first))
    own = ("-s", "generator.target=brought.py:Net", "-s", "discriminator.width=4")
    good("train", *BARE, *own, "--steps", "2", "--name", "run")
    good("resume", "run", "--steps", "3")
    assert Path(good("sample", "run", "--num", "2").out.strip()).is_file()


def test_a_penalty_without_second_derivative_is_refused_at_the_start() -> None:
    bring(ONCE)
    good("train", *BARE, *OWN, "--dry-run")
    (error,) = fmrun("train", *BARE, *OWN, "-s", "losses.gan.r1=1").errors
    assert "discriminator.target fails when it is trained: " in error
    assert "losses.gan.r1 and r2 need its second derivative" in error


@pytest.mark.parametrize("end", ["logits = self.head(b).mean(0).view(1)", "logits = self.a(x).flatten()"])
def test_logits_have_a_row_for_every_image(end: str) -> None:
    bring(RETURNS.format("logits").replace("logits = self.head(b)", end))
    (error,) = fmrun("train", *BARE, *OWN).errors
    assert "return them alone, or as {'logits': …}, with a row for every image" in error


def test_a_layer_that_begins_at_zero_is_not_blind() -> None:
    bring(
        BLOCKS.replace(
            "nn.init.zeros_(self.head.weight)",
            "nn.init.zeros_(self.blocks[0].two.weight); nn.init.zeros_(self.blocks[0].two.bias)",
        )
    )
    flags = ("--lambda-feature", "0.5", "--layers", "blocks.0.two", "--balance", "gradient", "-s", "log.every=1")
    done = good("train", *BARE, *OWN, *flags, "--steps", "6", "--name", "run")
    assert "blind" not in done.err
    assert rows(RUNS / "run")[-1]["fm/share"] == pytest.approx(0.5, rel=0.3)


def test_two_heads_of_one_channel_are_said_to_count_alike() -> None:
    bring(SCALES.format("self.head(b)"))
    assert "logits: the mean over those at 2 places" in good("train", *BARE, *OWN, "--dry-run").err


def test_a_file_that_bears_a_name_of_pythons_is_to_be_renamed() -> None:
    bring(VIEW)
    Path("brought.py").rename("queue.py")
    (error,) = fmrun("train", *BARE, "-s", "discriminator.target=queue.py:Net").errors
    assert "rename 'queue.py': its name is that of a module of Python's" in error
