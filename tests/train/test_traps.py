"""What goes wrong in published feature-matching code, each seen not to go wrong here."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    WORLD,
    Calls,
    advance,
    checkpoint_of,
    differing,
    draws_of,
    everything,
    flops,
    tensors_of,
    tiny_state,
)
from torch import nn

from fmrun.feature_matching import FeatureMatchingError
from fmrun.feature_matching.discriminator import DiscriminatorOutput
from fmrun.feature_matching.frozen import frozen
from fmrun.feature_matching.statistics import STATISTICS
from fmrun.models.dcgan import DcganDiscriminator
from fmrun.models.norm import SpectralNorm, advance_spectral
from fmrun.runtime.errors import UserError
from fmrun.tasks import Batch
from fmrun.train.optim import Optimiser
from fmrun.train.start_checks import check_start, passes_gradient
from fmrun.train.state import State
from fmrun.train.step import update_discriminator


def fm_state(**settings) -> State:
    return tiny_state(**{"feature_matching__weight": 0.1, **settings})


def role_of(state: State):
    return state.task.discriminators[0]


def noise_images(state: State, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    size = state.config.data.image_size
    return torch.rand(4, 1, size, size, generator=rng, dtype=torch.float64) * 2 - 1


# 1 Gradient cut


def test_trap_01_a_layer_without_gradient_is_refused_before_training():
    state = fm_state(feature_matching__layers="all")
    net = role_of(state).net

    def cut(image, layers=(), logits=True):
        out = DcganDiscriminator.forward(net, image, layers, logits)
        return DiscriminatorOutput(out.logits, {n: f.detach() if n == "block2" else f for n, f in out.features.items()})

    net.forward = cut
    with pytest.raises(UserError, match="layer 'block2' of discriminator passes no gradient to the image"):
        check_start(state, draws_of(state))


def test_trap_01_a_loss_without_gradient_is_refused_before_training():
    state = fm_state()
    net = role_of(state).net

    def cut(image, layers=(), logits=True):
        out = DcganDiscriminator.forward(net, image, layers, logits)
        return DiscriminatorOutput(None if out.logits is None else out.logits * 0.0, out.features)

    net.forward = cut
    with pytest.raises(UserError, match="the adversarial loss gives the generator no gradient"):
        check_start(state, draws_of(state))


def test_trap_01_a_statistic_without_gradient_is_refused_before_training(monkeypatch):
    state = fm_state()
    monkeypatch.setitem(STATISTICS, "mean", lambda real, fake, **_: fake.mean() * 0.0)
    with pytest.raises(UserError, match="feature matching gives the generator no gradient"):
        check_start(state, draws_of(state))


def test_trap_01_a_generator_without_gradient_is_refused_before_training():
    state = fm_state()
    state.task.generator.requires_grad_(False)
    with pytest.raises(UserError, match="images carry no gradient"):
        check_start(state, draws_of(state))


@pytest.mark.parametrize("norm", ["batch", "spectral", "group", "none"])
def test_trap_01_every_layer_of_every_dcgan_passes_gradient(norm):
    state = fm_state(discriminator__norm=norm, train__augment=("color", "translation", "cutout"))
    with frozen(*(d.net for d in state.task.discriminators)):
        for layer in role_of(state).net.feature_names:
            assert passes_gradient(role_of(state), layer, noise_images(state)), layer


# 2 Batch norm blinds


def test_trap_02_only_the_channel_mean_is_blind_behind_batch_norm():
    rng = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    real, fake = (torch.randn(16, 3, 4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    fake = fake * 2 + 1
    fake[:, :, :2] += 3
    before = STATISTICS["mean"](real.mean((2, 3)), fake.mean((2, 3)), ranks=WORLD)
    real, fake = norm(real), norm(fake)
    blind = STATISTICS["mean"](real.mean((2, 3)), fake.mean((2, 3)), ranks=WORLD)
    seeing = STATISTICS["mean"](real, fake, ranks=WORLD)
    assert before > 1
    assert blind < 1e-25
    assert seeing > 0.1


# 3 Running statistics


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("match", ["mean", "sample"])
def test_trap_03_feature_matching_leaves_running_averages_unchanged(match, accumulate):
    matched = fm_state(feature_matching__match=match, train__accumulate=accumulate)
    plain = tiny_state(feature_matching__weight=0, train__accumulate=accumulate)
    for state in (matched, plain):
        advance(state)
    for net in (lambda s: s.task.generator, lambda s: role_of(s).net):
        a, b = (dict(net(s).named_buffers()) for s in (matched, plain))
        assert a
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_trap_03_averages_move_once_per_pass_of_the_published_step():
    for accumulate in (1, 2):
        state = fm_state(train__accumulate=accumulate)
        advance(state, 3)
        g, d = state.task.generator.norm, role_of(state).net.blocks[1]["norm"]
        assert g.num_batches_tracked.item() == 3 * accumulate  # one forward a micro-batch
        assert d.num_batches_tracked.item() == 6 * accumulate  # real and fake


# 4 Spectral norm moves


def spectral_state(**settings) -> State:
    return fm_state(discriminator__norm="spectral", feature_matching__layers="all", **settings)


def test_trap_04_equal_images_have_equal_features_in_train_mode():
    state = spectral_state()
    role = role_of(state)
    assert role.net.training
    layers = role.matching.layers
    with frozen(*(d.net for d in state.task.discriminators)):
        a, b = (role(noise_images(state), None, layers, logits=False).features for _ in range(2))
        assert role.matching.distance(a, b, step=0, ranks=WORLD).total.item() == 0.0


def test_trap_04_torchs_own_spectral_norm_fails_that():
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)).train()
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(conv(x), conv(x))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trap_04_weights_are_normalised_once_in_a_generator_update(monkeypatch, accumulate):
    state = spectral_state(train__accumulate=accumulate, discriminator__train=False)
    calls = []
    forward = SpectralNorm.forward
    monkeypatch.setattr(SpectralNorm, "forward", lambda self, w: (calls.append(id(self)), forward(self, w))[1])
    advance(state)
    assert len(calls) == len(set(calls)) == 4


@pytest.mark.parametrize(("accumulate", "d_updates"), [(1, 1), (2, 1), (1, 2)])
def test_trap_04_one_power_iteration_a_discriminator_update(monkeypatch, accumulate, d_updates):
    state = spectral_state(train__accumulate=accumulate, train__d_updates=d_updates)
    calls = []
    advance_one = SpectralNorm.advance
    monkeypatch.setattr(
        SpectralNorm, "advance", lambda self, w, n=1: (calls.append((id(self), n)), advance_one(self, w, n))[1]
    )
    advance(state, 2)
    assert len(calls) == 2 * d_updates * 4
    assert all(n == 1 for _, n in calls)


def test_trap_04_gradient_flows_through_sigma():
    weight = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight, torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(norm, (weight,))
    direction = torch.randn_like(weight)
    (got,) = torch.autograd.grad((norm(weight) * direction).sum(), weight)
    matrix, sigma = weight.detach().flatten(1), float(norm.u @ weight.detach().flatten(1) @ norm.v)
    outer = torch.outer(norm.u, norm.v)
    expected = direction.flatten(1) / sigma - (direction.flatten(1) * matrix).sum() / sigma**2 * outer
    assert torch.allclose(got.flatten(1), expected)


def test_trap_04_power_iteration_finds_the_spectral_norm():
    net = DcganDiscriminator(28, 1, 4, "spectral", torch.Generator().manual_seed(0)).double()
    for _ in range(300):
        advance_spectral(net)
    for conv in [block["conv"] for block in net.blocks] + [net.head]:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-6)


# 5 In-place activation


@pytest.mark.parametrize("norm", ["batch", "spectral", "group", "none"])
def test_trap_05_conv_layers_hold_what_the_convolution_gave(norm):
    net = DcganDiscriminator(28, 1, 4, norm, torch.Generator().manual_seed(0)).double()
    image = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    features = net(image, net.feature_names).features
    x = image
    for i, block in enumerate(net.blocks, 1):
        assert torch.equal(features[f"block{i}.conv"], block["conv"](x))
        assert features[f"block{i}.conv"].min() < 0
        x = features[f"block{i}"]
    negative = features["block1.conv"] < 0
    assert torch.allclose(features["block1"][negative], 0.2 * features["block1.conv"][negative])


# 6 Hooks and compile


def test_trap_06_training_adds_no_hooks():
    state = fm_state(feature_matching__layers="all")
    net = role_of(state).net
    called = []

    def hooked(self, *args, **kwargs):
        called.append(self)
        raise AssertionError("a hook on the training path")

    original = nn.Module.register_forward_hook
    nn.Module.register_forward_hook = hooked
    try:
        check_start(state, draws_of(state))
        advance(state)
    finally:
        nn.Module.register_forward_hook = original
    assert not called
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_trap_06_a_compiled_discriminator_gives_the_same_layers(norm):
    state = fm_state(discriminator__norm=norm)
    role = role_of(state)
    torch._dynamo.reset()
    compiled = torch.compile(role.net, backend="eager")
    image = noise_images(state)
    with frozen(*(d.net for d in state.task.discriminators)):
        compiled(image)
        for layers in (("block2",), role.net.feature_names):
            got, expected = compiled(image, layers, False).features, role.net(image, layers, False).features
            assert list(got) == list(expected) == list(layers)
            assert all(torch.equal(got[n], expected[n]) for n in layers)


def test_trap_06_a_step_through_compiled_nets_is_the_eager_step():
    eager, compiled = fm_state(), fm_state()
    torch._dynamo.reset()
    role_of(compiled).compiled = torch.compile(role_of(compiled).net, backend="eager")
    advance(eager, 2)
    advance(compiled, 2)
    assert differing(everything(eager), everything(compiled)) == []


# 7 Stale features


def test_trap_07_both_features_come_from_the_updated_discriminator():
    state = fm_state(discriminator__norm="none")
    role = role_of(state)
    seen, distance = {}, role.matching.distance
    role.matching.distance = lambda real, fake, **k: (seen.update(real=real, fake=fake), distance(real, fake, **k))[1]
    draws = draws_of(state)
    calls = Calls(role.net)
    state.advance(draws)
    fake = next(c["image"] for c in calls.asked if c["layers"] and c["grad"])
    with torch.no_grad():
        now = [role.net(x, role.matching.layers, False).features for x in (draws[0][0].real, fake)]
    for name in role.matching.layers:
        assert torch.equal(seen["real"][name], now[0][name])
        assert torch.equal(seen["fake"][name], now[1][name])


# 8 Wasted work


@pytest.mark.parametrize("layers", [("block1.conv",), ("block2",), ("all",)])
def test_trap_08_feature_matching_costs_one_truncated_real_forward(layers):
    plain = tiny_state(feature_matching__weight=0)
    matched = fm_state(
        feature_matching__layers=layers, feature_matching__start_step=1, feature_matching__measure_every=100
    )
    for state in (plain, matched):
        advance(state)
    for state in (plain, matched):
        state.step = 50  # not a step that measures the share
    role = role_of(matched)
    draws = draws_of(matched)
    with torch.no_grad(), frozen(role.net):
        truncated = flops(lambda: role(draws[0][0].real, None, role.matching.layers, logits=False))
        whole = flops(lambda: role(draws[0][0].real, None))
    assert 0 < truncated < whole
    assert flops(lambda: matched.advance(draws)) - flops(lambda: plain.advance(draws)) == truncated


def test_trap_08_passes_of_a_step():
    """D: real and fake with weights; G: real truncated without graph, fake once with everything asked of it."""
    state = fm_state(feature_matching__layers=("block1", "block2"))
    role = role_of(state)
    calls = Calls(role.net)
    advance(state)
    asked = [(c["layers"], c["logits"], c["grad"], c["weights"]) for c in calls.asked]
    layers = ("block1", "block2")
    assert asked == [
        ((), True, False, True),
        ((), True, False, True),
        (layers, False, False, False),
        (layers, True, True, False),
    ]
    real = draws_of(state, 0)[0][0].real
    images = [c["image"] for c in calls.asked]
    assert torch.equal(images[0], real)
    assert torch.equal(images[2], real)
    assert torch.equal(images[1], images[3])  # the same fakes, made once


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trap_08_images_are_made_once_a_step(accumulate):
    """Under accumulation a second time, with a graph, when the gradient at the images is known."""
    state = fm_state(train__accumulate=accumulate)
    made, generate = [], state.task.generate
    state.task.generate = lambda batch: (made.append(batch), generate(batch))[1]
    advance(state)
    assert len(made) == (1 if accumulate == 1 else 4)


def test_trap_08_generator_updates_give_no_gradient_to_d():
    """The gradient left on D after the step is that of its own update alone."""
    state, alone = fm_state(), fm_state()
    advance(state)
    alone.set_scalars(0)
    draws, plan = draws_of(alone), alone.task.plan(0)
    images = [alone.task.generate(b) for b in draws[0]]
    update_discriminator(
        role_of(alone), plan.discriminators[0], draws[0], images, alone.optimisers["discriminator"], alone.scalars
    )
    for p, q in zip(role_of(state).net.parameters(), role_of(alone).net.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert p.requires_grad


def test_trap_08_an_untrained_discriminator_never_has_a_gradient():
    state = fm_state(discriminator__train=False)
    advance(state)
    assert all(p.grad is None for p in role_of(state).net.parameters())


def test_trap_08_a_relativistic_loss_shares_its_real_pass():
    state = fm_state(losses__gan__type="r3gan")
    calls = Calls(role_of(state).net)
    advance(state)
    layers = role_of(state).matching.layers
    assert [(c["layers"], c["logits"], c["grad"]) for c in calls.asked[2:]] == [
        (layers, True, False),
        (layers, True, True),
    ]


def test_trap_08_real_features_have_no_graph():
    state = fm_state()
    role = role_of(state)
    seen, distance = [], role.matching.distance
    role.matching.distance = lambda real, fake, **k: (seen.append((real, fake)), distance(real, fake, **k))[1]
    advance(state)
    real, fake = seen[0]
    assert not any(f.requires_grad for f in real.values())
    assert all(f.requires_grad for f in fake.values())


# 13 Shape mismatch


def test_trap_13_images_of_different_size_are_an_error_naming_the_layer():
    state = fm_state()
    draws = draws_of(state)
    batch = draws[0][0]
    larger = Batch(real=F.pad(batch.real, (0, 4, 0, 4)), noise=batch.noise)
    role = role_of(state)
    calls = role(larger.real, None, ("block1",), logits=False).features
    fake = role(batch.real, None, ("block1",), logits=False).features
    with pytest.raises(
        FeatureMatchingError, match=r"'block1' has shape \(4, 4, 16, 16\) for real and \(4, 4, 14, 14\)"
    ):
        role.matching.layer_distance("block1", calls["block1"], fake["block1"], ranks=WORLD, step=0)


# 14 Feature matching before the GAN starts


def test_trap_14_start_step_delays_the_generators_term_only():
    state = fm_state(losses__gan__start_step=2)
    role = role_of(state)
    for step in range(3):
        plan = state.task.plan(step).discriminators[0]
        assert plan.train
        assert plan.adversarial == (step == 2)
        assert plan.layers == role.matching.layers
    before = tensors_of(role.net)
    advance(state)
    assert differing(before, tensors_of(role.net))
    row = state.window.read(WORLD)
    assert "loss/d" in row
    assert "loss/g_adv" not in row
    assert row["loss/g"] == pytest.approx(row["fm/loss"])
    advance(state, 2)
    assert "loss/g_adv" in state.window.read(WORLD)


def test_trap_14_ramp_of_the_adversarial_term():
    role = role_of(fm_state(losses__gan__start_step=2, losses__gan__ramp=4, losses__gan__weight=0.5))
    assert [role.adversarial_weight(s) for s in (0, 2, 3, 4, 6, 9)] == [0, 0, 0.125, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_trap_14_an_untrained_discriminator_stays_fixed_and_is_matched(norm):
    state = fm_state(discriminator__train=False, discriminator__norm=norm)
    before, generator = tensors_of(role_of(state).net), tensors_of(state.task.generator)
    check_start(state, draws_of(state))
    advance(state, 3)
    assert differing(before, tensors_of(role_of(state).net)) == []
    assert differing(generator, tensors_of(state.task.generator))
    assert "discriminator" not in state.optimisers
    row = state.window.read(WORLD)
    assert row["fm/distance"] > 0
    assert "loss/d" not in row


# 15 Side effects of checks


@pytest.mark.parametrize(
    "settings",
    [
        {"discriminator__norm": "spectral", "feature_matching__balance": "gradient"},
        {"discriminator__norm": "batch", "feature_matching__estimator": "running", "losses__gan__type": "r3gan"},
        {"feature_matching__match": "sliced", "train__accumulate": 2, "train__augment": ("color", "cutout")},
    ],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_trap_15_the_check_at_the_start_changes_nothing(settings, steps_before):
    state, untouched = fm_state(**settings), fm_state(**settings)
    for s in (state, untouched):
        advance(s, steps_before)
    draws = draws_of(state)
    before = everything(state)
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    grads = [None if p.grad is None else p.grad.clone() for p in state.task.generator.parameters()]
    assert check_start(state, draws).strength.share > 0
    assert differing(before, everything(state)) == []
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()
    assert random.getstate() == streams[2]
    for p, grad in zip(state.task.generator.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    for s in (state, untouched):
        advance(s, 2)
    assert differing(everything(state), everything(untouched)) == []


def test_trap_15_a_check_that_fails_changes_nothing_either():
    state = fm_state(discriminator__norm="batch", feature_matching__balance="gradient")
    state.task.generator.requires_grad_(False)
    before = everything(state)
    with pytest.raises(UserError):
        check_start(state, draws_of(state))
    assert differing(before, everything(state)) == []
    assert all(p.requires_grad for p in role_of(state).net.parameters())
    assert role_of(state).net.blocks[1]["norm"].track_running_stats


# 16 Restored moments


def test_trap_16_restored_moments_have_their_parameters_memory_format():
    state = fm_state(precision="fp32")
    advance(state, 2)
    opt = state.optimisers["discriminator"]
    saved = {k: v.clone(memory_format=torch.contiguous_format) for k, v in opt.state().items()}
    net = copy.deepcopy(role_of(state).net)
    other = Optimiser(net, opt.config, clip=None, guard=state.guard, index=0, world=WORLD, device=torch.device("cpu"))
    other.restore(saved)
    weights = [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights
    for p in weights:
        assert p.is_contiguous(memory_format=torch.channels_last)
        assert other.adam.state[p]["exp_avg"].stride() == p.stride()
        assert other.adam.state[p]["exp_avg_sq"].stride() == p.stride()
    for p, q in zip(role_of(state).net.parameters(), net.parameters(), strict=True):
        q.grad = p.grad.clone()
    opt.step(2)
    other.step(2)
    assert all(torch.equal(p, q) for p, q in zip(role_of(state).net.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_trap_16_a_restored_run_goes_on_as_the_uninterrupted_one(norm, precision):
    settings = {"precision": precision, "discriminator__norm": norm, "feature_matching__balance": "gradient"}
    state = fm_state(**settings)
    advance(state, 2)
    restored = fm_state(**settings)
    restored.restore(checkpoint_of(state))
    advance(state, 2)
    advance(restored, 2)
    assert differing(everything(state), everything(restored)) == []
    assert state.window.read(WORLD) == restored.window.read(WORLD)


# 17 Only as deep as needed


@pytest.mark.parametrize(
    ("layers", "run"),
    [
        (("block1.conv",), ["blocks.0.conv"]),
        (("block1",), ["blocks.0.conv"]),
        (("block2.conv",), ["blocks.0.conv", "blocks.1.conv"]),
        (("block1", "block2"), ["blocks.0.conv", "blocks.1.conv", "blocks.1.norm"]),
        (("block3",), ["blocks.0.conv", "blocks.1.conv", "blocks.1.norm", "blocks.2.conv", "blocks.2.norm"]),
        ((), []),
    ],
)
def test_trap_17_only_what_the_layers_depend_on_is_run(layers, run):
    net = DcganDiscriminator(28, 1, 4, "batch", torch.Generator())
    seen = []
    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    net(torch.randn(2, 1, 28, 28), layers, False)
    assert seen == run
