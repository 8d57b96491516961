"""What `bench` counts, that the textbook's steps are what they are said to be, and what it says. Nothing asserts a time."""

import copy
import json
from pathlib import Path

import pytest
import torch
from commands import fmrun, good
from torch.nn import functional as F

from fmrun.bench import bench, words
from fmrun.bench.ledger import FORWARD, TO_INPUT, TO_WEIGHT, Ledger, unit
from fmrun.bench.machine import Rates
from fmrun.bench.variants import PAIRS, build, ordinary_step
from fmrun.metrics.extractors import available
from fmrun.presets import Override
from fmrun.report import Reporter

CPU = torch.device("cpu")

TINY = {
    "dcgan": (28, ("discriminator.width=8", "generator.width=4", "generator.latent_dim=4", "eval.num=8")),
    "munet": (
        32,
        ("discriminator.width=4", "generator.features=8", "generator.blocks=1", "eval.every=0", "log.sample_count=1"),
    ),
}


def small(pair: str) -> list[Override]:
    return [Override(f"-s {s}", *s.split("=")) for s in TINY[pair][1]]


@pytest.fixture(scope="module", params=TINY)
def built(request, tmp_path_factory):
    size, _ = TINY[request.param]
    folder = tmp_path_factory.mktemp("bench")
    return build(PAIRS[request.param], folder, CPU, size, 4, ("fp32",), small(request.param))


@pytest.fixture(scope="module")
def results():
    """Both pairs, everything on."""
    found = {}
    for pair, (size, _) in TINY.items():
        found[pair] = bench(
            pairs=(pair,), device="cpu", size=size, batch_size=4, rounds=1, profile=pair == "dcgan", report=Reporter(quiet_rank=True),
            overrides=small(pair),
        )  # fmt: skip
    return found


# What is counted

STEPS = {
    "plain": (8, 3),
    "fm": (9, 3),
    "simultaneous_plain": (7, 3),
    "simultaneous_fm": (7, 3),
    "plain_bf16": (8, 3),
    "fm_bf16": (9, 3),
    "textbook_plain": (9, 3),
    "textbook_fm": (13, 4),
    "textbook_fm_nhwc": (13, 4),
    "separate_nhwc": (11, 3),
}
"""Passes through the discriminator and the generator: a + b g."""

HEADLESS = 0.07
"""Features alone do without the head, the smaller a part of a pass the larger the net."""


@pytest.mark.parametrize("pair", TINY)
def test_every_step_makes_the_passes_that_its_formula_says(results, pair):
    steps = results[pair]["pairs"][pair]["steps"]
    for name, (own, generator) in STEPS.items():
        if name not in steps:
            assert (pair, name) == ("dcgan", "separate_nhwc")
            continue
        passes = steps[name]["passes"]
        assert sum(passes["generator"].values()) == generator, name
        assert own - 3 * HEADLESS <= sum(passes["discriminator"].values()) <= own, name


@pytest.mark.parametrize("pair", TINY)
def test_passes_are_told_apart_by_their_direction(results, pair):
    steps = results[pair]["pairs"][pair]["steps"]
    own, book = (steps[name]["passes"]["discriminator"] for name in ("plain", "textbook_plain"))
    assert own == {FORWARD: 3, TO_INPUT: 3, TO_WEIGHT: 2}
    assert book == {FORWARD: 3, TO_INPUT: 3, TO_WEIGHT: 3}
    matching = steps["fm"]["passes"]["discriminator"]
    assert 1 - HEADLESS <= matching[FORWARD] - 3 <= 1
    assert (matching[TO_INPUT], matching[TO_WEIGHT]) == (3, 2)
    assert steps["textbook_fm"]["passes"]["generator"] == {FORWARD: 2, TO_INPUT: 1, TO_WEIGHT: 1}


@pytest.mark.parametrize("pair", TINY)
def test_a_step_that_measures_the_share_costs_one_pass_more_and_its_part_is_charged(results, pair):
    found = results[pair]["pairs"][pair]
    measuring = found["measuring"]
    cost = found["steps"]["fm"]["cost"]
    assert cost + 1 - HEADLESS <= measuring["cost"] <= cost + 1
    assert measuring["surcharge"] == pytest.approx((measuring["cost"] / cost - 1) / measuring["every"])


