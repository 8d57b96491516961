"""One training step, for any task: who is run when, with what frozen, and how often.

In units of one discriminator forward, g for the generator's, on one micro-batch, the step costs

    D's update    D(real) 1 + 2    D(fake) 1 + 2    G forward g
    G's update    D(fake) 1 + 1 (frozen: no weight gradients)    G backward 2g    [D(real) truncated, no graph: <= 1]

8 + 3g, and at most 9 + 3g with feature matching. The generator's loss is differentiated down to the images first and
through the generator after; that is the same sum, and where the gradient share is measured the two parts of the image
gradient are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .dist import World
from .losses import Loss
from .losses.adversarial import D_LOSSES, G_LOSSES, squared_gradient
from .losses.statistics import widen
from .models.base import Out, mean_logit
from .models.norm import advance_spectral, held_averages
from .optim import Optimiser
from .tasks import Batch, Critic, CriticPlan, Live, Plan, Task

Terms = dict[str, Tensor]


def step(
    task: Task,
    draws: Sequence[Sequence[Batch]],
    plan: Plan,
    live: Live,
    optimisers: dict[str, Optimiser],
    world: World,
    d_updates: int = 1,
) -> Terms:
    """Update every discriminator `d_updates` times and the generator once for each remaining draw.

    `draws` are lists of micro-batches, one list an update: the discriminators take the first `d_updates`, the generator
    the last of those and all that follow. Images made for the last discriminator update are used again for the first
    generator update. Returns named scalars on the device, this process's share of them.
    """
    terms: Terms = {}
    images: list[Tensor] = []
    for draw in range(d_updates):
        images = generate(task, draws[draw], graph=draw == d_updates - 1)
        for critic, critic_plan in zip(task.critics, plan.critics, strict=True):
            if critic_plan.train:
                terms |= _update_discriminator(critic, critic_plan, draws[draw], images, optimisers[critic.name], live)
    for draw in range(d_updates - 1, len(draws)):
        if draw >= d_updates:
            images = generate(task, draws[draw], graph=True)
        terms |= _update_generator(task, plan, draws[draw], images, optimisers["generator"], live, world)
    return terms


def generate(task: Task, micro_batches: Sequence[Batch], graph: bool) -> list[Tensor]:
    """Images of every micro-batch; with a graph only if there is one micro-batch, for a graph holds all activations."""
    with torch.set_grad_enabled(graph and len(micro_batches) == 1):
        return [task.generate(batch) for batch in micro_batches]


def add(terms: Terms, name: str, value: Tensor, share: float = 1.0) -> None:
    value = value.detach() * share
    terms[name] = terms[name] + value if name in terms else value


@dataclass(frozen=True)
class Judged:
    """Images that no graph leads to, and what a discriminator says of them, with a graph to its weights."""

    source: Tensor
    out: Out


def judge(
    critic: Critic, plan: CriticPlan, batch: Batch, image: Tensor, *, shared: bool = False
) -> tuple[Judged, Judged]:
    """Real and generated images of one micro-batch as the discriminator's own update needs them.

    `shared`: the generator learns from the same passes, so they give its features and a gradient at its images too.
    Features that are compared are then of one arithmetic, also where one of the two is penalised.
    """
    numbers = batch.augment[0] if batch.augment is not None else None
    taps = plan.taps if shared else ()
    gammas = (critic.gan.r1, critic.gan.r2)
    judged = []
    for source, gamma, leaf in ((batch.real, gammas[0], False), (image, gammas[1], shared)):
        exact = plan.penalty and (gamma > 0 or (bool(taps) and max(gammas) > 0))
        source = source.detach().requires_grad_(leaf or (plan.penalty and gamma > 0))
        judged.append(Judged(source, critic(source, numbers, taps, exact=exact)))
    return judged[0], judged[1]


def discriminator_loss(critic: Critic, plan: CriticPlan, batch: Batch, image: Tensor) -> Loss:
    """The discriminator's loss on one micro-batch, its penalties included."""
    return loss_of(critic, plan, *judge(critic, plan, batch, image))


