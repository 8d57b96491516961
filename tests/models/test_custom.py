"""Nets of the user's own: found, made, walked, read and cut short."""

import copy
import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmrun.config import trust
from fmrun.feature_matching import FeatureMatchingError
from fmrun.feature_matching.discriminator import Discriminator, DiscriminatorOutput
from fmrun.feature_matching.walked import WalkedDiscriminator
from fmrun.models import custom
from fmrun.models.custom import custom_discriminator, custom_generator, load_target
from fmrun.models.norm import advance_spectral, hold_spectral
from fmrun.runtime.errors import UserError

IMAGE = (3, 16, 16)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=rng(seed)) * 2 - 1


def walked(net: nn.Module) -> WalkedDiscriminator:
    return WalkedDiscriminator(net, IMAGE, f"'{type(net).__name__}'")


def sequential(inplace: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=inplace),
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Linear(128, 1),
        )


class Branched(nn.Module):
    """Calls one convolution twice, writes into features, ends in two heads and a mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.SiLU()
        self.one = nn.Conv2d(4, 1, 1)
        self.two = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        x += 1
        x = self.act(self.shared(x))
        x = F.relu_(self.shared(x))
        return torch.sigmoid(self.one(x) + self.two(x)).mean((1, 2, 3))


# Walking


def test_layers_come_in_the_order_they_run_without_the_head():
    net = walked(sequential())
    assert isinstance(net, Discriminator)
    assert net.feature_names == ("0", "1", "2", "4", "5", "6")
    assert net.auto == "5"
    assert net.groups == {"early": ("0", "1"), "mid": ("2", "4"), "key": ("1", "6"), "all": net.feature_names}


def test_features_are_what_the_layers_give():
    plain, image = sequential(inplace=False), noise(2, *IMAGE)
    net = walked(sequential())
    out = net(image, net.feature_names)
    x = image
    for i, layer in enumerate(plain):
        x = layer(x)
        if str(i) in out.features:
            assert torch.equal(out.features[str(i)], x), i
    assert torch.equal(out.logits, x)
    assert tuple(out.features) == net.feature_names


def test_an_activation_in_place_does_not_change_the_convolution_before_it():
    """Trap 5."""
    features = walked(sequential())(noise(2, *IMAGE), ("0", "1"), False).features
    assert features["0"].min() < 0
    assert torch.equal(F.leaky_relu(features["0"], 0.2), features["1"])


def test_repeated_modules_arithmetic_heads_and_overwritten_features():
    net = walked(Branched())
    assert net.feature_names == ("stem", "shared", "act", "shared#2")
    assert net.auto == "shared#2"
    image = noise(2, *IMAGE)
    features = net(image, net.feature_names).features
    assert torch.equal(features["stem"], net.net.stem(image))
    assert features["shared#2"].min() < 0
    assert torch.equal(features["act"], F.silu(features["shared"]))


def test_layers_within_other_nets_have_dotted_names():
    net = walked(nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(2, 1, 3))))
    assert net.feature_names == ("0.0", "0.1")
    assert net.auto == "0.0"


def test_a_net_of_linear_layers_has_a_last_linear_layer():
    net = walked(nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))
    assert net.feature_names == ("1", "2", "3", "4")
    assert net.auto == "3"


def test_a_frozen_net_has_its_features_too():
    assert walked(sequential().requires_grad_(False)).feature_names == ("0", "1", "2", "4", "5", "6")


def test_walking_changes_no_weight_buffer_or_random_state():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 1, 3))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    adapter = walked(net)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in adapter.parameters())


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3)), wrap

    def forward(self, x):
        return self.wrap(self.body(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, {"a": y}),
        lambda y: [y],
        lambda y: {"logits": y, "more": 0},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_logits_may_come_in_several_ways(wrap):
    net = walked(Returns(wrap))
    assert net.feature_names == ("body.0", "body.1")
    out = net(noise(2, *IMAGE), ("body.0",))
    assert out.logits.shape == (2, 1, 12, 12)
    assert torch.equal(out.logits, net.net.body(noise(2, *IMAGE)))


@pytest.mark.parametrize(
    ("wrap", "shown"),
    [
        (lambda y: "logit", "a str without logits"),
        (lambda y: (), "a tuple without logits"),
        (lambda y: y.sum(), "a Tensor without logits"),
        (lambda y: (y, y.flatten(1).tanh().mean(1), y.mean((2, 3)).repeat(1, 5)), "[1] (2,), [2] (2, 5)"),
        (
            lambda y: {"a": y.repeat(1, 2, 1, 1), "b": (y, y.repeat(1, 3, 1, 1))},
            "['a'] (2, 2, 12, 12), ['b'][0] (2, 1, 12, 12)",
        ),
    ],
)
def test_where_logits_are_not_clear_what_came_back_is_said(wrap, shown):
    with pytest.raises(FeatureMatchingError) as caught:
        walked(Returns(wrap))
    assert shown in str(caught.value)
    assert str(caught.value).endswith(
        "it is not clear which are the logits: return them alone, or as {'logits': …}, with a row for every image"
    )


def test_a_net_without_layers_is_refused():
    with pytest.raises(FeatureMatchingError, match="has no module before its head whose output could be matched"):
        walked(nn.Sequential(nn.Flatten(), nn.Linear(768, 1)))


def test_a_net_that_fails_on_such_images_is_refused_with_the_reason():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))
    with pytest.raises(
        FeatureMatchingError, match=r"'Sequential' fails on an input of shape \(2, 3, 16, 16\): RuntimeError: .*1"
    ):
        walked(net)


# Reading


@pytest.mark.parametrize("build", [sequential, Branched])
def test_layers_alone_or_together_are_the_same_and_leave_the_logits_alone(build):
    net = walked(build())
    image = noise(2, *IMAGE)
    whole = net(image, net.feature_names)
    assert torch.equal(net(image).logits, whole.logits)
    assert net(image).features == {}
    for name in net.feature_names:
        alone = net(image, (name,), False)
        assert alone.logits is None
        assert list(alone.features) == [name]
        assert torch.equal(alone.features[name], whole.features[name])
    assert net(image, (), False) == DiscriminatorOutput(None, {})


def test_nothing_is_run_beyond_the_last_layer():
    net = walked(sequential())
    run: list[str] = []
    for name, module in net.net.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: run.append(name))
    for layer in net.feature_names:
        run.clear()
        net(noise(2, *IMAGE), (layer,), False)
        assert run == [str(i) for i in range(int(layer) + 1)]
    run.clear()
    net(noise(2, *IMAGE), (), False)
    assert run == []


def test_features_carry_gradients_once_and_twice():
    net = walked(Branched())
    image = noise(2, *IMAGE).requires_grad_()
    out = net(image, net.feature_names)
    for value in out.features.values():
        (gradient,) = torch.autograd.grad(value.square().sum(), image, retain_graph=True)
        assert gradient.abs().sum() > 0
    (gradient,) = torch.autograd.grad(net(image).logits.sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert net.net.stem.weight.grad.abs().sum() > 0


def test_nothing_is_kept_after_a_forward():
    net = walked(sequential())
    net(noise(2, *IMAGE), net.feature_names)
    assert net._recorder.caught == {}
    assert not net._recorder.active


def test_a_failing_forward_leaves_the_net_readable():
    net = walked(sequential())
    with pytest.raises(RuntimeError):
        net(noise(2, 5, 16, 16), ("0",))
    assert list(net(noise(2, *IMAGE), ("0",)).features) == ["0"]


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)
        self.skip = False

    def forward(self, x):
        x = self.a(x)
        return self.head(x if self.skip else self.b(x))


def test_a_layer_that_a_forward_leaves_out_is_named():
    net = walked(Fickle())
    net.net.skip = True
    with pytest.raises(
        FeatureMatchingError, match=r"did not come by layer 'b'.*leave it out of feature_matching\.layers"
    ):
        net(noise(1, *IMAGE), ("a", "b"))


def test_a_copy_has_its_own_hooks():
    net = walked(sequential())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.net[0].weight.zero_()
    image = noise(2, *IMAGE)
    assert torch.equal(twin(image, ("0",), False).features["0"], twin.net[0](image))
    assert not torch.equal(net(image, ("0",), False).features["0"], twin.net[0](image))


def test_compiled_it_still_gives_its_features():
    """Trap 6."""
    net = walked(sequential())
    fast, image = torch.compile(net, backend="eager"), noise(2, *IMAGE)
    assert torch.equal(fast(image).logits, net(image).logits)
    for layers, logits in ((("0", "5"), True), (("2",), False)):
        plain, out = net(image, layers, logits), fast(image, layers, logits)
        assert list(out.features) == list(layers)
        assert all(torch.equal(out.features[name], plain.features[name]) for name in layers)


@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_torchs_spectral_norms_move_in_the_discriminators_update_only(normalise):
    """Trap 4."""
    body = [normalise(nn.Conv2d(3, 16, 3)), nn.ReLU(), normalise(nn.Conv2d(16, 16, 3)), nn.ReLU(), nn.Conv2d(16, 1, 3)]
    net = walked(nn.Sequential(*body)).train()
    hold_spectral(net)
    image = noise(2, *IMAGE)
    first = net(image, net.feature_names).features
    assert net.feature_names == ("0", "1", "2", "3")
    again = net(image.clone(), net.feature_names).features
    assert all(torch.equal(first[name], again[name]) for name in first)
    advance_spectral(net)
    assert not torch.equal(net(image, ("0",), False).features["0"], first["0"])
    assert torch.equal(copy.deepcopy(net)(image).logits, net(image).logits)


# Targets


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, *, channels):
        super().__init__()
        if width < 1:
            raise ValueError("width must be positive")
        self.a, self.b = nn.Conv2d(channels, width, 3), nn.Conv2d(width, 1, 3)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
    def forward(self, x):
        return self.gain * x.repeat_interleave(2, 2).repeat_interleave(2, 3)

def make(channels):
    return Net(channels=channels)

def wrong():
    return 3

class NoNet:
    pass

def face():
    from fmrun.models.unet import UNet

    return UNet(3, 4, torch.Generator())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(MODULE)
    (tmp_path / "broken_nets.py").write_text("import own_nets\nraise KeyError('oh')\n")
    (tmp_path / "needy_nets.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)

    def typed(target: trust.Target) -> trust.NamedCode:
        trust.admit([dataclasses.replace(target, typed=True)])
        return trust.admitted(target)

    monkeypatch.setattr(custom, "admitted", typed)
    yield tmp_path
    for name in ("own_nets", "broken_nets", "needy_nets"):
        sys.modules.pop(name, None)


def test_a_target_in_the_current_folder_is_built_with_its_parameters(folder):
    net = load_target("own_nets:Net", {"channels": 3, "width": 5}, "discriminator", rng())
    assert net.a.weight.shape == (5, 3, 3, 3)
    assert load_target("own_nets:make", {"channels": 2}, "discriminator", rng()).a.in_channels == 2


def test_first_weights_follow_from_the_generator_alone(folder):
    before = torch.get_rng_state()
    made = [load_target("own_nets:Net", {"channels": 3}, "generator", rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made[0].a.weight, made[1].a.weight)
    assert not torch.equal(made[0].a.weight, made[2].a.weight)


@pytest.mark.parametrize(
    ("target", "params", "words"),
    [
        ("own_nets", {}, r"discriminator\.target: 'own_nets' is not of the form 'package\.module:Class'"),
        (":Net", {}, "is not of the form"),
        (
            "no_such_nets:Net",
            {},
            r"there is no module 'no_such_nets' in .* or among the installed packages",
        ),
        ("own_nets.deep:Net", {}, r"there is no module 'own_nets\.deep' in "),
        ("needy_nets:Net", {}, r"importing 'needy_nets' .*No module named 'a_package_nobody_has'"),
        ("broken_nets:Net", {}, r"importing 'broken_nets' .*KeyError: 'oh'"),
        ("own_nets:Nett", {}, r"'own_nets' has no 'Nett'; did you mean 'Net'\?"),
        ("own_nets:NoNet", {}, r"'own_nets:NoNet' is not a torch\.nn\.Module"),
        ("own_nets:torch", {}, r"'own_nets:torch' is not a torch\.nn\.Module"),
        ("own_nets:wrong", {}, r"'own_nets:wrong' makes something of type int, not a torch\.nn\.Module"),
        (
            "own_nets:Net",
            {"wdth": 3},
            r"making 'own_nets:Net' of discriminator\.params fails: TypeError: .*'wdth'",
        ),
        (
            "own_nets:Net",
            {"channels": 3, "width": 0},
            r"making 'own_nets:Net' of discriminator\.params fails: ValueError: width must be positive",
        ),
    ],
)
def test_a_target_that_cannot_be_had_is_one_sentence(folder, target, params, words):
    with pytest.raises(UserError, match=words) as caught:
        load_target(target, params, "discriminator", rng())
    assert "\n" not in str(caught.value)


def test_a_discriminator_comes_walked_or_as_it_is_if_it_has_the_face(folder):
    net = custom_discriminator("own_nets:Net", {"channels": 3}, rng(), IMAGE)
    assert net.feature_names == ("a",)
    assert type(custom_discriminator("own_nets:face", {}, rng(), IMAGE)).__name__ == "UNet"
    with pytest.raises(UserError, match=r"discriminator\.target: 'own_nets:Net' fails on an input of shape \(2, 3, 16"):
        custom_discriminator("own_nets:Net", {"channels": 1}, rng(), IMAGE)


def test_a_generator_comes_as_it_is_once_its_images_have_the_right_shape(folder):
    small = noise(1, 3, 8, 8)
    net = custom_generator("own_nets:Double", {}, rng(), [(small, (1, 3, 16, 16))])
    assert type(net).__name__ == "Double"
    with pytest.raises(
        UserError,
        match=r"generator\.target: 'own_nets:Double' makes \(1, 3, 16, 16\) of \(1, 3, 8, 8\), and must make "
        r"\(1, 3, 32, 32\)",
    ):
        custom_generator("own_nets:Double", {}, rng(), [(small, (1, 3, 16, 16)), (small, (1, 3, 32, 32))])
