"""Both nets updated at once: the gradients of both losses at the same weights, from one pass over each set of images."""

import math

import pytest
import torch
from support.helpers import (
    WORLD,
    Calls,
    advance,
    differing,
    draws_of,
    everything,
    flops,
    tensors_of,
    tiny_config,
    tiny_state,
)
from torch import nn

from fmrun.losses.adversarial import D_LOSSES, G_LOSSES
from fmrun.models.augment import augment
from fmrun.models.norm import SpectralNorm
from fmrun.train.state import State

MATCHES = ("sample", "mean", "moments", "coral", "mmd", "sliced")


def both_at_once(**settings) -> State:
    return tiny_state(**{"train__update": "simultaneous", "feature_matching__weight": 0.3, **settings})


def role_of(state: State):
    return state.task.discriminators[0]


def textbook(state: State, batch, gan: str, r1: float, r2: float, policy: tuple[str, ...], strength: float):
    """Both losses, each written out on passes of its own, and the gradients of both at the weights as they are."""
    task, role = state.task, role_of(state)
    d, matching = role.net, role.matching
    numbers = batch.augment[0] if policy else None
    fake = task.generate(batch)

    def judge(image, layers=()):
        return d(augment(image, numbers, policy), layers)

    def penalty(image):
        leaf = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(leaf).logits.sum(), leaf, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()

    d_loss = D_LOSSES[gan](judge(batch.real).logits, judge(fake.detach()).logits)
    d_loss = d_loss + (r1 / 2 * penalty(batch.real) if r1 else 0) + (r2 / 2 * penalty(fake) if r2 else 0)
    d_gradients = torch.autograd.grad(d_loss, list(d.parameters()))
    on_real, on_fake = judge(batch.real, matching.layers), judge(fake, matching.layers)
    real = {name: feature.detach() for name, feature in on_real.features.items()}
    distance = matching.distance(real, on_fake.features, step=0, ranks=WORLD).total
    g_loss = 0.7 * G_LOSSES[gan](on_fake.logits, on_real.logits.detach()) + strength * distance
    return d_loss, g_loss, d_gradients, torch.autograd.grad(g_loss, list(task.generator.parameters()))


CASES = [
    *((match, "vanilla", "batch", {}) for match in MATCHES),
    *(("mean", gan, "group", {}) for gan in D_LOSSES),
    ("mean", "vanilla", "batch", {"train__augment": ("color", "translation")}),
    ("sample", "hinge", "spectral", {"losses__gan__r1": 2.0}),
    ("moments", "r3gan", "none", {"losses__gan__r1": 1.0, "losses__gan__r2": 0.5}),
    ("mean", "vanilla", "batch", {"losses__gan__r2": 3.0, "feature_matching__balance": "gradient"}),
]


@pytest.mark.parametrize(("match", "gan", "norm", "settings"), CASES, ids=str)
def test_gradients_of_both_nets_equal_the_textbooks(match, gan, norm, settings):
    shared = {
        "losses__gan__type": gan,
        "losses__gan__weight": 0.7,
        "feature_matching__match": match,
        "discriminator__norm": norm,
        **settings,
    }
    state, twin = both_at_once(**shared), both_at_once(**shared)
    batch = draws_of(state)[0][0]
    if norm == "spectral":
        for module in role_of(twin).net.modules():
            if hasattr(module, "parametrizations"):
                module.parametrizations["weight"][0].advance(module.parametrizations["weight"].original)
    state.advance([[batch]])
    strength = 0.3 * role_of(state).matching.strength.balance.item()
    penalties = (settings.get("losses__gan__r1", 0.0), settings.get("losses__gan__r2", 0.0))
    policy = settings.get("train__augment", ())
    d_loss, g_loss, *expected = textbook(twin, batch, gan, *penalties, policy, strength)
    for net, gradients in zip((role_of(state).net, state.task.generator), expected, strict=True):
        largest = max(g.abs().max() for g in gradients)
        for p, g in zip(net.parameters(), gradients, strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12 * float(largest))
    row = state.window.read(WORLD)
    d_terms = row["loss/d"] + sum(
        g / 2 * row.get(f"loss/d_{n}", 0) for n, g in zip(("r1", "r2"), penalties, strict=True)
    )
    assert d_terms == pytest.approx(d_loss.item(), rel=1e-9)
    assert row["loss/g"] == pytest.approx(g_loss.item(), rel=1e-9)


