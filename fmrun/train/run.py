"""Starting and resuming runs: everything is checked before a folder is made, and a run's status is true however it ends."""

from __future__ import annotations

import shutil
import signal
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..config import trust
from ..config.losses import ramped
from ..config.presets import FREE_ON_RESUME, HORIZONS, PLACES, covers, flatten, from_json, render
from ..config.schema import Config, FeatureMatchingConfig, GanLossConfig
from ..config.tables import TASKS
from ..data.places import located, refuse_missing
from ..data.store import unlike
from ..metrics.extractors import HOW, available
from ..models.base import parameter_count
from ..models.layout import layout_of
from ..models.norm import has_batch_norm, has_spectral_norm
from ..runs import checkpoint
from ..runs import folder as runs
from ..runs.folder import Run
from ..runtime.allocator import keep_freed_memory
from ..runtime.dist import World
from ..runtime.errors import OK, Diverged, FmrunError, UserError, nearest
from ..runtime.files import Json, clean, saving, to_json, write_atomic
from ..runtime.precision import choose_device, choose_precision, deterministic_or_said, set_determinism, set_threads
from ..runtime.report import Reporter, counted, require_tensorboard
from ..tasks import Data, Monitor, kind
from .loop import Session, Stop, explain
from .memory import is_out_of_memory, within_memory
from .optim import lr_factor
from .start_checks import check_start
from .state import State

LOW_RATE = 0.1
"""Factor on the learning rates below which it is said."""


def check_batch(config: Config, world: World) -> None:
    """UserError unless the global batch divides among processes and micro-batches."""
    size, ways = config.train.batch_size, world.size * config.train.accumulate
    if size % ways or size // ways < 2:
        raise UserError(
            f"train.batch_size is {size}; {world.size} processes with {config.train.accumulate} micro-batches each need a "
            f"multiple of {ways}, at least {2 * ways}"
        )


def check_determinism(config: Config, device: torch.device) -> None:
    """UserError for a generator that cannot be trained as deterministically as the config asks."""
    if device.type == "cuda" and config.deterministic and config.generator.dysample and not config.generator.target:
        raise UserError(
            "generator.dysample samples by torch's grid_sample, whose backward pass has no deterministic form on a GPU; add "
            "-s deterministic=false, and runs no longer resume to the bit, or -s generator.dysample=false"
        )


def warnings(config: Config, state: State) -> list[str]:
    """What a user should know about this experiment before it starts."""
    fm, task = config.feature_matching, state.task
    sentences = []
    if fm.weight and fm.match == "sample" and not config.has_targets:
        sentences.append(
            "match 'sample' pairs each generated image with an unrelated real one, which rewards making every image the "
            "average of the data; use match=mean unless that is what you want to see"
        )
    late: dict[str, GanLossConfig | FeatureMatchingConfig] = {
        "adversarial training": config.losses.gan,
        "feature matching": fm,
    }
    missed = {name: term for name, term in late.items() if term.weight and term.start_step >= config.train.steps}
    if missed:
        first = min(term.start_step for term in missed.values())
        fields = {"adversarial training": "losses.gan.start_step", "feature matching": "feature_matching.start_step"}
        fix = " ".join(f"-s {fields[name]}=0" for name in missed)
        sentences.append(
            f"the run ends at step {config.train.steps}, before {' and '.join(missed)} begin{'s' * (len(missed) == 1)} (step "
            f"{first}): more --steps, or {fix} to begin at once"
        )
    if config.train.accumulate > 1:
        nets = {"generator": task.generator, "discriminator": task.discriminators[0].net}
        of_batch = [f"batch norm in the {name}" for name, net in nets.items() if has_batch_norm(net)]
        of_batch += [f"losses.{name}" for name in config.losses.of_batch]
        if of_batch:
            sentences.append(
                f"seen by micro-batches of {config.train.batch_size // config.train.accumulate}, not by the batch of "
                f"{config.train.batch_size}: {', '.join(of_batch)}; this is not the same experiment as accumulate=1"
            )
    if fm.weight and fm.estimator == "unbiased" and has_batch_norm(task.discriminators[0].net):
        sentences.append(
            "estimator 'unbiased' takes the features of a batch for independent, which batch norm makes them not: behind it "
            "more is subtracted than their noise; match before the norm, or use a discriminator without batch norm"
        )
    if getattr(task.discriminators[0].net, "ends_in_sigmoid", False) and config.losses.gan.type != "lsgan":
        sentences.append(
            f"the discriminator ends in a sigmoid, and losses.gan.type '{config.losses.gan.type}' takes logits, of any size: "
            "return them without the sigmoid, or add -s losses.gan.type=lsgan, which is for values from 0 to 1"
        )
    if (
        config.losses.gan.type == "wgan"
        and not config.losses.gan.r1
        and not has_spectral_norm(task.discriminators[0].net)
    ):
        own = config.discriminator.target is not None
        ways = "-s losses.gan.r1=10" if own else "-s discriminator.norm=spectral or -s losses.gan.r1=10"
        sentences.append(f"a Wasserstein critic has to be kept Lipschitz: add {ways}")
    if config.losses.gan.type == "r3gan" and not (config.losses.gan.r1 and config.losses.gan.r2):
        sentences.append("r3gan is published with both penalties: add -s losses.gan.r1=1 -s losses.gan.r2=1")
    return sentences