def test_ratios_are_there_and_what_passes_allow_follows_from_the_counts(results):
    ratios = results["dcgan"]["ratios"]
    assert {"fm_over_plain", "fm_over_textbook_plain", "textbook_over_fm", "loop_over_bare_step"} <= ratios.keys()
    assert {"simultaneous_fm_over_plain", "fm_over_plain_bf16", "textbook_over_fm_bf16"} <= ratios.keys()
    assert {"munet_separate_over_fm", "munet_fm_over_plain", "munet_fm_over_plain_memory"} <= results["munet"][
        "ratios"
    ].keys()
    for pair in TINY:
        found, prefix = results[pair]["pairs"][pair], "" if pair == "dcgan" else "munet_"
        assert results[pair]["ratios"].keys() >= results[pair]["allowed"].keys()
        g, extra = found["g"]["seconds"], found["measuring"]["surcharge"]
        allowed = results[pair]["allowed"][f"{prefix}fm_over_plain"]
        assert (1 + extra) * (9 - HEADLESS + 3 * g) / (8 + 3 * g) <= allowed <= (1 + extra) * (9 + 3 * g) / (8 + 3 * g)
        assert f"{prefix}textbook_over_fm_bf16" not in results[pair]["allowed"]  # other arithmetic, another speed


@pytest.mark.parametrize("pair", TINY)
def test_a_step_is_described_whole(results, pair):
    for step in results[pair]["pairs"][pair]["steps"].values():
        low, typical, high = step["seconds"]
        assert 0 < low <= typical <= high
        assert step["images_per_second"] == pytest.approx(4 / typical)
        assert step["flops"] > 0
        assert step["bytes"] > step["memory_bytes"] > 0
        assert step["product_share"] > 0
        assert step["least_share"] == pytest.approx(step["least_seconds"] / typical)


@pytest.mark.parametrize("pair", TINY)
def test_the_loop_is_measured_with_all_that_interrupts_it(results, pair):
    loop = results[pair]["pairs"][pair]["loop"]
    by_task = {"held_out", "kid"} if pair == "dcgan" and available() is not None else {"held_out"}
    stalls = loop["stalls"]
    assert stalls.keys() == {"read_out", "grid", "checkpoint"} | (by_task if pair == "dcgan" else set())
    assert loop["stall_share"] == pytest.approx(sum(stall["share"] for stall in stalls.values()))
    for stall in stalls.values():
        per_step = loop["bare_seconds"] * loop["step_ratio"]
        assert stall["share"] == pytest.approx(stall["seconds"] / stall["every"] / per_step)
    assert loop["ratio"] == pytest.approx(loop["step_ratio"] * (1 + loop["stall_share"]))


def test_profiles_name_the_operators_that_take_the_time(results):
    for rows in results["dcgan"]["pairs"]["dcgan"]["profile"].values():
        assert "aten::convolution_backward" in {row["operator"] for row in rows}
        assert sum(row["share"] for row in rows) <= 1
        assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)


# The ledger


def test_flops_and_bytes_of_a_product_and_none_of_a_view():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with Ledger() as ledger:
        (a @ b).t()
    assert (ledger.flops, ledger.bytes) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))


def test_writing_in_place_is_a_read_and_a_write():
    a = torch.zeros(8)
    with Ledger() as ledger:
        a.add_(1)
        torch.empty(100)
    assert (ledger.flops, ledger.bytes) == (0, 4 * 16)


def test_an_expanded_tensor_is_as_small_as_what_it_repeats():
    row, out = torch.zeros(8), torch.zeros(4, 8)
    with Ledger() as ledger:
        torch.mul(row.expand(4, 8), 2, out=out)
    assert ledger.bytes == 4 * (8 + 32)


def test_convolutions_are_noted_by_layer_and_direction():
    conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1)
    up = torch.nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1)
    image = torch.randn(1, 2, 8, 8)
    with Ledger() as ledger:
        up(conv(image)).sum().backward()
    down_flops, up_flops = 2 * (3 * 4 * 4) * (2 * 9), 2 * (3 * 4 * 4) * (2 * 16)
    layers = {((3, 2, 3, 3), False): down_flops, ((3, 2, 4, 4), True): up_flops}
    assert ledger.layers[FORWARD] == layers == ledger.layers[TO_WEIGHT]
    assert ledger.layers[TO_INPUT] == {((3, 2, 4, 4), True): up_flops}
    assert ledger.flops == 3 * up_flops + 2 * down_flops


def test_a_unit_leaves_out_what_reads_the_input_and_counts_the_rest():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 5, 3))
    image = torch.randn(2, 1, 9, 9)
    one = unit(lambda: net(image))
    assert list(one.layers) == [((5, 4, 3, 3), False)]
    with Ledger() as ledger:
        net(image)
        net(image).sum().backward()
        with torch.no_grad():
            net[1](torch.randn(1, 4, 7, 7))  # half a batch
    assert one.passes(ledger) == {FORWARD: 2.5, TO_INPUT: 1, TO_WEIGHT: 1}
    assert one.without(one).passes(ledger) == {}


