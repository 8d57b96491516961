"""Everything a run is made of at a step: what a checkpoint holds, and what one step changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config.schema import AdamConfig, Config
from ..data.feed import Feed
from ..losses.image import LOG_NAMES
from ..metrics.quick import extractor_name, metric_name
from ..models.custom import expecting_old_code, user_errors
from ..runs.checkpoint import Checkpoint, named
from ..runtime.dist import World
from ..runtime.rng import torch_generator
from ..tasks import Batch, StepPlan, StepScalars, Task, kind
from .cuda_graphs import CudaRecorder, Recorder, StepGraphs
from .optim import Ema, Guard, Optimiser, lr_factor
from .simultaneous import simultaneous_step
from .step import StepLog, alternating_step


class Update(Protocol):
    """One kind of training step."""

    def __call__(
        self,
        task: Task,
        batches: Sequence[Sequence[Batch]],
        plan: StepPlan,
        scalars: StepScalars,
        optimisers: Mapping[str, Optimiser],
        world: World,
        d_updates: int = 1,
    ) -> StepLog: ...


UPDATES: dict[str, Update] = {"alternating": alternating_step, "simultaneous": simultaneous_step}


class LogWindow:
    """Sums of a step's scalars since the last read-out, on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: StepLog) -> None:
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
        self.task: Task = kind(config.task).task(config if fresh else without_init(config), device, world)
        self.step = 0
        self._fitted = False
        self.guard = Guard(scaled=self.task.precision == torch.float16).to(device)
        self.ema = Ema(self.task.average, config.ema)
        self.scalars = self.task.scalars()
        self.window = LogWindow()
        self.graphs: StepGraphs | None = None
        """Recorded steps, where the config asks for them and the device has them."""
        if config.cuda_graphs and device.type == "cuda":
            self.record_with(CudaRecorder(device))
        clip = config.optim.clip_grad_norm

        def optimiser(net: nn.Module, adam: AdamConfig, index: int) -> Optimiser:
            return Optimiser(net, adam, clip=clip, guard=self.guard, index=index, world=world, device=device)

        self.optimisers = {"generator": optimiser(self.task.generator, config.optim.generator, 1)}
        for role in self.task.discriminators:
            if role.trained:
                self.optimisers[role.name] = optimiser(role.net, config.optim.discriminator, 0)

    @property
    def batches_per_step(self) -> int:
        """Global batches a step takes: the last discriminator update shares its own with the first generator update."""
        return self.config.train.d_updates + self.config.train.g_updates - 1

    def metric_names(self, held_out: Sequence[str]) -> list[str]:
        """Keys that rows of metrics.jsonl have, now and then or always; `held_out`: those of held-out images."""
        names = ["loss/g", "health/g_grad_norm", "health/diversity", "optim/lr_generator", "time/images_per_second"]
        others = [LOG_NAMES.get(name, name) for name in self.task.image_weights(0)]
        for role in self.task.discriminators:
            end, gan, matching = role.suffix, role.gan, role.matching
            if role.trained:
                names += [name + end for name in ("loss/d", "health/d_real", "health/d_fake", "health/d_grad_norm")]
                names += [f"loss/d{end}_{name}" for name, gamma in (("r1", gan.r1), ("r2", gan.r2)) if gamma]
            if gan.weight:
                names.append("loss/g_adv" + end)
            if matching is not None:
                shares = ["share", "balance", *(f"share.{name}" for name in others)] if gan.weight or others else []
                shares += ["cosine"] if gan.weight else []
                names += [f"fm/{name}{end}" for name in ("distance", "weight", "loss", *matching.layers, *shares)]
        names += [f"loss/{name}" for name in others]
        if self.config.feature_matching.weight:
            names.append("fm/lambda")
        if self.config.eval.every:
            names += held_out
        if (extractor := extractor_name(self.config, self.device)) is not None:
            names += [metric_name(extractor), "time/kid_seconds"]
        return sorted(names)

    def record_with(self, recorder: Recorder) -> None:
        """Record steps from now on."""
        self.graphs = StepGraphs(recorder)
        for role in self.task.discriminators:
            if role.matching is not None:
                role.matching.fixed_directions = {}

    def prepare(self, feed: Feed, step: int) -> list[list[Batch]]:
        """The batches of `step`: for each draw its micro-batches."""
        first = step * self.batches_per_step
        return [self.task.prepare(feed.batch(d), d) for d in range(first, first + self.batches_per_step)]

    def set_scalars(self, step: int) -> None:
        """Put the numbers that depend on the step alone onto the device."""
        discriminators = self.task.discriminators
        self.scalars.set(
            step,
            [c.adversarial_weight(step) for c in discriminators],
            [c.matching_weight(step) for c in discriminators],
            self.task.image_weights(step),
        )
        for role in discriminators:
            if role.matching is not None:
                role.matching.resample(step)
        factor = lr_factor(self.config.optim.schedule, step)
        for optimiser in self.optimisers.values():
            optimiser.lr.fill_(optimiser.config.lr * factor)

    @user_errors()
    def advance(self, batches: list[list[Batch]]) -> None:
        """Make one step. Waits for nothing."""
        if self.config.compile_mode != "default":
            torch.compiler.cudagraph_mark_step_begin()
        self.set_scalars(self.step)
        if self.config.own_nets:  # dropout and noise within them draw from the global generators
            torch.manual_seed(torch_generator(self.config.seed, "own nets", self.step, self.world.rank).initial_seed())
        plan = self.task.plan(self.step)
        train = self.config.train

        def work(batches: list[list[Batch]]) -> StepLog:
            update = UPDATES[train.update]
            return update(self.task, batches, plan, self.scalars, self.optimisers, self.world, train.d_updates)

        terms = work(batches) if self.graphs is None else self.graphs.run(plan, batches, work)
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
        parts = {"generator": self.task.generator.state_dict(), "ema": self.task.average.state_dict()}
        for role in self.task.discriminators:
            parts[role.name] = role.net.state_dict()
            if role.matching is not None:
                parts[f"matching.{role.name}"] = role.matching.state_dict()
        parts |= {f"optimiser.{name}": optimiser.state() for name, optimiser in self.optimisers.items()}
        parts["guard"] = self.guard.state_dict()
        # averaged over processes, so that one file serves them all
        parts["window"] = {name: self.world.mean(value) for name, value in self.window.sums.items()}
        return named(parts)

    def restore(self, saved: Checkpoint) -> None:
        """Put back what `tensors` gave, to the bit."""
        with expecting_old_code(self.config):
            self.task.generator.load_state_dict(saved.part("generator"))
            self.task.average.load_state_dict(saved.part("ema"))
            for role in self.task.discriminators:
                role.net.load_state_dict(saved.part(role.name))
        for role in self.task.discriminators:
            if role.matching is not None:
                role.matching.load_state_dict(saved.part(f"matching.{role.name}"))
        for name, optimiser in self.optimisers.items():
            optimiser.restore(saved.part(f"optimiser.{name}"))
            optimiser.remember()
        self.guard.load_state_dict(saved.part("guard"))
        self.window.sums = {name: value.to(self.device) for name, value in saved.part("window").items()}
        self.window.counts = dict(saved.meta.window)
        self.step = saved.step
        self._fitted = False
