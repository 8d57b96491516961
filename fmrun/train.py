"""The training loop, and what surrounds it: start, stop, resume, divergence."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import checkpoint, runs
from .checks import Strength, check_start, diagnose
from .config import Config
from .data.images import Feed, Images, open_data
from .dist import World
from .errors import OK, Diverged, FmrunError, UserError
from .grid import grid, save_png
from .health import Health, share_sentence
from .models.base import parameter_count
from .models.norm import has_batch_norm
from .precision import choose_device, choose_precision, set_determinism
from .report import Reporter, TensorBoard
from .runs import Run
from .state import State

FREE_ON_RESUME = ("log.", "eval.", "checkpoint.", "train.steps", "data.workers", "data.cache", "device")
"""What a resumed run may change: nothing here changes the experiment."""


class Stop:
    """Signals that save and stop. A second one aborts at once."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.signal = 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    @contextmanager
    def watching(self) -> Iterator[Stop]:
        before = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


class Session:
    """A run in training: its folder, state, data and the people watching."""

    def __init__(self, run: Run, state: State, train: Images, valid: Images | None, report: Reporter, stop: Stop):
        self.run, self.state, self.train, self.valid = run, state, train, valid
        self.report, self.stop, self.world, self.config = report, stop, state.world, state.config
        c = self.config
        self.feed = Feed(
            train,
            seed=c.seed,
            global_batch=c.train.batch_size,
            rank_slice=self.world.part(c.train.batch_size),
            device=state.device,
            cache=c.data.cache,
            workers=c.data.workers,
            hflip=c.data.hflip,
            start=state.step * state.draws_per_step,
        )
        self.board = TensorBoard(run.tensorboard, after=state.step or None) if c.log.tensorboard and self.world.first else None
        self.health = Health(run.metrics())
        self.best: dict[str, Any] | None = run.status().get("best")
        self._mark = (time.monotonic(), state.step)
        self._last: dict[str, Any] = {}

    def loop(self) -> None:
        """Train to the last step, or until a signal."""
        state, world, c = self.state, self.world, self.config
        draws = state.prepare(self.feed, state.step)
        self._explain(check_start(state, draws))
        self._mark = (time.monotonic(), state.step)
        with self.report.progress(c.train.steps, state.step, c.train.batch_size) as progress:
            while state.step < c.train.steps:
                state.advance(draws)
                done, last = state.step, state.step == c.train.steps
                stopped = world.any(bool(self.stop.signal))
                row = None
                if done % c.log.every == 0 or last:
                    row = self._read_out()
                progress.advance(done, row)
                if last or (c.log.sample_every and done % c.log.sample_every == 0):
                    self._preview()
                if last or stopped or done % c.checkpoint.every == 0:
                    self.save()
                if stopped:
                    return
                if not last:
                    draws = state.prepare(self.feed, done)

    def _explain(self, strength: Strength | None) -> None:
        if strength is None:
            return
        self.report.note(f"feature matching: {strength}")
        if strength.share == strength.share and self.config.feature_matching.balance == "none":
            sentence = share_sentence(strength.share, strength.weight)
            if sentence:
                self.report.warn(sentence)

    def _read_out(self) -> dict[str, Any]:
        """One row of metrics: the only place where training waits for the device."""
        state, c = self.state, self.config
        means = state.window.read(self.world)
        self.refuse_divergence()
        now = time.monotonic()
        since, step = self._mark
        row: dict[str, Any] = {"step": state.step, **means}
        if c.feature_matching.weight:
            row["fm/lambda"] = state.task.critics[0].matching_weight(state.step - 1)
        row["optim/lr_generator"] = float(state.optimisers["generator"].lr)
        row["time/images_per_second"] = (state.step - step) * c.train.batch_size / max(now - since, 1e-9)
        if c.eval.every and self.valid is not None and (state.step % c.eval.every == 0 or state.step == c.train.steps):
            row |= state.task.held_out(self.train, self.valid, c.eval.num)
        if self.world.first:
            self.run.append_metrics(row)
            self.run.write_status(state="running", step=state.step)
            if self.board:
                self.board.row(row)
            if sentence := self.health.read(row):
                self.report.warn(f"step {state.step}: {sentence}")
        self._last = row
        self._mark = (time.monotonic(), state.step)
        return row

    def refuse_divergence(self) -> None:
        """Raise Diverged, with the cause, if an update was not finite since the last look."""
        bad = self.state.guard.read()
        if bad is None:
            return
        step, net = bad
        self.state.step = step
        cause = diagnose(self.state, self.state.prepare(self.feed, step), net)
        kept = checkpoint.steps(self.run.checkpoints)
        back = f"the last checkpoint is of step {kept[-1]}" if kept else "no checkpoint had been written"
        raise Diverged(
            f"training diverged at step {step}: {cause}; no weight and no checkpoint holds it, {back}; start a new run "
            "with smaller learning rates (-s optim.generator.lr=1e-4 -s optim.discriminator.lr=1e-4) or a smaller "
            "--lambda-feature"
        )

    def _preview(self) -> None:
        self.refuse_divergence()
        state = self.state
        state.task.fit_average()
        images = state.task.preview(self.config.log.sample_count)
        if self.world.first:
            sheet = grid(images)
            save_png(sheet, self.run.samples / f"step-{state.step:08d}.png")
            if self.board:
                self.board.image("samples", sheet, state.step)

    def save(self) -> None:
        """Write a checkpoint, then drop the ones no longer wanted. Never saves a state that diverged."""
        self.refuse_divergence()
        state, c = self.state, self.config
        tensors = state.tensors()
        meta = {
            "config": c.model_dump(mode="json"),
            "data": self.train.fingerprint,
            "machine": checkpoint.machine(state.device, self.world.size),
            "window": state.window.counts,
        }

        def write() -> None:
            checkpoint.save(self.run.checkpoints, state.step, tensors, meta)
            keep = self._keep_best()
            checkpoint.rotate(
                self.run.checkpoints, keep_last=c.checkpoint.keep_last, keep_every=c.checkpoint.keep_every, keep=keep
            )
            self.run.write_status(state="running", step=state.step, best=self.best)

        self.world.together(write)

    def _keep_best(self) -> set[int]:
        """Note whether this checkpoint is the best by the chosen metric; the step of the best."""
        c = self.config.checkpoint
        if c.best is None:
            return set()
        value = self._last.get(c.best)
        if self._last and c.best not in self._last:
            known = ", ".join(k for k in self._last if k != "step")
            raise UserError(f"checkpoint.best: there is no metric '{c.best}'; this run has {known}")
        if value is not None and self._last["step"] == self.state.step:
            sign = 1 if c.best_mode == "min" else -1
            if self.best is None or self.best["metric"] != c.best or sign * value < sign * self.best["value"]:
                self.best = {"metric": c.best, "value": value, "step": self.state.step}
        return {self.best["step"]} if self.best is not None else set()

    def close(self) -> None:
        self.feed.close()
        if self.board:
            self.board.close()


