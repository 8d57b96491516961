"""Schedules, the masked optimiser, its restored moments, and the moving average."""

import math

import pytest
import torch
from support.helpers import WORLD
from torch import nn

from fmrun.config.schema import AdamConfig, EmaConfig, ScheduleConfig
from fmrun.train.optim import SMALLEST_SCALE, Ema, Guard, Optimiser, lr_factor

CPU = torch.device("cpu")


def small_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))
    return net.to(dtype=dtype, memory_format=torch.channels_last)


def optimiser(net: nn.Module, *, clip: float | None = None, scaled: bool = False, lr: float = 1e-2) -> Optimiser:
    config = AdamConfig(lr=lr)
    return Optimiser(net, config, clip=clip, guard=Guard(scaled), index=0, world=WORLD, device=CPU)


def give_gradients(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        # in the parameter's memory format, as autograd leaves it
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * scale)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


# Schedules


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1, 10**6: 1}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 100: 1}),
        ({"decay": "linear", "decay_start": 10, "decay_end": 20}, {0: 1, 10: 1, 15: 0.5, 20: 0, 99: 0}),
        (
            {"decay": "cosine", "decay_start": 10, "decay_end": 20, "final_factor": 0.2},
            {0: 1, 10: 1, 12: 0.2 + 0.4 * (1 + math.cos(0.2 * math.pi)), 15: 0.6, 20: 0.2, 99: 0.2},
        ),
        (
            {"warmup_steps": 10, "decay": "linear", "decay_start": 0, "decay_end": 10, "final_factor": 0.5},
            {0: 0.1, 4: 0.5 * 0.8, 9: 1 * 0.55, 10: 0.5},
        ),
    ],
)
def test_learning_rate_schedules(settings, expected):
    schedule = ScheduleConfig(**settings)
    for step, factor in expected.items():
        assert lr_factor(schedule, step) == pytest.approx(factor, rel=1e-12, abs=1e-15)


def test_the_learning_rate_of_the_step_is_the_one_used():
    net = small_net()
    opt = optimiser(net)
    before = weights(net)
    opt.lr.fill_(0.5)
    give_gradients(net, 0)
    opt.step(0)
    # Adam's first update is lr * sign(gradient), up to eps
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.allclose((p - old).abs(), torch.full_like(p, 0.5), rtol=1e-3)


# The update


def test_an_update_is_adams():
    ours, theirs = small_net(dtype=torch.float64), small_net(dtype=torch.float64)
    opt = optimiser(ours)
    reference = torch.optim.Adam(theirs.parameters(), lr=opt.lr.item(), betas=(0.5, 0.999), eps=1e-8)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = opt.step(step)
        expected = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        reference.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-10)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_clipping_is_torchs(size):
    ours, theirs = small_net(), small_net()
    opt = optimiser(ours, clip=1.5)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.5, 0.999), fused=True)
    for step in range(4):
        give_gradients(ours, step, size * 3**step)
        give_gradients(theirs, step, size * 3**step)
        before = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.5)
        reference.step()
        assert opt.step(step).item() == pytest.approx(before.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    moments = zip(opt.adam.state.values(), reference.state.values(), strict=True)
    assert all(torch.allclose(a["exp_avg"], b["exp_avg"], rtol=1e-4, atol=1e-6) for a, b in moments)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_changes_nothing_then_or_later(poison, clip):
    net = small_net()
    opt = optimiser(net, clip=clip)
    give_gradients(net, 0)
    opt.step(0)
    before, moments = weights(net), {k: v.clone() for k, v in opt.state().items()}
    for step, bad in ((1, True), (2, False), (3, True)):
        give_gradients(net, step)
        if bad:
            net[1].bias.grad[0] = poison
        opt.step(step)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert all(torch.equal(v, opt.state()[k]) for k, v in moments.items())
    assert opt.guard.read() == (1, 0)


def test_a_guard_that_saw_nothing_says_so():
    net = small_net()
    opt = optimiser(net)
    give_gradients(net, 0)
    opt.step(0)
    assert opt.guard.read() is None


def test_scaled_gradients_give_the_unscaled_update():
    plain, scaled = small_net(), small_net()
    a, b = optimiser(plain), optimiser(scaled, scaled=True)
    for step in range(3):
        give_gradients(plain, step)
        give_gradients(scaled, step, float(b.guard.scale))
        norms = a.step(step), b.step(step)
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-6)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


