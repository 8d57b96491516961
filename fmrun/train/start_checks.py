"""What is looked at without changing it: does every matched layer and every loss reach the generator, how strong is
feature matching, can the statistic see anything there, and which step went wrong where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..feature_matching import FeatureMatching
from ..feature_matching.discriminator import scales
from ..feature_matching.frozen import frozen, frozen_running_stats
from ..feature_matching.walked import said
from ..models.norm import perturbed, restored_buffers
from ..runtime.errors import UserError
from ..runtime.rng import torch_generator
from ..tasks import Batch, DiscriminatorPlan, DiscriminatorRole, StepPlan
from ..tasks.pair import feature_matching
from .simultaneous import one_augmentation
from .state import State
from .step import StepLog, discriminator_loss, image_gradients

LOOK = 8
"""Images that are enough to see whether a gradient passes."""

BLIND = 1 / 20
"""A statistic this far below the noise of sampling cannot see what it compares."""

SHUFFLES = 8

HELD = (
    "the statistic is blind on every matched layer, so there is nothing that the balance could weigh: it stays at {:.4g}, "
    "whatever the gradient share"
)

FINITE = "the replayed step is finite"


@dataclass(frozen=True)
class MatchingStrength:
    """How strongly features are matched: `weight` (lambda) x `balance`, and the share of the gradient (nan: unknown)."""

    weight: float
    balance: float
    share: float
    blind: tuple[str, ...]
    """Matched layers on which the statistic cannot see a difference."""
    compared: str
    """What the share is of."""
    held: bool
    """Whether the balance does not follow the gradients, for the statistic is blind on all matched layers."""

    def __str__(self) -> str:
        effective = f"λ {self.weight:.4g} × balance {self.balance:.4g} = {self.weight * self.balance:.4g}"
        if math.isnan(self.share):
            return f"{effective} (no other generator loss to compare with)"
        share = f"{100 * self.share:.3g} % of" if self.share < 10 else f"{self.share:.3g} times"
        return f"{effective}: its gradient is {share} {self.compared}"


def full_plan(role: DiscriminatorRole) -> DiscriminatorPlan:
    """A plan in which everything of the role's that will ever act acts now, and is measured."""
    layers = role.matching.layers if role.matching is not None else ()
    return DiscriminatorPlan(adversarial=role.gan.weight > 0, layers=layers, measure=True)


def compared(role: DiscriminatorRole) -> str:
    """What the gradient share under `full_plan` is of."""
    return "the adversarial one" if role.gan.weight > 0 else "that of the generator's other losses"


@dataclass(frozen=True)
class Start:
    """What was measured before the first step, everything acting at its full weight."""

    strength: MatchingStrength | None = None
    """None without feature matching."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Norm of each other loss's gradient at the generated images, over that of the adversarial one or, where that never
    acts, over that of all of these together."""


def check_start(state: State, batches: list[list[Batch]]) -> Start:
    """Check that gradients pass and measure how strong the losses are.

    Raises UserError naming the layer or loss that gives the generator nothing. Leaves parameters, buffers and random
    streams as they were, but for one: where the statistic is blind, a new run's balance is held.
    """
    nets = [state.task.generator, *(role.net for role in state.task.discriminators)]
    with restored_buffers(*nets), torch.random.fork_rng(enabled=state.config.own_nets):
        if state.config.own_nets:  # what they draw is the same every time
            torch.manual_seed(0)
        return _check_start(state, batches[0])


def _check_start(state: State, batches: list[Batch]) -> Start:
    task, images, start = state.task, [], Start()
    if state.config.own_nets and len(batches) > 1:
        _refuse_noise(state, batches)
    with frozen_running_stats(task.generator):
        for batch in batches:
            image = task.generate(batch)
            if not image.requires_grad:
                raise UserError("the generator's images carry no gradient; check that its parameters are trainable")
            images.append(image.detach())
    weights = task.image_weights(max(state.step, state.config.full_step))
    image_losses = tuple(name for name, weight in weights.items() if weight > 0)
    for role in task.discriminators:
        plan, matching = full_plan(role), role.matching
        state.scalars.set(state.step, [role.gan.weight], [matching.weight if matching is not None else 0.0], weights)
        if state.config.own_nets and role.trained:
            _try_update(role, batches[0], images[0])
        with frozen(role.net):
            _check_layers(role, plan.layers, images[0])
            hidden = _blind_layers(state, role, plan.layers, batches, images)
        balanced = matching is not None and matching.strength.balanced
        if matching is not None and balanced and state.step == 0 and state.world.any(hidden == plan.layers):
            matching.strength.review(blind=True)
        plans = tuple(plan if d is role else DiscriminatorPlan() for d in task.discriminators)
        with restored_buffers(matching):
            log = _check_losses(state, role, StepPlan(plans, image_losses=image_losses), batches, images)
            strength = None if matching is None else _strength(role, matching, hidden)
        shares = {n.removeprefix("fm/share."): float(value) for n, value in log.items() if n.startswith("fm/share.")}
        start = Start(strength, shares)
    return start


