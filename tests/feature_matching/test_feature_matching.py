"""Which layers, how strongly, from when on: what lambda means."""

import math

import pytest
import torch
from support.helpers import WORLD, Calls, advance, draws_of, tensors_of, tiny_config, tiny_state
from torch import nn

from fmrun.feature_matching import FeatureMatching, FeatureMatchingError, select_layers
from fmrun.feature_matching.discriminator import DiscriminatorOutput, truncated_forward
from fmrun.feature_matching.strength import DENSE_MEASUREMENTS
from fmrun.models.dcgan import DcganDiscriminator
from fmrun.tasks import DiscriminatorPlan, StepPlan
from fmrun.tasks.pair import feature_matching
from fmrun.train.step import image_gradients

NAMES = ("block1.conv", "block1", "block2.conv", "block2", "block3.conv", "block3")
SHAPES = {"block1": torch.Size((2, 4, 4)), "block2": torch.Size((3, 2, 2))}


def net(size: int = 28) -> DcganDiscriminator:
    return DcganDiscriminator(size, 1, 4, "batch", torch.Generator())


class Blocks(nn.Module):
    """Features of `SHAPES` from images of 8 px."""

    feature_names = tuple(SHAPES)
    groups = dict.fromkeys(("early", "mid", "key", "all"), feature_names)
    auto = "block2"

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 4, 2, 1), nn.Conv2d(2, 3, 4, 2, 1)

    def forward(self, image, layers=(), logits=True):
        one = self.one(image)
        two = self.two(one)
        found = {"block1": one, "block2": two}
        return DiscriminatorOutput(two.mean((1, 2, 3)) if logits else None, {n: found[n] for n in found if n in layers})


def matching(**settings) -> FeatureMatching:
    return FeatureMatching(Blocks().double(), (1, 8, 8), **{"weight": 0.1, "balance": "none", **settings})


def features(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, *s, generator=rng, dtype=torch.float64) for n, s in SHAPES.items()}


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Which layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("block2",), ("block2",)),
        ((0,), ("block1.conv",)),
        ((-1,), ("block3",)),
        ((-6,), ("block1.conv",)),
        (("all",), NAMES),
        (("key",), ("block1", "block2", "block3")),
        (("early",), ("block1",)),
        (("mid",), ("block2",)),
        (("auto",), ("block3.conv",)),
        (("block3", 0, "early", -1, "block3"), ("block1.conv", "block1", "block3")),
    ],
)
def test_selected_layers_come_in_the_nets_order_each_once(layers, expected):
    assert select_layers(layers, net()) == expected


@pytest.mark.parametrize("layer", [6, -7, 100])
def test_an_index_out_of_range_lists_the_layers(layer):
    with pytest.raises(
        FeatureMatchingError, match=rf"no layer {layer}; layers: 0 block1\.conv, 1 block1, .* 5 block3$"
    ):
        select_layers(("block1", layer), net())


def test_an_unknown_name_suggests_the_nearest_and_lists_layers_and_groups():
    with pytest.raises(FeatureMatchingError) as error:
        select_layers(("block1", "blok2"), net())
    text = str(error.value)
    assert "no layer 'blok2'; did you mean 'block2'?" in text
    assert all(name in text for name in (*NAMES, "early", "mid", "key", "all", "auto"))


def test_the_automatic_layer_is_the_convolution_before_the_head():
    d = net()
    image = torch.randn(2, 1, 28, 28)
    out = d(image, (d.auto,), True)
    assert out.features[d.auto].shape[1] == d.head.in_channels


def test_layer_weights_need_one_for_each_layer():
    with pytest.raises(FeatureMatchingError, match=r"3 weights for 2 layers \(block1, block2\)"):
        matching(layer_weights=(1.0, 2.0, 3.0))
    assert matching(layer_weights=(1.0, 3.0)).weights == {"block1": 1.0, "block2": 3.0}


def test_a_shape_mismatch_names_the_layer_and_both_shapes():
    real, fake = features(0), features(1)
    fake["block2"] = fake["block2"][..., :1]
    with pytest.raises(FeatureMatchingError, match=r"'block2' has shape \(4, 3, 2, 2\) for real and \(4, 3, 2, 1\)"):
        matching().distance(real, fake, step=0, ranks=WORLD)


