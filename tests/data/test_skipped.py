"""Files that cannot be read may be left out, said by name; a run goes on only with the images it started with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from support.commands import NETS, SMALL, Done, fmrun, good, noise_images, same_runs, write_folder

from fmrun.config.data import DataConfig
from fmrun.data.pairs import open_pairs
from fmrun.data.sources import open_images
from fmrun.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("workplace")

SKIP = ("-s", "data.skip_unreadable=true")
PICTURES = ("--data", "pictures", "-s", "data.image_size=28")


def spoilt(folder: str = "pictures") -> Path:
    """Ten images, of which one is cut short, and two files more that are none."""
    path = write_folder(Path(folder), count=10)
    cut = path / "004.png"
    cut.write_bytes(cut.read_bytes()[:-100])
    (path / "empty.png").write_bytes(b"")
    (path / "text.png").write_text("hello")
    return path


def trained(*flags: str) -> Done:
    return good("train", *SMALL, *PICTURES, "-s", "log.every=1", *flags)


def test_a_refusal_names_the_files_and_the_way_out() -> None:
    spoilt()
    (error,) = fmrun("train", *SMALL, *PICTURES).errors
    for said in ("3 of 12 images", "004.png", "empty.png", "text.png", *SKIP[1:]):
        assert said in error


def test_what_is_left_out_is_said_and_makes_no_difference() -> None:
    spoilt()
    done = trained(*SKIP, "--steps", "2", "--name", "run")
    (warning,) = done.warnings
    assert "data.skip_unreadable leaves out" in warning
    assert "3 in '" in warning
    assert "(004.png, empty.png, text.png)" in warning
    for name in ("004.png", "empty.png", "text.png"):
        (Path("pictures") / name).unlink()
    trained("--steps", "2", "--name", "without")
    same_runs(Path("runs/run"), Path("runs/without"), 2)


def test_resume_goes_on_with_the_same_images_only() -> None:
    folder = spoilt()
    trained(*SKIP, "--steps", "4", "--name", "whole")
    trained(*SKIP, "--steps", "2", "--name", "run")
    (warning,) = good("resume", "run", "--steps", "4").warnings
    assert "(004.png, empty.png, text.png)" in warning
    same_runs(Path("runs/whole"), Path("runs/run"), 4)
    fifth = (folder / "005.png").read_bytes()
    (folder / "005.png").write_bytes(b"")
    for count in (8, 10):  # one more cannot be read, then one more can
        done = fmrun("resume", "run", "--steps", "6")
        assert done.code == 2
        (error,) = done.errors
        assert f"these are not the images of run run (trained on: {count} instead of 9); put them back" in error
        (folder / "005.png").write_bytes(fifth)
        Image.fromarray(noise_images(1)[0]).save(folder / "text.png")


def test_a_wrong_size_is_not_unreadable() -> None:
    folder = spoilt()
    Image.new("L", (30, 20)).save(folder / "odd.png")
    (error,) = fmrun("train", *SMALL, *PICTURES, *SKIP).errors
    assert "odd.png 30×20" in error
    assert "empty.png" not in error


def test_what_is_held_out_is_left_out_too(capsys: pytest.CaptureFixture[str]) -> None:
    held = write_folder(Path("held"), count=4)
    write_folder(Path("pictures"), count=10)
    (held / "001.png").write_bytes(b"")
    config = DataConfig(path="pictures", valid_path="held", image_size=28, skip_unreadable=True)
    _, valid = open_images(config, 0)
    assert valid is not None
    assert len(valid) == 3
    assert "1 in 'held' (001.png)" in capsys.readouterr().err


def test_nothing_left_is_one_sentence() -> None:
    Path("pictures").mkdir()
    for name in "ab":
        (Path("pictures") / f"{name}.png").write_bytes(b"")
    (error,) = fmrun("train", *SMALL, *PICTURES, *SKIP).errors
    assert "no image in 'pictures' is left that could be read" in error
    shutil.rmtree("runs", ignore_errors=True)
    (error,) = fmrun("train", "--preset", "munet-x2-cpu", "--device", "cpu", "--data", "pictures", *SKIP).errors
    assert "no image in 'pictures'" in error


@pytest.mark.parametrize("side", ["high", "low"])
def test_a_pair_goes_where_one_side_cannot_be_read(side: str) -> None:
    write_folder(Path("high"), count=4, size=64, channels=3)
    write_folder(Path("low"), count=4, size=32, channels=3)
    cut = Path(side) / "002.png"
    cut.write_bytes(cut.read_bytes()[:-100])
    config = DataConfig(path="high", lr_path="low", patch_size=32)
    with pytest.raises(UserError, match=r"002\.png.*data\.skip_unreadable=true"):
        open_pairs(config, 0)
    skipped, _ = open_pairs(config.model_copy(update={"skip_unreadable": True}), 0)
    assert skipped.names == ["000", "001", "003"]
    for folder in ("high", "low"):
        (Path(folder) / "002.png").unlink()
    assert skipped.fingerprint == open_pairs(config, 0)[0].fingerprint


def test_a_probe_of_other_images_looks_at_no_folder_of_the_run() -> None:
    write_folder(Path("pictures"), count=10)
    held = write_folder(Path("held"), count=4)
    trained("-s", "data.valid_path=held", "--steps", "1", "--name", "run")
    shutil.rmtree(held)
    others = write_folder(Path("others"), count=8)
    (others / "004.png").write_bytes(b"")
    (error,) = fmrun("probe-layers", "run", "--data", "others").errors
    assert "004.png" in error
    assert SKIP[1] in error
    assert "block1" in good("probe-layers", "run", "--data", "others", *SKIP).out
    (error,) = fmrun("probe-layers", "run").errors
    assert "data.valid_path" in error


def test_a_preview_and_a_probe_say_it_too() -> None:
    spoilt()
    assert "leaves out" in good("data-preview", *PICTURES, *SKIP).err
    assert "leaves out" in good("probe-layers", *NETS, "--batch-size", "4", *PICTURES, *SKIP).err


# ---- measuring


@pytest.fixture
def own_extractor(small_extractor: str) -> tuple[str, ...]:
    return "--extractor", small_extractor, "--num", "10"


def on_data(done: Done) -> list[str]:
    """What is warned of, but for scores, of which little is known after one step."""
    return [warning for warning in done.warnings if "precision of" not in warning]


def test_what_a_run_held_out_is_measured_as_it_was_or_it_is_said(own_extractor: tuple[str, ...]) -> None:
    folder = write_folder(Path("pictures"), count=80)
    trained("-s", "data.valid_fraction=0.25", "--steps", "1", "--name", "run")
    assert on_data(good("eval", "run", *own_extractor)) == []
    (folder / "003.png").write_bytes(b"")
    (error,) = fmrun("eval", "run", *own_extractor).errors
    assert "003.png" in error
    changed = "the images of run run are not those it was trained on"
    skipped, warning = on_data(good("eval", "run", *own_extractor, *SKIP))
    assert "1 in '" in skipped
    assert changed in warning
    (folder / "003.png").unlink()
    (warning,) = on_data(good("eval", "run", *own_extractor))
    assert changed in warning


def test_other_images_have_files_left_out_of_their_own(own_extractor: tuple[str, ...]) -> None:
    way = ("--data", "others")
    write_folder(Path("pictures"), count=10)
    trained("--steps", "1", "--name", "run")
    write_folder(Path("others"), count=20)
    (Path("others") / "bad.png").write_bytes(b"")
    (error,) = fmrun("eval", "run", *own_extractor, *way).errors
    assert SKIP[1] in error
    (warning,) = on_data(good("eval", "run", *own_extractor, *way, *SKIP))
    assert "leaves out files that cannot be read: 1 in 'others' (bad.png)" in warning
