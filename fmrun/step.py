"""One training step, for any task: who is run when, with what frozen, and how often.

In units of one discriminator forward, g for the generator's, on one micro-batch, the step costs

    D's update    D(real) 1 + 2    D(fake) 1 + 2    G forward g
    G's update    D(fake) 1 + 1 (frozen: no weight gradients)    G backward 2g    [D(real) truncated, no graph: <= 1]

8 + 3g, and at most 9 + 3g with feature matching. The generator's loss is differentiated down to the images first and
through the generator after; that is the same sum, and where the gradient share is measured the two parts of the image
gradient are at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .dist import World
from .losses import Loss
from .losses.adversarial import D_LOSSES, G_LOSSES, squared_gradient
from .losses.statistics import widen
from .models.base import Out
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
        images = _generate(task, draws[draw], graph=draw == d_updates - 1)
        for critic, critic_plan in zip(task.critics, plan.critics, strict=True):
            if critic_plan.train:
                terms |= _update_discriminator(critic, critic_plan, draws[draw], images, optimisers[critic.name], live)
    for draw in range(d_updates - 1, len(draws)):
        if draw >= d_updates:
            images = _generate(task, draws[draw], graph=True)
        terms |= _update_generator(task, plan, draws[draw], images, optimisers["generator"], live, world)
    return terms


def _generate(task: Task, micro_batches: Sequence[Batch], graph: bool) -> list[Tensor]:
    """Images of every micro-batch; with a graph only if there is one micro-batch, for a graph holds all activations."""
    with torch.set_grad_enabled(graph and len(micro_batches) == 1):
        return [task.generate(batch) for batch in micro_batches]


def _add(terms: Terms, name: str, value: Tensor, share: float = 1.0) -> None:
    value = value.detach() * share
    terms[name] = terms[name] + value if name in terms else value


def discriminator_loss(critic: Critic, plan: CriticPlan, batch: Batch, image: Tensor) -> Loss:
    """The discriminator's loss on one micro-batch, its penalties included."""
    gan = critic.gan
    numbers = batch.augment[0] if batch.augment is not None else None
    judged: dict[str, tuple[Tensor, Out]] = {}
    gammas = {"real": gan.r1, "fake": gan.r2}
    for kind, source in (("real", batch.real), ("fake", image)):
        exact = plan.penalty and gammas[kind] > 0
        source = source.detach().requires_grad_(exact)
        judged[kind] = source, critic(source, numbers, exact=exact)
    real, fake = judged["real"][1].logits, judged["fake"][1].logits
    assert real is not None
    assert fake is not None
    adversarial = D_LOSSES[gan.type](real, fake)
    prefix = "loss/d" + critic.suffix
    total = adversarial
    terms = {
        prefix: adversarial,
        "health/d_real" + critic.suffix: real.mean(),
        "health/d_fake" + critic.suffix: fake.mean(),
    }
    if plan.penalty:
        for name, kind in (("r1", "real"), ("r2", "fake")):
            if gammas[kind]:
                source, out = judged[kind]
                assert out.logits is not None
                penalty = squared_gradient(out.logits, source)
                terms[f"{prefix}_{name}"] = penalty
                total = total + 0.5 * gammas[kind] * gan.penalty_every * penalty
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
            _add(terms, name, value, share)
        (loss.total * (share * optimiser.guard.scale)).backward()
    terms["health/d_grad_norm" + critic.suffix] = optimiser.step(live.step)
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


def generator_image_gradients(
    task: Task,
    plan: Plan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    live: Live,
    world: World,
    scale: Tensor | float = 1.0,
) -> tuple[list[Tensor], Terms]:
    """Gradient of the generator's loss at each micro-batch's images, times `scale`, and the loss's terms.

    Call inside `frozen(task.critics)`. Measures the gradient share where the plan says so.
    """
    terms: Terms = {}
    count = len(micro_batches)
    leaves = [image.detach().requires_grad_() for image in images]
    totals: list[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if plan.image_losses:
        for m, (batch, leaf) in enumerate(zip(micro_batches, leaves, strict=True)):
            for name, loss in task.image_losses(batch, leaf, live.step).items():
                _add(terms, f"loss/{name}", loss, 1 / count)
                _add(terms, "loss/g", loss, 1 / count)
                totals[m] += torch.autograd.grad(loss * (scale / count), leaf)[0]

    for i, (critic, critic_plan) in enumerate(zip(task.critics, plan.critics, strict=True)):
        if not critic_plan.adversarial and not critic_plan.taps:
            continue
        matching = critic.matching
        reals = [_judge_real(critic, critic_plan, batch) for batch in micro_batches]
        cached = None
        if critic_plan.taps and count > 1 and matching is not None and matching.whole_batch:
            whole, cached = _matching_gradients(critic, critic_plan, micro_batches, leaves, reals, live, world)
            _matching_terms(terms, critic, whole, 1.0)
        parts: dict[str, list[Tensor]] = {"adversarial": [], "matching": []}
        for m, (batch, leaf, real) in enumerate(zip(micro_batches, leaves, reals, strict=True)):
            judged = critic(leaf, _generator_numbers(batch), critic_plan.taps, logits=critic_plan.adversarial)
            losses: dict[str, Tensor] = {}
            if critic_plan.adversarial:
                assert judged.logits is not None
                adversarial = G_LOSSES[critic.gan.type](judged.logits, real.logits)
                _add(terms, "loss/g_adv" + critic.suffix, adversarial, 1 / count)
                _add(terms, "loss/g", live.adversarial[i] * adversarial, 1 / count)
                losses["adversarial"] = live.adversarial[i] * adversarial / count
            if critic_plan.taps:
                assert matching is not None
                if cached is not None:
                    pairs = [(judged.features[name], cached[m][name]) for name in critic_plan.taps]
                    losses["matching"] = torch.stack([(widen(f) * g).sum() for f, g in pairs]).sum()
                else:
                    distance = matching(real.features, judged.features, step=live.step, world=world)
                    _matching_terms(terms, critic, distance, 1 / count)
                    losses["matching"] = distance.total / count
            if critic_plan.measure:
                for name, loss in losses.items():
                    last = name == list(losses)[-1]
                    parts[name].append(torch.autograd.grad(loss * scale, leaf, retain_graph=not last)[0])
            else:
                strength = matching.strength(live.matching[i]) if matching is not None else 1.0
                weighted = [value * strength if name == "matching" else value for name, value in losses.items()]
                totals[m] += torch.autograd.grad(torch.stack(weighted).sum() * scale, leaf)[0]
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
            _add(terms, "loss/g", terms["fm/loss" + critic.suffix])

    return totals, terms


def _matching_terms(terms: Terms, critic: Critic, loss: Loss, share: float) -> None:
    _add(terms, "fm/distance" + critic.suffix, loss.total, share)
    for layer, value in loss.terms.items():
        _add(terms, f"fm/{layer}{critic.suffix}", value, share)


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
    optimiser.zero_grad()
    if len(micro_batches) == 1:
        images[0].backward(gradients[0])
    else:
        with held_averages(task.generator):
            for batch, gradient in zip(micro_batches, gradients, strict=True):
                task.generate(batch).backward(gradient)
    terms["health/g_grad_norm"] = optimiser.step(live.step)
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
