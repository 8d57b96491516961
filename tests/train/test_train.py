"""Whole trainings: what a run leaves behind, and how it ends when it goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import (
    NETS,
    TINY,
    fmrun,
    good,
    rows,
    same_tensors,
    saved,
    status,
    steps,
    timeless,
    train,
    write_images,
)

from fmrun.metrics.extractors import available
from fmrun.train.health import Health

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")


def s(*settings: str) -> tuple[str, ...]:
    return tuple(part for setting in settings for part in ("-s", setting))


def finite(run: Path) -> None:
    for step in steps(run):
        for name, tensor in saved(run, step).tensors.items():
            allowed = name.endswith(".share")  # not measured yet
            assert allowed or bool(torch.isfinite(tensor.double()).all()), f"{name} at {step}"


# ---- divergence


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (("optim.discriminator.lr=1e30",), ("loss/d", "loss/g")),
        (("optim.generator.lr=1e30",), ("loss/", "gradient of")),
        (
            ("feature_matching.weight=1e38", "feature_matching.balance=none"),
            ("largest gradient being that of generator image",),
        ),
    ],
)
def test_divergence_is_stopped_named_and_kept_out(settings: tuple[str, ...], loss: tuple[str, ...]) -> None:
    run = RUNS / "bad"
    flags = (*TINY, "--name", "bad", "--steps", "30", *s(*settings, "log.every=5", "checkpoint.every=2"))
    done = fmrun("train", *flags)
    assert done.code == 3
    assert done.out == ""
    (error,) = done.errors
    assert "Traceback" not in done.err
    assert "training diverged at step " in error
    assert any(name in error for name in loss), error
    assert "-s optim.generator.lr" in error
    at = int(error.split("diverged at step ")[1].split(":")[0])
    content = status(run)
    assert (content["state"], content["step"], content["exit_code"]) == ("diverged", at, 3)
    assert content["message"] == error.removeprefix("error: ")
    finite(run)
    assert all(step <= at for step in steps(run))
    assert all(row["step"] <= at for row in rows(run)) if (run / "metrics.jsonl").exists() else at < 5
    shown = "no checkpoint had been written" if not steps(run) else f"the last checkpoint is of step {steps(run)[-1]}"
    assert shown in error

    again = fmrun("resume", "bad")  # from the last good step into the same wall
    assert again.code == 3
    assert f"diverged at step {at}:" in again.errors[0]
    finite(run)


def test_divergence_after_checkpoints_leaves_the_last_good_one() -> None:
    run = RUNS / "late"
    late = s("feature_matching.weight=1e38", "feature_matching.balance=none", "feature_matching.start_step=5")
    done = fmrun("train", *TINY, "--name", "late", "--steps", "20", *late, *s("checkpoint.every=3"))
    assert done.code == 3, done.err
    assert steps(run) == [3]
    assert "diverged at step 5" in done.errors[0]
    assert "the last checkpoint is of step 3" in done.errors[0]
    good("sample", "late", "--num", "1")
    again = fmrun("resume", "late")
    assert (again.code, steps(run)) == (3, [3])
    assert "steps 3 to 20" in again.err


# ---- equalities


def test_lambda_zero_is_the_plain_gan_to_the_bit() -> None:
    train("--steps", "5", "--name", "off", "--lambda-feature", "0")
    train("--steps", "5", "--name", "plain", "--preset", "dcgan")
    assert timeless(RUNS / "off") == timeless(RUNS / "plain")
    one, other = saved(RUNS / "off", 5).tensors, saved(RUNS / "plain", 5).tensors
    assert not [name for name in one if name.startswith("matching")]
    same_tensors(one, other)
    train("--steps", "5", "--name", "on")
    with pytest.raises(AssertionError):
        same_tensors(
            {n: t for n, t in saved(RUNS / "on", 5).tensors.items() if n.startswith("generator")},
            {n: t for n, t in one.items() if n.startswith("generator")},
        )


def test_the_same_command_twice_gives_the_same_bytes() -> None:
    for name in ("one", "two"):
        train("--steps", "4", "--name", name)
    one, two = ((RUNS / name / "checkpoints" / "step-00000004.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    train("--steps", "4", "--name", "three", "--seed", "1")
    assert (RUNS / "three" / "checkpoints" / "step-00000004.safetensors").read_bytes() != one


# ---- what a run holds


def test_a_run_explains_itself() -> None:
    done = train("--steps", "4", "--name", "run", *s("log.every=2", "log.sample_every=3", "log.sample_count=6"))
    run = RUNS / "run"
    assert [p.name for p in sorted(run.iterdir()) if not p.name.startswith(".")] == [
        "checkpoints",
        "config.json",
        "env.json",
        "metrics.jsonl",
        "samples",
        "status.json",
    ]
    config = json.loads((run / "config.json").read_text())
    assert (config["train"]["steps"], config["data"]["channels"]) == (4, 1)
    env = json.loads((run / "env.json").read_text())
    assert env["command"][:2] == ["fmrun", "train"]
    assert env["preset"] == "dcgan-fm"
    assert env["torch"] == torch.__version__
    assert [row["step"] for row in rows(run)] == [2, 4]
    for row in rows(run):
        assert all(key == "step" or key.split("/")[0] in ("loss", "fm", "health", "time", "optim") for key in row)
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in row.values())
    sheets = sorted((run / "samples").iterdir())
    assert [p.name for p in sheets] == ["step-00000003.png", "step-00000004.png"]
    assert np.asarray(Image.open(sheets[0])).shape == (2 * 30 + 2, 3 * 30 + 2)
    assert "the picture: runs/run/samples/step-00000004.png" in done.err
    assert done.out == ""


def test_a_row_is_the_mean_of_its_steps() -> None:
    train("--steps", "4", "--name", "each", *s("log.every=1"))
    train("--steps", "4", "--name", "pairs", *s("log.every=2"))
    each, pairs = rows(RUNS / "each"), rows(RUNS / "pairs")
    for key in ("loss/d", "loss/g", "fm/distance", "fm/block2", "health/d_real", "health/g_grad_norm"):
        for i, row in enumerate(pairs):
            assert row[key] == pytest.approx((each[2 * i][key] + each[2 * i + 1][key]) / 2, rel=1e-5)


def test_terms_add_up() -> None:
    train("--steps", "2", "--name", "run", *s("log.every=1", "losses.gan.weight=0.5", "feature_matching.ramp=2"))
    for row in rows(RUNS / "run"):
        fm = row.get("fm/loss", 0.0)
        assert row["loss/g"] == pytest.approx(0.5 * row["loss/g_adv"] + fm, rel=1e-5)
        if fm:
            assert fm == pytest.approx(row["fm/distance"] * row["fm/weight"], rel=1e-5)
            assert row["fm/weight"] == pytest.approx(row["fm/lambda"] * row["fm/balance"], rel=1e-5)
            blocks = [row[f"fm/block{i}"] for i in (1, 2, 3)]
            assert row["fm/distance"] == pytest.approx(sum(blocks) / 3, rel=1e-5)
    assert [row["fm/lambda"] for row in rows(RUNS / "run")] == [0.0, 0.5]


def test_held_out_images_are_measured() -> None:
    train("--steps", "6", "--name", "run", *s("log.every=1", "eval.every=3", "data.valid_fraction=0.25"))
    measured = [row["step"] for row in rows(RUNS / "run") if "eval/d_valid" in row]
    assert measured == [3, 6]
    row = rows(RUNS / "run")[-1]
    assert all(math.isfinite(row[f"eval/d_{kind}"]) for kind in ("train", "valid", "fake"))
    # watching changes nothing
    train("--steps", "6", "--name", "unwatched", *s("eval.every=0", "data.valid_fraction=0.25"))
    weights = [
        {n: t for n, t in saved(RUNS / name, 6).tensors.items() if not n.startswith("window")}
        for name in ("run", "unwatched")
    ]
    same_tensors(*weights)


def test_rotation_keeps_the_last_the_best_and_every_so_many() -> None:
    flags = s(
        "checkpoint.every=1",
        "checkpoint.keep_last=2",
        "checkpoint.keep_every=4",
        "checkpoint.best=loss/d",
        "checkpoint.best_mode=max",
        "log.every=1",
    )
    train("--steps", "10", "--name", "run", *flags)
    by_loss = {row["step"]: row["loss/d"] for row in rows(RUNS / "run")}
    best = max(by_loss, key=lambda step: by_loss[step])
    assert steps(RUNS / "run") == sorted({4, 8, 9, 10, best})
    assert best not in (4, 8, 9, 10), "this seed shows nothing; take another"
    assert status(RUNS / "run")["best"] == {"metric": "loss/d", "value": by_loss[best], "step": best}
    # and after more training, begun anew
    good("resume", "run", "--steps", "12")
    by_loss = {row["step"]: row["loss/d"] for row in rows(RUNS / "run")}
    best = max(by_loss, key=lambda step: by_loss[step])
    assert steps(RUNS / "run") == sorted({4, 8, 11, 12, best})


def test_best_by_a_metric_that_comes_rarely() -> None:
    flags = s(
        "checkpoint.every=2", "log.every=1", "eval.every=3", "data.valid_fraction=0.3", "checkpoint.best=eval/d_valid"
    )
    train("--steps", "7", "--name", "run", *flags)
    measured = {row["step"]: row["eval/d_valid"] for row in rows(RUNS / "run") if "eval/d_valid" in row}
    assert sorted(measured) == [3, 6, 7]
    best = min(measured, key=lambda step: measured[step])
    assert status(RUNS / "run")["best"] == {"metric": "eval/d_valid", "value": measured[best], "step": best}
    assert best in steps(RUNS / "run")  # saved when it was found, whatever checkpoint.every says


def test_held_out_images_are_measured_when_asked_whatever_the_read_outs() -> None:
    flags = s("log.every=5", "eval.every=2", "data.valid_fraction=0.3")
    train("--steps", "6", "--name", "run", *flags)
    found = {row["step"]: ("loss/d" in row, "eval/d_valid" in row) for row in rows(RUNS / "run")}
    assert found == {2: (False, True), 4: (False, True), 5: (True, False), 6: (True, True)}


def test_every_metric_of_a_run_can_be_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `checkpoint.best` is checked against is what rows hold."""
    from fmrun.train.state import State

    known: list[set[str]] = []
    names = State.metric_names

    def recorded(state: State, held_out: Sequence[str]) -> list[str]:
        found = names(state, held_out)
        known.append(set(found))
        return found

    monkeypatch.setattr(State, "metric_names", recorded)
    for i, settings in enumerate(
        (
            ("data.valid_fraction=0.5", "eval.every=2", "eval.kid_every=2", "eval.kid_num=10"),
            ("losses.gan.type=hinge", "losses.gan.r1=1", "losses.gan.r2=1", "feature_matching.layers=all"),
            ("discriminator.train=false", "losses.gan.weight=0", "feature_matching.balance=none"),
            ("feature_matching.weight=0",),
        )
    ):
        some = "time/images_per_second"
        without = () if i == 0 and available() else ("eval.kid_every=0",)
        train("--steps", "2", "--name", str(i), *s(*settings, *without, "log.every=2", f"checkpoint.best={some}"))
        (row,) = rows(RUNS / str(i))
        assert set(row) - {"step"} <= known[-1]
        assert known[-1] - set(row) <= {"eval/overfit"}