# The scale of fp16


def test_scale_halves_on_overflow_which_skips_one_update_only():
    guard = Guard(scaled=True)
    assert guard.scale.item() == 2**16
    assert guard.skip(torch.tensor(math.inf), 0, 0).item() == 1
    assert guard.scale.item() == 2**15
    assert guard.read() is None
    assert guard.skip(torch.tensor(1.0), 0, 1).item() == 0


def test_scale_doubles_after_two_thousand_finite_updates_in_a_row():
    guard = Guard(scaled=True)
    for _ in range(1000):
        guard.skip(torch.tensor(1.0), 0, 0)
    guard.skip(torch.tensor(math.nan), 0, 0)
    assert guard.scale.item() == 2**15
    for _ in range(1999):
        guard.skip(torch.tensor(1.0), 0, 0)
    assert guard.scale.item() == 2**15
    guard.skip(torch.tensor(1.0), 0, 0)
    assert guard.scale.item() == 2**16
    for _ in range(2000):
        guard.skip(torch.tensor(1.0), 0, 0)
    assert guard.scale.item() == 2**17


def test_overflow_at_the_smallest_scale_is_fatal():
    guard = Guard(scaled=True)
    halvings = int(math.log2(2**16 / SMALLEST_SCALE))
    for step in range(halvings):
        guard.skip(torch.tensor(math.inf), step, 1)
        assert guard.read() is None
    guard.skip(torch.tensor(math.inf), halvings, 1)
    assert guard.read() == (halvings, 1)
    assert guard.skip(torch.tensor(1.0), 99, 0).item() == 1


def test_an_unscaled_guard_keeps_its_scale():
    guard = Guard(scaled=False)
    guard.skip(torch.tensor(1.0), 0, 0)
    guard.skip(torch.tensor(math.inf), 1, 1)
    assert guard.scale.item() == 1
    assert guard.read() == (1, 1)


# Moving average


def linear(value: float) -> nn.Module:
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, value)
    return net


@pytest.mark.parametrize(("decay", "warmup"), [(0.999, 10.0), (0.5, 10.0), (0.9, 1.0)])
def test_average_follows_the_warm_up_formula(decay, warmup):
    average, net = linear(1.0), linear(0.0)
    ema = Ema(average, EmaConfig(decay=decay, warmup=warmup))
    expected = 1.0
    for step in range(30):
        value = math.sin(step)
        nn.init.constant_(net.weight, value)
        ema.update(net, step)
        d = min(decay, (1 + step) / (warmup + step))
        expected = d * expected + (1 - d) * value
        assert average.weight.item() == pytest.approx(expected, rel=1e-12)


def test_zero_decay_is_the_raw_weights_to_the_bit():
    average, net = small_net(1), small_net(2)
    Ema(average, EmaConfig(decay=0)).update(net, 100)
    assert all(torch.equal(a, b) for a, b in zip(weights(average), weights(net), strict=True))


def test_the_average_takes_no_gradient():
    average = small_net()
    Ema(average, EmaConfig())
    assert not any(p.requires_grad for p in average.parameters())


def test_a_skipped_fp16_update_also_undoes_its_running_averages():
    """In fp16 a skipped update is no failure, so what its forward left in batch norm has to go."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    guard = Guard(scaled=True)
    optimiser = Optimiser(net, AdamConfig(), clip=None, guard=guard, index=0, world=WORLD, device=torch.device("cpu"))

    def update(image):
        optimiser.zero_grad()
        (net(image).square().mean() * guard.scale).backward()
        optimiser.step(0)

    update(torch.randn(4, 1, 3, 3))
    before = {name: b.clone() for name, b in net.named_buffers()}
    assert before["1.running_mean"].abs().sum() > 0
    update(torch.full((4, 1, 3, 3), torch.inf))
    after = dict(net.named_buffers())
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(after[name], before[name])
    update(torch.randn(4, 1, 3, 3))
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
