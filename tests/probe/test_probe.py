"""What `probe-layers` says of each layer, against what can be worked out by hand."""

import io
import itertools
import json
from dataclasses import replace

import pytest
import torch
from support.helpers import checkpoint_of
from torch import nn

from fmrun.config.schema import Config
from fmrun.feature_matching import FeatureMatching
from fmrun.feature_matching.discriminator import DiscriminatorOutput
from fmrun.feature_matching.frozen import frozen
from fmrun.feature_matching.statistics import mean
from fmrun.models import dcgan
from fmrun.models.dcgan import DcganDiscriminator
from fmrun.probe import layers, probe
from fmrun.runtime.dist import World
from fmrun.runtime.errors import UserError
from fmrun.runtime.report import Reporter
from fmrun.runtime.rng import torch_generator
from fmrun.train import start_checks as checks
from fmrun.train.state import State

NORMS = ["batch", "spectral", "group", "none"]
CPU = torch.device("cpu")


def make_config(**sections) -> Config:
    """A narrow pair; `feature_matching={"weight": 1}` and so on."""
    small = {
        "device": "cpu",
        "precision": "fp32",
        "data": {"channels": 1},
        "generator": {"width": 4, "latent_dim": 8},
        "discriminator": {"width": 4},
        "train": {"batch_size": 16},
    }
    keys = small.keys() | sections.keys()
    merged = {
        k: {**small.get(k, {}), **sections[k]} if isinstance(sections.get(k), dict) else sections.get(k, small.get(k))
        for k in keys
    }
    return Config.model_validate(merged)


def make_state(**sections) -> State:
    return State(make_config(**sections), CPU, World())


def make_batches(state: State):
    """The first update's, of blocks of grey: smooth enough that a fresh D tells them from noise."""
    c = state.config
    shape = (c.train.batch_size, c.data.channels, 4, 4)
    coarse = torch.randint(0, 256, shape, generator=torch_generator(0, "probe", 9), dtype=torch.uint8)
    repeat = c.data.image_size // 4
    raw = coarse.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
    return state.task.prepare(raw, 0)


def examined(**sections) -> dict:
    state = make_state(**sections)
    return probe.examine(state, make_batches(state))


def column(result: dict, key: str) -> dict:
    return {layer["name"]: layer[key] for layer in result["layers"]}


class Stages(nn.Module):
    """A discriminator with a layer for each trap: a batch norm over a 1 × 1 map, a cut gradient, a constant."""

    feature_names = ("code.conv", "code", "cut", "constant")
    groups = dict.fromkeys(("early", "mid", "key"), ("code.conv",)) | {"all": feature_names}
    auto = "code.conv"

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, size)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, image, layers=(), logits=True):
        conv = self.conv(image)
        code = self.norm(conv)
        with torch.no_grad():
            cut = self.conv(image)
        every = {"code.conv": conv, "code": code, "cut": cut, "constant": image[:, :, :1, :1] * 0}
        return DiscriminatorOutput(
            self.head(code).flatten() if logits else None, {n: every[n] for n in every if n in layers}
        )


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.setattr(dcgan, "discriminator", lambda config, image, rng: Stages(image[1], image[0]))


@pytest.mark.parametrize("norm", NORMS)
def test_layers_in_the_order_of_the_net(norm):
    result = examined(discriminator={"norm": norm})
    net = DcganDiscriminator(32, 1, 4, norm, torch.Generator())
    layers = result["layers"]
    assert [layer["name"] for layer in layers] == list(net.feature_names)
    assert [layer["index"] for layer in layers] == list(range(len(net.feature_names)))
    assert [layer["shape"] for layer in layers] == [[4, 16, 16]] * 2 + [[8, 8, 8]] * 2 + [[16, 4, 4]] * 2
    assert all(layer["gradient"] and not layer["blind"] for layer in layers)
    assert result["groups"] == {name: list(members) for name, members in net.groups.items()}
    assert result["auto"] == "block3.conv"
    assert result["warnings"] == []


@pytest.mark.parametrize(
    ("size", "fields"),
    [(28, [4, 10, 18]), (32, [4, 10, 22]), (64, [4, 10, 22, 46]), (128, [4, 10, 22, 46, 94])],
)
@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_receptive_fields_of_a_dcgan(size, fields, norm):
    """r = 1 + sum_k (kernel_k - 1) * product of the strides before."""
    net = DcganDiscriminator(size, 1, 2, norm, torch.Generator().manual_seed(0))
    found = layers.receptive_fields(net, (1, size, size), 0)
    assert list(found.values()) == [r for r in fields for _ in range(2)]