def plan_lines(config: Config, state: State, data: Data) -> list[str]:
    """What is going to happen, for a human."""
    task, c = state.task, config
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    lines = [
        f"data: {data.describe()}, from {c.data.path}",
        f"nets: generator {parameter_count(task.generator):,} weights, "
        f"discriminator {parameter_count(task.discriminators[0].net):,}, on {state.device} in {precision[task.precision]}",
        *(
            f"{name}: in the ordinary memory format (NCHW), for {net.target} does not take channels_last"
            for name, net, made in (
                ("generator", c.generator, task.generator),
                ("discriminator", c.discriminator, task.discriminators[0].net),
            )
            if layout_of(made) == torch.contiguous_format
        ),
        *(
            [f"logits: the mean over those at {len(paths)} places of what the discriminator returns"]
            if len(paths := getattr(task.discriminators[0].net, "paths", ())) > 1
            else []
        ),
        f"training: steps {state.step} to {c.train.steps}, batch {c.train.batch_size}"
        + (f" over {state.world.size} processes" if state.world.size > 1 else ""),
    ]
    schedule, first = c.optim.schedule, max(state.step, c.optim.schedule.warmup_steps)
    if schedule.decay != "none" and first < c.train.steps and lr_factor(schedule, c.train.steps - 1) < LOW_RATE:
        ahead = range(first, c.train.steps)
        low = ahead[bisect_left(ahead, True, key=lambda step: lr_factor(schedule, step) < LOW_RATE)]
        lines.append(f"learning rates: below a tenth of what is set from step {low} on (optim.schedule)")
    matching = task.discriminators[0].matching
    if matching is None:
        lines.append("feature matching: off")
    else:
        fm = c.feature_matching
        lines.append(
            f"feature matching: {fm.match} on {', '.join(matching.layers)}; λ {fm.weight:g}, balance {fm.balance}"
        )
    return lines


def prepare(config: Config, world: World, report: Reporter, fresh: bool = True) -> tuple[State, Data, Monitor]:
    """Device, data and nets of a config, all checked; UserError for whatever is wrong with them. `fresh`: its nets are yet
    to be trained."""
    device = choose_device(config.device, world.local_rank, world.size == 1)
    choose_precision(config.precision, device)
    set_determinism(config.deterministic, device)
    set_threads(config.threads)
    keep_freed_memory()
    if config.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError(
            "compile=true on the CPU needs a C++ compiler, and there is none; install g++, or leave compile out"
        )
    if config.cuda_graphs and (device.type != "cuda" or world.size > 1):
        here = f"this run is on {device}" if device.type != "cuda" else f"these are {world.size} processes"
        raise UserError(f"cuda_graphs=true is for one process on an NVIDIA GPU, and {here}; leave cuda_graphs out")
    check_batch(config, world)
    if config.log.tensorboard:
        require_tensorboard()
    parts = kind(config.task)
    data = parts.open(config, report.counting("checking images"))
    # errors quote the paths as typed; the run has to find them from other folders
    config = _placed(data.config)
    check_determinism(config, device)
    state = State(config, device, world, fresh)
    monitor = parts.monitor(state.task, data)
    extractor = config.eval.kid_extractor
    if extractor != "auto" and config.eval.kid_every and available([extractor]) is None:
        raise UserError(f"eval.kid_extractor: the weights of '{extractor}' are not on this machine: {HOW}")
    best = config.checkpoint.best
    if best not in (None, "auto") and best not in (
        known := state.metric_names(monitor.names if data.valid is not None else ())
    ):
        raise UserError(
            f"checkpoint.best: there is no metric '{best}'{nearest(best, known)}; this run has {', '.join(known)}"
        )
    return state, data, monitor


def start(
    config: Config,
    *,
    runs_dir: Path,
    name: str | None,
    preset: str,
    command: Sequence[str],
    report: Reporter,
    world: World,
) -> int:
    """Train a new run; the exit code."""

    def work() -> int:
        state, data, monitor = prepare(config, world, report)
        final = state.config
        resolved = final.model_dump(mode="json")
        run = None
        with world.on_first_rank() as first:
            if first:
                run = runs.create(runs_dir, name, preset, resolved, list(command), *trust.record(final), world.job)
        run = world.from_first(run)
        assert run is not None
        report.note(f"run {run.name} in {run.path}")
        return _work(run, state, data, monitor, report)

    with deterministic_or_said():
        return within_memory(config, world, work)


