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
from dataclasses import asdict, dataclass

from ..config.schema import Config
from ..data.grid import save_png
from ..data.store import Images
from ..metrics.quick import TrainingKid, extractor_name, metric_name, why_not
from ..runs import checkpoint
from ..runs.folder import Run
from ..runtime.errors import Diverged, FmrunError
from ..runtime.files import saving
from ..runtime.report import Reporter, TensorBoard
from ..tasks import Data, Monitor
from .health import Health, Row, share_sentence
from .start_checks import FINITE, HELD, Start, blind_sentence, check_start, compared, diagnose, review_balance
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


def explain(start: Start, state: State, report: Reporter) -> None:
    """Say how strong the generator's losses are beside each other, and what is odd about it."""
    if start.shares:
        shares = ", ".join(f"{name} {100 * share:.3g} %" for name, share in start.shares.items())
        report.note(f"gradients at the generated images, beside {compared(state.task.discriminators[0])}: {shares}")
    strength = start.strength
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
        known = state.task.discriminators[0].net.feature_names
        report.warn(blind_sentence(matching.match, strength.blind, known, config.discriminator.target is not None))
    if strength.held:
        report.warn(HELD.format(strength.balance))
    elif sentence := share_sentence(strength.share, strength.weight, strength.compared, matching.balance == "gradient"):
        report.warn(sentence)


@dataclass(frozen=True)
class Due:
    """What happens after a step."""

    log: bool
    """The losses since the last read-out."""
    evaluate: bool
    """Measurements on held-out images."""
    kid: bool
    sample: bool
    save: bool
    stop: bool

    @property
    def row(self) -> bool:
        return self.log or self.evaluate or self.kid


def due(config: Config, step: int, *, stopped: bool, held_out: bool, kid: bool) -> Due:
    """What is due once `step` updates have been made; a function of its arguments alone.

    `stopped`: by a signal; `held_out`: whether there are such images; `kid`: whether KID is measured in this run.
    """

    def every(steps: int) -> bool:
        return steps > 0 and step % steps == 0

    last = step == config.train.steps
    return Due(
        log=last or every(config.log.every),
        evaluate=held_out and config.eval.every > 0 and (last or every(config.eval.every)),
        kid=kid and (last or every(config.eval.kid_every)),
        sample=last or every(config.log.sample_every),
        save=last or stopped or every(config.checkpoint.every),
        stop=stopped,
    )


