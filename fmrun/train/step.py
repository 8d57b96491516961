"""One training step: which network runs when, and which one is frozen.

With discriminator D, generator G, latents or low-resolution images z, and real images r, one step is

    D's update    theta <- theta - h grad_theta L_D(D(r), D(G(z)))                                   G(z) without gradient
    G's update    phi   <- phi   - h grad_phi [sum_i w_i L_i(G(z), r) + a L_adv(D(G(z))) + s L_FM(D_k(r), D_k(G(z)))]

with D frozen in G's update: it passes gradients on, and none of its weights, running averages or power iterations moves.
L_FM compares features of layers k; D(r) is run without graph and no further than the last of them. s is lambda times the
balance (`feature_matching.strength`), which is measured at the generated images x = G(z): the generator's loss is
differentiated down to x first, and grad_x goes through G afterwards. That is the same gradient, and on measuring steps
the parts of it are at hand.

In units of one discriminator forward, g for the generator's, on one micro-batch:

    D's update    D(r) 1 + 2    D(G(z)) 1 + 2    G forward g
    G's update    D(G(z)) 1 + 1 (frozen: no weight gradients)    G backward 2g    [D(r) truncated, no graph: <= 1]

8 + 3g, and at most 9 + 3g with feature matching. Micro-batches are a loop: what is computed of a batch, as batch norm
and the statistics, is then of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..feature_matching.discriminator import DiscriminatorOutput, mean_logit
from ..feature_matching.frozen import frozen, frozen_running_stats
from ..feature_matching.strength import gradient_unit
from ..losses.adversarial import D_LOSSES, G_LOSSES, squared_gradient
from ..models.norm import advance_spectral
from ..runtime.dist import World
from ..tasks import Batch, DiscriminatorPlan, DiscriminatorRole, StepPlan, StepScalars, Task
from .optim import Optimiser


class StepLog(dict[str, Tensor]):
    """Named scalars on the device, of this process: means over micro-batches and over the updates of a step."""

    def add(self, name: str, value: Tensor, fraction: float = 1.0) -> None:
        value = value.detach() * fraction
        self[name] = self[name] + value if name in self else value

    def merge(self, update: StepLog, fraction: float) -> None:
        for name, value in update.items():
            self.add(name, value, fraction)


def alternating_step(
    task: Task,
    batches: Sequence[Sequence[Batch]],
    plan: StepPlan,
    scalars: StepScalars,
    optimisers: Mapping[str, Optimiser],
    world: World,
    d_updates: int = 1,
) -> StepLog:
    """Update every discriminator `d_updates` times, then the generator `g_updates` times, by discriminators as they are then.

    `batches` has `d_updates + g_updates - 1` global batches, each a list of micro-batches: the discriminators take the first
    `d_updates`, the generator the last of those and all that follow. That one batch, and the images made for it, serve the
    last discriminator update and the first generator update.
    """
    log, g_updates = StepLog(), len(batches) - d_updates + 1
    for k in range(d_updates):
        images = generate(task, batches[k], graph=k == d_updates - 1)
        for _, d, d_plan in plan.trained(task):
            update_log = update_discriminator(d, d_plan, batches[k], images, optimisers[d.name], scalars)
            log.merge(update_log, 1 / d_updates)
    for k in range(d_updates - 1, len(batches)):
        if k >= d_updates:
            images = generate(task, batches[k], graph=True)
        gradients, update_log = image_gradients(
            task, plan, batches[k], images, scalars, world, optimisers["generator"].guard.scale
        )
        update_generator(task, batches[k], images, gradients.total, optimisers["generator"], scalars, update_log)
        log.merge(update_log, 1 / g_updates)
    if plan.log_diversity:
        log["health/diversity"] = diversity(batches[-1], images, world)
    return log


def generate(task: Task, micro_batches: Sequence[Batch], graph: bool) -> list[Tensor]:
    """Images of every micro-batch, a function of it and the weights alone. With a graph only if there is one micro-batch, for
    a graph holds all activations: `update_generator` makes the images of several again, one after the other."""
    with torch.set_grad_enabled(graph and len(micro_batches) == 1):
        return [task.generate(batch) for batch in micro_batches]


# ---- the discriminator's update


def update_discriminator(
    d: DiscriminatorRole,
    plan: DiscriminatorPlan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    optimiser: Optimiser,
    scalars: StepScalars,
) -> StepLog:
    log, fraction = StepLog(), 1 / len(micro_batches)
    advance_spectral(d.net)
    optimiser.zero_grad()
    for batch, image in zip(micro_batches, images, strict=True):
        loss = discriminator_loss(d, plan, batch, image.detach(), log, fraction)
        (loss * (fraction * optimiser.guard.scale)).backward()
    log["health/d_grad_norm" + d.suffix] = optimiser.step(scalars.clock)
    return log


def discriminator_loss(
    d: DiscriminatorRole, plan: DiscriminatorPlan, batch: Batch, fake: Tensor, log: StepLog, fraction: float = 1.0
) -> Tensor:
    """L_D on one micro-batch, its penalties included; `fake` are generated images (b, C, H, W) without a graph."""
    with parametrize.cached():
        real, on_real, on_fake = discriminator_passes(d, plan, batch, fake)
    return loss_of_passes(d, plan, real, fake, on_real, on_fake, log, fraction)


def discriminator_passes(
    d: DiscriminatorRole, plan: DiscriminatorPlan, batch: Batch, fake: Tensor, layers: tuple[str, ...] = ()
) -> tuple[Tensor, DiscriminatorOutput, DiscriminatorOutput]:
    """The real images as the discriminator saw them, D(real) and D(fake), with graphs to its weights and, where a penalty
    needs it, to the images, which then require gradients. A penalised pass is `exact`, in at least float32: it is
    differentiated twice. With `layers` (a simultaneous step) their features, both exact where one of the two is."""
    real = batch.real.detach()
    numbers = batch.augment[0] if batch.augment is not None else None
    outputs = []
    for images, gamma in ((real, d.gan.r1), (fake, d.gan.r2)):
        penalised = plan.penalty and gamma > 0
        if penalised:
            images.requires_grad_()
        exact = penalised or (plan.penalty and bool(layers) and max(d.gan.r1, d.gan.r2) > 0)
        outputs.append(d(images, numbers, layers, exact=exact))
    return real, outputs[0], outputs[1]


def loss_of_passes(
    d: DiscriminatorRole,
    plan: DiscriminatorPlan,
    real: Tensor,
    fake: Tensor,
    on_real: DiscriminatorOutput,
    on_fake: DiscriminatorOutput,
    log: StepLog,
    fraction: float,
) -> Tensor:
    """L_D from D's passes over real and generated images (b, C, H, W)."""
    assert on_real.logits is not None
    assert on_fake.logits is not None
    loss = D_LOSSES[d.gan.type](on_real.logits, on_fake.logits)
    log.add("loss/d" + d.suffix, loss, fraction)
    log.add("health/d_real" + d.suffix, mean_logit(on_real.logits), fraction)
    log.add("health/d_fake" + d.suffix, mean_logit(on_fake.logits), fraction)
    penalties = (("r1", d.gan.r1, on_real.logits, real), ("r2", d.gan.r2, on_fake.logits, fake))
    for name, gamma, logits, images in penalties if plan.penalty else ():
        if gamma:
            penalty = squared_gradient(logits, images)
            log.add(f"loss/d{d.suffix}_{name}", penalty, fraction)
            loss = loss + 0.5 * gamma * d.gan.penalty_every * penalty
    return loss


