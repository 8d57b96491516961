"""Super-resolution from the command line: what is trained when, how often, and that it is the same however it is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import Background, fmrun, free_port, good, rows, same_runs, same_tensors, saved, status, steps
from support.helpers import WORLD, Calls, differing, everything, tensors_of, worst
from support.pair_images import picture, save
from support.pair_states import advance, draws_of, make_state
from support.two_ranks import closeness
from torch import nn

from fmrun.config.presets import resolve
from fmrun.models.upscalers import ARCHITECTURES, build_upscaler, fuse_convolutions
from fmrun.runtime.errors import UserError
from fmrun.tasks.upscale import UpscaleData, UpscaleMonitor
from fmrun.train import memory
from fmrun.train.health import Health
from fmrun.train.run import warnings
from fmrun.train.start_checks import blind, check_start
from fmrun.train.state import State

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")
FEATURES = ["input", "enc1", "enc2", "enc3", "enc4", "bottleneck", "spatial", "frequency", "patch", "fusion"]
"""MUNet's, as they are documented."""


def s(*settings: str) -> tuple[str, ...]:
    """`-s` before each."""
    return tuple(part for setting in settings for part in ("-s", setting))


NETS = (
    *s("generator.features=4", "generator.blocks=1", "discriminator.width=4", "data.patch_size=32"),
    *("--batch-size", "4", "--device", "cpu"),
)
TINY = (
    *NETS,
    *s("log.sample_count=2", "eval.num=2", "eval.every=3", "eval.perceptual=none", "log.every=1"),
    "--data",
    "photographs",
)
FROM_START = s("losses.gan.start_step=0", "feature_matching.start_step=0")


