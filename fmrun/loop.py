"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import checkpoint
from .checks import (
    FINITE,
    HELD,
    Strength,
    blind_sentence,
    check_start,
    diagnose,
    review_balance,
)
from .errors import Diverged, FmrunError
from .grid import save_png
from .health import Health, share_sentence
from .metrics.quick import QuickKid, extractor_name, metric_name, why_not
from .report import Reporter, TensorBoard
from .runs import Run, saving
from .state import State


class Stop:
    """Signals that save and stop. A second one aborts at once, also while the main thread waits for another process: there
    no handler of Python's runs, so a thread takes note."""

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n))

    def __init__(self) -> None:
        self.signal = 0

    def _listen(self, reader: socket.socket) -> None:
        while number := reader.recv(1):
            if number[0] in self.SIGNALS:
                self._receive(number[0])

    def _receive(self, number: int) -> None:
        if self.signal:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the progress bar hides the cursor
            os._exit(128 + number)
        self.signal = number

    @contextmanager
    def watching(self) -> Iterator[Stop]:
        ignored = [s for s in self.SIGNALS if s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN]  # nohup
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        thread.start()
        fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        before = {s: signal.signal(s, lambda number, frame: None) for s in self.SIGNALS if s not in ignored}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            signal.set_wakeup_fd(fd)
            writer.shutdown(socket.SHUT_WR)
            thread.join()
            reader.close()
            writer.close()


