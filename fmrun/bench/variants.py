"""The steps that are measured: fmrun's own, of real configs, and the textbook's, of the same pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..data.feed import PairBatch
from ..dist import World
from ..memory import few
from ..presets import Override, resolve
from ..state import UPDATES, State
from ..tasks import Batch
from .ledger import Unit, unit
from .textbook import Textbook, textbook

IMAGES = 1200
"""Made-up images that the loop trains on; half are held out."""

FP32, BF16 = "fp32", "bf16"


@dataclass(frozen=True)
class Pair:
    """One pair of nets: where its configs come from, and which of its layers are matched."""

    name: str
    cpu: str
    """Preset on a CPU."""
    gpu: str
    size_field: str
    size: int | None
    """Side of the images in pixels; None leaves the preset's."""
    layers: Mapping[str, str]
    """Steps with feature matching and their layers; the textbook matches those of `fm`."""
    book: Sequence[str]
    """Textbook steps."""
    bundled: bool
    """Whether it trains on bundled images; else on made-up ones, for no bundled ones are large enough."""

    def preset(self, device: torch.device) -> str:
        return self.gpu if device.type == "cuda" else self.cpu

    def config(self, folder: Path, device: torch.device, overrides: Sequence[Override]) -> Config:
        """The preset as it would be trained, with the number of channels known."""
        config = resolve(self.preset(device), None, overrides, need_data=False)
        if not self.bundled:
            size = config.data.image_size
            path = folder / f"{size}.npz"
            if not path.exists():
                images = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
                np.savez(path, images=images)
            data = {"path": str(path), "valid_fraction": 0.5, "channels": 3}
        else:
            data = {"channels": 3}
        return config.model_copy(update={"data": config.data.model_copy(update=data)})