@pytest.fixture(autouse=True)
def photographs(workplace: Path) -> Path:
    """Five small pictures, smooth enough to be upscaled."""
    for i, (height, width) in enumerate([(40, 52), (64, 48), (57, 61), (48, 48), (50, 44)]):
        small = Image.fromarray(picture(height // 6, width // 6, seed=i))
        save(
            workplace / "photographs" / f"{i}.png", np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        )
    return workplace / "photographs"


def train(*arguments: str | Path, preset: str = "munet-x2-cpu") -> Any:
    return good("train", "--preset", preset, *TINY, *s("data.valid_fraction=0.4"), *arguments)


def refused(*arguments: str | Path) -> str:
    """The one sentence with which a command refuses to work."""
    done = fmrun(*arguments)
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    (error,) = done.errors
    return error


# ---- probe


def layers_of(result: dict[str, Any]) -> list[tuple[int, str, bool]]:
    return [(layer["index"], layer["name"], layer["gradient"]) for layer in result["layers"]]


def test_probe_lists_ten_layers_in_order_all_with_gradient() -> None:
    flags = ("--preset", "munet-x2-cpu", "--json", *NETS)
    blank = json.loads(good("probe-layers", *flags, "--no-data").out)
    assert layers_of(blank) == [(i, name, True) for i, name in enumerate(FEATURES)]
    assert blank["image"] == [3, 32, 32]
    assert blank["groups"]["key"] == ["enc1", "enc3", "bottleneck", "fusion"]
    assert [layer["name"] for layer in blank["layers"] if layer["selected"]] == blank["groups"]["key"]
    seen = json.loads(good("probe-layers", *flags, "--data", "photographs").out)
    assert layers_of(seen) == layers_of(blank)
    assert not any(layer["blind"] for layer in seen["layers"])
    assert all(layer["gap"] > 0 and layer["gradient_share"] > 0 for layer in seen["layers"])
    assert seen["share"] == pytest.approx(0.1, rel=0.01), "balanced, lambda is the share"


def test_a_run_is_probed_at_its_patch_size() -> None:
    train("--steps", "1", "--name", "run")
    result = json.loads(good("probe-layers", "run", "--json").out)
    assert (result["step"], result["image"]) == (1, [3, 32, 32])


def test_only_a_blind_statistic_is_called_blind_however_close_pairs_are() -> None:
    state = make_state(feature_matching={"match": "mean"})
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(4, 3, 8, 8, generator=rng, dtype=torch.float64)
    near = real + 1e-3 * torch.randn(real.shape, generator=rng, dtype=torch.float64)
    assert not blind(state, "input", real, near)
    moved = near - near.mean(0) + real.mean(0)  # a norm that gives every batch the same mean
    assert blind(state, "input", real, moved)
    assert not blind(make_state(), "input", real, moved)
    constant = torch.ones_like(real)
    assert blind(make_state(), "input", constant, constant)


# ---- resuming


CHAIN = s("data.degradation.kind=chain")
STARTS = s("losses.gan.start_step=2", "feature_matching.start_step=2", "log.sample_every=3")
EXACT: dict[str, tuple[str, ...]] = {
    "streamed by two workers, simultaneous": s("data.cache=none", "data.workers=2", "train.update=simultaneous"),
    "chain": (*CHAIN, *s("data.workers=0")),
    "chain by two workers, span, penalties": (
        *(*CHAIN, *s("data.workers=2", "generator.type=span", "generator.blocks=none")),
        *s("losses.gan.type=hinge", "losses.gan.r1=1"),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_three_steps_and_three_are_six(name: str) -> None:
    flags = (*STARTS, *EXACT[name])
    train("--steps", "6", "--name", "whole", *flags)
    train("--steps", "3", "--name", "halves", *flags)
    done = good("resume", "halves", "--steps", "6")
    assert not done.warnings
    assert [row["step"] for row in rows(RUNS / "halves")] == list(range(1, 7))
    same_runs(RUNS / "whole", RUNS / "halves", 6)
    assert {"eval/psnr_y", "eval/ssim_y", "eval/psnr_y_bicubic"} <= rows(RUNS / "halves")[-1].keys()


def test_workers_change_no_bit() -> None:
    for name, workers in (("none", "0"), ("two", "2")):
        train("--steps", "2", "--name", name, *CHAIN, *s(f"data.workers={workers}"))
    same_runs(RUNS / "none", RUNS / "two", 2)


def test_pictures_and_measurements_change_no_bit() -> None:
    """SPAN in eval mode writes into its weights."""
    span = s("generator.type=span", "generator.blocks=none")
    train("--steps", "4", "--name", "watched", *span, *s("log.sample_every=1", "eval.every=1", "checkpoint.every=1"))
    train("--steps", "4", "--name", "alone", *span, *s("eval.every=0"))
    same_tensors(saved(RUNS / "watched", 4).tensors, saved(RUNS / "alone", 4).tensors)


# ---- what a step runs


def counted(state: State) -> Calls:
    role = state.task.discriminators[0]
    return Calls(role.net)


def test_before_anything_reads_it_the_discriminator_is_not_run() -> None:
    state = make_state(
        losses={"charbonnier": {}, "gan": {"start_step": 2}}, feature_matching={"start_step": 3, "balance": "gradient"}
    )
    calls = counted(state)
    net = state.task.discriminators[0].net
    before = tensors_of(net)
    advance(state, 2)
    assert len(calls) == 0
    assert not differing(before, tensors_of(net))
    advance(state)
    assert len(calls) == 3, "real, fake; fake"
    advance(state)
    assert len(calls) == 3 + 4, "real, fake; real, fake"
    assert [call["layers"] == () for call in calls.asked[3:]] == [True, True, False, False]


@pytest.mark.parametrize("type_", ["vanilla", "r3gan"])
def test_a_generator_update_runs_d_once_on_fakes_and_once_on_reals(type_: str) -> None:
    state = make_state(
        losses={"charbonnier": {}, "gan": {"type": type_}}, feature_matching={"layers": ["enc1", "bottleneck"]}
    )
    draws = draws_of(state)
    calls = counted(state)
    state.advance(draws)
    real = draws[0][0].real
    d_real, d_fake, *generator = calls.asked
    assert d_real["weights"]
    assert d_fake["weights"]
    assert torch.equal(d_real["image"], real)
    assert len(generator) == 2
    (on_real,) = (call for call in generator if torch.equal(call["image"], real))
    (on_fake,) = (call for call in generator if not torch.equal(call["image"], real))
    assert not on_real["grad"]
    assert on_real["logits"] is (type_ == "r3gan"), "truncated, unless the loss reads its logits: then shared"
    assert on_fake["grad"]
    assert on_fake["logits"]
    assert on_real["layers"] == on_fake["layers"] == ("enc1", "bottleneck")
    assert not on_real["weights"]
    assert not on_fake["weights"]


def shares_by_hand(state: State, adversarial: bool) -> float:
    """||grad lambda L_FM|| over that of the adversarial term, or of the pixel losses, at the generated images."""
    (batch,) = draws_of(state)[0]
    role = state.task.discriminators[0]
    leaf = state.task.generate(batch).detach().requires_grad_()
    layers = role.matching.layers
    with torch.no_grad():
        real = role(batch.real, None, layers).features
    out = role(leaf, None, layers)
    distance = torch.stack([(out.features[name] - real[name]).abs().mean() for name in layers]).mean()
    above = torch.autograd.grad(role.matching.weight * distance, leaf, retain_graph=True)[0].norm()
    if adversarial:
        below = role.gan.weight * nn.functional.softplus(-out.logits).mean()
    else:
        below = ((leaf - batch.real).square() / 4 + 1e-12).sqrt().mean()
    return float(above / torch.autograd.grad(below, leaf)[0].norm())


def test_the_share_is_of_the_pixel_losses_until_the_adversarial_term_acts() -> None:
    losses = {"charbonnier": {}, "gan": {"weight": 0.1, "start_step": 1}}
    state = make_state(losses=losses, optim={"discriminator": {"lr": 1e-30}})
    expected = {}
    for step, adversarial in ((0, False), (1, True)):
        expected[step] = shares_by_hand(state, adversarial)
        advance(state)
        assert float(state.task.discriminators[0].matching.strength.share) == pytest.approx(expected[step], rel=0.01)
    assert expected[0] != pytest.approx(expected[1], rel=0.5)


def test_without_an_adversarial_term_the_share_is_of_the_pixel_losses() -> None:
    train(*s("losses.gan.weight=0", "feature_matching.start_step=0"), "--steps", "2", "--name", "run")
    assert rows(RUNS / "run")[0]["fm/share"] == pytest.approx(0.1, rel=1e-3)
    flags = (*TINY, *s("losses.gan.weight=0", "feature_matching.start_step=0"))
    done = good("train", "--preset", "munet-x2-cpu", *flags, "--dry-run")
    assert "its gradient is 10 % of that of the generator's other losses" in done.err
    result = json.loads(good("probe-layers", "run", "--json").out)
    assert result["share"] == pytest.approx(0.1, rel=0.1)
    assert result["share_of"] == "that of the generator's other losses"


def test_balance_is_measured_densely_again_when_the_gan_starts() -> None:
    role = make_state(losses={"charbonnier": {}, "gan": {"start_step": 101}}).task.discriminators[0]
    assert [role.plan(step, True).measure for step in (0, 31, 33, 100)] == [True, True, False, False]
    assert all(role.plan(step, True).measure for step in range(101, 133))


@pytest.mark.parametrize("start", [0, 5])
def test_a_loss_that_teaches_nothing_is_named_also_if_it_starts_later(start: int) -> None:
    state = make_state(losses={"charbonnier": {"start_step": start}, "l1": {}})
    state.task.losses.functions["charbonnier"] = lambda image, target: (image * 0).sum()
    with pytest.raises(UserError, match=r"losses\.charbonnier gives the generator no gradient"):
        check_start(state, draws_of(state))


def test_checks_before_the_first_step_leave_no_trace() -> None:
    state = make_state(feature_matching={"balance": "gradient"})
    before = everything(state)
    check_start(state, draws_of(state))
    assert not differing(before, everything(state))


def test_the_batch_that_fits_is_found_with_everything_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_state(
        losses={"charbonnier": {}, "gan": {"start_step": 5, "ramp": 9, "r1": 1, "penalty_every": 4}},
        train={"batch_size": 8},
    ).config
    plans = []

    def advance_(state: State, draws: Any) -> None:
        plans.append(state.task.plan(state.step).discriminators[0])

    monkeypatch.setattr(State, "advance", advance_)
    assert memory.largest_batch(config, WORLD) == 4
    assert [(p.train, p.adversarial, bool(p.layers), p.penalty) for p in plans] == [(True, True, True, True)]


def test_the_pixel_phase_is_no_illness() -> None:
    health = Health()
    row = {"loss/g": 0.1, "loss/charbonnier": 0.1, "health/diversity": 0.95, "eval/psnr_y": 30.0}
    assert not any(health.read({"step": i, **row}) for i in range(40))


# ---- configs as they come

YAML = {
    "basic": """\
# A losses block as it is usually added to an existing super-resolution config.
losses:
  - type: featurematchingloss
    loss_weight: 0.2
    criterion: l1
    reduction: mean
    start_iter: 0
""",
    "combined": """\
losses:
  - type: charbonnierloss
    loss_weight: 0.5
  - type: convnextperceptualloss
    loss_weight: 0.2
  - type: ffloss
    loss_weight: 0.3
  - type: featurematchingloss
    loss_weight: 0.1
    layers: [1, 3, 5, 9]
    criterion: l1
  - type: hfenloss
    loss_weight: 0.02
  - type: ganloss
    gan_type: r3gan
    loss_weight: 0.05
    start_iter: 20000
""",
    "selected-layers": """\
losses:
  - type: FeatureMatchingLoss
    loss_weight: 0.05
    layers: [0, 2, 4, 5]
    criterion: charbonnier
    reduction: sum
    eps: 1e-6
    start_iter: 500
  - type: ganloss
    gan_type: vanilla
    loss_weight: 0.1
""",
}
CONVNEXT = """\
  - type: convnextperceptualloss
    loss_weight: 0.2
"""
LOGGED = {
    "basic": {"loss/charbonnier", "fm/distance", "fm/enc1", "fm/enc3", "fm/bottleneck", "fm/fusion", "loss/d"},
    "combined": {"loss/charbonnier", "loss/frequency", "loss/hfen", "fm/enc1", "fm/fusion", "loss/d"},
    "selected-layers": {"loss/g_adv", "loss/d"},
}


def yaml(name: str, text: str | None = None) -> Path:
    path = Path(f"{name}.yml")
    path.write_text(YAML[name] if text is None else text)
    return path


@pytest.mark.parametrize("name", YAML)
def test_yaml_configs_train(name: str) -> None:
    text = YAML[name].replace(CONVNEXT, "")
    train("--config", yaml(name, text), "--steps", "2", "--name", "run")
    row = rows(RUNS / "run")[-1]
    assert LOGGED[name] <= row.keys()
    config = json.loads((RUNS / "run" / "config.json").read_text())
    assert config["feature_matching"]["balance"] == "none"
    if name == "basic":
        assert config["losses"]["gan"]["weight"] == 0.02, "without other entries the preset's losses stand"
    if name == "combined":
        assert "loss/g_adv" not in row
        assert row["fm/loss"] == pytest.approx(0.1 * row["fm/distance"])
        parts = [row[f"loss/{x}"] for x in ("charbonnier", "frequency", "hfen")]
        assert row["loss/g"] == pytest.approx(sum(parts) + row["fm/loss"], rel=1e-4)
    if name == "selected-layers":
        assert "loss/charbonnier" not in row
        assert "fm/distance" not in row


def test_weights_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(workplace / "cache"))
    flags = ("--preset", "munet-x2-cpu", *TINY, "--config", yaml("combined"))
    error = refused("train", *flags)
    assert "losses.convnext" in error
    assert "convnext_tiny" in error
    assert ".pth" in error
    assert not RUNS.exists()


# ---- data


def test_paired_folders(workplace: Path) -> None:
    for i in range(4):
        low = picture(24, 20 + i, seed=i)
        save(workplace / "pairs" / "lr" / f"{i}.png", low)
        save(workplace / "pairs" / "hr" / f"{i}.png", low.repeat(2, 0).repeat(2, 1))
    flags = s(
        "data.lr_path=pairs/lr", "data.valid_path=pairs/hr", "data.valid_lr_path=pairs/lr", "data.valid_fraction=0"
    )
    done = train("--data", "pairs/hr", *flags, "--steps", "3", "--name", "run")
    assert "4 + 4 held out" in done.err
    assert "eval/psnr_y" in rows(RUNS / "run")[-1]


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_images_and_images_with_alpha(channels: int, workplace: Path) -> None:
    for i in range(3):
        save(workplace / "own" / f"{i}.png", picture(40, 44, channels, seed=i))
    train("--data", "own", *FROM_START, *s(f"data.channels={channels}"), "--steps", "3", "--name", "run")
    sheet = Image.open(RUNS / "run" / "samples" / "step-00000003.png")
    assert sheet.mode == {1: "L", 4: "RGBA"}[channels]
    assert math.isfinite(rows(RUNS / "run")[-1]["eval/psnr_y"])


def test_the_sheet_shows_low_resolution_bicubic_output_and_original() -> None:
    train("--steps", "1", "--name", "run", *s("data.valid_fraction=0", "log.sample_count=3"))
    sheet = np.asarray(Image.open(RUNS / "run" / "samples" / "step-00000001.png"))
    assert sheet.shape == (4 + 3 * 132, 4 + 4 * 132, 3)
    assert "eval/psnr_y" not in rows(RUNS / "run")[-1], "nothing is held out; training images are shown"
    low, bicubic, _, original = (sheet[4:44, 4 + 132 * i : 44 + 132 * i] for i in range(4))
    assert np.array_equal(original, np.asarray(Image.open("photographs/0.png"))[:, 6:46]), "its middle, square"
    assert np.array_equal(low, low[::2, ::2].repeat(2, 0).repeat(2, 1))
    assert np.abs(bicubic.astype(float) - original).mean() < np.abs(low.astype(float) - original).mean()


def test_validation_images_too_small_to_measure_are_named(workplace: Path) -> None:
    save(workplace / "valid" / "small.png", picture(14, 40))
    error = refused("train", "--preset", "munet-x2-cpu", *TINY, *s("data.valid_path=valid"))
    assert "at least 15 px" in error
    assert "small" in error


def test_large_validation_images_are_measured_in_tiles(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    state = make_state()
    sizes: list[torch.Size] = []
    state.task.average.register_forward_hook(lambda net, args, out: sizes.append(args[0].shape))
    image = UpscaleMonitor(state.task, UpscaleData(state.config)).upscale(
        torch.from_numpy(picture(40, 900)).permute(2, 0, 1)
    )
    assert image.shape == (1, 3, 80, 1800)
    assert len(sizes) > 1
    assert max(size[3] for size in sizes) < 450


def test_a_flat_photograph_ends_neither_a_run_nor_an_evaluation(workplace: Path) -> None:
    """Its PSNR is infinite, which JSON cannot say."""
    save(workplace / "held" / "flat.png", np.full((48, 48, 3), 128, np.uint8))
    save(workplace / "held" / "other.png", picture(48, 48))
    own = ("--name", "run", *s("data.valid_fraction=0", "data.valid_path=held", "checkpoint.best=eval/psnr_y_bicubic"))
    done = train("--steps", "3", *own)
    assert "of bicubic infinite" in done.err
    (warning,) = (line for line in done.warnings if "PSNR" in line)
    assert "flat in 'held'" in warning
    assert rows(RUNS / "run")[-1]["eval/psnr_y_bicubic"] is None
    done = good("eval", "run", "--json")
    assert len([line for line in done.warnings if "PSNR" in line]) == 1
    (record,) = json.loads(done.out)
    assert record["bicubic"]["psnr_y"] is None
    assert math.isfinite(record["metrics"]["psnr_y"])
    assert "Infinity" not in (RUNS / "run" / "evaluations.json").read_text()
    assert " inf " in good("eval", "run").out


def test_photographs_smaller_than_a_patch_are_measured(workplace: Path) -> None:
    train("--steps", "1", "--name", "run")
    save(workplace / "small" / "a.png", picture(20, 24))
    (record,) = json.loads(good("eval", "run", "--data", "small", "--json").out)
    assert math.isfinite(record["metrics"]["ssim_y"])
    save(workplace / "small" / "b.png", picture(14, 40))
    assert "at least 15 px a side to be measured, and 1 of 2 in 'small'" in refused("eval", "run", "--data", "small")


# ---- the best checkpoint


def test_the_best_checkpoint_is_kept() -> None:
    flags = s("checkpoint.best=eval/psnr_y", "checkpoint.best_mode=max", "checkpoint.every=1", "checkpoint.keep_last=1")
    train("--steps", "5", "--name", "run", *flags, *s("eval.every=1", "optim.generator.lr=3e-1"))
    values = {row["step"]: row["eval/psnr_y"] for row in rows(RUNS / "run")}
    best = max(values, key=lambda step: values[step])
    assert steps(RUNS / "run") == sorted({best, 5})
    assert status(RUNS / "run")["best"] == {"metric": "eval/psnr_y", "value": values[best], "step": best}
    assert best != 5, "a learning rate so large spoils it"


# ---- sample


def test_sample_upscales_files_and_folders(workplace: Path) -> None:
    train("--steps", "1", "--name", "run")
    done = good("sample", "run", "--input", "photographs/0.png", "--out", "large")
    (path,) = map(Path, done.out.split())
    assert Image.open(path).size == (104, 80)
    assert path.parent.resolve() == (workplace / "large").resolve()
    done = good("sample", "run", "--input", "photographs", "--out", "all")
    assert len(done.out.split()) == 5
    for line in done.out.split():
        small = Image.open(Path("photographs") / f"{Path(line).name[0]}.png")
        assert Image.open(line).size == (2 * small.width, 2 * small.height)


def test_blending_is_said_where_tiles_are_not_the_whole() -> None:
    noted = "this generator sees further than its tiles overlap"
    realplksr = s("generator.type=realplksr", "generator.kernel=3")
    train(*realplksr, "--steps", "1", "--name", "global")
    train("--steps", "1", "--name", "local")
    save(Path("in/wide.png"), picture(20, 100, seed=9))
    save(Path("in/small.png"), picture(12, 13, seed=9))
    done = good("sample", "global", "--input", "in", "--tile", "32", "--out", "a")
    (said,) = [line for line in done.err.splitlines() if noted in line]
    assert "blended" in said
    assert noted not in good("sample", "local", "--input", "in", "--tile", "32", "--out", "b").err


# ---- what does not go together


def write_target() -> None:
    Path("judge.py").write_text(
        "from torch import nn\n"
        "class Judge(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True),\n"
        "                         nn.Conv2d(4, 8, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 1, 3, 1, 1))\n"
    )


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "esrgan by 3": (
        s("generator.type=esrgan", "data.scale=3", "data.patch_size=36"),
        "ESRGAN upscales by x1, x2, x4, not x3",
    ),
    "realplksr of grey": (
        s("generator.type=realplksr", "data.channels=1"),
        "RealPLKSR takes images of 3 channels, not 1",
    ),
    "a window for patchgan": (
        s("discriminator.type=patchgan", "discriminator.norm=batch", "discriminator.window=4"),
        "discriminator.window is for type munet, not patchgan",
    ),
    "blocks for munet": (s("discriminator.blocks=3"), "discriminator.blocks is for type patchgan, not munet"),
    "a generator of images from noise": (s("generator.type=dcgan"), "'dcgan' is not for task 'upscale'"),
    "munet for images from noise": (
        s("task=generate", "generator.type=dcgan", "losses.charbonnier=none"),
        "discriminator.type 'munet' is not for task 'generate'",
    ),
    "a patch that does not divide": (
        s("data.scale=3", "data.patch_size=32"),
        "data.patch_size: 32 is no multiple of data.scale 3",
    ),
    "images smaller than a patch": (s("data.patch_size=64"), "smaller than data.patch_size 64"),
    "a setting of another net": (s("generator.kernel=7"), "generator.kernel is for type realplksr, not compact"),
    "bundled images of the other task": (("--data", "bundled:fashion-mnist"), "bundled:photographs"),
    "no such metric": (
        s("checkpoint.best=eval/psnr", "data.valid_fraction=0.4"),
        "there is no metric 'eval/psnr'; did you mean",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_one_sentence(name: str) -> None:
    flags, expected = WRONG[name]
    nets = [f for f in NETS if "generator" not in f and f != "-s"] if "esrgan" in name else NETS
    nets = (*s("discriminator.width=4"), "--device", "cpu") if "esrgan" in name else nets
    error = refused("train", "--preset", "munet-x2-cpu", *nets, "--data", "photographs", *flags)
    assert expected in error
    assert not RUNS.exists()


def test_sample_wants_what_its_generator_takes() -> None:
    train("--steps", "1", "--name", "up")
    error = refused("sample", "up")
    assert "--input FILE-OR-FOLDER" in error
    assert "--input" in refused("sample", "up", "--input", "photographs", "--num", "3")
    assert "nowhere" in refused("sample", "up", "--input", "nowhere")
    noise = s("generator.width=4", "discriminator.width=4", "data.image_size=28", "log.sample_count=4")
    good(
        "train", *noise, "--batch-size", "8", "--device", "cpu", "--data", "images.npz", "--steps", "1", "--name", "dc"
    )
    error = refused("sample", "dc", "--input", "photographs")
    assert "makes images from noise" in error
    assert "--tile" in refused("sample", "dc", "--tile", "64")


# ---- community files


def community_file(path: Path, arch: str, scale: int, **params: Any) -> nn.Module:
    """A model as it is found on the net: weights alone, under the names spandrel knows."""
    net = build_upscaler(arch, scale, 3, torch.Generator().manual_seed(7), **params)
    fuse_convolutions(net)
    save_file(net.state_dict(), path)
    return net


COMMUNITY: dict[str, tuple[str, int, dict[str, Any]]] = {
    "compact": ("compact", 2, {"features": 6, "blocks": 2}),
    "span": ("span", 2, {"features": 4, "norm": True}),
    "realplksr": ("realplksr", 2, {"features": 8, "blocks": 1, "kernel": 5, "layer_norm": True, "dysample": True}),
    "esrgan": ("esrgan", 2, {"features": 8, "blocks": 1, "unshuffle": True}),
}


@pytest.mark.parametrize("name", COMMUNITY)
def test_a_community_model_is_trained_on_and_its_file_needed_no_more(name: str) -> None:
    arch, scale, params = COMMUNITY[name]
    file = Path("community.safetensors")
    net = community_file(file, arch, scale, **params)
    flags = (
        *s(f"generator.type={arch}", "generator.features=none", "generator.blocks=none", f"generator.init={file}"),
        *s("optim.generator.lr=1e-30", "ema.decay=0"),
    )
    train(*flags, "--steps", "1", "--name", "run")
    generator = json.loads((RUNS / "run" / "config.json").read_text())["generator"]
    assert {key: generator[key] for key in params} == params
    assert {key for key in ("features", "blocks", "kernel") if generator[key] is not None} == set(
        ARCHITECTURES[arch].params
    ) & {"features", "blocks", "kernel"}
    trained = {k.removeprefix("generator."): v for k, v in saved(RUNS / "run", 1).tensors.items()}
    began = net.state_dict()
    for key, value in began.items():
        if "eval_conv" not in key:
            torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-20, msg=key)
    file.unlink()
    good("resume", "run", "--steps", "2")
    good("sample", "run", "--input", "photographs/0.png", "--out", "large")


def test_a_community_model_of_another_scale_is_one_sentence() -> None:
    community_file(Path("x4.safetensors"), "compact", 4, features=4, blocks=1)
    flags = ("--preset", "munet-x2-cpu", *TINY, *s("generator.init=x4.safetensors"))
    error = refused("train", *flags)
    assert "Compact x4" in error
    assert "scale 2: add -s data.scale=4" in error


def test_a_run_begins_from_a_run() -> None:
    train("--steps", "1", "--name", "parent")
    (parent,) = (RUNS / "parent" / "checkpoints").iterdir()
    train("--steps", "1", "--name", "child", *s(f"generator.init={parent}", "optim.generator.lr=1e-30", "ema.decay=0"))
    parent_, child = load_file(parent), saved(RUNS / "child", 1).tensors
    for name in parent_:
        if name.startswith("ema."):
            assert torch.equal(child[f"generator.{name.removeprefix('ema.')}"], parent_[name])


# ---- other discriminators


@pytest.mark.parametrize(
    "settings",
    [
        s("discriminator.type=patchgan", "discriminator.norm=batch"),
        s("discriminator.type=patchgan", "discriminator.norm=instance"),
        s("discriminator.type=patchgan", "discriminator.norm=batch", "discriminator.blocks=2"),
        s("discriminator.window=2"),
        s("discriminator.type=unet"),
        s("discriminator.type=dcgan", "discriminator.norm=spectral"),
    ],
    ids=["patchgan", "patchgan instance", "small patchgan", "munet", "unet", "dcgan"],
)
def test_other_discriminators_train(settings: tuple[str, ...]) -> None:
    train(*FROM_START, *settings, "--steps", "2", "--name", "run")
    row = rows(RUNS / "run")[-1]
    assert row["fm/share"] == pytest.approx(0.1, rel=0.2)
    assert row["loss/g_adv"] > 0


def test_a_net_of_ones_own_judges_photographs_in_place_of_munet() -> None:
    write_target()
    width = TINY.index("discriminator.width=4")
    tiny = (*TINY[: width - 1], *TINY[width + 1 :], *s("data.valid_fraction=0.4"))
    own = s("discriminator.target=judge:Judge")
    good("train", "--preset", "munet-x2-cpu", *tiny, *own, *FROM_START, "--steps", "2", "--name", "run")
    assert rows(RUNS / "run")[-1]["fm/share"] == pytest.approx(0.1, rel=0.2)
    error = refused("train", "--preset", "munet-x2-cpu", *TINY, *own)
    assert (
        "-s discriminator.width=4: discriminator.width is for type dcgan, munet, patchgan or unet, not judge:Judge"
        in error
    )


# ---- in parts and by several


def test_two_micro_batches_are_one_batch() -> None:
    settings = {
        "losses": {
            "charbonnier": {},
            "hfen": {"weight": 0.1},
            "gan": {"weight": 0.1, "type": "r3gan", "r1": 1, "r2": 1},
        },
        "feature_matching": {"balance": "gradient"},
    }
    one, two = (make_state(**settings, train={"accumulate": parts, "augment": ["color"]}) for parts in (1, 2))
    advance(one, 3)
    advance(two, 3)
    assert worst(everything(one), everything(two)) < 1e-9


def test_a_loss_of_the_batch_says_so_when_it_is_cut() -> None:
    def said(**losses: Any) -> list[str]:
        state = make_state(losses={"charbonnier": {}, **losses}, train={"accumulate": 2})
        return [w for w in warnings(state.config, state) if "micro-batches" in w]

    (sentence,) = said(frequency={})
    assert sentence.startswith("seen by micro-batches of 2, not by the batch of 4: losses.frequency;")
    assert said() == []
    assert said(frequency={"average_spectrum": False}) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_are_one_in_float64() -> None:
    flags = (
        *("train", "--preset", "munet-x2-cpu", *TINY, *FROM_START, "--steps", "2"),
        *s("precision=fp64", "losses.frequency={}", "train.augment=color"),
        *s("data.valid_fraction=0.4", "data.degradation.kind=chain", "data.workers=0"),
    )
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [Background(*flags, "--name", "two", env={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for rank in ranks:
        done = rank.end(120)
        assert done.code == 0, done.err
    good(*flags, "--name", "one")
    closeness(RUNS / "one", RUNS / "two", 2, 1e-9)


# ---- presets


def test_presets_of_super_resolution() -> None:
    for name in ("munet-x2", "munet-x4", "munet-x2-cpu"):
        treated, control = (resolve(preset, None, []) for preset in (name, f"{name}-control"))
        assert control.feature_matching.weight == 0
        assert control.model_copy(update={"feature_matching": treated.feature_matching}) == treated
        assert treated.data.scale == int(name.split("-")[1][1])
        assert treated.discriminator.type == "munet"
        assert treated.losses.gan.start_step == treated.feature_matching.start_step > 0


def test_control_trains_the_discriminator_once_the_adversarial_term_acts() -> None:
    train(*STARTS, "--steps", "4", "--name", "run", preset="munet-x2-cpu-control")
    keys = [row.keys() for row in rows(RUNS / "run")]
    assert ["loss/d" in k for k in keys] == ["loss/g_adv" in k for k in keys] == [False, False, True, True]
    assert not any(key.startswith("fm/") for k in keys for key in k)


def test_sizes_of_discriminators_come_from_the_config() -> None:
    small = make_state(discriminator={"type": "patchgan", "norm": "batch", "blocks": 2}).task.discriminators[0].net
    assert small.feature_names == ("block1.conv", "block1", "block2.conv", "block2")
    munet = make_state(discriminator={"window": 3}).task.discriminators[0].net
    assert munet.bottleneck.attention.window == 3


def test_a_run_that_ends_before_its_losses_begin_says_so() -> None:
    done = train("--steps", "2", "--name", "short")
    (said,) = [line for line in done.warnings if "the run ends at step 2" in line]
    assert "before adversarial training and feature matching begin (step 1500)" in said
    assert "-s losses.gan.start_step=0 -s feature_matching.start_step=0 to begin at once" in said
    assert "PSNR-Y" in done.err
    assert not [line for line in train(*FROM_START, "--steps", "2").warnings if "the run ends" in line]