def loss_of(critic: Critic, plan: CriticPlan, on_real: Judged, on_fake: Judged) -> Loss:
    """The discriminator's loss, its penalties included, from what it said of a micro-batch."""
    gan = critic.gan
    real, fake = on_real.out.logits, on_fake.out.logits
    assert real is not None
    assert fake is not None
    adversarial = D_LOSSES[gan.type](real, fake)
    prefix = "loss/d" + critic.suffix
    total = adversarial
    terms = {
        prefix: adversarial,
        "health/d_real" + critic.suffix: mean_logit(real),
        "health/d_fake" + critic.suffix: mean_logit(fake),
    }
    if plan.penalty:
        for name, gamma, logits, source in (
            ("r1", gan.r1, real, on_real.source),
            ("r2", gan.r2, fake, on_fake.source),
        ):
            if gamma:
                penalty = squared_gradient(logits, source)
                terms[f"{prefix}_{name}"] = penalty
                total = total + 0.5 * gamma * gan.penalty_every * penalty
    return Loss(total, terms)


def _update_discriminator(
    critic: Critic,
    plan: CriticPlan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    optimiser: Optimiser,
    live: Live,
) -> Terms:
    terms: Terms = {}
    share = 1 / len(micro_batches)
    advance_spectral(critic.net)
    optimiser.zero_grad()
    for batch, image in zip(micro_batches, images, strict=True):
        with parametrize.cached():
            loss = discriminator_loss(critic, plan, batch, image)
        for name, value in loss.terms.items():
            add(terms, name, value, share)
        (loss.total * (share * optimiser.guard.scale)).backward()
    terms["health/d_grad_norm" + critic.suffix] = optimiser.step(live.clock)
    return terms


