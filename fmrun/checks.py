"""What is looked at without changing it: does every matched layer and every loss reach the generator, how strong is
feature matching, can the statistic see anything there, and which step went wrong where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import FeatureMatchingConfig
from .errors import UserError
from .feature_matching import FeatureMatching
from .models.base import scales
from .models.norm import held_averages, perturbed, unchanged
from .models.walked import said
from .rng import torch_generator
from .simultaneous import one_augmentation
from .state import State
from .step import discriminator_loss, frozen, generator_image_gradients
from .tasks import Batch, Critic, CriticPlan, Plan

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
class Strength:
    """How strongly features are matched: `weight` (lambda) x `balance`, and the share of the gradient (nan: unknown)."""

    weight: float
    balance: float
    share: float
    blind: tuple[str, ...] = ()
    """Matched layers on which the statistic cannot see a difference."""
    compared: str = "the adversarial one"
    """What the share is of."""
    held: bool = False
    """Whether the balance does not follow the gradients, for the statistic is blind on all matched layers."""

    def __str__(self) -> str:
        effective = f"λ {self.weight:.4g} × balance {self.balance:.4g} = {self.weight * self.balance:.4g}"
        if math.isnan(self.share):
            return f"{effective} (no other generator loss to compare with)"
        share = f"{100 * self.share:.3g} % of" if self.share < 10 else f"{self.share:.3g} times"
        return f"{effective}: its gradient is {share} {self.compared}"


def full_plan(critic: Critic, others: bool = False) -> CriticPlan:
    """A plan in which everything of the critic's that will ever act acts now; `others`: whether there are generator losses
    besides, to compare the matching with where no adversarial term ever acts."""
    layers = critic.matching.layers if critic.matching is not None else ()
    adversarial = critic.gan.weight > 0
    measure = bool(layers) and (adversarial or others)
    return CriticPlan(train=False, adversarial=adversarial, taps=layers, penalty=False, measure=measure)


def compared(critic: Critic) -> str:
    """What the gradient share under `full_plan` is of."""
    return "the adversarial one" if critic.gan.weight > 0 else "that of the generator's other losses"


def check_start(state: State, draws: list[list[Batch]]) -> Strength | None:
    """Check that gradients pass and measure how strong feature matching is, everything acting at its full weight.

    Raises UserError naming the layer or loss that gives the generator nothing. Leaves parameters, buffers and random
    streams as they were, but for one: where the statistic is blind, a new run's balance is held.
    """
    nets = [state.task.generator, *(critic.net for critic in state.task.critics)]
    with unchanged(*nets), torch.random.fork_rng(enabled=state.task.own_nets):
        if state.task.own_nets:  # what they draw is the same every time
            torch.manual_seed(0)
        strength = _check_start(state, draws[0])
    if state.step == 0 and state.world.any(strength is not None and strength.held):
        for critic in state.task.critics:
            if critic.matching is not None:
                critic.matching.review(blind=True)
    return strength


def _check_start(state: State, batches: list[Batch]) -> Strength | None:
    task, strength = state.task, None
    if task.own_nets and len(batches) > 1:
        _refuse_noise(state, batches)
    with held_averages(task.generator), torch.no_grad():
        images = [task.generate(batch) for batch in batches]
    _check_image_losses(state, batches[0], images[0])
    for critic in task.critics:
        plan = full_plan(critic, others=bool(task.plan(state.step).image_losses))
        state.live.set(state.step, [critic.gan.weight], [_weight(critic.matching)], task.image_weights(state.step))
        if task.own_nets and critic.trained:
            _try_update(critic, batches[0], images[0])
        with unchanged(critic.matching), frozen([critic]):
            for layer in plan.taps:
                if not passes_gradient(critic, layer, images[0][:LOOK]):
                    raise UserError(
                        f"layer '{layer}' of {critic.name} passes no gradient to the image, so matching it teaches the "
                        "generator nothing; leave it out of feature_matching.layers, or let gradients through it"
                    )
            _check_losses(state, critic, plan, batches, images)
            if critic.matching is not None:
                real = features_of(critic, batches, [batch.real for batch in batches], plan.taps)
                fake = features_of(critic, batches, images, plan.taps)
                hidden = tuple(name for name in plan.taps if blind(state, name, real[name], fake[name]))
                if hidden:  # a layer that begins at zero is not blind
                    with perturbed(critic.net):
                        real = features_of(critic, batches, [batch.real for batch in batches], hidden)
                        fake = features_of(critic, batches, images, hidden)
                    hidden = tuple(name for name in hidden if blind(state, name, real[name], fake[name]))
                if state.step == 0 and hidden == plan.taps:
                    critic.matching.review(blind=True)
                if plan.measure:
                    parts = tuple(plan if c is critic else _idle(c) for c in task.critics)
                    plans = Plan(parts, image_losses=task.plan(state.step).image_losses)
                    generator_image_gradients(task, plans, batches, images, state.live, state.world)
                share = float(critic.matching.share)
                strength = Strength(
                    critic.matching.config.weight,
                    float(critic.matching.balance),
                    share if plan.measure else math.nan,
                    hidden,
                    compared(critic),
                    critic.matching.config.balance == "gradient" and bool(critic.matching.held),
                )
    return strength


def review_balance(state: State, draws: list[list[Batch]]) -> list[str]:
    """After a step on `draws`, look at the statistic of each discriminator whose balance has moved far: blind on all its
    layers, its gradient is noise, and the balance goes back and stays. Sentences on those."""
    said = []
    task, step = state.task, state.step - 1
    for critic, plan in zip(task.critics, task.plan(step).critics, strict=True):
        matching = critic.matching
        start = critic.gan.start_step if plan.adversarial else 0
        if matching is None or not plan.measure or not matching.review_due(step, start) or not matching.moved():
            continue
        with unchanged(task.generator, critic.net, matching), torch.no_grad(), frozen([critic]):
            with held_averages(task.generator):
                images = [task.generate(batch) for batch in draws[-1]]
            real = features_of(critic, draws[-1], [batch.real for batch in draws[-1]], plan.taps)
            fake = features_of(critic, draws[-1], images, plan.taps)
            each = [blind(state, name, real[name], fake[name]) for name in plan.taps]
        hidden = state.world.any(all(each))
        matching.review(hidden)
        if hidden:
            said.append(HELD.format(float(matching.balance)))
    return said


@torch.no_grad()
def _refuse_noise(state: State, batches: list[Batch]) -> None:
    """UserError for nets of the user's own that draw random numbers, where a step runs them twice on a micro-batch and
    takes the second time for the first."""
    task, batch = state.task, batches[0]

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        looked = [critic(batch.real, None, logits=True).logits for critic in task.critics]
        return [task.generate(batch), *(scale for logits in looked if logits is not None for scale in scales(logits))]

    with torch.random.fork_rng(), held_averages(task.generator, *(c.net for c in task.critics)), frozen(task.critics):
        noisy = any(not torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))
    if noisy:
        raise UserError(
            "train.accumulate runs nets twice on each micro-batch, and a target here draws random numbers (dropout or noise), "
            "so that the second time is not the first; leave train.accumulate out, or the random layers"
        )


def _try_update(critic: Critic, batch: Batch, image: Tensor) -> None:
    """UserError where a discriminator of the user's own fails in an update, penalties included."""
    penalty = critic.gan.r1 > 0 or critic.gan.r2 > 0
    plan = CriticPlan(train=True, adversarial=True, taps=(), penalty=penalty, measure=False)
    try:
        discriminator_loss(critic, plan, batch, image).total.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        fix = (
            "; losses.gan.r1 and r2 want its second derivative: leave them out, or give it what has one"
            if penalty
            else ""
        )
        raise UserError(f"{critic.name}.target fails when it is trained: {said(error)}{fix}") from error
    finally:
        critic.net.zero_grad(set_to_none=True)


