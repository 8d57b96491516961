"""Both nets updated at once, from one discriminator forward per set of images (`train.update = "simultaneous"`).

    theta' = theta - h grad_theta L_D(theta, phi)        phi' = phi - h grad_phi L_G(theta, phi)

The usual, alternating step updates theta first and takes the generator's gradient at theta'. Simultaneous gradient
descent (Mescheder, Nowozin & Geiger 2017, arXiv:1705.10461; compared with the alternating form in Mescheder, Geiger &
Nowozin 2018, arXiv:1801.04406, sec. 2) is another algorithm with other dynamics, not a faster form of the same one: real
and generated features are both from before the discriminator's update, and both nets see the same augmentation.

In units of one discriminator forward, g for the generator's, on one micro-batch, the step costs

    D(real) 1 + 2    D(fake) 1 + 2, and 1 more to the images for G    G g + 2g

7 + 3g, with feature matching or without. The two backward passes through D(fake) cannot be one: its logits' gradients
differ image by image between the two losses, and batch norm and matched features mix the images. Two exceptions cost
more: a compiled discriminator, whose backward pass is in one piece, takes its weight gradients twice (1 more), and batch
statistics over several micro-batches need the whole batch's features first (a truncated pass without graph each for real
and generated images).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn.utils import parametrize

from .dist import World
from .models.base import Out, at_each_scale
from .models.norm import advance_spectral
from .optim import Optimiser
from .step import (
    Terms,
    View,
    add,
    apply_to_generator,
    frozen,
    generate,
    generator_image_gradients,
    judge,
    look_frozen,
    loss_of,
)
from .tasks import Batch, Critic, CriticPlan, Live, Plan, Task


def simultaneous_step(
    task: Task,
    draws: Sequence[Sequence[Batch]],
    plan: Plan,
    live: Live,
    optimisers: dict[str, Optimiser],
    world: World,
    d_updates: int = 1,
) -> Terms:
    """Update every discriminator and the generator once, on the same images and from the same weights.

    Takes what `step` takes, with one draw; returns the same terms.
    """
    assert d_updates == len(draws) == 1
    micro_batches = [one_augmentation(batch) for batch in draws[0]]
    images = generate(task, micro_batches, graph=True)
    generator = optimisers["generator"]
    # a masked update changes the scale, and the gradients of both nets carry the one from before
    scale = generator.guard.scale.clone()
    terms: Terms = {}
    trained = [c for c, critic_plan in zip(task.critics, plan.critics, strict=True) if critic_plan.train]
    for critic in trained:
        advance_spectral(critic.net)
        optimisers[critic.name].zero_grad()

    def look(
        critic: Critic,
        critic_plan: CriticPlan,
        micro_batches: Sequence[Batch],
        leaves: Sequence[Tensor],
        reals: Sequence[Out] | None,
    ) -> Iterator[View]:
        """Views from the discriminator's own passes, which it learns from once the generator has."""
        if not critic_plan.train:
            with frozen([critic]):
                yield from look_frozen(critic, critic_plan, micro_batches, leaves, reals)
            return
        weights = [p for p in critic.net.parameters() if p.requires_grad]
        share = 1 / len(micro_batches)
        for batch, leaf in zip(micro_batches, leaves, strict=True):
            with parametrize.cached():
                real, fake = judge(critic, critic_plan, batch, leaf, shared=True)
            yield View(fake.source, _without_graph(real.out), fake.out, keep=True)
            loss = loss_of(critic, critic_plan, real, fake)
            for name, value in loss.terms.items():
                add(terms, name, value, share)
            (loss.total * (share * scale)).backward(inputs=weights)

    gradients, told = generator_image_gradients(task, plan, micro_batches, images, live, world, scale, look)
    terms |= told
    # The generator first: where its update is not finite, the discriminator's weights stay those that made it so.
    terms |= apply_to_generator(task, plan, micro_batches, images, gradients, generator, live, world, scale)
    for critic in trained:
        terms["health/d_grad_norm" + critic.suffix] = optimisers[critic.name].step(live.clock, scale)
    return terms


def one_augmentation(batch: Batch) -> Batch:
    """The batch with the discriminator's augmentation for both nets."""
    return batch if batch.augment is None else replace(batch, augment=batch.augment[:1].expand(2, -1, -1))


def _without_graph(out: Out) -> Out:
    logits = at_each_scale(Tensor.detach, out.logits) if out.logits is not None else None
    return Out(logits, {name: feature.detach() for name, feature in out.features.items()})
