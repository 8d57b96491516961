"""Everything a run is made of at a step: what a checkpoint holds, and what one step changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .dist import World
from .graphs import CudaRecorder, Recorder, StepGraphs
from .metrics.quick import extractor_name, metric_name
from .models.custom import expecting_old_code
from .optim import Ema, Guard, Optimiser, lr_factor
from .rng import torch_generator
from .simultaneous import simultaneous_step
from .step import Terms, step
from .tasks import Batch
from .tasks.generate import Generate
from .tasks.upscale import Upscale

TASKS: dict[str, Any] = {"generate": Generate, "upscale": Upscale}
UPDATES: dict[str, Callable[..., Terms]] = {"alternating": step, "simultaneous": simultaneous_step}


class Window:
    """Sums of a step's scalars since the last read-out, on the device."""

    def __init__(self) -> None:
        self.sums: Terms = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: Terms) -> None:
        known = [name for name in terms if name in self.sums]
        if known:
            torch._foreach_add_([self.sums[n] for n in known], [terms[n].detach() for n in known])
        for name, value in terms.items():
            if name not in self.sums:
                self.sums[name] = value.detach().clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, world: World, empty: bool = True) -> dict[str, float]:
        """Means over the window and over processes; then empties it. Waits for the device, once."""
        if not self.sums:
            return {}
        wide = max((value.dtype for value in self.sums.values()), key=lambda dtype: dtype.itemsize)
        means = world.mean(torch.stack([self.sums[n].to(wide) / self.counts[n] for n in self.sums])).tolist()
        row = dict(zip(self.sums, means, strict=True))
        if empty:
            self.sums, self.counts = {}, {}
        return row


def without_init(config: Config) -> Config:
    """The config with nets that start from no file."""
    sections = {name: getattr(config, name) for name in ("generator", "discriminator")}
    return config.model_copy(update={name: s.model_copy(update={"init": None}) for name, s in sections.items()})


