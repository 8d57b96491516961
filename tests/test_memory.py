"""DiscriminatorOutput of memory is one sentence with a batch size that was tried; what will not fit is said before the first step."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WORLD, advance, differing, everything, tiny_state
from tape import TapeRecorder

from fmrun import memory
from fmrun.config import Config
from fmrun.dist import World
from fmrun.errors import UserError
from fmrun.memory import check_fit, extrapolate, largest_batch, step_bytes, steps_at_once, within_memory
from fmrun.tasks.generate import Generate
from fmrun.train import check_batch

SMALL = {"generator": {"width": 4}, "discriminator": {"width": 4}, "data": {"channels": 1}}


@pytest.fixture
def room_for_16(monkeypatch):
    """A device on which more than 16 images at once do not fit."""
    generate = Generate.generate

    def full(self, batch):
        if len(batch.noise) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(self, batch)

    monkeypatch.setattr(Generate, "generate", full)


def test_the_largest_batch_that_fits_is_found_by_trying(room_for_16):
    config = Config.model_validate({**SMALL, "train": {"batch_size": 100}})
    assert largest_batch(config, World()) == 12
    config = Config.model_validate({**SMALL, "train": {"batch_size": 128}})
    assert largest_batch(config, World()) == 16


def test_the_sentence_names_both_ways_out_and_they_work(room_for_16):
    config = Config.model_validate({**SMALL, "train": {"batch_size": 64}})

    def work():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"out of memory at batch size 64; 16 fits: --batch-size 16.*accumulate=4"):
        within_memory(config, World(), work)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"):
        within_memory(Config(), World(), lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_a_training_run_that_runs_out_of_memory_exits_2(room_for_16, tmp_path: Path, monkeypatch, capsys):
    from fmrun.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "fmrun",
            "train",
            "--batch-size",
            "32",
            "--steps",
            "2",
            "-s",
            "generator.width=4",
            "-s",
            "discriminator.width=4",
            "--name",
            "big",
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert "out of memory at batch size 32; 16 fits" in err
    assert "Traceback" not in err


# Before the first step


def measured(**settings):
    """A state of which everything is measured, and no tensor is so small that only weights count."""
    return tiny_state(**{"train__batch_size": 48, "feature_matching__weight": 0.1, "precision": "fp32", **settings})


CASES = {
    "plain": {"feature_matching__weight": 0.0},
    "all layers": {"feature_matching__layers": "all", "train__augment": ("color", "translation", "cutout")},
    "spectral": {"discriminator__norm": "spectral", "feature_matching__estimator": "running"},
    "simultaneous": {"train__update": "simultaneous", "losses__gan__r1": 1.0, "losses__gan__penalty_every": 4},
    "in parts": {"train__accumulate": 2, "feature_matching__match": "moments", "feature_matching__balance": "gradient"},
    "updates": {"train__d_updates": 2, "train__g_updates": 2, "losses__gan__start_step": 7},
}


@pytest.mark.parametrize("name", CASES)
def test_two_small_steps_tell_what_a_large_one_holds(name):
    """Exactly, for every operation's need is a line in the number of images."""
    state = measured(**CASES[name])
    parts = state.config.train.accumulate
    courses = {size: step_bytes(state, size) for size in (2, 4)}
    for size in (3, 48 // parts):
        assert extrapolate(courses, size) == max(step_bytes(state, size))


def test_from_one_small_step_there_is_an_upper_bound():
    state = measured()
    one = {2: step_bytes(state, 2)}
    assert max(step_bytes(state, 2)) == extrapolate(one, 2)
    assert max(step_bytes(state, 48)) <= extrapolate(one, 48)


@pytest.mark.parametrize("name", CASES)
def test_measuring_changes_nothing(name, monkeypatch):
    state, untouched = measured(**CASES[name]), measured(**CASES[name])
    for s in (state, untouched):
        advance(s, 2)
    before = everything(state)
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    monkeypatch.setattr(memory, "available_on", lambda device: 0)
    with pytest.raises(UserError, match="not even the smallest batch fits"):
        check_fit(state)
    assert differing(before, everything(state)) == []
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert np.array_equal(np.random.get_state()[1], streams[1])
    assert random.getstate() == streams[2]
    for s in (state, untouched):
        advance(s)
    assert differing(everything(state), everything(untouched)) == []
    assert state.window.read(WORLD) == untouched.window.read(WORLD)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_proposed_fits_and_one_more_does_not(monkeypatch, accumulate):
    monkeypatch.setattr(memory, "available_on", lambda device: 500_000)
    with pytest.raises(UserError) as refused:
        check_fit(measured(train__accumulate=accumulate))
    said = re.fullmatch(
        r"batch size 48 needs about 0\.0 GB of memory and 0\.0 GB is free on cpu; (\d+) fits: --batch-size (\d+), or the "
        r"same batch in parts: -s train\.accumulate=(\d+)",
        str(refused.value),
    )
    assert said is not None, refused.value
    fits, parts = int(said[1]), int(said[3])
    assert 4 <= fits < 48
    check_fit(measured(train__accumulate=accumulate, train__batch_size=fits))
    with pytest.raises(UserError, match=f"{fits} fits"):
        check_fit(measured(train__accumulate=accumulate, train__batch_size=fits + accumulate))
    assert 48 % parts == 0
    assert 48 // parts <= fits // accumulate


def needed(state, **kept) -> float:
    """Bytes at batch size 48."""
    courses = {size: step_bytes(state, size) for size in (2, 4)}
    trained = [p for optimiser in state.optimisers.values() for p in optimiser.parameters]
    return 2 * sum(p.numel() * p.element_size() for p in trained) + extrapolate(courses, 48) * kept.get("steps", 1)


@pytest.mark.parametrize(("settings", "steps"), [({}, 2), ({"log__every": 1, "feature_matching__weight": 0.0}, 1)])
def test_recorded_steps_keep_their_memory_beside_those_of_another_plan(monkeypatch, settings, steps):
    """Where every step is of one plan, there is none beside it."""
    state = measured(train__steps=40, **settings)
    assert steps_at_once(state) == 1
    state.record_with(TapeRecorder())
    assert steps_at_once(state) == steps
    need = needed(state, steps=steps)
    monkeypatch.setattr(memory, "available_on", lambda device: int(need) + 1)
    check_fit(state)
    monkeypatch.setattr(memory, "available_on", lambda device: int(need) - 1)
    with pytest.raises(UserError, match=r"fits: --batch-size") as refused:
        check_fit(state)
    assert ("for recorded steps" in str(refused.value)) == (steps == 2)
    assert str(refused.value).endswith(", or leave cuda_graphs out") == (steps == 2)


def test_a_plan_that_comes_late_is_another_plan():
    state = measured(log__every=1, train__steps=9000, feature_matching__start_step=5000)
    state.record_with(TapeRecorder())
    assert steps_at_once(state) == 2


def test_images_kept_on_the_device_count(monkeypatch):
    state = measured()
    need, kept = needed(state), 3_000_000
    monkeypatch.setattr(memory, "available_on", lambda device: int(need) + kept + 1)
    check_fit(state, kept)
    monkeypatch.setattr(memory, "available_on", lambda device: int(need) + kept - 1)
    with pytest.raises(
        UserError, match=r"0\.0 GB for images kept there.*, or keep the images elsewhere: -s data\.cache=ram$"
    ):
        check_fit(state, kept)


def test_what_surely_fits_is_not_measured_and_what_plainly_fits_measured_once(monkeypatch):
    sizes, measure = [], memory.step_bytes
    monkeypatch.setattr(memory, "step_bytes", lambda state, images: (sizes.append(images), measure(state, images))[1])
    state = measured()
    check_fit(state)
    assert sizes == []
    monkeypatch.setattr(memory, "_surely_small", lambda state, room: False)
    check_fit(state)
    assert sizes == [2]


def test_a_run_that_will_not_fit_exits_2_and_leaves_no_folder(tmp_path: Path, monkeypatch, capsys):
    from fmrun.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available_on", lambda device: 2_000_000)
    small = ("-s", "generator.width=4", "-s", "discriminator.width=4", "--batch-size", "64", "--device", "cpu")
    monkeypatch.setattr("sys.argv", ["fmrun", "train", *small])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert re.search(r"error: batch size 64 needs about .* fits: --batch-size \d+", err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "fits", "parts"),
    [(64, 1, 1, 16, 4), (48, 2, 1, 16, 6), (10, 1, 1, 4, 5), (64, 1, 2, 16, 4), (24, 1, 4, 8, 3), (7, 1, 1, 3, None)],
)
def test_the_parts_proposed_are_a_config_that_trains(batch, accumulate, processes, fits, parts):
    config = Config.model_validate({"train": {"batch_size": batch, "accumulate": accumulate}})
    said = memory._remedy(config, fits, processes)
    assert said.startswith(f"{fits} fits: --batch-size {fits}")
    assert ("train.accumulate" in said) == (parts is not None)
    if parts is not None:
        assert said.endswith(f"train.accumulate={parts}")
        train = Config.model_validate({"train": {"batch_size": batch, "accumulate": parts}})
        check_batch(train, World(size=processes))
        assert batch // parts <= fits // accumulate