def _weight(matching: FeatureMatching | None) -> float:
    return matching.config.weight if matching is not None else 0.0


def _idle(critic: Critic) -> CriticPlan:
    return CriticPlan(train=False, adversarial=False, taps=(), penalty=False, measure=False)


def passes_gradient(critic: Critic, layer: str, images: Tensor) -> bool:
    """Whether features of `layer` have a gradient at the images, or would have, did no weight begin at zero."""
    if _passes_gradient(critic, layer, images):
        return True
    with perturbed(critic.net):
        return _passes_gradient(critic, layer, images)


def _passes_gradient(critic: Critic, layer: str, images: Tensor) -> bool:
    leaf = images.detach().requires_grad_()
    feature = critic(leaf, critic.mildest(leaf), (layer,), logits=False, exact=True).features[layer]
    if not feature.requires_grad:
        return False
    # A fixed random direction: a plain sum is constant behind a batch norm.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(feature.shape, generator=generator, dtype=torch.float32).to(feature)
    (gradient,) = torch.autograd.grad((feature * direction).sum(), leaf, allow_unused=True)
    return gradient is not None and bool(gradient.abs().sum() > 0)


def _check_losses(state: State, critic: Critic, plan: CriticPlan, batches: list[Batch], images: list[Tensor]) -> None:
    task = state.task
    parts = {
        "the adversarial loss": replace(plan, taps=(), measure=False) if plan.adversarial else None,
        "feature matching": replace(plan, adversarial=False, measure=False) if plan.taps else None,
    }
    for name, part in parts.items():
        if part is None:
            continue
        plans = Plan(tuple(part if c is critic else _idle(c) for c in task.critics), image_losses=())

        def reaches(plans: Plan = plans) -> bool:
            with unchanged(critic.matching):
                gradients, _ = generator_image_gradients(task, plans, batches, images, state.live, state.world)
            return state.world.any(any(bool(g.abs().sum() > 0) for g in gradients))

        if not reaches():
            with perturbed(critic.net):  # a head that begins at zero
                found = reaches()
        else:
            found = True
        if not found:
            raise UserError(
                f"{name} gives the generator no gradient, so it can learn nothing from it; check the discriminator "
                "and the layers and statistic matched"
            )
    with held_averages(task.generator):
        image = task.generate(batches[0])
    if not image.requires_grad:
        raise UserError("the generator's images carry no gradient; check that its parameters are trainable")