def test_it_is_another_algorithm():
    """The discriminator's update is the same; the generator's is taken at the weights from before it."""
    one, other = (tiny_state(feature_matching__weight=0.3, train__update=u) for u in ("simultaneous", "alternating"))
    for state in (one, other):
        advance(state)
    assert all(
        torch.allclose(p, q, rtol=1e-9)
        for p, q in zip(role_of(one).net.parameters(), role_of(other).net.parameters(), strict=True)
    )
    assert not torch.allclose(
        one.task.generator.project.weight.grad, other.task.generator.project.weight.grad, rtol=1e-3
    )


# Passes


def plain_and_matched(**settings) -> tuple[State, State]:
    """Two states at a step that measures nothing, without feature matching and with it."""
    settings = {"feature_matching__measure_every": 100, **settings}
    states = both_at_once(**{**settings, "feature_matching__weight": 0.0}), both_at_once(**settings)
    for state in states:
        advance(state)
        state.step = 50
    return states


def test_one_forward_for_each_set_of_images():
    _, state = plain_and_matched(feature_matching__layers=("block1", "block2"))
    calls = Calls(role_of(state).net)
    draws = draws_of(state)
    state.advance(draws)
    layers = ("block1", "block2")
    assert [(c["layers"], c["logits"], c["grad"], c["weights"]) for c in calls.asked] == [
        (layers, True, False, True),
        (layers, True, True, True),
    ]
    assert torch.equal(calls.asked[0]["image"], draws[0][0].real)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_it_saves_a_pass_and_feature_matching_costs_none(norm):
    """Without matching, exactly one forward on the generated images less than alternating updates; with it, nothing more."""
    plain, matched = plain_and_matched(discriminator__norm=norm)
    alternating = tiny_state(discriminator__norm=norm)
    advance(alternating)
    draws = draws_of(plain)
    image = plain.task.generate(draws[0][0]).detach()
    with torch.no_grad():
        forward = flops(lambda: role_of(alternating).net(image))
        # a pass normalises the weights anew
        forward -= flops(lambda: [m(w) for m, w in sigmas(role_of(alternating).net)])
    cost = {name: flops(lambda s=s: s.advance(draws)) for name, s in (("plain", plain), ("matched", matched))}
    usual = flops(lambda: alternating.advance(draws))
    normalising = flops(lambda: [m(w) for m, w in sigmas(role_of(alternating).net)])
    assert usual - cost["plain"] == forward + normalising
    assert cost["matched"] == cost["plain"]


def sigmas(net: nn.Module):
    for module in net.modules():
        if hasattr(module, "parametrizations"):
            chain = module.parametrizations["weight"]
            yield chain[0], chain.original.detach()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_move_as_in_the_discriminators_own_update(monkeypatch, accumulate):
    state = both_at_once(train__accumulate=accumulate)
    advance(state, 3)
    g, d = state.task.generator.norm, role_of(state).net.blocks[1]["norm"]
    assert g.num_batches_tracked.item() == 3 * accumulate
    assert d.num_batches_tracked.item() == 6 * accumulate
    usual = tiny_state(feature_matching__weight=0.3, train__accumulate=accumulate)
    one = both_at_once(train__accumulate=accumulate)
    for s in (usual, one):
        advance(s)
    buffers = [dict(role_of(s).net.named_buffers()) for s in (usual, one)]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])

    state = both_at_once(train__accumulate=accumulate, discriminator__norm="spectral")
    moved, move = [], SpectralNorm.advance
    monkeypatch.setattr(SpectralNorm, "advance", lambda self, w, n=1: (moved.append(n), move(self, w, n))[1])
    advance(state)
    assert moved == [1] * 4


