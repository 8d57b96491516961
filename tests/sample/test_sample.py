"""Image i of seed s is the same bytes whatever else is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import SMALL, fmrun, good, tiles, train, write_folder

from fmrun.models.dcgan import DcganGenerator
from fmrun.sample import sample as sampling

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def run(workplace: Path) -> Path:
    train("--steps", "3", "--name", "run")
    return Path("runs/run")


def picture(*arguments: str) -> Path:
    """The one file that `fmrun sample` says it wrote."""
    (line,) = good("sample", "run", *arguments).out.splitlines()
    return Path(line)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_same_seed_same_bytes(run: Path) -> None:
    path = picture("--num", "9", "--seed", "4")
    assert path == run / "samples" / "seed-4-of-step-3.png"
    assert pixels(path).shape == (3 * 30 + 2, 3 * 30 + 2)
    again = picture("--num", "9", "--seed", "4", "--out", "again.png")
    assert again.read_bytes() == path.read_bytes()
    other = picture("--num", "9", "--seed", "5", "--out", "other.png")
    assert other.read_bytes() != path.read_bytes()
    images = tiles(path, 9, 3)
    assert len({image.tobytes() for image in images}) == 9


def test_it_says_which_generator_the_pictures_are_of(run: Path) -> None:
    assert good("sample").err.splitlines() == ["made by run run, step 3, averaged weights"]
    assert good("sample", "--raw").err.splitlines() == ["made by run run, step 3, weights as trained"]
    (path,) = (run / "checkpoints").glob("*3.safetensors")
    assert good("sample", path).err.splitlines() == [f"made by {path.name}, step 3, averaged weights"]
    assert "exported run run, step 3, averaged weights" in good("export", "--out", "net.safetensors").err


def test_an_image_does_not_depend_on_how_many_are_asked_for(run: Path) -> None:
    many = tiles(picture("--num", "37", "--grid", "5", "--out", "many.png"), 37, 5)
    for count in (1, 3, 16, 17, 30):
        few = tiles(picture("--num", str(count), "--grid", "4", "--out", f"{count}.png"), count, min(count, 4))
        for i, (one, other) in enumerate(zip(few, many, strict=False)):
            assert np.array_equal(one, other), f"image {i} of {count}"


def test_nor_do_its_bits_before_they_are_rounded_to_pixels() -> None:
    """A batch's size changes what a convolution rounds; one image alone goes another way than forty."""
    net = DcganGenerator(28, 1, 16, 16, torch.Generator().manual_seed(0)).eval().to(memory_format=torch.channels_last)
    source = sampling.Source(net, 16, 0, Path())
    noise = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    many = sampling.draw(source, noise)
    for count in (1, 2, 16, 17):
        assert torch.equal(sampling.draw(source, noise[:count]), many[:count])


def test_single_files_are_the_tiles_of_the_grid(run: Path) -> None:
    grid = tiles(picture("--num", "5", "--grid", "5", "--seed", "2"), 5, 5)
    lines = good("sample", "run", "--num", "5", "--seed", "2", "--individual").out.splitlines()
    assert lines == [f"runs/run/samples/seed-2-of-step-3/seed-2-of-step-3-{i:05d}.png" for i in range(5)]
    assert all(np.array_equal(pixels(Path(line)), tile) for line, tile in zip(lines, grid, strict=True))


def test_the_ends_of_a_walk_are_images_of_the_seed(run: Path) -> None:
    plain = tiles(picture("--num", "3", "--grid", "3"), 3, 3)
    path = picture("--num", "10", "--interpolate", "5")
    assert path.name == "interpolation-seed-0-of-step-3.png"
    walk = tiles(path, 10, 5)
    for place, image in ((0, 0), (4, 1), (5, 1), (9, 2)):
        # the ends are computed from the latents of the seed, to the last rounding of a pixel
        assert np.abs(walk[place].astype(int) - plain[image]).max() <= 1
    assert len({image.tobytes() for image in walk[:5]}) == 5