def test_receptive_fields_take_one_forward_for_all_layers_of_a_size():
    net = DcganDiscriminator(32, 1, 4, "batch", torch.Generator().manual_seed(0))
    sides = []
    net.blocks[0].conv.register_forward_hook(lambda module, inputs, output: sides.append(inputs[0].shape[-1]))
    settled = []
    layers.receptive_fields(net, (1, 32, 32), 0, lambda: settled.append(len(sides)))
    assert sides == sorted(set(sides))
    assert len(settled) == len(net.feature_names)


def test_a_long_wait_says_how_far_it_is():
    said, seconds = io.StringIO(), itertools.count(step=1.5)
    report = Reporter(stream=said, clock=lambda: next(seconds))
    config = make_state().config
    probe.probe(config, run_checkpoint=None, data=False, report=report)
    assert said.getvalue().startswith("layers measured: 2 of 6\nlayers measured: 4 of 6\n")


def test_group_norm_sees_the_whole_image():
    net = DcganDiscriminator(32, 1, 4, "group", torch.Generator().manual_seed(0))
    found = layers.receptive_fields(net, (1, 32, 32), 0)
    assert list(found.values()) == [4, 4, 10, "global", "global", "global"]


def test_receptive_field_beyond_the_image_and_of_a_zero_branch():
    class Net(nn.Module):
        feature_names = ("wide", "zero", "flat", "none")

        def __init__(self):
            super().__init__()
            self.wide, self.zero = nn.Conv2d(1, 1, 41, padding=20), nn.Conv2d(1, 1, 3, padding=1)
            self.flat = nn.Linear(28 * 28, 3)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x, layers=(), logits=True):
            made = {"wide": lambda: self.wide(x), "zero": lambda: self.zero(x), "flat": lambda: self.flat(x.flatten(1))}
            return DiscriminatorOutput(None, {n: made.get(n, lambda: x.detach())() for n in layers})

    found = layers.receptive_fields(Net(), (1, 28, 28), 0)
    assert found == {"wide": 41, "zero": 3, "flat": "global", "none": None}


def test_flops_are_those_of_the_convolutions():
    """2 · outputs · inputs · kernel² · pixels each; the head is left out of every layer."""
    result = examined(discriminator={"width": 4, "norm": "none"})
    convolutions = [2 * 4 * 1 * 16 * 16**2, 2 * 8 * 4 * 16 * 8**2, 2 * 16 * 8 * 16 * 4**2]
    head = 2 * 16 * 16
    flops = [sum(convolutions[: i + 1]) for i in range(3) for _ in range(2)]
    assert list(column(result, "flops").values()) == flops
    shares = list(column(result, "flops_share").values())
    assert shares == [f / (flops[-1] + head) for f in flops]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


@pytest.mark.parametrize("batch_size", [16, 64])
def test_activation_memory_is_what_the_layers_keep(batch_size):
    """A convolution keeps its input; LeakyReLU its input (its output where it works in place); batch norm its input."""
    sections = {"discriminator": {"norm": "batch"}, "train": {"batch_size": batch_size}}
    image, one, two, three = 32 * 32, 4 * 16 * 16, 8 * 8 * 8, 16 * 4 * 4
    kept = [image, image + one, image + 2 * one, image + 2 * one + 2 * two]
    kept += [kept[-1], kept[-1] + 2 * three]
    found = list(column(probe.examine(make_state(**sections), None), "activation_bytes").values())
    assert found == [4 * batch_size * n for n in kept]
    half = probe.examine(make_state(**sections, precision="bf16"), None)["layers"][0]["activation_bytes"]
    assert half == 2 * batch_size * image


def test_gap_is_the_squared_distance_of_means_over_their_spread():
    """Real features N(0, 1), generated N(3, 4): 9 / 2.5 in every width, scale and shape, and 0 if they are alike."""
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(64, 32, 8, 8, generator=rng) for _ in range(2))
    assert probe.gap(real, 2 * fake + 3) == pytest.approx(9 / 2.5, rel=0.01)
    assert probe.gap(100 * real, 200 * fake + 300) == pytest.approx(probe.gap(real, 2 * fake + 3), rel=1e-5)
    assert abs(probe.gap(real, fake)) < 2e-3
    few = [probe.gap(*torch.randn(2, 4, 50, generator=rng)) for _ in range(300)]
    assert abs(sum(few) / 300) < 0.02