def dry_run(config: Config, report: Reporter, world: World, show: Callable[[Config], None] | None = None) -> None:
    """Everything `start` checks, on one batch, without training or a run folder.

    With `show`, which takes the resolved config, the plan is told as well.
    """
    state, data, _ = prepare(config, world, report)
    config, feed = state.config, data.feed(world, state.device, 0)
    with state.task.eager(), deterministic_or_said():
        measured = check_start(state, state.prepare(feed, 0))
    feed.close()
    if show is not None:
        show(config)
        for line in plan_lines(config, state, data):
            report.note(line)
    for sentence in warnings(config, state):
        report.warn(sentence)
    explain(measured, state, report)


def resume(run: Run, change: Callable[[Json], Config], *, report: Reporter, world: World) -> int:
    """Continue a run where it stopped; the exit code. `change` turns its saved config into the one to go on with."""
    config = change(run.config())
    last, skipped = checkpoint.newest(run.checkpoints)
    if last is None and skipped:
        raise UserError(
            f"run {run.name}: none of its {len(skipped)} checkpoints can be read; start again with fmrun train"
        )
    if last is None and run.has_saved:
        raise run.no_checkpoint()
    for sentence in skipped:
        report.warn(f"{sentence}; going on from the checkpoint before")
    if last is not None:
        _refuse_edits(run, config, last)
        _refuse_other_past(run, config, last)
    for target in trust.changed(config, run.code()):
        report.warn(
            f"the code of {target} is not what run {run.name} was started with; that lies in {run.path / 'code'}"
        )
    step = last.step if last is not None else 0
    if step >= config.train.steps:
        if step > config.train.steps:
            raise UserError(
                f"--steps {config.train.steps}: run {run.name} has already made {counted(step, 'step')}; give more"
            )
        if world.first and run.state == "interrupted":  # killed between the last checkpoint and the last word
            run.write_status(state="finished", step=step, exit_code=OK)
        report.note(
            f"run {run.name} is finished: {counted(step, 'step')}. To train on: {run.command('resume')} --steps {2 * step}; "
            f"for pictures: {run.command('sample')}"
        )
        return OK
    refuse_missing(
        config.data,
        config.task,
        f"; where the images of run {run.name} were moved, say where to: {run.command('resume')} --data PATH (others than "
        "data.path with -s)",
    )

    def work() -> int:
        state, data, monitor = prepare(config, world, report, fresh=last is None)
        if last is None:
            report.warn(f"run {run.name} has no checkpoint yet; it starts again at step 0")
        else:
            _refuse_others(run, config, last, data)
            _warn_inexact(last, data, state, report)
            state.restore(last)
        best = last.meta.best if last else None
        return _work(run, state, data, monitor, report, resumed=True, best=best)

    with deterministic_or_said():
        return within_memory(config, world, work)


def _refuse_edits(run: Run, config: Config, last: checkpoint.Checkpoint) -> None:
    """UserError if the run's config file no longer describes the experiment its checkpoint belongs to."""
    then, now = flatten(from_json(last.meta.config)), flatten(config)
    may = (*FREE_ON_RESUME, *HORIZONS, *PLACES)
    edited = [key for key, value in then.items() if now[key] != value and not covers(may, key)]
    if edited:
        raise UserError(
            f"{run.config_file} has been edited: it says {render(edited[0], now[edited[0]])}, and the run was trained "
            f"with {render(edited[0], then[edited[0]])}; put it back, or start the other experiment with fmrun train"
        )


def _refuse_other_past(run: Run, config: Config, last: checkpoint.Checkpoint) -> None:
    """UserError where a horizon that has been changed would have made steps different that the run has made."""
    before = from_json(last.meta.config)
    then, now = flatten(before), flatten(config)
    moved = [key for key in now if covers(HORIZONS, key) and then.get(key) != now[key]]
    if (
        moved
        and (step := next((s for s in range(last.step) if _course(before, s) != _course(config, s)), None)) is not None
    ):
        raise UserError(
            f"{', '.join(render(key, now[key]) for key in moved)}: this would change step {step}, and run {run.name} has made "
            f"{counted(last.step, 'step')}; a resumed run can change only what is still ahead of it"
        )


def _course(config: Config, step: int) -> tuple[float, ...]:
    """The factors that follow from horizons: on the learning rates and on every term of the generator's loss."""
    losses, matching = config.losses, config.feature_matching
    images = (ramped(loss, step) for loss in losses.image.values())
    return lr_factor(config.optim.schedule, step), ramped(losses.gan, step), ramped(matching, step), *images