def test_the_least_time_is_the_longer_of_computing_and_moving():
    rates = Rates({torch.float32: 100.0, torch.bfloat16: 400.0}, memory=10.0)
    assert rates.seconds(200, 5, torch.float32) == 2.0
    assert rates.seconds(200, 5, torch.bfloat16) == 0.5
    assert rates.seconds(200, 5, torch.float16) == 0.5
    assert rates.seconds(0, 50, torch.int64) == 5.0
    assert rates.best(Rates({torch.float32: 50.0, torch.bfloat16: 500.0}, 20.0)) == Rates(
        {torch.float32: 100.0, torch.bfloat16: 500.0}, 20.0
    )


# The textbook's steps


def published(built, name):
    """A copy of the textbook pair behind a variant, and its batch."""
    owner = next(v.owner for v in built.variants if v.name == name)
    return copy.deepcopy(owner.book), owner.batch


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def gradients(net):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def test_hooks_see_the_features_that_fmrun_matches(built):
    book, batch = published(built, "textbook_fm")
    seen = book.features(batch.real)
    state = next(v.owner.state for v in built.variants if v.name == "fm")
    critic = state.task.critics[0]
    layers = built.matched["textbook_fm"]
    assert layers == built.matched["fm"]
    assert len(seen) == len(layers)
    net = copy.deepcopy(critic.net)
    source = book.discriminator.net if hasattr(book.discriminator, "net") else None
    if source is not None:
        net.load_state_dict(source.state_dict())
    else:
        for p, q in zip(net.parameters(), book.discriminator.parameters(), strict=True):
            p.data.copy_(q)
    with torch.no_grad():
        expected = net(batch.real, layers, False).features
    for name, feature in zip(layers, seen, strict=True):
        assert torch.allclose(feature, expected[name], rtol=1e-4, atol=1e-5), name
    assert not any(module._forward_hooks for module in book.discriminator.modules())


def test_as_published_the_discriminators_weight_gradients_are_computed_and_thrown_away(built):
    book, batch = published(built, "textbook_fm")
    stepped = []
    book.optimise_d.register_step_post_hook(
        lambda *_: stepped.append((weights(book.discriminator), gradients(book.discriminator)))
    )
    book.matching(batch)
    ((after, own),) = stepped
    assert all(map(torch.equal, after, weights(book.discriminator)))
    assert not all(map(torch.equal, own, gradients(book.discriminator)))


def test_in_passes_of_its_own_the_discriminator_is_frozen(built):
    if "separate_nhwc" not in {v.name for v in built.variants}:
        book, batch = published(built, "textbook_fm")
    else:
        book, batch = published(built, "separate_nhwc")
    stepped = []
    book.optimise_d.register_step_post_hook(lambda *_: stepped.append(gradients(book.discriminator)))
    before = weights(book.generator)
    book.separate(batch)
    assert all(map(torch.equal, stepped[0], gradients(book.discriminator)))
    assert all(p.requires_grad for p in book.discriminator.parameters())
    assert not any(map(torch.equal, before, weights(book.generator)))


def test_layouts_are_as_named(built):
    for name, memory_format in (("textbook_fm", torch.contiguous_format), ("textbook_fm_nhwc", torch.channels_last)):
        book, batch = published(built, name)
        assert batch.real.is_contiguous(memory_format=memory_format)
        for net in (book.generator, book.discriminator):
            assert all(p.is_contiguous(memory_format=memory_format) for p in net.parameters() if p.ndim == 4)


def test_fresh_images_are_made_from_fresh_latents(built):
    book, batch = published(built, "textbook_fm")
    with torch.no_grad():
        one, other = (book.generator(book.start(batch)) for _ in range(2))
    assert torch.equal(one, other) == (batch.noise is None)


def test_both_learn_the_same_losses(built):
    """The textbook's discriminator loss is the vanilla one of fmrun's presets, by its gradients."""
    book, batch = published(built, "textbook_plain")
    twin = copy.deepcopy(book.discriminator)
    grabbed = []
    book.optimise_d.register_step_post_hook(lambda *_: grabbed.append(gradients(book.discriminator)))
    fake = book.generator(book.start(batch)).detach()
    book._update_discriminator(batch, fake)
    loss = F.softplus(-twin(batch.real)).mean() + F.softplus(twin(fake)).mean()
    expected = torch.autograd.grad(loss, list(twin.parameters()))
    if built.config.task == "generate":  # spectral norm has moved on in between for munet
        for got, want in zip(grabbed[0], expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-6)


# Steps of a run