@pytest.mark.parametrize("match", ["sample", "mean", "moments", "coral", "mmd", "sliced"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_no_statistic_is_blind_on_a_dcgan(match, norm):
    result = examined(discriminator={"norm": norm}, feature_matching={"match": match})
    assert not any(column(result, "blind").values())
    assert all(layer["gradient_share"] > 0 for layer in result["layers"])


def test_not_blind_where_there_is_no_difference():
    """Equal distributions look as far apart as sampling noise; only less than that is blindness."""
    state = make_state()
    real, fake = torch.randn(2, 16, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert abs(probe.gap(real, fake)) < 0.1
    assert not probe.blind(state, "block1", real, fake)


@pytest.mark.parametrize(
    ("matching", "hidden"),
    [
        ({"match": "mean"}, ["code", "constant"]),
        ({"match": "mean", "estimator": "unbiased", "elements": "sum"}, ["code", "constant"]),
        ({"match": "mean", "criterion": "l1", "estimator": "running"}, ["code", "constant"]),
        ({"match": "moments"}, ["code", "constant"]),
        ({"match": "sample"}, ["constant"]),
        ({"match": "mmd"}, ["constant"]),
        ({"match": "sliced"}, ["constant"]),
    ],
)
def test_blind_behind_batch_norm(stages, matching, hidden):
    result = examined(feature_matching=matching | {"weight": 1})
    assert [name for name, found in column(result, "blind").items() if found] == hidden
    warning = next(w for w in result["warnings"] if "blind" in w)
    for name in hidden:
        assert name in warning
    assert ("--layers code.conv" in warning) == ("code" in hidden)


def test_a_cut_gradient_is_seen(stages):
    result = examined()
    assert column(result, "gradient") == {"code.conv": True, "code": True, "cut": False, "constant": False}
    assert column(result, "receptive_field") == {"code.conv": 32, "code": 32, "cut": None, "constant": None}
    assert any("no gradient" in w and "layers cut, constant" in w for w in result["warnings"])
    assert "NO" in probe.layer_table(result)


def test_selected_layers():
    result = examined(feature_matching={"layers": ["block3", 0, "auto"]})
    assert [name for name, chosen in column(result, "selected").items() if chosen] == [
        "block1.conv",
        "block3.conv",
        "block3",
    ]
    with pytest.raises(UserError, match="block3"):
        examined(feature_matching={"layers": ["blok3"]})


@pytest.mark.parametrize("balance", ["none", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_share_is_the_one_that_training_prints(balance, accumulate):
    sections = {
        "feature_matching": {"weight": 0.3, "balance": balance, "match": "moments"},
        "train": {"batch_size": 16, "accumulate": accumulate},
    }
    state = make_state(**sections)
    batches = make_batches(state)
    result, strength = probe.examine(state, batches), checks.check_start(state, [batches]).strength
    assert strength is not None
    assert result["share"] == strength.share
    assert result["balance_factor"] == strength.balance
    assert result["lambda"] == 0.3
    if balance == "gradient":
        assert result["share"] == pytest.approx(0.3)


def test_share_of_each_layer():
    """||grad lambda L_FM|| / ||grad L_adv|| at the images, by hand; lambda is 1 where matching is off."""
    shares = {}
    for weight in (0.0, 0.2):
        state = make_state(feature_matching={"weight": weight, "balance": "gradient", "elements": "sum"})
        shares[weight] = column(probe.examine(state, make_batches(state)), "gradient_share")
    (batch,), role = make_batches(state), state.task.discriminators[0]
    image = state.task.generate(batch).detach().requires_grad_()
    with frozen(role.net):
        out = role(image, None, role.net.feature_names)
        real = role(batch.real, None, role.net.feature_names, logits=False).features
        adversarial = torch.nn.functional.softplus(-out.logits).mean()
        (reference,) = torch.autograd.grad(adversarial, image, retain_graph=True)
        for name, fake in out.features.items():
            distance = mean(real[name].detach(), fake, ranks=World(), elements="sum")
            (gradient,) = torch.autograd.grad(distance, image, retain_graph=True)
            share = float(gradient.norm() / reference.norm())
            assert shares[0.0][name] == pytest.approx(share, rel=1e-4)
            assert shares[0.2][name] == pytest.approx(0.2 * share, rel=1e-4)


def test_no_share_without_an_adversarial_term():
    result = examined(losses={"gan": {"weight": 0}}, feature_matching={"weight": 1})
    assert result["share"] is None
    assert set(column(result, "gradient_share").values()) == {None}
    assert all(layer["gap"] is not None for layer in result["layers"])


@pytest.mark.parametrize("norm", NORMS)
def test_the_state_is_what_it_was(norm):
    state = make_state(
        discriminator={"norm": norm},
        feature_matching={"weight": 0.1, "balance": "gradient", "estimator": "running"},
        train={"augment": ["color", "translation"], "batch_size": 16},
    )
    batches = make_batches(state)
    state.advance([batches])
    role = state.task.discriminators[0]
    modules = {"G": state.task.generator, "average": state.task.average, "D": role.net, "matching": role.matching}

    def everything():
        tensors = {f"{n}.{k}": v.clone() for n, m in modules.items() for k, v in m.state_dict().items()}
        tensors |= {f"{n}.{k}": v.clone() for n, o in state.optimisers.items() for k, v in o.state().items()}
        tensors |= {"live": state.scalars.matching.clone(), "rng": torch.get_rng_state()}
        flags = [
            (n, k, m.training, getattr(m, "track_running_stats", None), [p.requires_grad for p in m.parameters()])
            for n, root in modules.items()
            for k, m in root.named_modules()
        ]
        return tensors, flags, [p.grad is None for m in modules.values() for p in m.parameters()]

    before = everything()
    first = probe.examine(state, batches)
    after = everything()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert probe.examine(state, batches) == first


def test_probe_on_data_repeats_and_is_json():
    config = make_config(feature_matching={"weight": 0.1}, data={"channels": None})
    results, said = [], io.StringIO()
    for _ in range(2):
        results.append(probe.probe(config, run_checkpoint=None, data=True, report=Reporter(stream=said)))
    assert results[0] == results[1]
    assert json.loads(json.dumps(results[0], allow_nan=False)) == results[0]
    assert results[0]["image"] == [1, 32, 32]
    assert results[0]["step"] is None
    assert "untrained" in said.getvalue()
    assert all(layer["gap"] > 0 for layer in results[0]["layers"])
    text = probe.layer_table(results[0])
    assert [line.split()[1] for line in text.splitlines()[2:]] == list(column(results[0], "name"))
    assert "gap" in text


def test_probe_without_data():
    config = make_config(data={"channels": None, "path": "/nowhere"})
    result = probe.probe(config, run_checkpoint=None, data=False, report=Reporter(stream=io.StringIO()))
    assert result["image"] == [3, 32, 32]
    for layer in result["layers"]:
        assert layer["gap"] is layer["gradient_share"] is layer["blind"] is None
    assert result["share"] is None
    assert "gap" not in probe.layer_table(result)
    with pytest.raises(UserError, match="nowhere"):
        probe.probe(config, run_checkpoint=None, data=True, report=Reporter(stream=io.StringIO()))


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_probe_of_a_run(weight):
    """Its weights, its step, the batch it would take next; also where the run itself did not match features."""
    config = make_config(feature_matching={"weight": weight, "balance": "gradient"})
    state = State(config, CPU, World())
    for _ in range(3):
        state.advance([make_batches(state)])
    saved = checkpoint_of(state)
    quiet = Reporter(stream=io.StringIO())
    asked = make_config(feature_matching={"weight": 0.1, "balance": "gradient"})
    result = probe.probe(asked, run_checkpoint=saved, data=True, report=quiet)
    fresh = probe.probe(asked, run_checkpoint=None, data=True, report=quiet)
    assert result["step"] == 3
    assert not any("untrained" in note for note in result["notes"])
    assert column(result, "gap") != column(fresh, "gap")
    assert result == probe.probe(asked, run_checkpoint=replace(saved), data=True, report=quiet)
    if weight:
        matching = state.task.discriminators[0].matching
        assert isinstance(matching, FeatureMatching)
        assert result["balance_factor"] == pytest.approx(float(matching.strength.balance), rel=0.5)
    else:
        assert result["share"] == pytest.approx(0.1)


def test_other_layers_than_the_run_matched():
    state = make_state(feature_matching={"weight": 0.1, "layers": ["block1"], "estimator": "running"})
    state.advance([make_batches(state)])
    saved = checkpoint_of(state)
    asked = make_config(feature_matching={"weight": 0.1, "layers": ["block3"], "estimator": "running"})
    result = probe.probe(asked, run_checkpoint=saved, data=True, report=Reporter(stream=io.StringIO()))
    assert result["share"] == column(result, "gradient_share")["block3"] > 0
