"""What `bench` counts, that the steps of others are what they are said to be, and what it says. Nothing asserts a time."""

import json
from dataclasses import replace

import pytest
import torch
from support.commands import fmrun, good
from support.helpers import tiny_config
from support.pair_states import make_state

from fmrun.bench import baselines, bench, timing, words
from fmrun.bench.baselines import Baseline, fresh
from fmrun.bench.count import FORWARD, TO_INPUT, TO_WEIGHT, StepCounter, passes, units
from fmrun.bench.steps import OwnStep
from fmrun.config.presets import parse_set
from fmrun.runtime.report import Reporter

CPU = torch.device("cpu")

TINY = {
    "dcgan": (
        "data.image_size=28",
        "discriminator.width=8",
        "generator.width=4",
        "generator.latent_dim=4",
        "eval.num=8",
    ),
    "munet": (
        "data.patch_size=32",
        "discriminator.width=4",
        "generator.features=8",
        "generator.blocks=1",
        "eval.every=0",
    ),
}
TINY = {pair: ("train.batch_size=4", "log.sample_count=1", *settings) for pair, settings in TINY.items()}


def measured(pair, device="cpu"):
    asked = [parse_set(text) for text in TINY[pair]]
    return bench([pair], asked, device=device, precision="all", rounds=2, report=Reporter(quiet_rank=True))


@pytest.fixture(scope="module", params=TINY)
def result(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "LEAST", 0)
        return measured(request.param)


@pytest.fixture
def found(result):
    (pair,) = result["pairs"].values()
    return pair


# What is counted

STEPS = {
    "plain": (8, 3),
    "matching": (9, 3),
    "simultaneous_plain": (7, 3),
    "simultaneous": (7, 3),
    "plain_bf16": (8, 3),
    "matching_bf16": (9, 3),
    "published": (9, 3),
    "published_nhwc": (9, 3),
    "howto_plain": (9, 3),
    "howto_plain_nhwc": (9, 3),
    "howto": (13, 4),
    "howto_nhwc": (13, 4),
}
"""Passes through the discriminator and the generator: a + b g."""

HEADLESS = 0.07
"""Features alone do without the head, the smaller a part of a pass the larger the net."""


def test_every_step_makes_the_passes_that_its_formula_says(found):
    assert found["steps"].keys() == STEPS.keys()
    for name, (own, generator) in STEPS.items():
        through = found["steps"][name]["passes"]
        assert sum(through["generator"].values()) == generator, name
        assert own - 4 * HEADLESS <= sum(through["discriminator"].values()) <= own, name


def test_passes_are_told_apart_by_their_direction(found):
    through = {name: step["passes"]["discriminator"] for name, step in found["steps"].items()}
    assert through["plain"] == {FORWARD: 3, TO_INPUT: 3, TO_WEIGHT: 2}
    assert through["howto_plain"] == through["published"] == {FORWARD: 3, TO_INPUT: 3, TO_WEIGHT: 3}
    assert 1 - HEADLESS <= through["matching"][FORWARD] - 3 <= 1
    assert found["steps"]["howto"]["passes"]["generator"] == {FORWARD: 2, TO_INPUT: 1, TO_WEIGHT: 1}


def test_a_steps_description_and_ratio_follow_from_counted_passes(found):
    for step in found["steps"].values():
        low, middle, high = step["seconds"]
        assert 0 < low <= middle <= high
        assert step["images_per_second"] == pytest.approx(4 / middle)
        assert step["cost"] == pytest.approx(sum(step["passes"]["discriminator"].values()) + found["g"] * sum(step["passes"]["generator"].values()))  # fmt: skip
        assert min(step["flops"], step["memory_bytes"], step["matmul_share"]) > 0
    assert found["matmul_flops"].keys() == {"fp32", "bf16"}
    assert {"matching_over_plain", "published_over_matching", "howto_over_matching_bf16"} <= found["ratios"].keys()
    for name, ratio in found["ratios"].items():
        over, under = (found["steps"][step] for step in name.split("_over_"))
        alike = over["precision"] == under["precision"]
        assert ratio["passes"] == (over["cost"] / under["cost"] if alike else None)
        assert ratio["quartiles"] == sorted(ratio["quartiles"])


def test_a_run_is_timed_with_all_that_interrupts_it(found):
    cost = found["training"]
    assert cost["over_step"] > cost["loop_over_step"] > 1
    assert cost["pause_seconds"] > 0
    assert cost["pause_every"] in (250, 500)


def test_tables_hold_every_step_and_ratio(result, found):
    text = words.tables(result)
    for name in [*found["steps"], *found["ratios"]]:
        assert f"\n{name}  " in text


def test_flops_and_memory_of_a_product_and_none_of_a_view():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with StepCounter() as counter:
        (a @ b).t()
        (a @ b).add_(1)
    assert (counter.flops, counter.peak) == (2 * 2 * 3 * 5 * 7, 4 * 21)


def test_convolutions_are_counted_by_layer_and_direction():
    conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1)
    up = torch.nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1)
    image = torch.randn(1, 2, 8, 8)
    with StepCounter() as counter:
        up(conv(image)).sum().backward()
    down_flops, up_flops = 2 * (3 * 4 * 4) * (2 * 9), 2 * (3 * 4 * 4) * (2 * 16)
    layers = {((3, 2, 3, 3), False): down_flops, ((3, 2, 4, 4), True): up_flops}
    assert counter.layers[FORWARD] == layers == counter.layers[TO_WEIGHT]
    assert counter.layers[TO_INPUT] == {((3, 2, 4, 4), True): up_flops}
    assert counter.flops == 3 * up_flops + 2 * down_flops