class State:
    """Nets, optimisers, averages and counters of a run; `step` updates have been made.

    Without `fresh`, a checkpoint is to be restored: the files of `generator.init` and `discriminator.init` are not read.
    """

    def __init__(self, config: Config, device: torch.device, world: World, fresh: bool = True):
        self.config, self.device, self.world = config, device, world
        self.task = TASKS[config.task](config if fresh else without_init(config), device, world)
        self.step = 0
        self._fitted = False
        self.guard = Guard(scaled=self.task.precision == torch.float16).to(device)
        self.ema = Ema(self.task.average, config.ema)
        self.live = self.task.live()
        self.window = Window()
        self.graphs: StepGraphs | None = None
        """Recorded steps, where the config asks for them and the device has them."""
        if config.cuda_graphs and device.type == "cuda":
            self.record_with(CudaRecorder(device))
        shared: dict[str, Any] = {
            "clip": config.optim.clip_grad_norm,
            "guard": self.guard,
            "world": world,
            "device": device,
        }
        self.optimisers = {"generator": Optimiser(self.task.generator, config.optim.generator, index=1, **shared)}
        for critic in self.task.critics:
            if critic.trained:
                optimiser = Optimiser(critic.net, config.optim.discriminator, index=0, **shared)
                self.optimisers[critic.name] = optimiser

    @property
    def draws_per_step(self) -> int:
        """Global batches a step takes: the last discriminator update shares its own with the first generator update."""
        return self.config.train.d_updates + self.config.train.g_updates - 1

    def metric_names(self, held_out: bool) -> list[str]:
        """Keys that rows of metrics.jsonl have, now and then or always; `held_out`: whether there are such images."""
        found = ["loss/g", "health/g_grad_norm", "health/diversity", "optim/lr_generator", "time/images_per_second"]
        for critic in self.task.critics:
            end, gan, matching = critic.suffix, critic.gan, critic.matching
            if critic.trained:
                found += [name + end for name in ("loss/d", "health/d_real", "health/d_fake", "health/d_grad_norm")]
                found += [f"loss/d{end}_{name}" for name, gamma in (("r1", gan.r1), ("r2", gan.r2)) if gamma]
            if gan.weight:
                found.append("loss/g_adv" + end)
            if matching is not None:
                shares = ["share", "balance"] if gan.weight or self.task.image_loss_names else []
                found += [f"fm/{name}{end}" for name in ("distance", "weight", "loss", *matching.layers, *shares)]
        found += [f"loss/{name}" for name in self.task.image_loss_names]
        if self.config.feature_matching.weight:
            found.append("fm/lambda")
        if held_out and self.config.eval.every:
            found += self.task.held_out_names
        if (extractor := extractor_name(self.config, self.device)) is not None:
            found += [metric_name(extractor), "time/kid_seconds"]
        return sorted(found)

    def record_with(self, recorder: Recorder) -> None:
        """Record steps from now on."""
        self.graphs = StepGraphs(recorder)
        for critic in self.task.critics:
            if critic.matching is not None:
                critic.matching.kept = {}

    def prepare(self, feed: Any, step: int) -> list[list[Batch]]:
        """The batches of `step`: for each draw its micro-batches."""
        first = step * self.draws_per_step
        return [self.task.prepare(feed.batch(d), d) for d in range(first, first + self.draws_per_step)]

    def set_live(self, step: int) -> None:
        """Put the numbers that depend on the step alone onto the device."""
        critics = self.task.critics
        self.live.set(
            step,
            [c.adversarial_weight(step) for c in critics],
            [c.matching_weight(step) for c in critics],
            self.task.image_weights(step),
        )
        for critic in critics:
            if critic.matching is not None:
                critic.matching.renew(step)
        factor = lr_factor(self.config.optim.schedule, step)
        for optimiser in self.optimisers.values():
            optimiser.lr.fill_(optimiser.config.lr * factor)

    def advance(self, draws: list[list[Batch]]) -> None:
        """Make one step. Waits for nothing."""
        if self.config.compile_mode != "default":
            torch.compiler.cudagraph_mark_step_begin()
        self.set_live(self.step)
        if self.task.own_nets:  # dropout and noise within them draw from the global generators
            torch.manual_seed(torch_generator(self.config.seed, "own nets", self.step, self.world.rank).initial_seed())
        plan = self.task.plan(self.step)
        train = self.config.train

        def work(draws: list[list[Batch]]) -> Terms:
            update = UPDATES[train.update]
            return update(self.task, draws, plan, self.live, self.optimisers, self.world, train.d_updates)

        terms = work(draws) if self.graphs is None else self.graphs.run(plan, draws, work)
        for critic, critic_plan in zip(self.task.critics, plan.critics, strict=True):
            if critic_plan.measure and critic.matching is not None:
                terms["fm/share" + critic.suffix] = critic.matching.share
                terms["fm/balance" + critic.suffix] = critic.matching.balance
        self.ema.update(self.task.generator, self.step)
        self.window.add(terms)
        self.step += 1
        self._fitted = False

    def fit_average(self) -> None:
        """Fit the averaged generator's batch norm to its weights, once for all who look at it between two steps."""
        if not self._fitted:
            self.task.fit_average()
            self._fitted = True

    def tensors(self) -> dict[str, Tensor]:
        """All that has to be saved, by name. Fits the averaged generator's batch norm first."""
        self.fit_average()
        tensors: dict[str, Tensor] = {}

        def put(prefix: str, values: Mapping[str, Tensor]) -> None:
            tensors.update({f"{prefix}.{name}": value for name, value in values.items()})

        put("generator", self.task.generator.state_dict())
        put("ema", self.task.average.state_dict())
        for critic in self.task.critics:
            put(critic.name, critic.net.state_dict())
            if critic.matching is not None:
                put(f"matching.{critic.name}", critic.matching.state_dict())
        for name, optimiser in self.optimisers.items():
            put(f"optimiser.{name}", optimiser.state())
        put("guard", self.guard.state_dict())
        put("window", self._window_means())
        return tensors

    def _window_means(self) -> Terms:
        """The window's sums, averaged over processes so that one file serves them all."""
        return {name: self.world.mean(value) for name, value in self.window.sums.items()}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put back what `tensors` gave, to the bit."""

        def take(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

        with expecting_old_code(self.config):
            self.task.generator.load_state_dict(take("generator"))
            self.task.average.load_state_dict(take("ema"))
            for critic in self.task.critics:
                critic.net.load_state_dict(take(critic.name))
        for critic in self.task.critics:
            if critic.matching is not None:
                critic.matching.load_state_dict(take(f"matching.{critic.name}"))
        for name, optimiser in self.optimisers.items():
            optimiser.restore(take(f"optimiser.{name}"))
            optimiser.remember()
        self.guard.load_state_dict(take("guard"))
        self.window.sums = {name: value.to(self.device) for name, value in take("window").items()}
        self.window.counts = dict(meta["window"])
        self.step = int(meta["step"])
        self._fitted = False