def _refuse_others(run: Run, config: Config, last: checkpoint.Checkpoint, data: Data) -> None:
    """UserError where other images than the run's lie where its own were said to be now, or where files can or cannot be
    read that could not or could before, of which leaving out other ones would hold others out of training."""
    before = from_json(last.meta.config)
    then, now = ({key: flatten(c)[key] for key in PLACES} for c in (_placed(before), _placed(config)))
    moved = [key for key in PLACES if then[key] != now[key]]
    if not (moved or config.data.skip_unreadable):
        return
    problems = []
    for key, name, images in (("train", "trained on", data.train), ("held_out", "held out", data.valid)):
        if how := unlike(getattr(last.meta.images, key), None if images is None else images.identity):
            problems.append(f"{name}: {how}")
    if problems:
        said = " and ".join(render(key, now[key]) for key in moved or PLACES[:1])
        way_out = "`resume --data` accepts only the run's own images at a new path; to use other images, start a new run with `fmrun train`"
        if not moved:
            way_out = "put them back as they were, or start another experiment: fmrun train"
        raise UserError(f"{said}: these are not the images of run {run.name} ({'; '.join(problems)}); {way_out}")


def _placed(config: Config) -> Config:
    return config.model_copy(update={"data": located(config.data, config.task)})


def _warn_inexact(last: checkpoint.Checkpoint, data: Data, state: State, report: Reporter) -> None:
    changes = checkpoint.machine_differences(last.meta.machine, checkpoint.machine(state.device, state.world.size))
    if last.meta.data != data.train.fingerprint:
        changes.append("the data has changed")
    held_out = None if data.valid is None else data.valid.fingerprint
    if last.meta.held_out != held_out:
        changes.append("the held-out data has changed")
    if changes:
        report.warn(f"resuming, but results may differ from an uninterrupted run: {'; '.join(changes)}")


def _work(
    run: Run,
    state: State,
    data: Data,
    monitor: Monitor,
    report: Reporter,
    *,
    resumed: bool = False,
    best: checkpoint.Best | None = None,
) -> int:
    """Train under the run's lock, and leave its status true however it ends."""
    world, config = state.world, state.config
    with ExitStack() as held, Stop().watching() as stop:
        with world.on_first_rank() as first:
            if first:
                held.enter_context(run.lock())
                _begin(run, state, resumed)
        for line in plan_lines(config, state, data):
            report.note(line)
        for sentence in warnings(config, state):
            report.warn(sentence)
        session = None
        try:
            session = Session(run, state, data, monitor, report, stop, resumed=resumed, best=best)
            session.loop()
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            kind = "diverged" if isinstance(error, Diverged) else "failed"
            message = str(error) if isinstance(error, FmrunError) else f"{type(error).__name__}: {error}"
            alone = isinstance(error, FmrunError) and error.everywhere is False
            if alone or (world.first and run.status().get("state") == "running" and not is_out_of_memory(error)):
                run.try_status(state=kind, step=state.step, exit_code=code, message=message)
            raise
        finally:
            if session is not None:
                session.close()
        finished = state.step >= config.train.steps
        code = OK if finished else 128 + (stop.signal or signal.SIGTERM)
        if world.first:
            run.write_status(state="finished" if finished else "stopped", step=state.step, exit_code=code)
    _say_next(run, state, finished, report)
    return code


def _begin(run: Run, state: State, resumed: bool) -> None:
    """Make the folder that of a run which is about to take the step after the state's."""
    for folder in (run.path, run.checkpoints, run.samples):
        clean(folder)
    if resumed:
        run.cut_back(state.step)
        with saving(run.config_file):
            write_atomic(run.config_file, to_json(state.config.model_dump(mode="json")))
    run.write_status(state="running", step=state.step, steps=state.config.train.steps, exit_code=None, message=None)


def _say_next(run: Run, state: State, finished: bool, report: Reporter) -> None:
    picture = run.samples / f"step-{state.step:08d}.png"
    if finished:
        report.note(f"finished {counted(state.step, 'step')}; the picture: {picture}")
        row = (run.metrics() or [{}])[-1]
        if "eval/psnr_y" in row:
            ours, bicubic = (
                "infinite" if value is None else f"{value:.2f} dB"
                for value in (row["eval/psnr_y"], row["eval/psnr_y_bicubic"])
            )
            report.note(f"on held-out photographs: PSNR-Y {ours}, of bicubic {bicubic}")
        report.note(
            f"next: {run.command('sample')}{TASKS[state.config.task].sample_options} · {run.command('eval')} · {run.command('probe-layers')} · "
            f"{run.command('resume')} --steps N"
        )
    else:
        report.note(f"stopped and saved at step {state.step}; to go on: {run.command('resume')}")
