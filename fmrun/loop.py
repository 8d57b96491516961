"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from . import checkpoint
from .checks import Strength, blind_sentence, check_start, diagnose
from .errors import Diverged
from .grid import save_png
from .health import Health, share_sentence
from .report import Reporter, TensorBoard
from .runs import Run
from .state import State


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

    def __init__(
        self,
        run: Run,
        state: State,
        train: Any,
        valid: Any,
        report: Reporter,
        stop: Stop,
        *,
        resumed: bool,
        best: dict[str, Any] | None = None,
    ):
        self.run, self.state, self.train, self.valid = run, state, train, valid
        self.report, self.stop, self.world, self.config = report, stop, state.world, state.config
        c = self.config
        self.feed = state.task.feed(
            train, cache=c.data.cache, workers=c.data.workers, start=state.step * state.draws_per_step
        )
        self.board: TensorBoard | None = None
        if c.log.tensorboard and self.world.first:
            self.board = TensorBoard(run.tensorboard, after=state.step if resumed else None)
        self.health = Health(run.metrics())
        self.best = best
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
        if strength.blind:
            names = self.state.task.critics[0].net.feature_names
            self.report.warn(blind_sentence(self.config.feature_matching.match, strength.blind, names))
        if strength.share == strength.share and self.config.feature_matching.balance == "none":
            sentence = share_sentence(strength.share, strength.weight, strength.compared)
            if sentence:
                self.report.warn(sentence)

    def _read_out(self) -> dict[str, Any]:
        """One row of metrics: the only place where training waits for the device."""
        state, c = self.state, self.config
        # A last step between read-outs leaves the window as a longer run would find it.
        means = state.window.read(self.world, empty=state.step % c.log.every == 0)
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
        shown = self.valid if self.valid is not None else self.train
        sheet = state.task.preview(shown, self.config.log.sample_count)
        if self.world.first:
            save_png(sheet, self.run.samples / f"step-{state.step:08d}.png")
            if self.board:
                self.board.image("samples", sheet, state.step)

    def save(self) -> None:
        """Write a checkpoint, then drop the ones no longer wanted. Never saves a state that diverged."""
        self.refuse_divergence()
        state, c = self.state, self.config
        tensors = state.tensors()
        self._note_best()
        meta = {
            "config": c.model_dump(mode="json"),
            "data": self.train.fingerprint,
            "machine": checkpoint.machine(state.device, self.world.size),
            "window": state.window.counts,
            "best": self.best,
        }

        def write() -> None:
            checkpoint.save(self.run.checkpoints, state.step, tensors, meta)
            checkpoint.rotate(
                self.run.checkpoints,
                keep_last=c.checkpoint.keep_last,
                keep_every=c.checkpoint.keep_every,
                keep={self.best["step"]} if self.best is not None else set(),
            )
            self.run.write_status(state="running", step=state.step, best=self.best)

        self.world.together(write)

    def _note_best(self) -> None:
        """Note whether this step is the best by the chosen metric."""
        c = self.config.checkpoint
        if c.best is None:
            return
        value = self._last.get(c.best)
        if value is not None and self._last["step"] == self.state.step:
            sign = 1 if c.best_mode == "min" else -1
            if self.best is None or self.best["metric"] != c.best or sign * value < sign * self.best["value"]:
                self.best = {"metric": c.best, "value": value, "step": self.state.step}

    def close(self) -> None:
        self.feed.close()
        if self.board:
            self.board.close()