def _strength(role: DiscriminatorRole, matching: FeatureMatching, hidden: tuple[str, ...]) -> MatchingStrength:
    measured = matching.strength
    balance, share, held = float(measured.balance), float(measured.share), bool(measured.held)
    return MatchingStrength(matching.weight, balance, share, hidden, compared(role), held)


def _check_layers(role: DiscriminatorRole, layers: Sequence[str], images: Tensor) -> None:
    for layer in layers:
        if not passes_gradient(role, layer, images[:LOOK]):
            raise UserError(
                f"layer '{layer}' of {role.name} passes no gradient to the image, so matching it teaches the "
                "generator nothing; leave it out of feature_matching.layers, or let gradients through it"
            )


def _blind_layers(
    state: State, role: DiscriminatorRole, layers: tuple[str, ...], batches: list[Batch], images: list[Tensor]
) -> tuple[str, ...]:
    """Those of the layers on which the statistic is blind, and stays so when weights that begin at zero have moved."""

    def look(names: tuple[str, ...]) -> tuple[str, ...]:
        real = features_of(role, batches, [batch.real for batch in batches], names)
        fake = features_of(role, batches, images, names)
        return tuple(name for name in names if blind(state, name, real[name], fake[name]))

    if not layers or not (hidden := look(layers)):
        return ()
    with perturbed(role.net):
        return look(hidden)


def review_balance(state: State, batches: list[list[Batch]]) -> list[str]:
    """After a step on `batches`, look at the statistic of each discriminator whose balance has moved far: blind on all its
    layers, its gradient is noise, and the balance goes back and stays. Sentences on those."""
    said = []
    task, step = state.task, state.step - 1
    for role, plan in zip(task.discriminators, task.plan(step).discriminators, strict=True):
        matching = role.matching
        start = role.gan.start_step if plan.adversarial else 0
        if (
            matching is None
            or not plan.measure
            or not matching.review_due(step, start)
            or not matching.strength.moved()
        ):
            continue
        with restored_buffers(task.generator, role.net, matching), torch.no_grad(), frozen(role.net):
            with frozen_running_stats(task.generator):
                images = [task.generate(batch) for batch in batches[-1]]
            real = features_of(role, batches[-1], [batch.real for batch in batches[-1]], plan.layers)
            fake = features_of(role, batches[-1], images, plan.layers)
            each = [blind(state, name, real[name], fake[name]) for name in plan.layers]
        hidden = state.world.any(all(each))
        matching.strength.review(hidden)
        if hidden:
            said.append(HELD.format(float(matching.strength.balance)))
    return said


@torch.no_grad()
def _refuse_noise(state: State, batches: list[Batch]) -> None:
    """UserError for nets of the user's own that draw random numbers, where a step runs them twice on a micro-batch and
    takes the second time for the first."""
    task, batch = state.task, batches[0]

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        looked = [role(batch.real, None, logits=True).logits for role in task.discriminators]
        return [task.generate(batch), *(scale for logits in looked if logits is not None for scale in scales(logits))]

    with (
        torch.random.fork_rng(),
        frozen_running_stats(task.generator, *(c.net for c in task.discriminators)),
        frozen(*(d.net for d in task.discriminators)),
    ):
        noisy = any(not torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))
    if noisy:
        raise UserError(
            "train.accumulate runs nets twice on each micro-batch, and a target here draws random numbers (dropout or noise), "
            "so that the second time is not the first; leave train.accumulate out, or the random layers"
        )


def _try_update(role: DiscriminatorRole, batch: Batch, image: Tensor) -> None:
    """UserError where a discriminator of the user's own fails in an update, penalties included."""
    penalty = role.gan.r1 > 0 or role.gan.r2 > 0
    plan = DiscriminatorPlan(train=True, adversarial=True, penalty=penalty)
    try:
        discriminator_loss(role, plan, batch, image, StepLog()).backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        fix = "; losses.gan.r1 and r2 need its second derivative" if penalty else ""
        raise UserError(f"{role.name}.target fails when it is trained: {said(error)}{fix}") from error
    finally:
        role.net.zero_grad(set_to_none=True)