def test_raw_is_the_generator_itself(run: Path) -> None:
    average, raw = picture("--num", "4", "--out", "a.png"), picture("--num", "4", "--raw", "--out", "b.png")
    assert average.read_bytes() != raw.read_bytes()
    train("--steps", "3", "--name", "plain", "-s", "ema.decay=0")
    done = [good("sample", "plain", "--num", "4", *flags, "--out", f"{len(flags)}.png") for flags in ((), ("--raw",))]
    assert all(d.code == 0 for d in done)


def test_the_preview_of_training_is_what_sample_shows(run: Path) -> None:
    """Same weights, other latents: as bright and as varied on average."""
    preview = np.stack(tiles(run / "samples" / "step-00000003.png", 4, 2)).astype(float)
    sampled = np.stack(tiles(picture("--num", "64"), 64, 8)).astype(float)
    assert abs(preview.mean() - sampled.mean()) < 10
    assert 0.5 < preview.std() / sampled.std() < 2


def test_needs_neither_run_nor_data() -> None:
    write_folder(Path("pictures"), count=10)
    good("train", *SMALL, "--data", "pictures", "-s", "data.image_size=28", "--steps", "2", "--name", "run")
    shutil.rmtree("pictures")
    Path("images.npz").unlink()
    from_run = picture("--num", "6")
    shutil.copy("runs/run/checkpoints/step-00000002.safetensors", "alone.safetensors")
    expected = from_run.read_bytes()
    shutil.rmtree("runs")
    (line,) = good("sample", "alone.safetensors", "--num", "6").out.splitlines()
    assert line == "seed-0-of-step-2.png"
    assert Path(line).read_bytes() == expected


def test_a_damaged_checkpoint_is_passed_over(run: Path) -> None:
    train("--steps", "4", "--name", "two", "-s", "checkpoint.every=2")
    newest = Path("runs/two/checkpoints/step-00000004.safetensors")
    newest.write_bytes(newest.read_bytes()[:-9])
    done = good("sample", "two", "--num", "1")
    assert done.out == "runs/two/samples/seed-0-of-step-2.png\n"
    (warning,) = done.warnings
    assert "sampling from the checkpoint before" in warning
    one_left = Path("runs/two/checkpoints/step-00000002.safetensors")
    one_left.write_bytes(one_left.read_bytes()[:-9])
    failed = fmrun("sample", "two")
    assert failed.code == 2
    assert failed.err.splitlines() == ["error: run two: none of its 2 checkpoints can be read"]


@pytest.mark.parametrize(
    ("out", "written"),
    [
        ("x.png", "x.png"),
        ("deep/er/x.PNG", "deep/er/x.PNG"),
        ("new-folder", "new-folder/seed-0-of-step-3.png"),
        ("folder.png", "folder.png/seed-0-of-step-3.png"),
    ],
)
def test_out(run: Path, out: str, written: str) -> None:
    Path("folder.png").mkdir()
    assert picture("--num", "1", "--out", out) == Path(written)
    assert pixels(Path(written)).shape == (32, 32)
    assert good("sample", "run", "--num", "2", "--individual", "--out", "many").out.split() == [
        f"many/seed-0-of-step-3-{i:05d}.png" for i in range(2)
    ]


def test_colour() -> None:
    write_folder(Path("pictures"), count=10, channels=3)
    good("train", *SMALL, "--data", "pictures", "-s", "data.image_size=28", "--steps", "2", "--name", "run")
    assert pixels(picture("--num", "2")).shape == (32, 62, 3)
    assert pixels(Path(good("sample", "run", "--num", "1", "--individual").out.strip())).shape == (28, 28, 3)


def test_other_formats_of_numbers() -> None:
    for precision in ("bf16", "fp64"):
        train("--steps", "2", "--name", precision, "-s", f"precision={precision}")
        good("sample", precision, "--num", "2")
