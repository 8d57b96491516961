"""Both nets updated at once, from one discriminator forward per set of images (`train.update = "simultaneous"`).

    theta' = theta - h grad_theta L_D(theta, phi)        phi' = phi - h grad_phi L_G(theta, phi)

The usual, alternating step updates theta first and takes the generator's gradient at theta'. Simultaneous gradient
descent (Mescheder, Nowozin & Geiger 2017, arXiv:1705.10461; compared with the alternating form in Mescheder, Geiger &
Nowozin 2018, arXiv:1801.04406, sec. 2) is another algorithm with other dynamics, not a faster form of the same one: real
and generated features are both from before the discriminator's update, and both nets see the same augmentation.

In units of one discriminator forward, g for the generator's, on one micro-batch, the step costs

    D(real) 1 + 2    D(fake) 1 + 2, and 1 more to the images for G    G g + 2g

7 + 3g, with feature matching or without. The two backward passes through D(fake) cannot be one: its logits' gradients
differ image by image between the two losses, and batch norm and matched features mix the images. A compiled
discriminator, whose backward pass is in one piece, takes its weight gradients twice (1 more).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn.utils import parametrize

from ..feature_matching.discriminator import DiscriminatorOutput, at_each_scale
from ..feature_matching.frozen import frozen
from ..models.norm import advance_spectral
from ..runtime.dist import World
from ..tasks import Batch, StepPlan, StepScalars, Task
from .optim import Optimiser
from .step import (
    ImageGradients,
    StepLog,
    add_discriminator_losses,
    add_image_losses,
    discriminator_passes,
    diversity,
    generate,
    generator_passes,
    loss_of_passes,
    settle,
    update_generator,
)


def simultaneous_step(
    task: Task,
    batches: Sequence[Sequence[Batch]],
    plan: StepPlan,
    scalars: StepScalars,
    optimisers: Mapping[str, Optimiser],
    world: World,
    d_updates: int = 1,
) -> StepLog:
    """Update every discriminator and the generator once, on the same images and from the same weights: takes what
    `alternating_step` takes, with one global batch, and gives the same log."""
    assert d_updates == len(batches) == 1
    log, n = StepLog(), len(batches[0])
    micro_batches = [one_augmentation(batch) for batch in batches[0]]
    images = generate(task, micro_batches, graph=True)
    # a masked update changes the scale, and the gradients of both nets carry the one from before
    scale = optimisers["generator"].guard.scale.clone()
    gradients = ImageGradients(images, scale)
    add_image_losses(task, plan, micro_batches, gradients, scalars, log)
    trained = [d for _, d, _ in plan.trained(task)]
    for d in trained:
        advance_spectral(d.net)
        optimisers[d.name].zero_grad()
    for i, d, d_plan in plan.acting(task):
        weights = [p for p in d.net.parameters() if p.requires_grad]
        for m, (batch, fake) in enumerate(zip(micro_batches, gradients.images, strict=True)):
            if d in trained:
                with parametrize.cached():
                    real, on_real, on_fake = discriminator_passes(d, d_plan, batch, fake, d_plan.layers)
                on = (without_graph(on_real), on_fake)
            else:
                with frozen(d.net):
                    on = generator_passes(d, d_plan, batch, fake)
            add_discriminator_losses(gradients, m, i, d, d_plan, *on, scalars, world, log, retain_graph=d in trained)
            if d in trained:
                loss = loss_of_passes(d, d_plan, real, fake, on_real, on_fake, log, 1 / n)
                (loss * (scale / n)).backward(inputs=weights)
        settle(gradients, i, d, d_plan, scalars, world, log)
    # The generator first: where its update is not finite, the discriminator's weights stay those that made it so.
    update_generator(task, micro_batches, images, gradients.total, optimisers["generator"], scalars, log, scale=scale)
    for d in trained:
        log["health/d_grad_norm" + d.suffix] = optimisers[d.name].step(scalars.clock, scale)
    if plan.log_diversity:
        log["health/diversity"] = diversity(micro_batches, images, world)
    return log


def one_augmentation(batch: Batch) -> Batch:
    """The batch with the discriminator's augmentation for both nets."""
    return batch if batch.augment is None else replace(batch, augment=batch.augment[:1].expand(2, -1, -1))


def without_graph(out: DiscriminatorOutput) -> DiscriminatorOutput:
    logits = at_each_scale(Tensor.detach, out.logits) if out.logits is not None else None
    return DiscriminatorOutput(logits, {name: feature.detach() for name, feature in out.features.items()})
