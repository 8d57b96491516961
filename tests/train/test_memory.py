"""Out of memory is one sentence with a batch size that was tried."""

from pathlib import Path

import pytest
import torch

from fmrun.config.schema import Config
from fmrun.runtime.dist import World
from fmrun.runtime.errors import UserError
from fmrun.tasks.generate import Generate
from fmrun.train import memory
from fmrun.train.memory import largest_batch, within_memory
from fmrun.train.run import check_batch

SMALL = {"generator": {"width": 4}, "discriminator": {"width": 4}, "data": {"channels": 1}}


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


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


def test_the_sentence_names_both_ways_out_and_they_work(room_for_16):
    config = Config.model_validate({**SMALL, "train": {"batch_size": 64}})
    with pytest.raises(UserError, match=r"out of memory at batch size 64; 16 fits: --batch-size 16.*accumulate=4"):
        within_memory(config, World(), out_of_memory)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"):
        within_memory(Config(), World(), lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_a_training_run_that_runs_out_of_memory_exits_2(room_for_16, tmp_path: Path, monkeypatch, capsys):
    from fmrun.__main__ import main

    monkeypatch.chdir(tmp_path)
    nets = ("-s", "generator.width=4", "-s", "discriminator.width=4")
    monkeypatch.setattr("sys.argv", ["fmrun", "train", "--batch-size", "32", "--steps", "2", *nets, "--name", "big"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert "out of memory at batch size 32; 16 fits" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("batch", "accumulate", "fits", "parts"),
    [(64, 1, 16, 4), (48, 2, 16, 6), (10, 1, 4, 5), (24, 1, 8, 3), (7, 1, 3, None)],
)
def test_the_parts_proposed_are_a_config_that_trains(monkeypatch, batch, accumulate, fits, parts):
    config = Config.model_validate({"train": {"batch_size": batch, "accumulate": accumulate}})
    monkeypatch.setattr(memory, "largest_batch", lambda config, world: fits)
    with pytest.raises(UserError) as stopped:
        within_memory(config, World(), out_of_memory)
    said = str(stopped.value)
    assert f"{fits} fits: --batch-size {fits}" in said
    assert ("train.accumulate" in said) == (parts is not None)
    if parts is not None:
        assert said.endswith(f"train.accumulate={parts}")
        check_batch(Config.model_validate({"train": {"batch_size": batch, "accumulate": parts}}), World())
        assert batch // parts <= fits // accumulate