@pytest.mark.parametrize("measuring", [False, True])
def test_a_step_is_made_where_everything_acts_and_nothing_is_looked_at(built, measuring):
    state = next(v.owner.state for v in built.variants if v.name == "fm")
    plan = state.task.plan(ordinary_step(state, measuring))
    (critic,) = plan.critics
    assert critic.train
    assert critic.adversarial
    assert critic.taps
    assert critic.measure == measuring
    assert not plan.observe


# The command


def test_json_on_stdout_and_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size, settings = TINY["dcgan"]
    sets = [word for s in settings for word in ("-s", s)]
    done = good(
        "bench", "--pair", "dcgan", "--size", size, "--batch-size", 2, "--rounds", 1, "--precision", "fp32",
        "--device", "cpu", "--json", "--out", "here.json", *sets,
    )  # fmt: skip
    result = json.loads(done.out)
    assert result == json.loads(Path("here.json").read_text())
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["threads"] == 1
    found = result["pairs"]["dcgan"]
    assert (found["preset"], found["size"], found["batch_size"], found["rounds"]) == ("dcgan-64", 28, 2, 1)
    assert not any(name.endswith("bf16") for name in found["steps"])
    assert [p.name for p in tmp_path.iterdir()] == ["here.json"]
    for sentence in result["hints"]:
        assert sentence in done.err
    assert done.errors == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--size", "48"), "--size 48: dcgan makes images of 28, 32, 64, 128 px; give one of these, or --pair munet"),
        (
            ("--size", "28"),
            "--size 28: munet is measured on patches of an even number of pixels, at least 32; give 32, 64 or 128, or "
            "--pair dcgan",
        ),
        (("--pair", "munet", "--size", "33"), "--size 33: munet is measured on patches of an even number"),
        (("--out", "no/such/file.json"), "--out no/such/file.json: there is no folder no/such; make it first"),
        (("--out", "."), "--out .: is a folder; give a file in it, like bench.json"),
        (("--device", "tpu"), "--device"),
        (("-s", "precision=bf16"), "-s precision=bf16: bench sets precision by itself; give --precision"),
        (("-s", "train.update=simultaneous"), "bench sets train.update by itself; leave it out"),
        (("-s", "train.stpes=5"), "did you mean 'train.steps'?"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = fmrun("bench", *arguments)
    assert done.code == 2
    (error,) = done.errors
    assert sentence in error
    assert done.out == ""


# What it says


def test_tables_hold_every_step_and_ratio(results):
    text = words.tables(results["munet"])
    for step in results["munet"]["pairs"]["munet"]["steps"].values():
        assert step["words"] in text
    for name in results["munet"]["ratios"]:
        assert name in text


def test_hints_say_what_is_out_of_the_ordinary(results):
    result = copy.deepcopy(results["dcgan"])
    result["machine"] |= {"cores": 2, "load_average": [0.5, 1.0]}
    pair = result["pairs"]["dcgan"]
    pair["loop"] |= {"stall_share": 0.01}
    pair["steps"]["fm"] |= {"least_share": 0.9}
    result["ratios"] |= {"fm_over_plain": 1.09, "fm_over_fm_bf16": 1.0, "textbook_over_fm": 1.5}
    result["allowed"]["fm_over_plain"] = 1.087
    cost, textbook = words.hints(result)
    assert "a step 1.09 times as long" in cost
    assert "1.09 times" in cost
    assert "1.5 times" in textbook

    result["machine"]["load_average"] = [0.5, 3.4]
    result["ratios"] |= {"fm_over_plain": 1.3, "fm_over_fm_bf16": 1.7}
    pair["loop"] |= {"stall_share": 0.1}
    pair["loop"]["stalls"]["held_out"]["share"] = 0.09
    pair["steps"]["fm"] |= {"least_share": 0.2}
    sentences = words.hints(result)
    assert len(sentences) == 6
    for part in ("load average 3.4 on 2 cores", "--layers", "precision=bf16: 1.7", "eval.every=500", "--batch-size"):
        assert sum(part in sentence for sentence in sentences) == 1, part


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_compiled_and_recorded_steps_are_measured_too():
    result = bench(
        pairs=("dcgan",), device="cuda", size=28, batch_size=8, rounds=1, report=Reporter(quiet_rank=True),
        overrides=small("dcgan"),
    )  # fmt: skip
    steps = result["pairs"]["dcgan"]["steps"]
    assert {"fm_compiled", "fm_graphs"} <= steps.keys()
    for step in steps.values():
        assert step["device_seconds"][1] > 0
        assert step["memory_bytes"] > 0
    assert {"textbook_over_fm_graphs", "textbook_over_fm_compiled"} <= result["ratios"].keys()