@contextmanager
def frozen(critics: Sequence[Critic]) -> Iterator[None]:
    """Inside, discriminators take no weight gradients, move no statistics, and normalise their weights once."""
    parameters = [p for critic in critics for p in critic.net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    with ExitStack() as stack:
        stack.enter_context(held_averages(*(critic.net for critic in critics)))
        stack.enter_context(parametrize.cached())
        try:
            yield
        finally:
            for p in parameters:
                p.requires_grad_(True)


def _generator_numbers(batch: Batch) -> Tensor | None:
    return batch.augment[1] if batch.augment is not None else None


@torch.no_grad()
def _judge_real(critic: Critic, plan: CriticPlan, batch: Batch) -> Out:
    """Features of the real images, and their logits only where the generator's loss reads them."""
    logits = critic.paired and plan.adversarial
    if not logits and not plan.taps:
        return Out(None)
    return critic(batch.real, _generator_numbers(batch), plan.taps, logits=logits)


def _magnitude(loss: Tensor, world: World) -> Tensor:
    """The size of a statistic, in units of which it is differentiated: before it is balanced, a small one's gradient would
    underflow half precision on its way through the discriminator. The same for all processes, whose gradients meet there."""
    size = world.mean(loss.detach().abs())
    return torch.where(size > 0, size, torch.ones_like(size))


def _norm(gradients: Sequence[Tensor], world: World) -> Tensor:
    """Norm over the global batch (up to the factor that all norms share)."""
    return world.mean(torch.stack([g.square().sum() for g in gradients]).sum()).sqrt()


def _matching_gradients(
    critic: Critic,
    plan: CriticPlan,
    micro_batches: Sequence[Batch],
    leaves: Sequence[Tensor],
    reals: Sequence[Out],
    live: Live,
    world: World,
) -> tuple[Loss, list[dict[str, Tensor]]]:
    """The loss of a batch statistic over all micro-batches, and its gradient at each one's features.

    Features of the whole batch are held, but no graph: the gradient goes back through the discriminator micro-batch by
    micro-batch afterwards (Gao et al. 2021, arXiv:2101.06983).
    """
    assert critic.matching is not None
    with torch.no_grad():
        fakes = [
            critic(leaf, _generator_numbers(batch), plan.taps, logits=False).features
            for batch, leaf in zip(micro_batches, leaves, strict=True)
        ]
    # widened: a mean's gradient underflows half precision
    whole = {name: widen(torch.cat([f[name] for f in fakes])).requires_grad_() for name in plan.taps}
    real = {name: torch.cat([r.features[name] for r in reals]) for name in plan.taps}
    loss = critic.matching(real, whole, step=live.step, world=world)
    gradients = torch.autograd.grad(loss.total, list(whole.values()))
    sizes = [leaf.shape[0] for leaf in leaves]
    split = [g.split(sizes) for g in gradients]
    return loss, [dict(zip(plan.taps, parts, strict=True)) for parts in zip(*split, strict=True)]


@dataclass(frozen=True)
class View:
    """One micro-batch as a discriminator shows it to the generator."""

    leaf: Tensor
    """The generated images: where the generator's loss is differentiated at."""
    real: Out
    """What it says of the real images, without graph."""
    fake: Out
    """What it says of the generated ones, with a graph down to `leaf`."""
    keep: bool = False
    """Whether that graph is wanted afterwards."""


Look = Callable[[Critic, CriticPlan, Sequence[Batch], Sequence[Tensor], Sequence[Out] | None], Iterator[View]]
"""Views of all micro-batches, each made when it is asked for; the real images' `Out` where they are at hand."""


def look_frozen(
    critic: Critic,
    plan: CriticPlan,
    micro_batches: Sequence[Batch],
    leaves: Sequence[Tensor],
    reals: Sequence[Out] | None,
) -> Iterator[View]:
    """Views of a discriminator that is `frozen`."""
    for m, (batch, leaf) in enumerate(zip(micro_batches, leaves, strict=True)):
        real = reals[m] if reals is not None else _judge_real(critic, plan, batch)
        yield View(leaf, real, critic(leaf, _generator_numbers(batch), plan.taps, logits=plan.adversarial))


def generator_image_gradients(
    task: Task,
    plan: Plan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    live: Live,
    world: World,
    scale: Tensor | float = 1.0,
    look: Look = look_frozen,
) -> tuple[list[Tensor], Terms]:
    """Gradient of the generator's loss at each micro-batch's images, times `scale`, and the loss's terms.

    `look_frozen` wants to be called inside `frozen(task.critics)`. Measures the gradient share where the plan says so.
    """
    terms: Terms = {}
    count = len(micro_batches)
    leaves = [image.detach().requires_grad_() for image in images]
    totals: list[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if plan.image_losses:
        for m, (batch, leaf) in enumerate(zip(micro_batches, leaves, strict=True)):
            for name, loss in task.image_losses(batch, leaf, live.step, live.image).items():
                add(terms, f"loss/{name}", loss, 1 / count)
                add(terms, "loss/g", loss, 1 / count)
                totals[m] += torch.autograd.grad(loss * (scale / count), leaf)[0]

    for i, (critic, critic_plan) in enumerate(zip(task.critics, plan.critics, strict=True)):
        if not critic_plan.adversarial and not critic_plan.taps:
            continue
        matching = critic.matching
        reals = cached = None
        if critic_plan.taps and count > 1 and matching is not None and matching.whole_batch:
            with held_averages(critic.net), parametrize.cached():
                reals = [_judge_real(critic, critic_plan, batch) for batch in micro_batches]
                whole, cached = _matching_gradients(critic, critic_plan, micro_batches, leaves, reals, live, world)
            _matching_terms(terms, critic, whole, 1.0)
        parts: dict[str, list[Tensor]] = {"adversarial": [], "matching": []}
        for m, view in enumerate(look(critic, critic_plan, micro_batches, leaves, reals)):
            losses: dict[str, Tensor] = {}
            if critic_plan.adversarial:
                assert view.fake.logits is not None
                adversarial = G_LOSSES[critic.gan.type](view.fake.logits, view.real.logits)
                add(terms, "loss/g_adv" + critic.suffix, adversarial, 1 / count)
                add(terms, "loss/g", live.adversarial[i] * adversarial, 1 / count)
                losses["adversarial"] = live.adversarial[i] * adversarial / count
            if critic_plan.taps:
                assert matching is not None
                if cached is not None:
                    pairs = [(view.fake.features[name], cached[m][name]) for name in critic_plan.taps]
                    losses["matching"] = torch.stack([(widen(f) * g).sum() for f, g in pairs]).sum()
                else:
                    distance = matching(view.real.features, view.fake.features, step=live.step, world=world)
                    _matching_terms(terms, critic, distance, 1 / count)
                    losses["matching"] = distance.total / count
            if critic_plan.measure:
                for name, loss in losses.items():
                    keep = view.keep or name != list(losses)[-1]
                    unit = _magnitude(loss, world) if name == "matching" else 1.0
                    (gradient,) = torch.autograd.grad(loss * (scale / unit), view.leaf, retain_graph=keep)
                    parts[name].append(gradient * unit)
            else:
                strength = matching.strength(live.matching[i]) if matching is not None else 1.0
                weighted = [value * strength if name == "matching" else value for name, value in losses.items()]
                loss = torch.stack(weighted).sum() * scale
                totals[m] += torch.autograd.grad(loss, view.leaf, retain_graph=view.keep)[0]
        if critic_plan.measure:
            assert matching is not None
            # before the adversarial term acts, the share is of the generator's other losses
            reference = parts["adversarial"] or totals
            matching.measure(_norm(reference, world), _norm(parts["matching"], world), live.matching[i])
            strength = matching.strength(live.matching[i])
            for m, distance in enumerate(parts["matching"]):
                totals[m] += strength * distance
            for m, adversarial in enumerate(parts["adversarial"]):
                totals[m] += adversarial
        if critic_plan.taps:
            assert matching is not None
            weight = matching.strength(live.matching[i])
            terms["fm/weight" + critic.suffix] = weight
            terms["fm/loss" + critic.suffix] = terms["fm/distance" + critic.suffix] * weight
            add(terms, "loss/g", terms["fm/loss" + critic.suffix])

    return totals, terms


def _matching_terms(terms: Terms, critic: Critic, loss: Loss, share: float) -> None:
    add(terms, "fm/distance" + critic.suffix, loss.total, share)
    for layer, value in loss.terms.items():
        add(terms, f"fm/{layer}{critic.suffix}", value, share)


def _update_generator(
    task: Task,
    plan: Plan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    optimiser: Optimiser,
    live: Live,
    world: World,
) -> Terms:
    with frozen(task.critics):
        gradients, terms = generator_image_gradients(
            task, plan, micro_batches, images, live, world, optimiser.guard.scale
        )
    return terms | apply_to_generator(task, plan, micro_batches, images, gradients, optimiser, live, world)


def apply_to_generator(
    task: Task,
    plan: Plan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    gradients: Sequence[Tensor],
    optimiser: Optimiser,
    live: Live,
    world: World,
    scale: Tensor | None = None,
) -> Terms:
    """Send the gradients at the images, which carry the loss scale `scale`, through the generator, and update it."""
    terms: Terms = {}
    optimiser.zero_grad()
    if len(micro_batches) == 1:
        images[0].backward(gradients[0])
    else:
        with held_averages(task.generator):
            for batch, gradient in zip(micro_batches, gradients, strict=True):
                task.generate(batch).backward(gradient)
    terms["health/g_grad_norm"] = optimiser.step(live.clock, scale)
    if plan.observe:
        terms["health/diversity"] = _diversity(micro_batches, images, world)
    return terms


@torch.no_grad()
def _diversity(micro_batches: Sequence[Batch], images: Sequence[Tensor], world: World) -> Tensor:
    """Spread of the generated images over that of the real ones: ratio of the root mean variance per pixel."""

    def variance(stack: Tensor) -> Tensor:
        mean = world.mean(stack.mean(0))
        return world.mean((stack - mean).square().mean())

    fake = torch.cat([image.detach() for image in images])
    real = torch.cat([batch.real for batch in micro_batches])
    return (variance(fake) / variance(real)).sqrt()