def test_it_says_when_something_is_wrong() -> None:
    """A raw weight so small that feature matching does nothing is said before the first step; rules speak later."""
    done = train("--steps", "2", "--name", "weak", "--lambda-feature", "1e-6", "--balance", "none")
    (warning,) = done.warnings
    assert "feature matching has no effect" in warning
    assert "--balance gradient" in warning

    weak = ("--lambda-feature", "1e-6", "--balance", "none")
    done = train("--steps", "9", "--name", "poor", *weak, *s("log.every=1"))
    assert [w for w in done.warnings if w.startswith("warning: step ") and "has no effect" in w]
    found = Health()
    assert [sentence for row in rows(RUNS / "poor") if (sentence := found.read(row))]


def test_what_a_user_should_know_is_said_first() -> None:
    done = train("--steps", "1", "--name", "a", *s("feature_matching.match=sample", "train.accumulate=2"))
    assert [w for w in done.warnings if "match 'sample' pairs" in w]
    (parts,) = (w for w in done.warnings if "micro-batches of 4, not by the batch of 8" in w)
    assert "batch norm in the generator, batch norm in the discriminator;" in parts
    done = train("--steps", "1", "--name", "b", *s("losses.gan.type=wgan"))
    assert [w for w in done.warnings if "Lipschitz" in w]


