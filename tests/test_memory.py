"""Out of memory is one sentence with a batch size that was tried."""

from pathlib import Path

import pytest
import torch

from fmrun.config import Config
from fmrun.dist import World
from fmrun.errors import UserError
from fmrun.memory import largest_batch, within_memory
from fmrun.tasks.generate import Generate

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
