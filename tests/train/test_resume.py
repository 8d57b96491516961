"""A resumed run is the run that was never interrupted, to the bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from support.commands import (
    SMALL,
    TINY,
    Background,
    fmrun,
    forget,
    good,
    rows,
    same_runs,
    same_tensors,
    saved,
    status,
    steps,
    timeless,
    train,
    write_folder,
    write_images,
)

from fmrun.runs import checkpoint

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")


def s(*settings: str) -> tuple[str, ...]:
    """`-s` before each."""
    return tuple(part for setting in settings for part in ("-s", setting))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def test_seven_steps_and_five_are_twelve() -> None:
    """Uninterrupted; seven then resumed; cut at the checkpoint of seven; and checkpoints leave no trace."""
    cadence = s("log.every=4", "log.sample_every=4")
    train("--steps", "12", "--name", "whole", *cadence)
    train("--steps", "12", "--name", "cut", *cadence, *s("checkpoint.every=7"))
    train("--steps", "7", "--name", "resumed", *cadence)
    good("resume", "resumed", "--steps", "12")
    assert [row["step"] for row in rows(RUNS / "resumed")] == [4, 7, 8, 12]
    same_runs(RUNS / "whole", RUNS / "resumed", 12, 7)
    same_runs(RUNS / "whole", RUNS / "cut", 12)

    shutil.copytree(RUNS / "cut", RUNS / "killed")
    forget(RUNS / "killed", 7)
    done = good("resume", "killed")
    assert "steps 7 to 12" in done.err
    assert not done.warnings
    same_runs(RUNS / "whole", RUNS / "killed", 12)
    names = {run: sorted(p.name for p in (RUNS / run / "samples").iterdir()) for run in ("whole", "killed")}
    assert names["whole"] == names["killed"] == [f"step-{n:08d}.png" for n in (4, 8, 12)]
    assert status(RUNS / "killed")["state"] == "finished"
    assert status(RUNS / "killed")["exit_code"] == 0


VARIATIONS = {
    "bf16": ("precision=bf16",),
    "sliced": ("feature_matching.match=sliced",),
    "running": ("feature_matching.estimator=running", "feature_matching.criterion=charbonnier"),
    "unbalanced": ("feature_matching.balance=none", "feature_matching.start_step=2", "feature_matching.ramp=8"),
    "measured": ("feature_matching.measure_every=3", "feature_matching.start_step=5"),
    "spectral": ("discriminator.norm=spectral", "losses.gan.type=hinge", "optim.clip_grad_norm=0.5"),
    "accumulate": ("train.accumulate=2", "discriminator.norm=group"),
    "updates": ("train.d_updates=2", "train.g_updates=2"),
    "simultaneous": ("train.update=simultaneous", "losses.gan.r1=1", "losses.gan.penalty_every=3"),
    "augment": ("train.augment=color,translation,cutout", "data.hflip=true"),
    "r3gan": (
        "losses.gan.type=r3gan",
        "losses.gan.r1=1",
        "losses.gan.r2=1",
        "losses.gan.penalty_every=4",
        "discriminator.norm=none",
    ),
    "schedule": (
        "optim.schedule.warmup_steps=9",
        "optim.schedule.decay=cosine",
        "optim.schedule.decay_start=6",
        "optim.schedule.decay_end=12",
        "ema.decay=0.9",
        "ema.warmup=2",
    ),
    "frozen": ("discriminator.train=false", "losses.gan.weight=0", "feature_matching.balance=none"),
    "measurements": ("data.valid_fraction=0.3", "eval.every=5", "checkpoint.best=eval/d_valid"),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_exact_with(name: str) -> None:
    train("--steps", "12", "--name", "whole", *s(*VARIATIONS[name], "log.every=5", "checkpoint.every=7"))
    shutil.copytree(RUNS / "whole", RUNS / "killed")
    forget(RUNS / "killed", 7)
    good("resume", "killed")
    same_runs(RUNS / "whole", RUNS / "killed", 12)


def test_exact_in_the_middle_of_an_epoch_of_streamed_images() -> None:
    write_folder(Path("pictures"), count=20)
    flags = (
        *SMALL,
        "--data",
        "pictures",
        *s("data.image_size=28", "data.cache=none", "data.workers=2", "data.hflip=true"),
    )
    good("train", *flags, "--steps", "12", "--name", "whole")
    good("train", *flags, "--steps", "7", "--name", "halves")
    done = good("resume", "halves", "--steps", "12", *s("data.workers=1"))
    assert not done.warnings
    same_runs(RUNS / "whole", RUNS / "halves", 12, 7)
    # where images are kept changes nothing either
    good("train", *flags, "--steps", "12", "--name", "in-memory", *s("data.cache=ram"))
    same_runs(RUNS / "whole", RUNS / "in-memory", 12)


def test_survives_five_kills() -> None:
    """Killed at random moments, resumed each time: the bits of a run left alone, and no step stands twice."""
    flags = (*TINY, "--steps", "60", *s("checkpoint.every=3", "log.every=2", "log.sample_every=50"))
    good("train", *flags, "--name", "whole")
    random_ = random.Random(5)
    run = RUNS / "killed"
    process = Background("train", *flags, "--name", "killed")
    target = 0
    for _ in range(5):
        target += random_.randint(1, 6)
        process.until(lambda: run.is_dir() and max(steps(run), default=0) >= target)  # noqa: B023
        time.sleep(random_.random() * 0.1)
        assert process.kill().code == -signal.SIGKILL
        target = max(steps(run))
        assert target < 54, "too fast to be killed five times"
        process = Background("resume", "killed")
    done = process.end()
    assert done.code == 0, done.err
    assert not [w for w in done.warnings if "step " not in w]
    same_runs(RUNS / "whole", run, 60)
    assert [row["step"] for row in rows(run)] == list(range(2, 61, 2))
    assert not list(run.rglob("*.tmp"))


def test_killed_before_the_first_checkpoint_starts_again() -> None:
    train("--steps", "6", "--name", "whole")
    train("--steps", "6", "--name", "early", *s("log.every=2"))
    forget(RUNS / "early", 0)
    done = good("resume", "early", *s("log.every=50"))
    assert "run early has no checkpoint yet; it starts again at step 0" in done.err
    same_runs(RUNS / "whole", RUNS / "early", 6)


def test_pictures_torn_by_a_kill_are_removed() -> None:
    train("--steps", "2", "--name", "run")
    torn = RUNS / "run" / "samples" / ".step-00000002.png.123.tmp"
    torn.touch()
    good("resume", "run", "--steps", "4")
    assert not torn.exists()


def test_a_run_whose_checkpoints_are_gone_says_so_and_keeps_its_rows() -> None:
    train("--steps", "4", "--name", "finished", *s("log.every=2"))
    train("--steps", "4", "--name", "killed", *s("log.every=2", "checkpoint.every=3"))
    forget(RUNS / "killed", 3)
    for name in ("finished", "killed"):
        for step in steps(RUNS / name):
            checkpoint.path_of(RUNS / name / "checkpoints", step).unlink()
        before = rows(RUNS / name)
        done = fmrun("resume", name, "--steps", "6")
        assert done.code == 2
        (error,) = done.errors
        assert f"the checkpoints of run {name} are gone from runs/{name}/checkpoints; put them back, or" in error
        assert rows(RUNS / name) == before


def test_a_finished_run_says_so() -> None:
    train("--steps", "2", "--name", "short")
    before = (RUNS / "short" / "status.json").read_bytes()
    done = good("resume", "short")
    assert "run short is finished: 2 steps" in done.err
    assert "fmrun resume short --steps 4" in done.err
    assert done.out == ""
    assert (RUNS / "short" / "status.json").read_bytes() == before


def test_killed_after_the_last_checkpoint_is_finished() -> None:
    train("--steps", "2", "--name", "short")
    forget(RUNS / "short", 2)
    assert "interrupted" in good("runs").out
    assert "is finished" in good("resume", "short").err
    assert status(RUNS / "short")["state"] == "finished"
    assert status(RUNS / "short")["exit_code"] == 0


def test_the_newest_run_is_resumed_by_default() -> None:
    train("--steps", "2", "--name", "older")
    train("--steps", "2", "--name", "newer")
    good("resume", "--steps", "3")
    assert (steps(RUNS / "older"), steps(RUNS / "newer")) == ([2], [2, 3])


def test_fewer_steps_than_made_are_refused() -> None:
    train("--steps", "4", "--name", "longer")
    done = fmrun("resume", "longer", "--steps", "3")
    assert done.code == 2
    assert done.errors == ["error: --steps 3: run longer has already made 4 steps; give more"]


def test_cadence_may_change_and_changes_no_bit() -> None:
    train("--steps", "12", "--name", "whole")
    train("--steps", "6", "--name", "other")
    good(
        "resume",
        "other",
        "--steps",
        "12",
        *s("log.every=3", "checkpoint.every=4", "log.sample_every=5", "eval.every=2"),
    )
    assert [row["step"] for row in rows(RUNS / "other")] == [6, 9, 12]
    config = json.loads((RUNS / "other" / "config.json").read_text())
    assert (config["log"]["every"], config["train"]["steps"]) == (3, 12)
    whole, other = (
        {name: t for name, t in saved(RUNS / run, 12).tensors.items() if not name.startswith("window.")}
        for run in ("whole", "other")
    )
    same_tensors(whole, other)


def test_another_experiment_is_refused_by_name() -> None:
    train("--steps", "2", "--name", "run")
    before = {p: p.read_bytes() for p in (RUNS / "run").rglob("*") if p.is_file()}
    for setting in ("optim.generator.lr=1e-3", "seed=1", "train.batch_size=16", "feature_matching.weight=0.2"):
        done = fmrun("resume", "run", "--steps", "4", "-s", setting)
        assert (done.code, done.out) == (2, "")
        (error,) = done.errors
        assert error.startswith(f"error: -s {setting}: {setting.partition('=')[0]} would ")
        assert "another experiment" in error
        assert "train.steps" in error
        assert before == {p: p.read_bytes() for p in (RUNS / "run").rglob("*") if p.is_file()}


def test_a_path_that_is_set_is_told_the_flag() -> None:
    train("--steps", "2", "--name", "run")
    (error,) = fmrun("resume", "run", *s("data.path=other")).errors
    assert error.startswith("error: -s data.path=other: where the run's images were moved to is said by --data PATH")


def test_a_run_that_never_saved_refuses_what_cannot_be_read() -> None:
    folder = write_folder(Path("pictures"), count=10)
    good("train", *SMALL, "--data", "pictures", *s("data.image_size=28"), "--steps", "2", "--name", "run")
    forget(RUNS / "run", 0)
    (folder / "001.png").write_bytes(b"")
    (error,) = fmrun("resume", "run", "--steps", "4").errors
    assert "001.png" in error


def test_an_edited_config_is_refused_by_name() -> None:
    train("--steps", "2", "--name", "run")
    file = RUNS / "run" / "config.json"
    config = json.loads(file.read_text())
    config["generator"]["width"] = 5
    file.write_text(json.dumps(config))
    done = fmrun("resume", "run", "--steps", "4")
    assert done.code == 2
    (error,) = done.errors
    assert "generator.width" in error
    assert "config.json" in error


def test_a_flipped_byte_costs_one_checkpoint() -> None:
    flags = s("checkpoint.every=3", "log.every=2")
    train("--steps", "12", "--name", "whole", *flags)
    train("--steps", "6", "--name", "damaged", *flags)
    flip_byte(checkpoint.path_of(RUNS / "damaged" / "checkpoints", 6))
    done = good("resume", "damaged", "--steps", "12")
    (warning,) = done.warnings
    assert "step-00000006.safetensors is damaged" in warning
    assert "going on from the checkpoint before" in warning
    assert "steps 3 to 12" in done.err
    same_runs(RUNS / "whole", RUNS / "damaged", 12)


def test_no_readable_checkpoint_is_one_sentence() -> None:
    train("--steps", "6", "--name", "damaged", *s("checkpoint.every=3"))
    for step in steps(RUNS / "damaged"):
        flip_byte(checkpoint.path_of(RUNS / "damaged" / "checkpoints", step))
    done = fmrun("resume", "damaged", "--steps", "12")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: run damaged: none of its 2 checkpoints can be read; start again with fmrun train"
    ]


def test_changed_data_is_a_warning() -> None:
    train("--steps", "2", "--name", "run")
    write_images(Path("images.npz"), seed=1)
    done = good("resume", "run", "--steps", "4")
    assert done.warnings == [
        "warning: resuming, but results may differ from an uninterrupted run: the data has changed"
    ]


def test_images_are_found_from_another_folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--steps", "4", "--name", "whole", *s("log.every=1"))
    train("--steps", "2", "--name", "run", *s("log.every=1"))
    other = workplace / "other"
    other.mkdir()
    write_images(other / "images.npz", seed=1)
    monkeypatch.chdir(other)
    done = good("resume", "run", "--steps", "4", "--runs-dir", "../runs")
    assert done.warnings == []
    same_runs(workplace / RUNS / "whole", workplace / RUNS / "run", 4)
    paths = []
    for folder, data in ((workplace, "images.npz"), (other, "../images.npz"), (other, "images.npz")):
        monkeypatch.chdir(folder)
        paths.append(json.loads(good("train", *TINY, "--data", data, "--dry-run").out)["data"]["path"])
    assert paths[0] == paths[1] != paths[2]


def test_the_parent_of_a_link_is_not_the_parent_of_its_target(workplace: Path) -> None:
    (workplace / "far" / "away").mkdir(parents=True)
    (workplace / "link").symlink_to(workplace / "far" / "away")
    write_images(workplace / "far" / "images.npz", seed=1)
    done = good("train", *TINY, "--data", "link/../images.npz", "--dry-run")
    assert Path(json.loads(done.out)["data"]["path"]).samefile("far/images.npz")


def test_images_that_were_moved_are_asked_for(workplace: Path) -> None:
    train("--steps", "4", "--name", "whole", *s("log.every=1"))
    train("--steps", "2", "--name", "run", *s("log.every=1"))
    Path("images.npz").rename("moved.npz")
    done = fmrun("resume", "run", "--steps", "4")
    assert done.code == 2
    (error,) = done.errors
    assert f"data.path: '{workplace / 'images.npz'}' does not exist" in error
    assert "fmrun resume run --data PATH" in error
    (error,) = fmrun("eval", "run").errors
    assert "does not exist" in error
    assert "--data PATH" in error
    done = good("resume", "run", "--data", "moved.npz", "--steps", "3")
    assert done.warnings == []
    assert good("resume", "run", "--steps", "4").warnings == []
    same_runs(RUNS / "whole", RUNS / "run", 4)
    write_images(Path("others.npz"), seed=1)
    done = fmrun("resume", "run", "--data", "others.npz", "--steps", "5")
    assert done.code == 2
    assert "these are not the images of run run (trained on: other contents)" in done.errors[0]


SOME = (*SMALL, "--data", "pictures", *s("data.image_size=28", "data.valid_path=held"))


def test_a_copy_of_the_images_is_the_same_images_and_anything_else_is_not() -> None:
    write_folder(Path("pictures"), count=10)
    write_folder(Path("held"), count=4)
    good("train", *SOME, "--steps", "1", "--name", "run")
    for name in ("pictures", "held"):
        shutil.copytree(name, f"copy/{name}", copy_function=shutil.copyfile)  # with new times of change
    assert good("resume", "run", "--data", "copy/pictures", "--steps", "2").warnings == []
    assert good("resume", "run", *s("data.valid_path=copy/held"), "--steps", "3").warnings == []

    def refused(*flags: str) -> str:
        done = fmrun("resume", "run", *flags, "--steps", "4")
        assert done.code == 2, done.err
        return done.errors[0]

    assert "trained on: 4 instead of 10" in refused("--data", "held")
    assert "held out: 10 instead of 4" in refused(*s("data.valid_path=pictures"))
    assert "held out: none instead of 4" in refused(*s("data.valid_path=none"))
    (Path("pictures") / "001.png").rename("pictures/renamed.png")
    assert "trained on: other names" in refused("--data", "pictures")
    (Path("held") / "001.png").write_bytes((Path("held") / "001.png").read_bytes() + b"0")
    error = refused(*s("data.valid_path=held"))
    assert "held out: other sizes" in error
    assert f"data.valid_path={Path('held').absolute()}" in error
    (Path("copy/held/001.png")).write_bytes((Path("held") / "001.png").read_bytes())
    (warning,) = good("resume", "run", "--steps", "4").warnings  # at the same place, it is a warning
    assert warning.endswith("the held-out data has changed")


def test_a_finished_run_needs_no_images() -> None:
    train("--steps", "2", "--name", "run")
    Path("images.npz").unlink()
    assert "is finished" in good("resume", "run").err


def test_another_number_of_threads_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    train("--steps", "2", "--name", "run")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    done = good("resume", "run", "--steps", "4")
    (warning,) = done.warnings
    assert "threads: 1 then, 2 now" in warning
    assert "the data" not in warning


def test_a_run_being_trained_is_not_resumed() -> None:
    from fmrun.runs.folder import Run

    train("--steps", "2", "--name", "busy")
    with Run(RUNS / "busy").lock():
        done = fmrun("resume", "busy", "--steps", "4")
    assert done.code == 2
    (error,) = done.errors
    assert "run busy is being trained by process" in error
    assert status(RUNS / "busy")["state"] == "finished"


def test_torn_metrics_are_mended() -> None:
    train("--steps", "12", "--name", "whole", *s("log.every=2"))
    train("--steps", "6", "--name", "torn", *s("log.every=2"))
    with open(RUNS / "torn" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss/d": 1.')
    good("resume", "torn", "--steps", "12")
    assert timeless(RUNS / "torn") == timeless(RUNS / "whole")


def test_files_a_run_began_from_are_needed_no_more() -> None:
    train("--steps", "2", "--name", "parent")
    (parent,) = (RUNS / "parent" / "checkpoints").iterdir()
    begin = Path("begin.safetensors")
    begin.write_bytes(parent.read_bytes())
    init = s("generator.init=begin.safetensors", "discriminator.init=begin.safetensors")
    train(*init, "--steps", "4", "--name", "whole")
    train(*init, "--steps", "2", "--name", "child")
    begin.unlink()
    good("resume", "child", "--steps", "4")
    same_tensors(saved(RUNS / "whole", 4).tensors, saved(RUNS / "child", 4).tensors)
    good("sample", "child", "--num", "4")
    good("probe-layers", "child", "--json")


# ---- horizons

DECAY = s("optim.schedule.decay=linear", "optim.schedule.decay_end=4")


def test_a_run_is_not_extended_into_steps_at_a_learning_rate_of_zero() -> None:
    train(*DECAY, "--steps", "4", "--name", "run")
    (error,) = fmrun("resume", "run", "--steps", "6").errors
    assert "train.steps is 6, and the learning rate is 0 from step 4 on: nothing would be learned there" in error
    assert "set optim.schedule.decay_end to 6" in error
    assert fmrun("train", *TINY, *DECAY, "--steps", "5").code == 2
    assert steps(RUNS / "run") == [4]


def test_a_learning_rate_below_a_tenth_is_said_at_start_and_resume() -> None:
    own = s("optim.schedule.decay=linear", "optim.schedule.decay_end=25")
    assert (
        "learning rates: below a tenth of what is set from step 23 on" in train(*own, "--steps", "25", "--dry-run").err
    )
    assert "below a tenth" not in train(*own, "--steps", "23", "--name", "run").err
    assert "learning rates: below a tenth of what is set from step 23 on" in good("resume", "run", "--steps", "25").err


def test_moving_a_future_horizon_equals_having_it_from_the_start() -> None:
    def own(end: int) -> tuple[str, ...]:
        ahead = ("optim.schedule.decay=linear", "optim.schedule.decay_start=5", f"optim.schedule.decay_end={end}")
        return s(
            *ahead,
            f"losses.gan.ramp={0}",
            "log.every=1",
            f"feature_matching.start_step={end - 1}",
            "feature_matching.weight=1",
        )

    train(*own(10), "--steps", "12", "--name", "whole", "-s", "optim.schedule.final_factor=0.5")
    train(*own(8), "--steps", "4", "--name", "parts", "-s", "optim.schedule.final_factor=0.5")
    moved = s("optim.schedule.decay_end=10", "feature_matching.start_step=9")
    good("resume", "parts", "--steps", "12", *moved)
    same_runs(RUNS / "whole", RUNS / "parts", 12)
    good("resume", "parts", "--steps", "13", "-s", "optim.schedule.final_factor=0.5")


def test_a_horizon_that_would_change_what_was_trained_is_refused() -> None:
    own = s("optim.schedule.decay=linear", "optim.schedule.decay_start=5", "optim.schedule.decay_end=30")
    train(*own, "--steps", "4", "--name", "run")
    before = (RUNS / "run" / "config.json").read_bytes()
    for setting, step in (
        ("optim.schedule.decay_start=2", 3),
        ("optim.schedule.warmup_steps=2", 0),
        ("feature_matching.start_step=3", 0),
        ("feature_matching.ramp=7", 0),
        ("losses.gan.start_step=1", 0),
    ):
        (error,) = fmrun("resume", "run", "--steps", "6", "-s", setting).errors
        assert f"{setting}: this would change step {step}, and run run has made 4 steps" in error
        assert (RUNS / "run" / "config.json").read_bytes() == before