def _check_losses(
    state: State, role: DiscriminatorRole, plan: StepPlan, batches: list[Batch], images: list[Tensor]
) -> StepLog:
    """The log of measuring every loss; UserError where one has no gradient at the images, nor would have, did no weight
    begin at zero."""

    def measure() -> tuple[list[str], StepLog]:
        gradients, log = image_gradients(state.task, plan, batches, images, state.scalars, state.world)
        reaching = {name: any(bool(g.abs().sum() > 0) for g in part) for name, part in gradients.by_term.items()}
        return [name for name, reaches in reaching.items() if not state.world.any(reaches)], log

    never, log = measure()
    if never:
        with restored_buffers(role.matching), perturbed(role.net):
            never, _ = measure()
    if never:
        name = {"adversarial": "the adversarial loss", "matching": "feature matching"}.get(
            never[0].removesuffix(role.suffix), f"losses.{never[0]}"
        )
        raise UserError(
            f"{name} gives the generator no gradient, so it can learn nothing from it; check the loss, the discriminator "
            "and the layers and statistic matched"
        )
    return log


def passes_gradient(role: DiscriminatorRole, layer: str, images: Tensor) -> bool:
    """Whether features of `layer` have a gradient at the images, or would have, did no weight begin at zero."""
    if _passes_gradient(role, layer, images):
        return True
    with perturbed(role.net):
        return _passes_gradient(role, layer, images)


def _passes_gradient(role: DiscriminatorRole, layer: str, images: Tensor) -> bool:
    inputs = images.detach().requires_grad_()
    feature = role(inputs, role.mildest(inputs), (layer,), logits=False, exact=True).features[layer]
    if not feature.requires_grad:
        return False
    # A fixed random direction: a plain sum is constant behind a batch norm.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(feature.shape, generator=generator, dtype=torch.float32).to(feature)
    (gradient,) = torch.autograd.grad((feature * direction).sum(), inputs, allow_unused=True)
    return gradient is not None and bool(gradient.abs().sum() > 0)