if hasattr(os, "register_at_fork"):  # a signal to a data worker is none to its parent
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def explain(strength: Strength | None, state: State, report: Reporter) -> None:
    """Say how strongly features will be matched, and what is odd about it."""
    if strength is None:
        return
    config, matching = state.config, state.config.feature_matching
    gan, since = config.losses.gan, matching.start_step
    words = f", as measured now; it acts from step {since} on" if since else ""
    if gan.weight and gan.start_step > since:
        words = (
            f", as measured now; it acts from step {since} on, the adversarial loss from step {gan.start_step} on: until "
            "then the share that is logged is of the generator's other losses"
        )
    report.note(f"feature matching: {strength}{words}")
    if strength.blind:
        known = state.task.critics[0].net.feature_names
        report.warn(blind_sentence(matching.match, strength.blind, known, config.discriminator.target is not None))
    if strength.held:
        report.warn(HELD.format(strength.balance))
    elif sentence := share_sentence(strength.share, strength.weight, strength.compared, matching.balance == "gradient"):
        report.warn(sentence)


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
        self.health = Health(run.metrics(), c.feature_matching.balance == "gradient")
        self.best = best
        # what the first process has on its machine decides for all
        self.extractor = state.world.together(lambda: extractor_name(c, state.device))
        self._kid = state.world.together(lambda: metric_name(self.extractor) if self.extractor is not None else None)
        self.quick: QuickKid | None = None
        self._mark = (time.monotonic(), state.step)

    def loop(self) -> None:
        """Train to the last step, or until a signal."""
        state, world, c = self.state, self.world, self.config
        draws = state.prepare(self.feed, state.step)
        with state.task.eager():
            strength = check_start(state, draws)
        explain(strength, state, self.report)
        measured = self._start_quick()
        self._mark = (time.monotonic(), state.step)
        with self.report.progress(c.train.steps, state.step, c.train.batch_size) as progress:
            while state.step < c.train.steps:
                with self._own_errors():
                    state.advance(draws)
                with state.task.eager():
                    for sentence in review_balance(state, draws):
                        self.report.warn(f"step {state.step}: {sentence}")
                done, last = state.step, state.step == c.train.steps
                stopped = world.any(bool(self.stop.signal))
                row = self._row(
                    log=last or done % c.log.every == 0,
                    evaluate=last or self._due(c.eval.every),
                    quick=measured and (last or self._due(c.eval.kid_every)),
                )
                progress.advance(done, row)
                if last or self._due(c.log.sample_every):
                    self._preview()
                if self._is_best(row) or last or stopped or self._due(c.checkpoint.every):
                    self.save()
                if stopped:
                    return
                if not last:
                    with self._own_errors():
                        draws = state.prepare(self.feed, done)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What goes wrong inside may go wrong on this process alone, which then has to say so itself."""
        try:
            yield
        except FmrunError as error:
            error.everywhere = self.world.size == 1
            raise

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _start_quick(self) -> bool:
        """Get ready to measure KID, where that is wanted; whether it will be."""
        c, world = self.config, self.world
        if reason := why_not(c, self.train, self.extractor):
            if not self.state.step:
                self.report.note(reason)
            return False
        if self.extractor is None or c.eval.kid_every > c.train.steps:
            return False
        task, name = self.state.task, self.extractor

        def make() -> None:
            self.quick = QuickKid(c, name, self.train, task.generated, task.device, self.report.warn)

        self.state.fit_average()
        world.together(make)
        return True

    def _quick_row(self) -> dict[str, Any]:
        """KID of the averaged generator, measured by the first process, and how long it took."""

        def measure() -> dict[str, Any]:
            assert self.quick is not None
            return {self.quick.name: self.quick()}

        start = time.monotonic()
        self.state.fit_average()
        row = self.world.together(measure)
        return row | {"time/kid_seconds": time.monotonic() - start}

    def _row(self, log: bool, evaluate: bool, quick: bool) -> dict[str, Any] | None:
        """A row of metrics, if it is time for one: a read-out, a measurement on held-out images, a quick KID, or several of
        them. The only place where training waits for the device."""
        state, c = self.state, self.config
        valid = self.valid if evaluate and c.eval.every else None
        if not (log or quick) and valid is None:
            return None
        row: dict[str, Any] = {"step": state.step}
        if log:
            row |= self._read_out()
        self.refuse_divergence()
        if valid is not None:
            with state.task.eager():
                row |= state.task.held_out(self.train, valid, c.eval.num)
        if quick:
            row |= self._quick_row()

        def write() -> None:
            self.run.append_metrics(row)
            self.run.write_status(state="running", step=state.step)
            if self.board:
                with saving(self.run.tensorboard):
                    self.board.row(row)

        self.world.together(write)
        if self.world.first and (sentence := self.health.read(row)):
            self.report.warn(f"step {state.step}: {sentence}")
        self._mark = (time.monotonic(), state.step)
        return self.world.together(lambda: row)  # what is decided by it, all decide alike

    def _read_out(self) -> dict[str, Any]:
        """Means since the last read-out."""
        state, c = self.state, self.config
        # A last step between read-outs leaves the window as a longer run would find it.
        row: dict[str, Any] = state.window.read(self.world, empty=state.step % c.log.every == 0)
        since, step = self._mark
        if c.feature_matching.weight:
            row["fm/lambda"] = state.task.critics[0].matching_weight(state.step - 1)
        row["optim/lr_generator"] = float(state.optimisers["generator"].lr)
        seconds = time.monotonic() - since
        row["time/images_per_second"] = (state.step - step) * c.train.batch_size / max(seconds, 1e-9)
        return row

    def refuse_divergence(self) -> None:
        """Raise Diverged, with the cause, if an update was not finite since the last look."""
        bad = self.state.guard.read()
        if bad is None:
            return
        step, net = bad
        self.state.step = step
        with self.state.task.eager():
            causes = self.world.collect(diagnose(self.state, self.state.prepare(self.feed, step), net))
        cause = next((c for c in causes if not c.startswith(FINITE)), causes[0])
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
        state.fit_average()
        shown = self.valid if self.valid is not None else self.train
        sheet = state.task.preview(shown, self.config.log.sample_count)

        def write() -> None:
            save_png(sheet, self.run.samples / f"step-{state.step:08d}.png")
            if self.board:
                with saving(self.run.tensorboard):
                    self.board.image("samples", sheet, state.step)

        self.world.together(write)

    def save(self) -> None:
        """Write a checkpoint, then drop the ones no longer wanted. Never saves a state that diverged."""
        self.refuse_divergence()
        state, c = self.state, self.config
        tensors = state.tensors()
        meta = {
            "config": c.model_dump(mode="json"),
            "data": self.train.fingerprint,
            "held_out": None if self.valid is None else self.valid.fingerprint,
            "images": {
                "train": self.train.identity,
                "held_out": None if self.valid is None else self.valid.identity,
            },
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
            self.run.write_status(state="running", step=state.step, saved=state.step, best=self.best)

        self.world.together(write)

    def _is_best(self, row: dict[str, Any] | None) -> bool:
        """Whether this step is the best so far by the chosen metric; takes note of it."""
        metric, mode = self.config.checkpoint.best, self.config.checkpoint.best_mode
        if metric == "auto":
            metric = self._kid
        value = row.get(metric) if row is not None and metric is not None else None
        if value is None or not math.isfinite(value):
            return False
        sign = 1 if mode == "min" else -1
        if self.best is not None and self.best["metric"] == metric and sign * value >= sign * self.best["value"]:
            return False
        self.best = {"metric": metric, "value": value, "step": self.state.step}
        return True

    def close(self) -> None:
        self.feed.close()
        if self.board:
            self.board.close()
