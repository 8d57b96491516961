"""One training step: exact accumulation, penalties, how often who moves on what, and what no update may do."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import WORLD, advance, differing, draws_of, everything, tensors_of, tiny_state, worst
from torch import nn

import fmrun
from fmrun.feature_matching.frozen import frozen
from fmrun.losses.adversarial import D_LOSSES, G_LOSSES
from fmrun.models.augment import augment
from fmrun.tasks import Batch, DiscriminatorPlan, StepPlan, StepScalars
from fmrun.train.start_checks import check_start, diagnose
from fmrun.train.state import State
from fmrun.train.step import StepLog, discriminator_loss, image_gradients

FMRUN = str(Path(fmrun.__file__).parent)


def role_of(state: State):
    return state.task.discriminators[0]


def per_image(**settings) -> State:
    """A state in which no image sees another through a norm, so that micro-batches can be exact."""
    settings = {"discriminator__norm": "spectral", "train__batch_size": 8, **settings}
    state = tiny_state(**settings)
    state.task.generator.eval()
    return state


# Gradient accumulation


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feature_matching__elements": "sum", "feature_matching__criterion": "charbonnier"},
        {"feature_matching__layers": ("block1", "head"), "feature_matching__balance": "none"},
        {"losses__gan__type": "r3gan", "losses__gan__r1": 1.0, "losses__gan__r2": 0.5},
        {"train__d_updates": 2, "train__g_updates": 2, "optim__clip_grad_norm": 0.5},
        {"train__update": "simultaneous"},
        {"train__update": "simultaneous", "losses__gan__type": "r3gan"},
    ],
    ids=str,
)
def test_micro_batches_make_the_step_of_the_whole_batch(settings):
    """With augmentation and balance, for a statistic of single images; also the shares, the cosine and the log."""
    states, rows = [], []
    for accumulate in (1, 2, 4):
        state = per_image(
            train__accumulate=accumulate,
            train__augment=("color", "translation", "cutout"),
            **{"feature_matching__weight": 0.3, "feature_matching__match": "sample"},
            **{"feature_matching__balance": "gradient", "log__every": 1, **settings},
        )
        advance(state, 2)
        states.append(everything(state))
        rows.append(state.window.read(WORLD))
    for other, row in zip(states[1:], rows[1:], strict=True):
        # Adam divides by gradients near 0 in places, and the clip factor is float32
        assert worst(states[0], other) < 1e-8
        assert row == pytest.approx(rows[0], rel=1e-7)


@pytest.mark.parametrize("match", ["mean", "moments", "coral", "mmd", "sliced"])
def test_a_batch_statistic_is_that_of_each_micro_batch(match):
    state = per_image(feature_matching__weight=1.0, feature_matching__match=match, train__accumulate=2)
    role, (draws,) = role_of(state), draws_of(state)
    images = [state.task.generate(batch).detach() for batch in draws]
    state.set_scalars(0)
    _, log = image_gradients(state.task, state.task.plan(0), draws, images, state.scalars, WORLD)
    layers = role.matching.layers

    def distance(real, fake):
        real, fake = (role(x, None, layers, logits=False).features for x in (real, fake))
        return role.matching.distance(real, fake, step=0, ranks=WORLD).total.item()

    parts = [distance(batch.real, image) for batch, image in zip(draws, images, strict=True)]
    assert log["fm/distance"].item() == pytest.approx(sum(parts) / 2, rel=1e-10)
    whole = distance(torch.cat([batch.real for batch in draws]), torch.cat(images))
    assert log["fm/distance"].item() != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_large_loss_scale_passes_through_half_precision_features(accumulate):
    """The scale of fp16 times lambda times balance exceeds float16; the gradient of the features does not."""
    state = tiny_state(
        feature_matching__weight=1.0,
        train__accumulate=accumulate,
        train__batch_size=8,
        precision="fp32",
        discriminator__norm="none",
    )
    role = role_of(state)
    role.precision = torch.float16
    draws = draws_of(state)[0]
    images = [state.task.generate(b).detach() for b in draws]
    state.scalars.set(0, [0.0], [300.0])
    plan = StepPlan((DiscriminatorPlan(True, False, ("block1.conv",), False, False),))
    role.matching.layers = ("block1.conv",)
    role.matching.weights = {"block1.conv": 1.0}
    scaled, _ = image_gradients(state.task, plan, draws, images, state.scalars, WORLD, 2.0**10)
    role.precision = torch.float32
    exact, _ = image_gradients(state.task, plan, draws, images, state.scalars, WORLD)
    scaled, exact = torch.cat(scaled.total) / 2.0**10, torch.cat(exact.total)
    assert scaled.isfinite().all()
    assert (scaled - exact).norm() < 0.02 * exact.norm()


# The whole step against autograd


@pytest.mark.parametrize("kind", D_LOSSES)
@pytest.mark.parametrize("match", ["mean", "sample"])
def test_gradients_of_a_step_are_those_of_the_textbook(kind, match):
    """Both losses written out, differentiated by autograd in one piece; augmentation, weight and balance none."""
    state = tiny_state(
        losses__gan__type=kind,
        losses__gan__weight=0.7,
        feature_matching__weight=0.3,
        feature_matching__match=match,
        feature_matching__measure_every=1000,
        train__augment=("translation",),
        discriminator__norm="group",
    )
    twin = tiny_state(discriminator__norm="group")
    task, batch = twin.task, draws_of(state)[0][0]
    policy = ("translation",)
    fake = task.generate(batch)
    d = role_of(twin).net

    def judge(image, numbers, layers=()):
        return d(augment(image, numbers, policy), layers)

    loss = D_LOSSES[kind](judge(batch.real, batch.augment[0]).logits, judge(fake.detach(), batch.augment[0]).logits)
    d_gradients = torch.autograd.grad(loss, list(d.parameters()))

    state.advance([[batch]])
    for p, g in zip(role_of(state).net.parameters(), d_gradients, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-15)

    d.load_state_dict(role_of(state).net.state_dict())
    layers = ("block1", "block2", "block3")
    on_fake = judge(fake, batch.augment[1], layers)
    on_real = judge(batch.real, batch.augment[1], layers)
    distances = []
    for name in layers:
        f, r = on_fake.features[name], on_real.features[name].detach()
        difference = f - r if match == "sample" else f.mean(0) - r.mean(0)
        distances.append(difference.square().mean())
    total = 0.7 * G_LOSSES[kind](on_fake.logits, on_real.logits.detach()) + 0.3 * sum(distances) / 3
    g_gradients = torch.autograd.grad(total, list(task.generator.parameters()))
    for p, g in zip(state.task.generator.parameters(), g_gradients, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-8, atol=1e-14)
    row = state.window.read(WORLD)
    assert row["loss/d"] == pytest.approx(loss.item(), rel=1e-10)
    assert row["loss/g"] == pytest.approx(total.item(), rel=1e-10)


# On one screen


@pytest.mark.parametrize(
    ("update", "settings"),
    [
        ("alternating", {"losses__gan__r1": 1.0, "losses__gan__r2": 1.0, "train__d_updates": 2}),
        ("alternating", {"train__accumulate": 2, "losses__gan__type": "r3gan"}),
        ("simultaneous", {}),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_every_gradient_of_a_step_is_taken_within_six_frames_in_two_files(update, settings, measured):
    """From the call of the step to `torch.autograd`."""
    state = tiny_state(feature_matching__weight=0.3, train__update=update, **settings)
    state.step = 0 if measured else 33
    assert state.task.plan(state.step).measure == measured
    draws, stacks = draws_of(state), []

    def note(frame, event, argument):
        code = frame.f_code
        autograd = code.co_filename == torch.autograd.__file__ and code.co_name in ("grad", "backward")
        if event != "call" or not autograd:
            return
        stack = []
        while frame is not None and frame.f_code.co_name != "advance":
            if frame.f_code.co_filename.startswith(FMRUN):
                stack.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
            frame = frame.f_back
        if stack:
            stacks.append(stack[: [name for _, name in stack].index(f"{update}_step") + 1])

    sys.setprofile(note)
    try:
        state.advance(draws)
    finally:
        sys.setprofile(None)
    assert len(stacks) >= 3
    for stack in stacks:
        assert len(stack) <= 6, stack
        assert len({file for file, _ in stack}) <= 2, stack


# R1 and R2


@pytest.mark.parametrize("policy", [(), ("color", "translation")])
def test_penalties_equal_an_explicit_double_backward(policy):
    state = tiny_state(losses__gan__r1=2.0, losses__gan__r2=3.0, discriminator__norm="spectral", train__augment=policy)
    batch, role = draws_of(state)[0][0], role_of(state)
    image = state.task.generate(batch).detach()
    plan = state.task.plan(0).discriminators[0]
    assert plan.penalty
    log = StepLog()
    got = discriminator_loss(role, plan, batch, image, log)
    numbers = batch.augment[0] if policy else None

    def norm(x):
        """Image by image, each gradient with a graph of its own."""
        values = []
        for i in range(len(x)):
            leaf = x[i : i + 1].clone().requires_grad_()
            logit = role.net(augment(leaf, None if numbers is None else numbers[i : i + 1], policy)).logits
            values.append(torch.autograd.grad(logit.sum(), leaf, create_graph=True)[0].square().sum())
        return torch.stack(values).mean()

    r1, r2 = norm(batch.real), norm(image)
    logits = [role.net(augment(x, numbers, policy)).logits for x in (batch.real, image)]
    expected = D_LOSSES["vanilla"](*logits) + 2.0 / 2 * r1 + 3.0 / 2 * r2
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    assert log["loss/d_r1"].item() == pytest.approx(r1.item(), rel=1e-10)
    assert log["loss/d_r2"].item() == pytest.approx(r2.item(), rel=1e-10)
    parameters = [p for n, p in role.net.named_parameters() if "head.bias" not in n]
    gradients = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-14)


def test_lazy_penalties_are_due_every_so_many_steps_and_scaled_by_as_many():
    lazy, eager = (tiny_state(losses__gan__r1=1.0, losses__gan__penalty_every=k) for k in (4, 1))
    assert [lazy.task.plan(s).discriminators[0].penalty for s in range(6)] == [True, False, False, False, True, False]
    batch = draws_of(lazy)[0][0]
    image = lazy.task.generate(batch).detach()
    plan = lazy.task.plan(0).discriminators[0]
    log = StepLog()
    a, b = (discriminator_loss(role_of(s), plan, batch, image, log, fraction=0.5) for s in (lazy, eager))
    plain = log["loss/d"]
    assert (a - plain).item() == pytest.approx(4 * (b - plain).item(), rel=1e-10)
    advance(lazy, 2)
    assert lazy.window.counts["loss/d_r1"] == 1


def test_without_penalties_none_is_planned():
    assert not tiny_state().task.plan(0).discriminators[0].penalty


# Who moves when, on which images


@pytest.mark.parametrize(("d_updates", "g_updates"), list(itertools.product((1, 2, 3), (1, 2))))
def test_updates_take_their_own_batch_but_d_and_g_share_one(d_updates, g_updates):
    state = tiny_state(train__d_updates=d_updates, train__g_updates=g_updates, feature_matching__weight=0.1)
    assert state.batches_per_step == d_updates + g_updates - 1
    draws = draws_of(state)
    index = {id(micro[0]): i for i, micro in enumerate(draws)}
    made, graphs, generate = [], [], state.task.generate

    def noted(batch):
        image = generate(batch)
        made.append(index[id(batch)])
        graphs.append(image.requires_grad)
        return image

    state.task.generate = noted
    order = []
    for name, optimiser in state.optimisers.items():
        step = optimiser.step
        optimiser.step = lambda *a, name=name, step=step: (order.append(name), step(*a))[1]
    state.advance(draws)
    assert made == list(range(d_updates + g_updates - 1))
    assert graphs == [False] * (d_updates - 1) + [True] * g_updates
    assert order == ["discriminator"] * d_updates + ["generator"] * g_updates
    for name, updates in (("discriminator", d_updates), ("generator", g_updates)):
        assert {v.item() for k, v in state.optimisers[name].state().items() if k.endswith("/step")} == {updates}


def test_steps_take_consecutive_draws():
    state = tiny_state(train__d_updates=2, train__g_updates=2)
    first, second = ([b[0].noise for b in draws_of(state, s)] for s in (0, 1))
    every = torch.stack(first + second)
    assert len(every) == 6
    assert len(every.unique(dim=0)) == 6


def test_draws_do_not_depend_on_micro_batches():
    whole, parts = (
        draws_of(tiny_state(train__batch_size=8, train__accumulate=k, train__augment=("color",)))[0] for k in (1, 4)
    )
    assert len(parts) == 4
    assert torch.equal(whole[0].noise, torch.cat([b.noise for b in parts]))
    assert torch.equal(whole[0].real, torch.cat([b.real for b in parts]))
    assert torch.equal(whole[0].augment, torch.cat([b.augment for b in parts], dim=1))


def test_a_steps_draws_are_the_same_whatever_came_before():
    a, b = tiny_state(), tiny_state()
    advance(a, 2)
    x, y = draws_of(a, 2)[0][0], draws_of(b, 2)[0][0]
    assert torch.equal(x.noise, y.noise)
    assert torch.equal(x.real, y.real)


def test_steps_repeat_to_the_bit():
    a, b = (tiny_state(precision="fp32", feature_matching__weight=0.1) for _ in range(2))
    advance(a, 3)
    torch.randn(5)
    advance(b, 3)
    assert differing(everything(a), everything(b)) == []


def test_the_step_neither_reads_nor_moves_global_random_state():
    state = tiny_state(feature_matching__weight=0.1, feature_matching__match="sliced", train__augment=("color",))
    before = torch.get_rng_state()
    advance(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_learning_rates_follow_the_schedule():
    state = tiny_state(optim__schedule={"warmup_steps": 4}, optim__generator={"lr": 1e-3})
    for step, factor in ((0, 0.25), (1, 0.5), (9, 1.0)):
        state.set_scalars(step)
        assert state.optimisers["generator"].lr.item() == pytest.approx(1e-3 * factor)
        assert state.optimisers["discriminator"].lr.item() == pytest.approx(2e-4 * factor)


def test_diversity_is_the_spread_of_generated_over_real_images():
    state = tiny_state(log__every=1)
    draws = draws_of(state)
    batch = draws[0][0]
    fake = state.task.generate(batch).detach()
    spread = [(x - x.mean(0)).square().mean().sqrt().item() for x in (fake, batch.real)]
    state.advance(draws)
    assert state.window.read(WORLD)["health/diversity"] == pytest.approx(spread[0] / spread[1], rel=1e-9)


# Updates that are not finite


def poisoned(state: State, value: float, where: str) -> list[list[Batch]]:
    draws = draws_of(state)
    batch = draws[0][0]
    getattr(batch, where).view(-1)[3] = value
    return draws


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", ["batch", "spectral", "group"])
def test_poisoned_real_images_change_no_weight_and_are_named(norm, value):
    state = tiny_state(feature_matching__weight=0.1, discriminator__norm=norm, ema__decay=0.0)
    advance(state, 2)

    def learned():
        kept = {k: v for k, v in everything(state).items() if not k.startswith(("guard", "matching"))}
        return {k: v for k, v in kept.items() if "running" not in k and "num_batches" not in k and "weight.0" not in k}

    before = learned()
    assert any(k.startswith("adam.generator") for k in before)
    draws = poisoned(state, value, "real")
    state.advance(draws)
    assert state.guard.read() == (2, 0)
    assert differing(before, learned()) == []
    advance(state, 2)
    assert differing(before, learned()) == []
    assert state.guard.read() == (2, 0)

    state.step = 2
    cause = diagnose(state, draws, 0)
    assert (
        cause == "loss/d is not finite; the first layer with a value that is not finite is discriminator blocks.0.conv"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_generator_loss_is_named_and_changes_no_weight(value):
    state = tiny_state(feature_matching__weight=0.1, feature_matching__layers="block2", ema__decay=0.0)
    advance(state)
    before = {k: v for k, v in everything(state).items() if k.startswith(("g.", "ema.", "adam.generator"))}
    before = {k: v for k, v in before.items() if "running" not in k and "num_batches" not in k}
    draws, role = draws_of(state), role_of(state)
    distance = role.matching.distance

    def bad(real, fake, **k):
        loss = distance(real, fake, **k)
        loss.total = loss.total * value
        return loss

    role.matching.distance = bad
    state.advance(draws)
    assert state.guard.read() == (1, 1)
    after = everything(state)
    assert differing(before, {k: after[k] for k in before}) == []
    state.step = 1
    assert diagnose(state, draws, 1).startswith("fm/distance is not finite")


def test_a_layer_that_overflows_is_named():
    state = tiny_state(precision="fp32", discriminator__norm="none")
    with torch.no_grad():
        role_of(state).net.blocks[1]["conv"].weight.fill_(3e38)
    draws = draws_of(state)
    state.advance(draws)
    assert state.guard.read() == (0, 0)
    state.step = 0
    assert "the first layer with a value that is not finite is discriminator blocks.1.conv" in diagnose(state, draws, 0)


def test_the_draw_that_was_not_finite_is_found_among_several():
    state = tiny_state(train__d_updates=3)
    draws = draws_of(state)
    draws[1][0].real.view(-1)[0] = math.nan
    state.advance(draws)
    assert state.guard.read() == (0, 0)
    state.step = 0
    assert diagnose(state, draws, 0).startswith("loss/d is not finite")


def test_a_gradient_that_alone_is_not_finite_is_named():
    state = tiny_state()
    draws = draws_of(state)

    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.inf

    head = role_of(state).net.head
    head.register_forward_hook(lambda m, a, out: Cliff.apply(out))
    state.advance(draws)
    assert state.guard.read() == (0, 0)
    state.step = 0
    assert "the gradient of discriminator" in diagnose(state, draws, 0)


def test_diagnosis_leaves_no_hook_behind():
    state = tiny_state()
    diagnose(state, draws_of(state), 0)
    diagnose(state, draws_of(state), 1)
    nets = (state.task.generator, role_of(state).net)
    assert not any(m._forward_hooks for net in nets for m in net.modules())


# Freezing, and what the start-up check reports


def test_frozen_gives_back_what_it_found():
    state = tiny_state()
    net = role_of(state).net
    net.head.bias.requires_grad_(False)

    def fail():
        with frozen(net):
            assert not any(p.requires_grad for p in net.parameters())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_check_at_the_start_reports_lambda_balance_and_share():
    state = tiny_state(feature_matching__weight=0.1, feature_matching__balance="gradient", feature_matching__ramp=100)
    start = check_start(state, draws_of(state))
    strength = start.strength
    assert start.shares == {}
    assert strength.share == pytest.approx(0.1)
    assert strength.balance > 0
    assert str(strength).startswith(f"λ 0.1 × balance {strength.balance:.4g} = {0.1 * strength.balance:.4g}: ")
    assert str(strength).endswith("its gradient is 10 % of the adversarial one")
    assert check_start(tiny_state(), draws_of(tiny_state())).strength is None


def test_a_live_number_changes_in_place():
    """A captured graph would otherwise go on with the old one."""
    live = StepScalars(1, torch.device("cpu"), torch.float64)
    places = live.adversarial.data_ptr(), live.matching.data_ptr()
    live.set(3, [0.5], [0.25])
    assert (live.adversarial.data_ptr(), live.matching.data_ptr()) == places
    assert (live.step, live.adversarial.item(), live.matching.item()) == (3, 0.5, 0.25)


def test_precision_bf16_keeps_weights_statistics_and_logits_wide():
    state = tiny_state(precision="bf16", feature_matching__weight=0.1)
    draws, role = draws_of(state), role_of(state)
    out = role(draws[0][0].real, None, role.matching.layers)
    assert out.logits.dtype == torch.float32
    assert {f.dtype for f in out.features.values()} == {torch.bfloat16}
    before = tensors_of(role.net)
    state.advance(draws)
    assert {p.dtype for p in role.net.parameters()} == {torch.float32}
    assert differing(before, tensors_of(role.net))
    assert all(math.isfinite(v) for v in state.window.read(WORLD).values())


def test_penalties_are_exact_also_in_bf16():
    half, full = (tiny_state(precision=p, losses__gan__r1=1.0, discriminator__norm="none") for p in ("bf16", "fp32"))
    batch = draws_of(full)[0][0]
    image = full.task.generate(batch).detach()
    plan = full.task.plan(0).discriminators[0]
    logs = StepLog(), StepLog()
    for state, log in zip((half, full), logs, strict=True):
        discriminator_loss(role_of(state), plan, batch, image, log)
    assert logs[0]["loss/d_r1"].item() == logs[1]["loss/d_r1"].item()