# ---- the generator's update


class ImageGradients:
    """The gradient of the generator's loss at the generated images, micro-batch by micro-batch, times the loss scale.

    `images` are copies that begin a graph: that of the generator ends there. `total` is the sum; terms that are measured are
    also kept apart, by name.
    """

    def __init__(self, images: Sequence[Tensor], scale: Tensor | float = 1.0):
        self.images = [image.detach().requires_grad_() for image in images]
        self.total = [torch.zeros_like(image) for image in self.images]
        self.by_term: dict[str, list[Tensor]] = {}
        self.factor = scale / len(images)

    def add(self, m: int, loss: Tensor, retain_graph: bool = False) -> None:
        """Add the gradient of `loss`, of micro-batch m."""
        self.total[m] += torch.autograd.grad(loss * self.factor, self.images[m], retain_graph=retain_graph)[0]

    def keep(self, name: str, m: int, loss: Tensor, unit: Tensor | float = 1.0, retain_graph: bool = False) -> None:
        """Keep the gradient of `loss` apart. A loss so small that its gradient would vanish in half precision is differentiated
        in units of `unit`, which changes nothing else."""
        (gradient,) = torch.autograd.grad(loss * (self.factor / unit), self.images[m], retain_graph=retain_graph)
        self.by_term.setdefault(name, []).append(gradient * unit)

    def join(self, name: str, weight: Tensor | float = 1.0) -> None:
        """Add `weight` times a term that was kept apart."""
        for total, part in zip(self.total, self.by_term[name], strict=True):
            total += part * weight