def check_batch(config: Config, world: World) -> None:
    """UserError unless the global batch divides among processes and micro-batches."""
    size, ways = config.train.batch_size, world.size * config.train.accumulate
    if size % ways or size // ways < 2:
        raise UserError(
            f"train.batch_size is {size}; {world.size} processes with {config.train.accumulate} micro-batches each need a "
            f"multiple of {ways}, at least {2 * ways}"
        )


def warnings(config: Config, state: State) -> list[str]:
    """What a user should know about this experiment before it starts."""
    fm, task = config.feature_matching, state.task
    found = []
    if fm.weight and fm.match == "sample":
        found.append(
            "match 'sample' pairs each generated image with an unrelated real one, which rewards making every image the "
            "average of the data; use match=mean unless that is what you want to see"
        )
    if config.train.accumulate > 1:
        normed = [n for n, net in (("generator", task.generator), ("discriminator", task.critics[0].net)) if has_batch_norm(net)]
        if normed:
            found.append(
                f"batch norm in the {' and '.join(normed)} sees micro-batches of "
                f"{config.train.batch_size // config.train.accumulate}, not the batch of {config.train.batch_size}; "
                "this is not the same experiment as accumulate=1"
            )
    if config.losses.gan.type == "wgan" and config.discriminator.norm != "spectral" and not config.losses.gan.r1:
        found.append(
            "a Wasserstein critic has to be kept Lipschitz: add -s discriminator.norm=spectral or -s losses.gan.r1=10"
        )
    if config.losses.gan.type == "r3gan" and not (config.losses.gan.r1 and config.losses.gan.r2):
        found.append("r3gan is published with both penalties: add -s losses.gan.r1=1 -s losses.gan.r2=1")
    return found


def plan_lines(config: Config, state: State, train: Images, valid: Images | None) -> list[str]:
    """What is going to happen, for a human."""
    task, c = state.task, config
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    held = f" + {len(valid)} held out" if valid is not None else ""
    lines = [
        f"data: {len(train)}{held} images, {train.channels} × {train.size} × {train.size}, from {c.data.path}",
        f"nets: generator {parameter_count(task.generator):,} weights, "
        f"discriminator {parameter_count(task.critics[0].net):,}, on {state.device} in {precision[task.precision]}",
        f"training: steps {state.step} to {c.train.steps}, batch {c.train.batch_size}"
        + (f" over {state.world.size} processes" if state.world.size > 1 else ""),
    ]
    matching = task.critics[0].matching
    if matching is None:
        lines.append("feature matching: off")
    else:
        fm = c.feature_matching
        lines.append(
            f"feature matching: {fm.match} on {', '.join(matching.layers)}; λ {fm.weight:g}, balance {fm.balance}"
        )
    return lines


def prepare(config: Config, world: World, report: Reporter) -> tuple[Config, Images, Images | None, State]:
    """Device, data and nets of a config, all checked; UserError for whatever is wrong with them."""
    device = choose_device(config.device, world.local_rank)
    choose_precision(config.precision, device)
    set_determinism(config.deterministic, device)
    check_batch(config, world)
    train, valid = open_data(config.data, config.seed)
    data = config.data.model_copy(update={"channels": train.channels})
    config = config.model_copy(update={"data": data})
    return config, train, valid, State(config, device, world)