def test_a_unit_counts_only_costs_that_are_not_input_or_duplicates():
    def net(last):
        return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, last, 3))

    first, other, image = net(5), net(7), torch.randn(2, 1, 9, 9)
    unit = units({"first": lambda: first(image), "other": lambda: other(image)})["first"]
    assert list(unit) == [((5, 6, 3, 3), False)]
    with StepCounter() as counter:
        first(image)
        first(image).sum().backward()
        with torch.no_grad():
            first[2](torch.randn(1, 6, 5, 5))  # half a batch
    assert passes(counter, unit) == {FORWARD: 2.5, TO_INPUT: 1, TO_WEIGHT: 1}


# The steps of others

CONFIGS = {
    "dcgan": lambda update: tiny_config(
        feature_matching__weight=30.0,
        feature_matching__match="mean",
        feature_matching__layers="all",
        train__update=update,
        train__batch_size=16,
    ),
    "munet": lambda update: make_state(train={"update": update}).config,
}
TWINS = {"published": "simultaneous", "howto": "alternating", "howto_plain": "alternating"}
"""fmrun's update of the same mathematics, where the how-to's new images are made from the same latents."""


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("pair", "memory_format"),
    [("dcgan", torch.contiguous_format), ("dcgan", torch.channels_last), ("munet", torch.channels_last)],
)
def test_an_update_of_others_is_that_of_fmruns_step(pair, name, memory_format, monkeypatch):
    monkeypatch.setattr(baselines, "fresh", lambda batch: batch)
    config = CONFIGS[pair](TWINS[name])
    base = Baseline(OwnStep(config, CPU), getattr(Baseline, name), memory_format)
    assert base.batch.real.is_contiguous(memory_format=memory_format)
    for net in (base.generator, base.discriminator):
        assert all(p.is_contiguous(memory_format=memory_format) for p in net.parameters() if p.ndim == 4)
    if name == "howto_plain":
        off = config.feature_matching.model_copy(update={"weight": 0.0})
        config = config.model_copy(update={"feature_matching": off})
    own = OwnStep(config, CPU)
    own.batch = base.batch
    before = [p.detach().clone() for p in base.discriminator.parameters()]
    own()
    base()
    task = own.state.task
    for net, twin in ((base.generator, task.generator), (base.discriminator, task.discriminators[0].net)):
        for ours, theirs in zip(twin.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)
    theirs, ours = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (base.generator, task.generator))
    assert (theirs - ours).norm() <= 1e-8 * ours.norm()
    assert not any(map(torch.equal, before, base.discriminator.parameters()))


def test_new_images_are_made_from_new_latents():
    batch = OwnStep(CONFIGS["dcgan"]("alternating"), CPU).batch
    assert not torch.equal(fresh(batch).noise, batch.noise)
    assert torch.equal(fresh(batch).real, batch.real)
    assert fresh(without := replace(batch, noise=None)) is without


@pytest.mark.parametrize("pair", CONFIGS)
def test_a_step_is_made_where_everything_acts_and_nothing_is_logged(pair):
    own = OwnStep(CONFIGS[pair]("alternating"), CPU)
    plan = own.state.task.plan(own.at)
    (role,) = plan.discriminators
    assert role.train
    assert role.adversarial
    assert role.layers == own.layers != ()
    assert not role.measure
    assert not plan.log_diversity


# The command


def test_json_on_stdout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [word for setting in TINY["dcgan"][2:] for word in ("-s", setting)]
    done = good(
        "bench", "--pair", "dcgan", "--batch-size", 2, "--rounds", 1, "--precision", "fp32", "--device", "cpu", "--json", *sets
    )  # fmt: skip
    result = json.loads(done.out)
    assert result["machine"]["device"] == "cpu"
    found = result["pairs"]["dcgan"]
    assert (found["size"], found["batch_size"], found["rounds"], len(found["layers"])) == (28, 2, 1, 6)
    assert not any(name.endswith("bf16") for name in found["steps"])
    assert list(tmp_path.iterdir()) == []
    assert done.errors == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-s", "data.image_size=48"), "-s data.image_size=48: data.image_size is 48; allowed: 28, 32, 64, 128"),
        (("--pair", "munet", "-s", "data.patch_size=33"), "data.patch_size: 33 is no multiple of data.scale 2"),
        (("--device", "tpu"), "--device"),
        (("--batch-size", "1"), "--batch-size"),
        (
            ("-s", "precision=bf16"),
            "bench sets precision by itself; leave it out, or choose by --pair, --device and --prec",
        ),
        (("-s", "train.update=simultaneous"), "bench sets train.update by itself; leave it out"),
        (("-s", "train.stpes=5"), "did you mean 'train.steps'?"),
        (("-s", "feature_matching.layers=nosuch"), "there is no layer 'nosuch'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = fmrun("bench", "--pair", "dcgan", *arguments)
    assert done.code == 2
    (error,) = done.errors
    assert sentence in error
    assert done.out == ""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_compiled_and_recorded_steps_are_measured_too():
    found = measured("dcgan", "cuda")["pairs"]["dcgan"]
    assert {"compiled", "reduce_overhead", "cuda_graphs"} <= found["steps"].keys()
    assert all(step["memory_bytes"] > 0 for step in found["steps"].values())
    assert {"howto_over_cuda_graphs", "howto_over_compiled"} <= found["ratios"].keys()