class Session:
    """A run in training: its folder, state, data and the people watching."""

    def __init__(
        self,
        run: Run,
        state: State,
        data: Data,
        monitor: Monitor,
        report: Reporter,
        stop: Stop,
        *,
        resumed: bool,
        best: checkpoint.Best | None = None,
    ):
        self.run, self.state, self.data, self.monitor = run, state, data, monitor
        self.report, self.stop, self.world, self.config = report, stop, state.world, state.config
        c = self.config
        start = state.step * state.batches_per_step
        self.feed = data.feed(state.world, state.device, start, cache=c.data.cache, workers=c.data.workers)
        self.board: TensorBoard | None = None
        if c.log.tensorboard and self.world.first:
            self.board = TensorBoard(run.tensorboard, after=state.step if resumed else None)
        self.health = Health(run.metrics(), c.feature_matching.balance == "gradient")
        self.best = best
        # what the first process has on its machine decides for all
        self.extractor = self.world.from_first(extractor_name(c, state.device) if self.world.first else None)
        self.kid: TrainingKid | None = None
        self._mark = (time.monotonic(), state.step)

    def loop(self) -> None:
        """Train to the last step, or until a signal."""
        state, world, c = self.state, self.world, self.config
        batches = state.prepare(self.feed, state.step)
        with state.task.eager():
            start = check_start(state, batches)
        explain(start, state, self.report)
        kid = self._start_kid()
        self._mark = (time.monotonic(), state.step)
        with self.report.progress(c.train.steps, state.step, c.train.batch_size) as progress:
            while state.step < c.train.steps:
                with self._own_errors():
                    state.advance(batches)
                with state.task.eager():
                    for sentence in review_balance(state, batches):
                        self.report.warn(f"step {state.step}: {sentence}")
                stopped = world.any(bool(self.stop.signal))
                now = due(c, state.step, stopped=stopped, held_out=self.data.valid is not None, kid=kid)
                row = self._row(now) if now.row else None
                progress.advance(state.step, row)
                if now.sample:
                    self._preview()
                if self._is_best(row) or now.save:
                    self.save()
                if now.stop:
                    return
                if state.step < c.train.steps:
                    with self._own_errors():
                        batches = state.prepare(self.feed, state.step)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What goes wrong inside may go wrong on this process alone, which then has to say so itself."""
        try:
            yield
        except FmrunError as error:
            error.everywhere = self.world.size == 1
            raise

    def _start_kid(self) -> bool:
        """Get ready to measure KID, where that is wanted; whether it will be."""
        c, generated, train = self.config, self.monitor.generated, self.data.train
        if generated is None:
            return False
        assert isinstance(train, Images)
        if reason := why_not(c, train, self.extractor):
            if not self.state.step:
                self.report.note(reason)
            return False
        if self.extractor is None or c.eval.kid_every > c.train.steps:
            return False
        with self.world.on_first_rank() as first:
            if first:
                self.kid = TrainingKid(c, self.extractor, train, generated, self.state.device)
        return True

    def _row(self, now: Due) -> Row:
        """Make a row of metrics, write it, and say what it means. The only place where training waits for the device."""
        state, c = self.state, self.config
        row: Row = {"step": state.step}
        if now.log:
            row |= self._read_out()
        self.refuse_divergence()
        if now.evaluate:
            with state.task.eager():
                row |= self.monitor.held_out(c.eval.num)
        if now.kid:
            state.fit_average()
        with self.world.on_first_rank() as first:
            if first:
                if now.kid and self.kid is not None:
                    row |= self.kid()
                self.run.append_metrics(row)
                self.run.write_status(state="running", step=state.step)
                if self.board:
                    with saving(self.run.tensorboard):
                        self.board.row(row)
                if sentence := self.health.read(row):
                    self.report.warn(f"step {state.step}: {sentence}")
        self._mark = (time.monotonic(), state.step)
        return self.world.from_first(row)  # what is decided by it, all decide alike

    def _read_out(self) -> Row:
        """Means since the last read-out."""
        state, c = self.state, self.config
        # A last step between read-outs leaves the window as a longer run would find it.
        row: Row = state.window.read(self.world, empty=state.step % c.log.every == 0)
        since, step = self._mark
        if c.feature_matching.weight:
            row["fm/lambda"] = state.task.discriminators[0].matching_weight(state.step - 1)
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
            causes = self.world.all_gather_object(diagnose(self.state, self.state.prepare(self.feed, step), net))
        cause = next((c for c in causes if not c.startswith(FINITE)), causes[0])
        kept = checkpoint.steps(self.run.checkpoints)
        back = f"the last checkpoint is of step {kept[-1]}" if kept else "no checkpoint had been written"
        raise Diverged(
            f"training diverged at step {step}: {cause}; the update was discarded; weights and checkpoints are unaffected, and {back}; start a new run "
            "with smaller learning rates (-s optim.generator.lr=1e-4 -s optim.discriminator.lr=1e-4) or a smaller "
            "--lambda-feature"
        )

    def _preview(self) -> None:
        self.refuse_divergence()
        state = self.state
        state.fit_average()
        sheet = self.monitor.preview(self.config.log.sample_count)
        with self.world.on_first_rank() as first:
            if first:
                save_png(sheet, self.run.samples / f"step-{state.step:08d}.png")
                if self.board:
                    with saving(self.run.tensorboard):
                        self.board.image("samples", sheet, state.step)

    def save(self) -> None:
        """Write a checkpoint, then drop the ones no longer wanted. Never saves a state that diverged."""
        self.refuse_divergence()
        state, c = self.state, self.config
        tensors = state.tensors()
        train, valid = self.data.train, self.data.valid
        meta = checkpoint.Meta(
            step=state.step,
            config=c.model_dump(mode="json"),
            data=train.fingerprint,
            held_out=None if valid is None else valid.fingerprint,
            images=checkpoint.ImagesIdentity(train.identity, None if valid is None else valid.identity),
            machine=checkpoint.machine(state.device, self.world.size),
            window=dict(state.window.counts),
            best=self.best,
        )

        with self.world.on_first_rank() as first:
            if first:
                checkpoint.save(self.run.checkpoints, tensors, meta)
                checkpoint.rotate(
                    self.run.checkpoints,
                    keep_last=c.checkpoint.keep_last,
                    keep_every=c.checkpoint.keep_every,
                    keep={self.best.step} if self.best is not None else set(),
                )
                best = None if self.best is None else asdict(self.best)
                self.run.write_status(state="running", step=state.step, saved=state.step, best=best)

    def _is_best(self, row: Row | None) -> bool:
        """Whether this step is the best so far by the chosen metric; takes note of it."""
        metric, mode = self.config.checkpoint.best, self.config.checkpoint.best_mode
        if metric == "auto":
            metric = metric_name(self.extractor) if self.extractor is not None else None
        value = row.get(metric) if row is not None and metric is not None else None
        if metric is None or value is None or not math.isfinite(value):
            return False
        sign = 1 if mode == "min" else -1
        if self.best is not None and self.best.metric == metric and sign * value >= sign * self.best.value:
            return False
        self.best = checkpoint.Best(metric, value, self.state.step)
        return True

    def close(self) -> None:
        self.feed.close()
        if self.board:
            self.board.close()