def start(
    config: Config, *, runs_dir: Path, name: str | None, preset: str, command: Sequence[str], report: Reporter, world: World
) -> int:
    """Train a new run; the exit code."""
    config, train, valid, state = prepare(config, world, report)
    run = world.together(
        lambda: runs.create(runs_dir, name, preset, config.model_dump(mode="json"), list(command))
    )
    report.note(f"run {run.name} in {run.path}")
    return _work(run, state, train, valid, report)


def dry_run(config: Config, report: Reporter, world: World) -> Config:
    """Everything `start` checks and prints, on one batch, without training or a run folder; the resolved config."""
    config, train, valid, state = prepare(config, world, report)
    for line in plan_lines(config, state, train, valid):
        report.note(line)
    for sentence in warnings(config, state):
        report.warn(sentence)
    c = config
    feed = Feed(
        train, seed=c.seed, global_batch=c.train.batch_size, rank_slice=world.part(c.train.batch_size),
        device=state.device, cache="none" if train.pixels is None else "ram", workers=0, hflip=c.data.hflip, start=0,
    )
    strength = check_start(state, state.prepare(feed, 0))
    if strength is not None:
        report.note(f"feature matching: {strength}")
    return config


def resume(
    run: Run, change: Callable[[dict[str, Any]], Config], *, report: Reporter, world: World
) -> int:
    """Continue a run where it stopped; the exit code. `change` turns its saved config into the one to go on with."""
    config = change(run.config())
    found, skipped = checkpoint.newest(run.checkpoints)
    for sentence in skipped:
        report.warn(f"{sentence}; going on from the checkpoint before")
    if found is None and skipped:
        raise UserError(
            f"run {run.name}: none of its {len(skipped)} checkpoints can be read; start again with fmrun train"
        )
    step = found.step if found is not None else 0
    if step >= config.train.steps:
        if step > config.train.steps:
            raise UserError(f"--steps {config.train.steps}: run {run.name} has already made {step} steps; give more")
        report.note(
            f"run {run.name} is finished: {step} steps. To train on: fmrun resume {run.name} --steps {2 * step}; "
            f"for pictures: fmrun sample {run.name}"
        )
        return OK
    config, train, valid, state = prepare(config, world, report)
    if found is None:
        report.warn(f"run {run.name} has no checkpoint yet; it starts again at step 0")
    else:
        _warn_inexact(found, train, state, report)
        state.restore(found.tensors, found.meta)
    return _work(run, state, train, valid, report, resumed=True)


def _warn_inexact(found: checkpoint.Checkpoint, train: Images, state: State, report: Reporter) -> None:
    changes = checkpoint.differences(found.meta["machine"], checkpoint.machine(state.device, state.world.size))
    if found.meta["data"] != train.fingerprint:
        changes.append("the data has changed")
    if changes:
        report.warn(f"resuming, but not to the bit as if uninterrupted: {'; '.join(changes)}")


def _work(
    run: Run, state: State, train: Images, valid: Images | None, report: Reporter, resumed: bool = False
) -> int:
    """Train under the run's lock, and leave its status true however it ends."""
    world, config = state.world, state.config
    with run.lock() if world.first else nullcontext(), Stop().watching() as stop:
        if world.first:
            checkpoint.clean(run.checkpoints)
            if resumed:
                run.cut_back(state.step)
                runs.write_atomic(run.config_file, runs.to_json(config.model_dump(mode="json")))
            run.write_status(state="running", step=state.step, steps=config.train.steps, exit_code=None, message=None)
        for line in plan_lines(config, state, train, valid):
            report.note(line)
        for sentence in warnings(config, state):
            report.warn(sentence)
        session = Session(run, state, train, valid, report, stop)
        try:
            session.loop()
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            kind = "diverged" if isinstance(error, Diverged) else "failed"
            message = str(error) if isinstance(error, FmrunError) else f"{type(error).__name__}: {error}"
            if world.first:
                run.try_status(state=kind, step=state.step, exit_code=code, message=message)
            raise
        finally:
            session.close()
        finished = state.step >= config.train.steps
        code = OK if finished else 128 + (stop.signal or signal.SIGTERM)
        if world.first:
            run.write_status(state="finished" if finished else "stopped", step=state.step, exit_code=code)
    _say_next(run, state, finished, report)
    return code


def _say_next(run: Run, state: State, finished: bool, report: Reporter) -> None:
    picture = run.samples / f"step-{state.step:08d}.png"
    if finished:
        report.note(f"finished {state.step} steps; the picture: {picture}")
        report.note(f"next: fmrun sample {run.name} · fmrun probe-layers {run.name} · fmrun resume {run.name} --steps N")
    else:
        report.note(f"stopped and saved at step {state.step}; to go on: fmrun resume {run.name}")