def test_real_features_have_no_graph_and_are_of_the_weights_from_before():
    state = both_at_once(discriminator__norm="none")
    role, draws = role_of(state), draws_of(state)
    with torch.no_grad():
        before = role.net(draws[0][0].real, role.matching.layers, False).features
    seen, distance = {}, role.matching.distance
    role.matching.distance = lambda real, fake, **k: (seen.update(real=real, fake=fake), distance(real, fake, **k))[1]
    state.advance(draws)
    for name, feature in seen["real"].items():
        assert not feature.requires_grad
        assert torch.equal(feature, before[name])
        assert seen["fake"][name].requires_grad


def test_penalised_features_are_compared_in_one_precision():
    state = both_at_once(
        precision="bf16", losses__gan__r1=1.0, losses__gan__penalty_every=2, discriminator__norm="none"
    )
    role, seen = role_of(state), []
    distance = role.matching.distance
    role.matching.distance = lambda real, fake, **k: (
        seen.append({f.dtype for x in (real, fake) for f in x.values()}),
        distance(real, fake, **k),
    )[1]
    advance(state, 2)
    assert seen == [{torch.float32}, {torch.bfloat16}]


# Who takes part


def test_an_untrained_discriminator_stays_fixed_and_is_matched():
    state = both_at_once(discriminator__train=False)
    before = tensors_of(role_of(state).net)
    calls = Calls(role_of(state).net)
    advance(state)
    assert differing(before, tensors_of(role_of(state).net)) == []
    assert not any(c["weights"] for c in calls.asked)
    assert all(p.requires_grad for p in role_of(state).net.parameters())
    row = state.window.read(WORLD)
    assert row["fm/distance"] > 0
    assert "loss/d" not in row


def test_the_discriminator_learns_before_the_adversarial_term_starts():
    state = both_at_once(losses__gan__start_step=1)
    before = tensors_of(role_of(state).net)
    advance(state)
    assert differing(before, tensors_of(role_of(state).net))
    row = state.window.read(WORLD)
    assert {"loss/d", "fm/distance"} <= row.keys()
    assert "loss/g_adv" not in row


def test_compiled_nets_make_the_same_step():
    eager, compiled = both_at_once(), both_at_once()
    torch._dynamo.reset()
    role_of(compiled).compiled = torch.compile(role_of(compiled).net, backend="aot_eager")
    for state in (eager, compiled):
        advance(state, 2)
    a, b = everything(eager), everything(compiled)
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-6, atol=1e-9, equal_nan=True), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_moves_neither_net(value):
    state = both_at_once(discriminator__norm="none")
    advance(state)
    nets = (state.task.generator, role_of(state).net)
    before = [{n: p.clone() for n, p in net.named_parameters()} for net in nets]
    draws = draws_of(state)
    draws[0][0].real.view(-1)[3] = value
    state.advance(draws)
    assert state.guard.read() == (1, 1)
    for net, kept in zip(nets, before, strict=True):
        assert all(torch.equal(p, kept[n]) for n, p in net.named_parameters())


def test_the_scale_of_fp16_is_the_one_that_both_gradients_carry():
    """The first of two masked updates halves it, and the second must not divide by that."""
    state, plain = both_at_once(), both_at_once()
    state.guard.scaled = True
    state.guard.scale.fill_(2.0**10)
    state.guard.good_steps.fill_(1999)  # the next update makes the scale grow
    for s in (state, plain):
        advance(s)
    assert state.guard.scale.item() == 2.0**11
    rows = [s.window.read(WORLD) for s in (state, plain)]
    for name in ("health/g_grad_norm", "health/d_grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-6)


@pytest.mark.parametrize("field", ["d_updates", "g_updates"])
def test_several_updates_of_one_net_are_refused(field):
    with pytest.raises(ValueError, match="set d_updates and g_updates to 1, or update to alternating"):
        tiny_config(**{"train__update": "simultaneous", f"train__{field}": 2})