def image_gradients(
    task: Task,
    plan: StepPlan,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    scalars: StepScalars,
    world: World,
    scale: Tensor | float = 1.0,
) -> tuple[ImageGradients, StepLog]:
    """Everything that the generator learns from, differentiated down to its images, times `scale`."""
    gradients, log = ImageGradients(images, scale), StepLog()
    add_image_losses(task, plan, micro_batches, gradients, scalars, log)
    with frozen(*(d.net for d in task.discriminators)):  # no weight gradients, and nothing in them moves
        for i, d, d_plan in plan.acting(task):
            for m, batch in enumerate(micro_batches):
                real, fake = generator_passes(d, d_plan, batch, gradients.images[m])
                add_discriminator_losses(gradients, m, i, d, d_plan, real, fake, scalars, world, log)
            settle(gradients, i, d, d_plan, scalars, world, log)
    return gradients, log


def add_image_losses(
    task: Task,
    plan: StepPlan,
    micro_batches: Sequence[Batch],
    gradients: ImageGradients,
    scalars: StepScalars,
    log: StepLog,
) -> None:
    """The losses w_i L_i between generated images and their originals, which no discriminator judges."""
    for m, batch in enumerate(micro_batches if plan.image_losses else ()):
        for name, loss in task.image_losses(batch, gradients.images[m], plan.image_losses, scalars.image).items():
            for key in (f"loss/{name}", "loss/g"):
                log.add(key, loss, 1 / len(micro_batches))
            if plan.measure:
                gradients.keep(name, m, loss)
            else:
                gradients.add(m, loss)
    for name in tuple(gradients.by_term):
        gradients.join(name)


def generator_passes(
    d: DiscriminatorRole, plan: DiscriminatorPlan, batch: Batch, images: Tensor
) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
    """D(real), without graph and no further than the generator's loss reads it, and D(images) with a graph down to them."""
    numbers = batch.augment[1] if batch.augment is not None else None
    logits = d.relativistic and plan.adversarial
    real = DiscriminatorOutput(None)
    if logits or plan.layers:
        with torch.no_grad():
            real = d(batch.real, numbers, plan.layers, logits=logits)
    return real, d(images, numbers, plan.layers, logits=plan.adversarial)


def add_discriminator_losses(
    gradients: ImageGradients,
    m: int,
    i: int,
    d: DiscriminatorRole,
    plan: DiscriminatorPlan,
    real: DiscriminatorOutput,
    fake: DiscriminatorOutput,
    scalars: StepScalars,
    world: World,
    log: StepLog,
    retain_graph: bool = False,
) -> None:
    """a L_adv and s L_FM of discriminator i on micro-batch m, in one backward pass. Where they are measured, apart, and L_FM
    without its weight: its balance is known only after all micro-batches, and acts in this same step (`settle`)."""
    fraction, losses = 1 / len(gradients.images), []
    if plan.adversarial:
        assert fake.logits is not None
        adversarial = G_LOSSES[d.gan.type](fake.logits, real.logits)
        weighted = scalars.adversarial[i] * adversarial
        log.add("loss/g_adv" + d.suffix, adversarial, fraction)
        log.add("loss/g", weighted, fraction)
        if plan.measure:
            gradients.keep("adversarial" + d.suffix, m, weighted, retain_graph=True)
        else:
            losses.append(weighted)
    if plan.layers:
        assert d.matching is not None
        distance = d.matching.distance(real.features, fake.features, step=scalars.step, ranks=world)
        log.add("fm/distance" + d.suffix, distance.total, fraction)
        for layer, value in distance.terms.items():
            log.add(f"fm/{layer}{d.suffix}", value, fraction)
        if plan.measure:
            unit = gradient_unit(distance.total, world)
            gradients.keep("matching" + d.suffix, m, distance.total, unit, retain_graph)
        else:
            losses.append(scalars.matching[i] * d.matching.strength.balance * distance.total)
    if losses:
        gradients.add(m, torch.stack(losses).sum(), retain_graph)