# How strongly


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", ["uniform", (0.5, 3.0)])
def test_total_is_the_reduction_of_weighted_distances(weights, reduction):
    module = matching(layer_weights=weights, reduction=reduction)
    loss = module.distance(features(0), features(1), step=0, ranks=WORLD)
    w = (1.0, 1.0) if weights == "uniform" else weights
    real, fake = features(0), features(1)
    d = [float((real[n].mean(0) - fake[n].mean(0)).square().mean()) for n in SHAPES]
    expected = w[0] * d[0] + w[1] * d[1]
    assert loss.total.item() == pytest.approx(expected / 2 if reduction == "mean" else expected, rel=1e-12)
    assert [t.item() for t in loss.terms.values()] == pytest.approx(d, rel=1e-12)
    assert list(loss.terms) == list(SHAPES)


def image_gradient(state, plan: DiscriminatorPlan) -> torch.Tensor:
    batches = draws_of(state, 0)[0]
    rng = torch.Generator().manual_seed(5)
    images = [torch.rand(b.real.shape, generator=rng, dtype=torch.float64) * 2 - 1 for b in batches]
    gradients, _ = image_gradients(state.task, StepPlan((plan,)), batches, images, state.scalars, WORLD)
    return torch.cat(gradients.total)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("match", ["mean", "sample"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", ["uniform", (0.5, 0.0, 2.0)])
def test_lambda_acts_once(weights, reduction, match, accumulate):
    """0.1 adds 0.1 times the unweighted term to the generator's gradient, not 0.01 times."""

    def gradient(weight: float, adversarial: bool, matched: bool) -> torch.Tensor:
        state = tiny_state(
            feature_matching__weight=weight,
            feature_matching__match=match,
            feature_matching__reduction=reduction,
            feature_matching__layer_weights=weights,
            discriminator__norm="group",
            train__accumulate=accumulate,
        )
        state.set_scalars(0)
        plan = state.task.plan(0).discriminators[0]
        layers = plan.layers if matched else ()
        return image_gradient(state, DiscriminatorPlan(True, adversarial, layers, False, False))

    adversarial, unweighted = gradient(0.1, True, False), gradient(1.0, False, True)
    assert torch.allclose(gradient(0.1, True, True), adversarial + 0.1 * unweighted, rtol=1e-10, atol=1e-18)
    assert unweighted.abs().sum() > 0


def test_balance_follows_reduction_and_multiplies_ramped_lambda():
    state = tiny_state(
        feature_matching__weight=0.2,
        feature_matching__ramp=4,
        feature_matching__balance="gradient",
        discriminator__norm="group",
    )
    module = state.task.discriminators[0].matching
    module.strength.balance.fill_(7.0)
    state.set_scalars(3)
    layers = module.layers
    got = image_gradient(state, DiscriminatorPlan(True, False, layers, False, False))
    module.strength.balance.fill_(1.0)
    state.scalars.set(3, [1.0], [1.0])
    unweighted = image_gradient(state, DiscriminatorPlan(True, False, layers, False, False))
    assert torch.allclose(got, 7 * 0.2 * 0.75 * unweighted, rtol=1e-10, atol=0)


def test_ramp():
    module = matching(start_step=10, ramp=4)
    assert [module.ramped(s) / 0.1 for s in (0, 9, 10, 11, 13, 14, 100)] == pytest.approx([0, 0, 0, 0.25, 0.75, 1, 1])
    assert [module.active(s) for s in (9, 10, 11)] == [False, False, True]
    assert [matching(start_step=10).ramped(s) for s in (9, 10)] == [0, 0.1]


# What it costs when it does not act


def test_zero_weight_builds_nothing_and_runs_no_real_pass():
    state = tiny_state(feature_matching__weight=0.0)
    role = state.task.discriminators[0]
    assert role.matching is None
    calls = Calls(role.net)
    advance(state)
    assert len(calls) == 3  # D: real, fake; G: fake
    assert all(call["layers"] == () for call in calls.asked)


@pytest.mark.parametrize("settings", [{"start_step": 2}, {"start_step": 1, "ramp": 3}])
def test_before_its_start_it_runs_nothing_and_changes_nothing(settings):
    late = tiny_state(feature_matching__weight=0.5, **{f"feature_matching__{k}": v for k, v in settings.items()})
    without = tiny_state(feature_matching__weight=0.0)
    calls = Calls(late.task.discriminators[0].net)
    for done in (1, 2):
        advance(late)
        advance(without)
        assert len(calls) == 3 * done
    a, b = tensors_of(late.task.generator), tensors_of(without.task.generator)
    assert all(torch.equal(a[n], b[n]) for n in a)
    advance(late)
    assert len(calls) == 3 * 2 + 4
    assert [bool(call["layers"]) for call in calls.asked[-4:]] == [False, False, True, True]


# Balance and share


def test_first_measurement_under_balance_makes_the_share_lambda():
    module = matching(weight=0.1, balance="gradient")
    module.strength.measure(number(6.0), number(0.02), number(0.1))
    assert module.strength.balance.item() == pytest.approx(300)
    assert module.strength.share.item() == pytest.approx(0.1)


def test_a_step_under_balance_adds_lambda_times_the_adversarial_gradient():
    state = tiny_state(feature_matching__weight=0.25, feature_matching__balance="gradient")
    state.set_scalars(0)
    plan = state.task.plan(0).discriminators[0]
    assert plan.measure
    whole = image_gradient(state, plan)
    adversarial = image_gradient(state, DiscriminatorPlan(True, True, (), False, False))
    assert (whole - adversarial).norm().item() == pytest.approx(0.25 * adversarial.norm().item(), rel=1e-9)
    assert state.task.discriminators[0].matching.strength.share.item() == pytest.approx(0.25)


def test_unbalanced_share_is_the_raw_terms_beside_the_weighted_gan_term():
    state = tiny_state(feature_matching__weight=0.25, losses__gan__weight=0.5)
    state.set_scalars(0)
    image_gradient(state, state.task.plan(0).discriminators[0])
    adversarial = image_gradient(state, DiscriminatorPlan(True, True, (), False, False))
    term = image_gradient(
        state, DiscriminatorPlan(True, False, state.task.discriminators[0].matching.layers, False, False)
    )
    state.scalars.set(0, [1.0], [0.25])
    unweighted = image_gradient(state, DiscriminatorPlan(True, True, (), False, False))
    assert torch.allclose(adversarial, 0.5 * unweighted, rtol=1e-10, atol=1e-18)
    module = state.task.discriminators[0].matching
    assert module.strength.share.item() == pytest.approx((term.norm() / adversarial.norm()).item(), rel=1e-9)
    assert module.strength.balance.item() == 1.0


def test_measuring_does_not_change_the_gradient_without_balance():
    state = tiny_state(feature_matching__weight=0.25)
    state.set_scalars(0)
    plan = state.task.plan(0).discriminators[0]
    measured = image_gradient(state, plan)
    plain = image_gradient(state, DiscriminatorPlan(True, True, plan.layers, False, False))
    assert torch.allclose(measured, plain, rtol=1e-10, atol=1e-18)


def test_balance_is_one_over_a_moving_mean_of_the_ratio():
    module = matching(balance="gradient", balance_decay=0.75)
    mean = 0.0
    for i, ratio in enumerate((1.0, 1.05, 0.93, 1.01)):
        module.strength.measure(number(1.0), number(ratio), number(0.1))
        mean = ratio if i == 0 else 0.75 * mean + 0.25 * ratio
        assert module.strength.balance.item() == pytest.approx(1 / mean, rel=1e-6)
        assert module.strength.share.item() == pytest.approx(0.1 * ratio / mean, rel=1e-6)


@pytest.mark.parametrize("jump", [2.0, 0.5, 30.0, 1 / 30])
def test_balance_follows_at_once_where_it_is_far_off(jump):
    module = matching(balance="gradient")
    module.strength.measure(number(1.0), number(1.0), number(0.1))
    module.strength.measure(number(1.0), number(jump), number(0.1))
    assert module.strength.share.item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("ratio", [1e12, 1e-12])
def test_the_first_balance_has_no_limits(ratio):
    module = matching(balance="gradient")
    module.strength.measure(number(ratio), number(1.0), number(0.1))
    assert module.strength.balance.item() == pytest.approx(ratio)
    assert not module.strength.moved()


@pytest.mark.parametrize("ratio", [1e6, 1e-6])
@pytest.mark.parametrize("blind", [False, True])
def test_a_balance_that_moves_far_waits_for_a_look_at_the_statistic(ratio, blind):
    module = matching(balance="gradient")
    module.strength.measure(number(3.0), number(1.0), number(0.1))
    module.strength.measure(number(3.0 * ratio), number(1.0), number(0.1))
    limit = 300.0 if ratio > 1 else 0.03
    assert module.strength.balance.item() == pytest.approx(limit)
    assert module.strength.moved()
    module.strength.review(blind)
    assert module.strength.balance.item() == pytest.approx(3.0 if blind else limit)
    module.strength.measure(number(3.0 * ratio), number(1.0), number(0.1))
    assert module.strength.balance.item() == pytest.approx(3.0 if blind else limit * (100 if ratio > 1 else 0.01))


def test_the_balance_is_reviewed_after_every_eighth_measurement():
    module = matching(balance="gradient", start_step=5, measure_every=10)
    assert [s for s in range(200) if module.review_due(s)] == [5, 85, 165]
    assert not any(matching(balance="none").review_due(s) for s in range(200))


@pytest.mark.parametrize(
    ("reference", "distance"),
    [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)],
)
def test_a_measurement_that_says_nothing_is_ignored(reference, distance):
    module = matching(balance="gradient")
    module.strength.measure(number(reference), number(distance), number(0.1))
    assert module.strength.balance.item() == 1.0
    assert not module.strength.measured
    module.strength.measure(number(8.0), number(1.0), number(0.1))
    assert module.strength.balance.item() == pytest.approx(8.0)
    module.strength.measure(number(reference), number(distance), number(0.1))
    assert module.strength.balance.item() == pytest.approx(8.0)


def test_balance_carries_no_gradient():
    module = matching(balance="gradient")
    module.strength.measure(number(3.0).requires_grad_(), number(1.0).requires_grad_(), number(0.1))
    assert not module.strength.balance.requires_grad
    assert not module.strength.share.requires_grad


def test_measured_at_first_every_step_then_every_so_many():
    module = matching(start_step=5, measure_every=10)
    due = [s for s in range(5, 60) if module.due(s)]
    dense = list(range(5, 5 + DENSE_MEASUREMENTS))
    assert due == dense + [s for s in range(5 + DENSE_MEASUREMENTS, 60) if (s - 5) % 10 == 0]


# State


@pytest.mark.parametrize("settings", [{"balance": "gradient"}, {"estimator": "running"}])
def test_a_restored_module_goes_on_as_the_original(settings):
    def act(module: FeatureMatching, seed: int) -> float:
        loss = module.distance(features(seed), features(seed + 50), step=seed, ranks=WORLD).total
        module.strength.measure(number(1.0 + seed / 10), number(1.0), number(0.1))
        return (module.strength.balance * loss).item()

    original, restored = matching(**settings), matching(**settings)
    act(original, 0)
    act(original, 1)
    restored.load_state_dict({k: v.clone() for k, v in original.state_dict().items()})
    assert act(restored, 2) == act(original, 2)
    assert act(matching(**settings), 2) != act(original, 2)


def test_running_mean_is_bias_corrected_and_follows_the_reals():
    module = matching(estimator="running", running_decay=0.9)
    sums, weight = dict.fromkeys(SHAPES, 0.0), 0.0
    for seed in range(3):
        real, fake = features(seed), features(seed + 9)
        loss = module.distance(real, fake, step=seed, ranks=WORLD)
        weight = 0.9 * weight + 0.1
        for name in SHAPES:
            sums[name] = 0.9 * sums[name] + 0.1 * real[name].mean(0)
            expected = (sums[name] / weight - fake[name].mean(0)).square().mean()
            assert loss.terms[name].item() == pytest.approx(expected.item(), rel=1e-10)


def test_directions_change_with_step_layer_and_seed_alone():
    real, fake = features(0), features(1)

    def terms(seed: int, step: int, real=real, fake=fake) -> dict[str, torch.Tensor]:
        config = tiny_config(seed=seed, feature_matching={"weight": 1, "match": "sliced", "directions": 4})
        module = feature_matching(config, Blocks().double(), (1, 8, 8))
        return module.distance(real, fake, step=step, ranks=WORLD).terms

    assert terms(0, 3) == terms(0, 3)
    assert terms(0, 3) != terms(0, 4)
    assert terms(0, 3) != terms(1, 3)
    same = terms(0, 0, dict.fromkeys(SHAPES, real["block2"]), dict.fromkeys(SHAPES, fake["block2"]))
    assert same["block1"] != same["block2"]


@pytest.mark.parametrize("match", ["sample", "mean", "moments", "coral", "mmd", "sliced"])
def test_settings_reach_the_statistic(match):
    """Every option that a statistic has changes its value."""
    real, fake = features(0), features(1)

    def value(**settings) -> float:
        return matching(match=match, **settings).distance(real, fake, step=0, ranks=WORLD).total.item()

    plain = value()
    assert value(elements="sum") != plain
    if match in ("sample", "mean", "moments"):
        assert value(criterion="l1") != plain
        assert value(criterion="charbonnier", eps=1e-6) != value(criterion="charbonnier", eps=1e-1)
    if match == "mean":
        assert value(estimator="unbiased") != plain
    if match == "mmd":
        assert value(kernel="rbf") != plain
    if match == "sliced":
        assert value(directions=5) != plain


def test_the_strength_acts_where_it_is_configured():
    """A step's log shows lambda, balance and their product with the distance."""
    state = tiny_state(feature_matching__weight=0.3, feature_matching__balance="gradient")
    advance(state)
    row = state.window.read(WORLD)
    assert row["fm/weight"] == pytest.approx(0.3 * row["fm/balance"], rel=1e-9)
    assert row["fm/loss"] == pytest.approx(row["fm/weight"] * row["fm/distance"], rel=1e-9)
    assert row["loss/g"] == pytest.approx(row["loss/g_adv"] + row["fm/loss"], rel=1e-9)
    assert row["fm/distance"] == pytest.approx(sum(row[f"fm/block{i}"] for i in (1, 2, 3)) / 3, rel=1e-9)
    assert row["fm/share"] == pytest.approx(0.3, rel=1e-9)


def test_config_default_balance_is_none():
    assert tiny_config().feature_matching.balance == "none"


def test_a_layer_of_weight_zero_is_not_computed_and_counts_in_the_mean():
    module = matching(layer_weights=(1.0, 0.0))
    assert module.layers == ("block1",)
    both = module.distance(features(0), features(1), step=0, ranks=WORLD).total
    alone = matching(layers="block1").distance(features(0), features(1), step=0, ranks=WORLD).total
    torch.testing.assert_close(both, alone / 2)


# The head


def test_the_head_is_a_layer_in_no_group_and_without_an_index():
    d = net()
    assert select_layers(("head",), d) == ("head",)
    assert select_layers(("head", "block1"), d) == ("block1", "head")
    assert all("head" not in select_layers((group,), d) for group in ("early", "mid", "key", "all", "auto"))
    image = torch.randn(2, 1, 28, 28)
    for layers, logits in ((("head",), True), (("block1", "head"), False)):
        out = truncated_forward(d, image, layers, logits)
        assert tuple(out.features) == layers
        assert torch.equal(out.features["head"].flatten(), d(image).logits.flatten())
        assert (out.logits is not None) == logits


def test_a_step_on_the_head_matches_logits():
    state = tiny_state(
        feature_matching__weight=0.1,
        feature_matching__layers=("head",),
        feature_matching__match="sample",
        discriminator__norm="group",
    )
    state.set_scalars(0)
    layers = state.task.plan(0).discriminators[0].layers
    got = image_gradient(state, DiscriminatorPlan(True, False, layers, False, False))
    (batch,) = draws_of(state, 0)[0]
    rng = torch.Generator().manual_seed(5)
    image = (torch.rand(batch.real.shape, generator=rng, dtype=torch.float64) * 2 - 1).requires_grad_()
    d = state.task.discriminators[0].net
    distance = (d(image).logits - d(batch.real).logits.detach()).square().mean()
    (expected,) = torch.autograd.grad(0.1 * distance, image)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-18)