# ---- extras


def test_tensorboard_holds_every_row_once() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = s("log.tensorboard=true", "log.every=2", "checkpoint.every=4")
    train("--steps", "6", "--name", "run", *flags)
    run = RUNS / "run"
    Path(run / "checkpoints" / "step-00000006.safetensors").unlink()  # killed after step 6, resumed from 4
    good("resume", "run", "--steps", "8")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    written = rows(run)
    assert [row["step"] for row in written] == [2, 4, 6, 8]
    for key in ("loss/d", "fm/share", "health/g_grad_norm"):
        seen = [(e.step, e.value) for e in events.Scalars(key)]
        assert [step for step, _ in seen] == [2, 4, 6, 8]
        assert [value for _, value in seen] == pytest.approx([row[key] for row in written])
    assert [image.step for image in events.Images("samples")] == [8]


def test_compiled_nets_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time, but not turned into machine code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    train("--steps", "2", "--name", "compiled", *s("compile=true", "log.every=1"))
    train("--steps", "2", "--name", "eager", *s("log.every=1"))
    for compiled, eager in zip(rows(RUNS / "compiled"), rows(RUNS / "eager"), strict=True):
        assert compiled["loss/d"] == pytest.approx(eager["loss/d"], rel=1e-3)
        assert compiled["fm/distance"] == pytest.approx(eager["fm/distance"], rel=1e-2)
    names = [set(saved(RUNS / name, 2).tensors) for name in ("compiled", "eager")]
    assert names[0] == names[1]
    good("resume", "compiled", "--steps", "3")
    good("sample", "compiled", "--num", "1")


@pytest.mark.parametrize(("size", "channels"), [(28, 3), (32, 1), (64, 3), (128, 1)])
def test_every_image_size(size: int, channels: int) -> None:
    write_images(Path("these.npz"), count=6, size=size, channels=channels)
    flags = ("--batch-size", "4", "--steps", "1", "--data", "these.npz", *s("log.sample_count=2"))
    good("train", *NETS, *flags, *s(f"data.image_size={size}"), "--name", "run")
    sheet = np.asarray(Image.open(RUNS / "run" / "samples" / "step-00000001.png"))
    assert sheet.shape[:2] == (size + 4, 2 * size + 6)
    assert sheet.ndim == (2 if channels == 1 else 3)