def settle(
    gradients: ImageGradients,
    i: int,
    d: DiscriminatorRole,
    plan: DiscriminatorPlan,
    scalars: StepScalars,
    world: World,
    log: StepLog,
) -> None:
    """On measuring steps set the balance and add what was kept apart; log how strongly features are matched."""
    if plan.measure:
        measure(gradients, i, d, scalars, world, log)
        if plan.adversarial:
            gradients.join("adversarial" + d.suffix)
    if plan.layers:
        assert d.matching is not None
        weight = scalars.matching[i] * d.matching.strength.balance
        if plan.measure:
            gradients.join("matching" + d.suffix, weight)
        log["fm/weight" + d.suffix] = weight
        log["fm/loss" + d.suffix] = log["fm/distance" + d.suffix] * weight
        log.add("loss/g", log["fm/loss" + d.suffix])


def measure(
    gradients: ImageGradients, i: int, d: DiscriminatorRole, scalars: StepScalars, world: World, log: StepLog
) -> None:
    """Shares: the norm of each loss's gradient at the generated images over that of the adversarial one, or, before that
    acts, over that of all others together. And the cosine between the matching gradient and the adversarial one."""
    adversarial, matching = (
        gradients.by_term.get("adversarial" + d.suffix),
        gradients.by_term.get("matching" + d.suffix),
    )
    reference = adversarial or gradients.total  # what is in it by now: image losses, and discriminators before this one
    others = {
        name: part for name, part in gradients.by_term.items() if not name.startswith(("adversarial", "matching"))
    }
    pairs = [(reference, reference), *((part, part) for part in others.values())]
    pairs += [(matching, matching), (matching, reference)] if matching else []
    products = world.mean(torch.stack([_dot(a, b) for a, b in pairs]))
    norm = products[0].sqrt()
    for place, name in enumerate(others, 1):
        log[f"fm/share.{name}{d.suffix}"] = products[place].sqrt() / norm
    if matching:
        assert d.matching is not None
        d.matching.strength.measure(norm, products[-2].sqrt(), scalars.matching[i])
        log["fm/share" + d.suffix] = d.matching.strength.share.clone()
        log["fm/balance" + d.suffix] = d.matching.strength.balance.clone()
        if adversarial:
            log["fm/cosine" + d.suffix] = products[-1] / (norm * products[-2].sqrt())


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def update_generator(
    task: Task,
    micro_batches: Sequence[Batch],
    images: Sequence[Tensor],
    gradients: Sequence[Tensor],
    optimiser: Optimiser,
    scalars: StepScalars,
    log: StepLog,
    scale: Tensor | None = None,
) -> None:
    """Send the gradients at the images through the generator, and update it. They carry the loss scale `scale`, or if that is
    None the scale of the optimiser's guard as it is now."""
    optimiser.zero_grad()
    if len(micro_batches) == 1:
        images[0].backward(gradients[0])
    else:
        with frozen_running_stats(task.generator):  # they have moved when the images were made
            for batch, gradient in zip(micro_batches, gradients, strict=True):
                task.generate(batch).backward(gradient)
    log["health/g_grad_norm"] = optimiser.step(scalars.clock, scale)


@torch.no_grad()
def diversity(micro_batches: Sequence[Batch], images: Sequence[Tensor], world: World) -> Tensor:
    """Spread of the generated images over that of the real ones: ratio of the root mean variance per pixel."""

    def variance(stack: Tensor) -> Tensor:
        mean = world.mean(stack.mean(0))
        return world.mean((stack - mean).square().mean())

    fake = torch.cat([image.detach() for image in images])
    real = torch.cat([batch.real for batch in micro_batches])
    return (variance(fake) / variance(real)).sqrt()