PAIRS = {
    "dcgan": Pair(
        "dcgan",
        "dcgan-64",
        "dcgan-64",
        "data.image_size",
        64,
        {"fm": "all", "fm_key": "key"},
        ("textbook_plain", "textbook_fm", "textbook_fm_nhwc"),
        bundled=False,
    ),
    "munet": Pair(
        "munet",
        "munet-x2-cpu",
        "munet-x2",
        "data.patch_size",
        None,
        {"fm": "key", "fm_all": "all"},
        ("textbook_plain", "textbook_fm", "textbook_fm_nhwc", "separate_nhwc"),
        bundled=True,
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    name: str
    words: str
    precision: str
    run: Callable[[], object]
    owner: Own | Published


@dataclass(frozen=True)
class Bench:
    """Everything that is measured of one pair."""

    preset: str
    config: Config
    size: int
    variants: list[Variant]
    counted: list[Variant]
    """Steps that are counted and not timed."""
    matched: dict[str, tuple[str, ...]]
    """Layers by the name of the variant; none where nothing is matched."""
    own: frozenset[str]
    """Names of the variants that are fmrun's own."""
    precision: dict[str, str]
    units: dict[str, Unit]
    """A forward of each net."""
    forwards: dict[str, Callable[[], object]]
    """A forward of each net without a graph, to time one against the other."""


def ordinary_step(state: State, measuring: bool = False) -> int:
    """A step at which every term acts and nothing is looked at; with `measuring`, the gradient share alone is."""
    step = state.config.full_step
    critic = state.task.critics[0]
    if critic.matching is not None:
        while critic.matching.due(step, critic.gan.start_step) != measuring or state.task.plan(step).observe:
            step += 1
    else:
        while state.task.plan(step).observe:
            step += 1
    return step


def bare_step(state: State, draws: list[list[Batch]], at: int) -> None:
    """The losses and updates of step `at`, and nothing else: no average, no log."""
    plan = replace(state.task.plan(at), observe=False)
    state.set_live(at)
    train = state.config.train
    UPDATES[train.update](state.task, draws, plan, state.live, state.optimisers, state.world, train.d_updates)


def random_draws(state: State) -> list[list[Batch]]:
    """Batches of one step made of noise, in memory."""
    rng = torch.Generator().manual_seed(0)
    raw = state.task.blank()

    def noise(like: Tensor) -> Tensor:
        return torch.randint(0, 256, like.shape, generator=rng, dtype=torch.uint8).to(like.device)

    def one() -> Any:
        return PairBatch(*map(noise, raw)) if isinstance(raw, PairBatch) else noise(raw)

    return [state.task.prepare(one(), draw) for draw in range(state.draws_per_step)]


class Own:
    """fmrun's step of a config: `State.advance`, again and again at the same step of the run."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.state = State(config, device, World())
        self.draws = random_draws(self.state)
        # a step on two images makes the moments, which are there in every step but the first
        with self.eager():
            self.at(ordinary_step(self.state), [[few(batch, 2) for batch in draw] for draw in self.draws])

    @property
    def layers(self) -> tuple[str, ...]:
        matching = self.state.task.critics[0].matching
        return matching.layers if matching is not None else ()

    def at(self, step: int, draws: list[list[Batch]]) -> None:
        self.state.step = step
        self.state.advance(draws)

    def variant(self, name: str, words: str, measuring: bool = False) -> Variant:
        step = ordinary_step(self.state, measuring)
        return Variant(name, words, self.config.precision, lambda: self.at(step, self.draws), self)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, nothing is compiled or replayed, so that every operation is seen."""
        graphs, self.state.graphs = self.state.graphs, None
        with self.state.task.eager():
            yield
        self.state.graphs = graphs

    def held(self) -> list[Tensor]:
        """Tensors that stay between steps."""
        task = self.state.task
        nets = [task.generator, task.average, *(critic.net for critic in task.critics)]
        moments = [value for optimiser in self.state.optimisers.values() for value in optimiser.state().values()]
        return [*(t for net in nets for t in (*net.parameters(), *net.buffers())), *moments]

    def forget(self) -> None:
        """Drop the gradients of the last step."""
        for optimiser in self.state.optimisers.values():
            optimiser.zero_grad()


class Published:
    """A textbook pair with its batch."""

    def __init__(self, own: Own, layers: Sequence[str], memory_format: torch.memory_format):
        self.book: Textbook = textbook(own.state, layers).layout(memory_format)
        batch = own.draws[0][0]
        self.batch = replace(
            batch,
            real=batch.real.contiguous(memory_format=memory_format),
            condition=None if batch.condition is None else batch.condition.contiguous(memory_format=memory_format),
        )
        self.book.plain(few(self.batch, 2))

    def variant(self, name: str, words: str, step: Callable[[Textbook, Batch], None]) -> Variant:
        return Variant(name, words, FP32, lambda: step(self.book, self.batch), self)

    def eager(self) -> AbstractContextManager[None]:
        return nullcontext()

    def held(self) -> list[Tensor]:
        nets = (self.book.generator, self.book.discriminator)
        entries = [entry for o in (self.book.optimise_d, self.book.optimise_g) for entry in o.state.values()]
        moments = [value for entry in entries for value in entry.values()]
        return [*(t for net in nets for t in (*net.parameters(), *net.buffers())), *moments]

    def forget(self) -> None:
        self.book.optimise_d.zero_grad()
        self.book.optimise_g.zero_grad()


STEPS: dict[str, tuple[str, Callable[[Textbook, Batch], None]]] = {
    "textbook_plain": ("no feature matching", Textbook.plain),
    "textbook_fm": ("feature matching as published", Textbook.matching),
    "separate": ("feature matching in passes of its own", Textbook.separate),
}


def build(
    pair: Pair,
    folder: Path,
    device: torch.device,
    size: int | None,
    batch_size: int | None,
    precisions: Sequence[str],
    overrides: Sequence[Override],
) -> Bench:
    """Nets, batches and steps of a pair, every variant with weights of its own.

    What is compared with the textbook is in the first of `precisions`; names in another end in it.
    """
    given: list[tuple[str, str, Any]] = [
        ("--device", "device", str(device)),
        ("--size", pair.size_field, size or pair.size),
    ]
    given += [("--batch-size", "train.batch_size", batch_size)]
    if device.type == "cuda":
        given.append(("bench", "deterministic", False))  # speed is what is asked for, of the textbook's kernels too
    common = [*(Override(*one) for one in given if one[2] is not None), *overrides]

    def config(**more: Any) -> Config:
        return pair.config(folder, device, [*common, *(Override("bench", k, v) for k, v in more.items())])

    variants: list[Variant] = []
    counted: list[Variant] = []
    matched: dict[str, tuple[str, ...]] = {}
    owns: dict[str, Own] = {}
    for name, words, precision, way in _ways(pair, device, precisions):
        owns[name] = own = Own(config(precision=precision, **way), device)
        variants.append(own.variant(name, f"fmrun, {precision}: {words}"))
        matched[name] = own.layers
    counted.append(owns["fm"].variant("fm_measuring", "a step that measures the share", measuring=True))
    for name in pair.book:
        stem = name.removesuffix("_nhwc")
        nhwc = stem != name
        words, step = STEPS[stem]
        book = Published(owns["fm"], owns["fm"].layers, torch.channels_last if nhwc else torch.contiguous_format)
        variants.append(book.variant(name, f"textbook, fp32, {'NHWC' if nhwc else 'NCHW'}: {words}", step))
        matched[name] = () if stem == "textbook_plain" else owns["fm"].layers
    units, forwards = _units(owns["fm"])
    chosen = owns["fm"].config
    return Bench(
        pair.preset(device),
        config(precision=precisions[0 if device.type == "cpu" else -1]),
        chosen.data.image_size if chosen.task == "generate" else chosen.data.patch_size,
        variants,
        counted,
        matched,
        frozenset(owns),
        {variant.name: variant.precision for variant in variants},
        units,
        forwards,
    )


def _ways(
    pair: Pair, device: torch.device, precisions: Sequence[str]
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """fmrun's own steps: name, words, precision, settings."""
    first, main = precisions[0], pair.layers["fm"]
    plain = {"feature_matching.weight": 0.0}
    at_once = {"train.update": "simultaneous"}
    said = "feature matching, {} layers"
    yield "plain", "no feature matching", first, plain
    for name, layers in pair.layers.items():
        yield name, said.format(layers), first, _matching(layers)
    yield "simultaneous_plain", "simultaneous, no feature matching", first, plain | at_once
    yield "simultaneous_fm", f"simultaneous, {said.format(main)}", first, _matching(main) | at_once
    for precision in precisions[1:]:
        yield f"plain_{precision}", "no feature matching", precision, plain
        yield f"fm_{precision}", said.format(main), precision, _matching(main)
    if device.type == "cuda":
        for name, words, settings in (
            ("compiled", "compiled", {"compile": True}),
            ("reduced", "compiled, reduce-overhead", {"compile": True, "compile_mode": "reduce-overhead"}),
            ("graphs", "CUDA graphs", {"cuda_graphs": True}),
        ):
            yield f"fm_{name}", f"{words}, {said.format(main)}", precisions[-1], _matching(main) | settings


def _matching(layers: str) -> dict[str, Any]:
    return {"feature_matching.layers": [layers]}


def _units(own: Own) -> tuple[dict[str, Unit], dict[str, Callable[[], object]]]:
    """A forward of each net, as a measure of passes and as a thing to time."""
    task, batch = own.state.task, own.draws[0][0]
    critic = task.critics[0]
    with torch.no_grad():
        image = task.generate(batch)

    def judge() -> Tensor:
        logits = critic(image, None).logits
        assert isinstance(logits, Tensor)
        return logits

    def generate() -> Tensor:
        made: Tensor = task.generate(batch)
        return made

    d, g = unit(judge), unit(generate)
    own.forget()
    forwards: dict[str, Callable[[], object]] = {
        "discriminator": torch.no_grad()(judge),
        "generator": torch.no_grad()(generate),
    }
    return {"discriminator": d.without(g), "generator": g.without(d)}, forwards
