"""Files that cannot be read may be left out, said by name, and which ones is settled when a run starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import NETS, SMALL, Done, fmrun, good, noise_images, same_runs, write_folder
from fmrun.data.folder import Choice
from fmrun.data.pair_folder import Place, open_pair_folder
from PIL import Image

from fmrun.config.data import DataConfig
from fmrun.config.degradation import DegradationConfig
from fmrun.data.places import skipped_sentence
from fmrun.errors import UserError

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


def data_of(run: str) -> dict[str, object]:
    return json.loads((Path("runs") / run / "config.json").read_text())["data"]


def test_a_refusal_names_the_files_and_the_way_out() -> None:
    spoilt()
    (error,) = fmrun("train", *SMALL, *PICTURES).errors
    for said in ("3 of 12 images", "004.png", "empty.png", "text.png", *SKIP[1:]):
        assert said in error


def test_what_is_left_out_is_said_recorded_and_makes_no_difference() -> None:
    spoilt()
    done = trained(*SKIP, "--steps", "2", "--name", "run")
    (warning,) = done.warnings
    assert "data.skip_unreadable leaves out" in warning
    assert "3 in '" in warning
    assert "(004.png, empty.png, text.png)" in warning
    assert data_of("run")["leave_out"] == ["004.png", "empty.png", "text.png"]
    assert data_of("run")["skip_unreadable"] is False
    for name in ("004.png", "empty.png", "text.png"):
        (Path("pictures") / name).unlink()
    trained("--steps", "2", "--name", "without")
    same_runs(Path("runs/run"), Path("runs/without"), 2)


def test_resume_keeps_the_set_whatever_has_become_of_the_files() -> None:
    folder = spoilt()
    trained(*SKIP, "--steps", "4", "--name", "whole")
    trained(*SKIP, "--steps", "2", "--name", "run")
    Image.fromarray(noise_images(1)[0]).save(folder / "text.png")  # readable now, and still left out
    assert good("resume", "run", "--steps", "4").warnings == []
    same_runs(Path("runs/whole"), Path("runs/run"), 4)
    (folder / "005.png").write_bytes(b"")
    done = fmrun("resume", "run", "--steps", "6")
    assert done.code == 2
    (error,) = done.errors
    assert "005.png" in error
    assert "put them back as they were" in error
    assert "skip_unreadable" not in error


def test_nothing_unreadable_is_nothing_to_say() -> None:
    write_folder(Path("pictures"), count=10)
    assert trained(*SKIP, "--steps", "1", "--name", "run").warnings == []
    trained("--steps", "1", "--name", "plain")
    assert data_of("run") == data_of("plain")


def test_a_wrong_size_is_not_unreadable() -> None:
    folder = spoilt()
    Image.new("L", (30, 20)).save(folder / "odd.png")
    (error,) = fmrun("train", *SMALL, *PICTURES, *SKIP).errors
    assert "odd.png 30×20" in error
    assert "empty.png" not in error


def test_what_is_held_out_has_a_list_of_its_own() -> None:
    spoilt()
    held = write_folder(Path("held"), count=4)
    (held / "001.png").write_bytes(b"")
    trained(*SKIP, "-s", "data.valid_path=held", "--steps", "1", "--name", "run")
    assert data_of("run")["valid_leave_out"] == ["001.png"]


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
    (Path(side) / "002.png").write_bytes(b"")
    places = Place("data.path", Path("high")), Place("data.lr_path", Path("low"))
    options = {"scale": 2, "patch": 32, "channels": None, "cache": "auto", "degradation": DegradationConfig()}
    with pytest.raises(UserError, match=r"002\.png.*data\.skip_unreadable=true"):
        open_pair_folder(*places, **options)
    pairs = open_pair_folder(*places, **options, choice=Choice.SKIP)
    assert pairs.left_out == ("002.png",)
    assert pairs.names == ["000", "001", "003"]
    again = open_pair_folder(*places, **options, leave_out=("002.png",), choice=Choice.SETTLED)
    assert again.fingerprint == pairs.fingerprint


def test_what_is_left_out_has_to_be_there_at_first() -> None:
    write_folder(Path("pictures"), count=10, size=64)
    flags = ("-s", 'data.leave_out=["01.png"]', "--data", "pictures", "--dry-run")
    for done in (
        fmrun("train", *SMALL, *flags, "-s", "data.image_size=64"),
        fmrun("train", "--preset", "munet-x2-cpu", "--device", "cpu", *flags),
    ):
        assert done.code == 2
        assert "data.leave_out: there is no image '01.png' in 'pictures'; did you mean '001.png'?" in done.errors[0]


def test_what_is_left_out_of_pairs_is_not_looked_at_nor_are_its_partners() -> None:
    high = write_folder(Path("high"), count=5, size=64, channels=3)
    low = write_folder(Path("low"), count=5, size=32, channels=3)
    options = {"scale": 2, "patch": 32, "channels": None, "cache": "auto", "degradation": DegradationConfig()}

    def names(*leave_out: str, choice: Choice = Choice.REFUSE) -> list[str]:
        places = Place("data.path", high), Place("data.lr_path", low)
        return open_pair_folder(*places, **options, leave_out=leave_out, choice=choice).names

    (low / "001.png").unlink()
    (low / "002.png").rename(low / "002x2.png")
    assert names("001.png", "002.png") == ["000", "003", "004"]
    shutil.copy(high / "004.png", high / "004.jpg")
    assert names("001.png", "002.png", "004.jpg") == ["000", "003", "004"]
    (high / "002.png").unlink()  # its partner is left
    kept = names("001.png", "002.png", "004.jpg", choice=Choice.SETTLED)
    assert kept == ["000", "003", "004"]
    with pytest.raises(UserError, match=r"no image '002\.png'"):
        names("001.png", "002.png", "004.jpg")


def test_a_probe_of_other_images_looks_at_no_folder_of_the_run() -> None:
    spoilt()
    held = write_folder(Path("held"), count=4)
    trained(*SKIP, "-s", "data.valid_path=held", "--steps", "1", "--name", "run")
    shutil.rmtree(held)
    others = write_folder(Path("others"), count=8)
    (others / "004.png").write_bytes(b"")
    (error,) = fmrun("probe-layers", "run", "--data", "others").errors
    assert "004.png" in error  # one that the run leaves out of another folder
    assert SKIP[1] in error
    (others / "004.png").unlink()
    assert "block1" in good("probe-layers", "run", "--data", "others").out
    (error,) = fmrun("probe-layers", "run").errors
    assert "data.valid_path" in error


def test_a_preview_and_a_probe_say_it_too() -> None:
    spoilt()
    assert "leaves out" in good("data-preview", *PICTURES, *SKIP).err
    assert "leaves out" in good("probe-layers", *NETS, "--batch-size", "4", *PICTURES, *SKIP).err


# ---- measuring


@pytest.fixture
def own_extractor(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    (workplace / "looks.py").write_text(
        "import torch\nclass Means(torch.nn.Module):\n    def forward(self, image):\n"
        "        return torch.nn.functional.avg_pool2d(image, 14).flatten(1)\n"
    )
    monkeypatch.syspath_prepend(workplace)
    return "--extractor", "looks:Means", "--num", "10"


def on_data(done: Done) -> list[str]:
    """What is warned of, but for scores, of which little is known after one step."""
    return [warning for warning in done.warnings if "precision of" not in warning]


def test_what_a_run_held_out_is_measured_as_it_was_or_not_at_all(own_extractor: tuple[str, ...]) -> None:
    folder = write_folder(Path("pictures"), count=80)
    trained("-s", "data.valid_fraction=0.25", "--steps", "1", "--name", "run")
    assert on_data(good("eval", "run", *own_extractor)) == []
    (folder / "003.png").write_bytes(b"")
    (error,) = fmrun("eval", "run", *own_extractor).errors
    assert "003.png" in error
    assert "put them back as they were" in error
    assert "skip_unreadable" not in error
    done = fmrun("eval", "run", *own_extractor, *SKIP)
    assert done.code == 2
    assert "data.skip_unreadable is for other images than those of run run" in done.errors[0]
    (folder / "003.png").unlink()
    (warning,) = on_data(good("eval", "run", *own_extractor))
    assert "the images of run run are not those it was trained on" in warning


@pytest.mark.parametrize("way", [("--data", "others"), ("-s", "data.path=others")])
def test_other_images_have_files_left_out_of_their_own(own_extractor: tuple[str, ...], way: tuple[str, ...]) -> None:
    spoilt()
    trained(*SKIP, "--steps", "1", "--name", "run")
    write_folder(Path("others"), count=20)  # as many as are needed, and 004.png is fine here
    assert on_data(good("eval", "run", *own_extractor, *way)) == []
    (Path("others") / "bad.png").write_bytes(b"")
    (error,) = fmrun("eval", "run", *own_extractor, *way).errors
    assert SKIP[1] in error
    (warning,) = on_data(good("eval", "run", *own_extractor, *way, *SKIP))
    assert "leaves out files that cannot be read: 1 in 'others' (bad.png)" in warning


def test_one_folder_in_two_parts_is_said_once() -> None:
    before = DataConfig(path="a", valid_path="a")
    names = {"leave_out": ("1.png",), "valid_leave_out": ("1.png",)}
    assert "1 in 'a' (1.png)" in str(skipped_sentence(before, before.model_copy(update=names)))
    names["valid_leave_out"] = ("2.png",)
    assert "1 in 'a' (1.png) and 1 in 'a' (2.png)" in str(skipped_sentence(before, before.model_copy(update=names)))