def _check_image_losses(state: State, batch: Batch, image: Tensor) -> None:
    leaf = image.detach().requires_grad_()
    for name, loss in state.task.image_losses(batch, leaf, max(state.step, state.config.full_step)).items():
        gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None or not bool(gradient.abs().sum() > 0):
            raise UserError(f"losses.{name} gives the generator no gradient, so it can learn nothing from it")


@torch.no_grad()
def features_of(
    critic: Critic, batches: Sequence[Batch], images: Sequence[Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Features (B, …) of the named layers, as the generator's update has them. Call inside `frozen`."""
    parts = [
        critic(image, None if batch.augment is None else batch.augment[1], names, logits=False).features
        for batch, image in zip(batches, images, strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def matching_on(
    state: State,
    fm: FeatureMatchingConfig,
    layers: Sequence[str],
    shapes: Mapping[str, torch.Size],
    weight: float,
    **changes: Any,
) -> FeatureMatching:
    """A fresh `FeatureMatching` like the config's, on these layers and with these changes."""
    config = fm.model_copy(update={"weight": weight, "layers": tuple(layers), **changes})
    matching = FeatureMatching(config, {name: shapes[name] for name in layers}, state.config.seed)
    return matching.to(device=state.device, dtype=state.task.dtype)


def blind(state: State, layer: str, real: Tensor, fake: Tensor) -> bool:
    """Whether the configured statistic cannot see a difference between these features (B, …).

    So it is where real against generated comes out far below what sampling noise alone would give: below 1/20 of the
    least that the same images give when shuffled into two other groups. Shuffling undoes what blinds, a norm that
    gives every batch the same mean. (MMD compares whole distributions: blind only if the features are constant.)
    Where images come with their originals, which they resemble, half of the pairs are swapped instead.
    """
    fm = state.config.feature_matching
    match = "sample" if fm.match == "mmd" else fm.match
    shapes = {layer: real.shape[1:]}
    statistic = matching_on(state, fm, (layer,), shapes, 1.0, match=match, estimator="batch", layer_weights="uniform")

    def distance(a: Tensor, b: Tensor) -> float:
        return float(statistic.distance(layer, a, b, world=state.world, step=state.step))

    pool, rng, count = torch.cat([real, fake]), torch_generator(state.config.seed, "probe", 2), len(real)
    noise = []
    for _ in range(SHUFFLES):
        if state.task.paired:
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


def diagnose(state: State, draws: list[list[Batch]], net: int) -> str:
    """Repeat the update that was not finite, on the weights from just before it, and say what was the first to be so.

    `net` is 0 for the discriminator, 1 for the generator.
    """
    first: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = [output] if isinstance(output, Tensor) else []
            if not first and any(not bool(torch.isfinite(t).all()) for t in tensors):
                first.append(name)

        return hook

    task = state.task
    watched = {"generator": task.generator, **{critic.name: critic.net for critic in task.critics}}
    handles = [
        module.register_forward_hook(watch(f"{net_name} {name}"))
        for net_name, module_root in watched.items()
        for name, module in module_root.named_modules()
        if name
        and "parametrizations" not in name
        and not [n for n, _ in module.named_children() if n != "parametrizations"]
    ]
    state.set_live(state.step)
    d_updates = state.config.train.d_updates
    try:
        for batches in draws[:d_updates] if net == 0 else draws[d_updates - 1 :]:
            first.clear()
            with held_averages(task.generator, *(c.net for c in task.critics)):
                terms, gradients = _replay_d(state, batches) if net == 0 else _replay_g(state, batches)
            bad_terms = sorted(
                (n for n, v in terms.items() if n.startswith(("loss/", "fm/")) and not torch.isfinite(v)), key=_breadth
            )
            bad_gradients = [name for name, g in gradients.items() if not bool(torch.isfinite(g).all())]
            if bad_terms:
                where = f"; the first layer with a value that is not finite is {first[0]}" if first else ""
                return f"{bad_terms[0]} is not finite{where}"
            if bad_gradients:
                return f"the gradient of {bad_gradients[0]} is not finite, though every loss is"
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm(list(gradients.values())))):
                largest = max(gradients, key=lambda name: float(gradients[name].abs().max()))
                return f"the gradient norm overflows, the largest gradient being that of {largest}, though every loss is finite"
    finally:
        for handle in handles:
            handle.remove()
    return f"{FINITE} in this arithmetic; the overflow was in a value that replaying does not repeat"


def _breadth(term: str) -> int:
    """0 for a term of its own, more for one that sums up others."""
    return 3 if term == "loss/g" else 2 if term.startswith(("fm/loss", "fm/weight")) else term.startswith("fm/distance")


def _as_trained(state: State, batches: list[Batch]) -> list[Batch]:
    """The batches as the kind of update saw them."""
    return [one_augmentation(b) for b in batches] if state.config.train.update == "simultaneous" else batches


def _replay_d(state: State, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and weight gradients of every trained discriminator."""
    terms: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    batches = _as_trained(state, batches)
    for critic, plan in zip(state.task.critics, state.task.plan(state.step).critics, strict=True):
        if not plan.train:
            continue
        critic.net.zero_grad()
        for batch in batches:
            with torch.no_grad():
                image = state.task.generate(batch)
            loss = discriminator_loss(critic, plan, batch, image)
            terms |= {n: terms[n] + v if n in terms else v for n, v in loss.terms.items()}
            loss.total.backward()
        gradients |= {f"{critic.name} {n}": p.grad for n, p in critic.net.named_parameters() if p.grad is not None}
    return terms, gradients


def _replay_g(state: State, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and weight gradients of the generator."""
    task, batches = state.task, _as_trained(state, batches)
    images = [task.generate(batch) for batch in batches]
    with frozen(task.critics):
        image_gradients, terms = generator_image_gradients(
            task, task.plan(state.step), batches, images, state.live, state.world
        )
    task.generator.zero_grad()
    for image, gradient in zip(images, image_gradients, strict=True):
        image.backward(gradient)
    return terms, {f"generator {n}": p.grad for n, p in task.generator.named_parameters() if p.grad is not None}