@torch.no_grad()
def features_of(
    role: DiscriminatorRole, batches: Sequence[Batch], images: Sequence[Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Features (B, …) of the named layers, as the generator's update has them. Call inside `frozen`."""
    parts = [
        role(image, None if batch.augment is None else batch.augment[1], names, logits=False).features
        for batch, image in zip(batches, images, strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def matching_on(state: State, layers: Sequence[str], **changes: object) -> FeatureMatching:
    """A fresh `FeatureMatching` like the config's, on these layers of the first discriminator and with these changes."""
    role = state.task.discriminators[0]
    return feature_matching(state.config, role.net, role.image, layers=layers, **changes)


def blind(state: State, layer: str, real: Tensor, fake: Tensor) -> bool:
    """Whether the configured statistic cannot see a difference between these features (B, …).

    So it is where real against generated comes out far below what sampling noise alone would give: below 1/20 of the
    least that the same images give when shuffled into two other groups. Shuffling undoes what blinds, a norm that
    gives every batch the same mean. (MMD compares whole distributions: blind only if the features are constant.)
    Where images come with their originals, which they resemble, half of the pairs are swapped instead.
    """
    match = state.config.feature_matching.match
    changes = {"match": "sample" if match == "mmd" else match, "estimator": "batch", "layer_weights": "uniform"}
    statistic = matching_on(state, (layer,), **changes)

    def distance(a: Tensor, b: Tensor) -> float:
        return float(statistic.layer_distance(layer, a, b, ranks=state.world, step=state.step))

    pool, rng, count = torch.cat([real, fake]), torch_generator(state.config.seed, "probe", 2), len(real)
    noise = []
    for _ in range(SHUFFLES):
        if state.config.has_targets:
            swapped = torch.randperm(count, generator=rng) < count // 2
            first = torch.arange(count) + count * swapped
            order = torch.cat([first, (first + count) % (2 * count)])
        else:
            order = torch.randperm(len(pool), generator=rng)
        order = order.to(pool.device)
        noise.append(distance(pool[order[:count]], pool[order[count:]]))
    return distance(real, fake) <= BLIND * min(noise)


def blind_sentence(match: str, hidden: Sequence[str], known: Sequence[str], own: bool) -> str:
    """What to do about layers on which a statistic is blind, among the `known` ones of fmrun's net or the user's `own`."""
    before = [f"{name}.conv" for name in hidden if f"{name}.conv" in known and f"{name}.conv" not in hidden]
    tap = f"match before the norm (--layers {','.join(before)})" if before else "match a layer before the norm"
    return (
        f"match '{match}' is blind on {enumerate_names(hidden)}: real and generated images come out equal there "
        f"whatever they are, as behind a batch norm that sees them apart; {tap}, use another statistic "
        f"(-s feature_matching.match=mmd), or a discriminator without batch norm{' (-s discriminator.norm=spectral)' * (not own)}"
    )


def enumerate_names(names: Sequence[str]) -> str:
    """`layer 'a'`, or `layers a, b`."""
    return f"layer '{names[0]}'" if len(names) == 1 else "layers " + ", ".join(names)


def diagnose(state: State, batches: list[list[Batch]], net: int) -> str:
    """Repeat the update that was not finite, on the weights from just before it, and say what was the first to be so.

    `net` is 0 for the discriminator, 1 for the generator.
    """
    first: list[str] = []

    def watch(name: str, module: nn.Module, args: object, output: object) -> None:
        if not first and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            first.append(name)

    task = state.task
    nets = {"generator": task.generator, **{role.name: role.net for role in task.discriminators}}
    layers = {f"{net_name} {name}": m for net_name, net in nets.items() for name, m in net.named_modules() if name}
    handles = [
        module.register_forward_hook(partial(watch, name))
        for name, module in layers.items()
        if "parametrizations" not in name and all(part == "parametrizations" for part, _ in module.named_children())
    ]
    state.set_scalars(state.step)
    d_updates = state.config.train.d_updates
    try:
        for micro_batches in batches[:d_updates] if net == 0 else batches[d_updates - 1 :]:
            first.clear()
            with frozen_running_stats(*nets.values()):
                terms, gradients = (_replay_d if net == 0 else _replay_g)(state, micro_batches)
            if bad := [n for n, v in terms.items() if not n.startswith(OF_GRADIENTS) and not torch.isfinite(v)]:
                where = f"; the first layer with a value that is not finite is {first[0]}" if first else ""
                return f"{min(bad, key=_place)} is not finite{where}"
            for name, gradient in gradients.items():
                if not bool(torch.isfinite(gradient).all()):
                    return f"the gradient of {name} is not finite, though every loss is"
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm(list(gradients.values())))):
                largest = max(gradients, key=lambda name: float(gradients[name].abs().max()))
                return f"the gradient norm overflows, the largest gradient being that of {largest}"
    finally:
        for handle in handles:
            handle.remove()
    return f"{FINITE} in this arithmetic; the overflow was in a value that replaying does not repeat"


OF_GRADIENTS = ("health/", "fm/share", "fm/balance", "fm/cosine")
SUMS = ("fm/distance", "fm/weight", "fm/loss", "loss/g")
"""Terms that sum up others; they are named where none of those is at fault."""


def _place(term: str) -> int:
    name = term.partition(".")[0]
    return SUMS.index(name) if name in SUMS else -1


def _as_trained(state: State, batches: list[Batch]) -> list[Batch]:
    """The batches as the kind of update saw them."""
    return [one_augmentation(b) for b in batches] if state.config.train.update == "simultaneous" else batches


def _replay_d(state: State, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and weight gradients of every trained discriminator."""
    terms = StepLog()
    gradients: dict[str, Tensor] = {}
    batches = _as_trained(state, batches)
    for role, plan in zip(state.task.discriminators, state.task.plan(state.step).discriminators, strict=True):
        if not plan.train:
            continue
        role.net.zero_grad()
        for batch in batches:
            with torch.no_grad():
                image = state.task.generate(batch)
            discriminator_loss(role, plan, batch, image, terms, 1 / len(batches)).backward()
        gradients |= {f"{role.name} {n}": p.grad for n, p in role.net.named_parameters() if p.grad is not None}
    return terms, gradients


def _replay_g(state: State, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and weight gradients of the generator."""
    task, batches = state.task, _as_trained(state, batches)
    images = [task.generate(batch) for batch in batches]
    at_images, terms = image_gradients(task, task.plan(state.step), batches, images, state.scalars, state.world)
    task.generator.zero_grad()
    for image, gradient in zip(images, at_images.total, strict=True):
        image.backward(gradient)
    return terms, {f"generator {n}": p.grad for n, p in task.generator.named_parameters() if p.grad is not None}
