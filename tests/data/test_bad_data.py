"""Whatever is wrong with a user's data is one sentence that names the files and holds the fix."""

import gzip
import os
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fmrun.config.data import DataConfig
from fmrun.data.files import BAD
from fmrun.data.pairs import open_pairs
from fmrun.data.sources import open_images
from fmrun.runtime.errors import UserError

GOOD = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
BYTES = np.zeros((3, 28, 28), np.uint8)


def message(path: Path | str, task: str = "images", **options: Any) -> str:
    """The sentence over images from noise, or over pairs."""
    opened = open_images if task == "images" else open_pairs
    options = {"patch_size": 32, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            opened(DataConfig(path=str(path), **options), 0)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("data.")
    assert len(text.replace(str(Path(path).parent), "")) < (500 if task == "images" else 2000)
    return text


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def good(folder: Path, count: int = 3) -> None:
    for i in range(count):
        Image.fromarray(GOOD).save(folder / f"good{i}.png")


def png(path: Path, width: int, height: int) -> None:
    Image.new("RGB", (width, height), "red").save(path)


def cut(path: Path) -> None:
    Image.fromarray(GOOD).save(path)
    path.write_bytes(path.read_bytes()[:-300])


def npz(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, *arrays, **named)


def zip_of_images(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", "x")


def deep(path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.float32)).save(path, format="TIFF")


def deep_int(path: Path) -> None:
    Image.fromarray(np.full((32, 32), 70_000, np.int32)).save(path, format="TIFF")


def bomb(path: Path) -> None:
    """A PNG whose header promises 400 million pixels."""
    Image.fromarray(GOOD).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (
        lambda p: p.write_text("<html>"),
        f"{BAD['foreign'][0]} (bad.png), so convert",
    ),
    "eps": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "(bad.png), so convert or remove them"),
    "empty": (lambda p: p.touch(), "empty files (bad.png), so copy them again"),
    "truncated": (cut, "cut short or damaged (bad.png), so copy them again"),
    "header only": (lambda p: (cut(p), p.write_bytes(p.read_bytes()[:60])), "cut short or damaged (bad.png)"),
    "broken link": (lambda p: p.symlink_to("nowhere"), "missing or not readable (bad.png), so restore"),
    "link to itself": (lambda p: p.symlink_to(p.name), "missing or not readable (bad.png), so restore"),
    "pipe": (os.mkfifo, "inside (bad.png), so convert or remove them"),
    "float": (deep, "of more than 16 bits per pixel and channel (bad.png), so convert"),
    "32 bits": (deep_int, "of more than 16 bits per pixel and channel (bad.png), so convert"),
    "bomb": (bomb, "larger than 178 million pixels (bad.png), so make them smaller"),
}


@pytest.mark.parametrize(("task", "cache"), [("images", "ram"), ("pairs", "none")])
@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_in_a_folder(tmp_path: Path, kind: str, cache: str, task: str) -> None:
    good(tmp_path)
    make, expected = FILES[kind]
    make(tmp_path / "bad.png")
    text = message(tmp_path, task, cache=cache)
    assert text.startswith(f"data.path: 1 of 4 images in '{tmp_path}' cannot be used: ")
    assert expected in text


@pytest.mark.parametrize(
    ("task", "options", "size", "expected"),
    [
        ("images", {}, (40, 30), "not 32×32 (bad.png 40×30), so add -s data.fit=crop"),
        ("images", {}, (1, 1), "not 32×32 (bad.png 1×1), so add -s data.fit=crop"),
        ("images", {"fit": "crop"}, (1, 1), "smaller than 8 px (bad.png), so remove them"),
        ("images", {"fit": "pad"}, (1, 1), "smaller than 8 px (bad.png), so remove them"),
        ("pairs", {}, (48, 6), "smaller than 8 px (bad.png), so remove them"),
    ],
)
def test_a_size_that_will_not_do(
    tmp_path: Path, task: str, options: dict[str, Any], size: tuple[int, int], expected: str
) -> None:
    good(tmp_path)
    png(tmp_path / "bad.png", *size)
    assert expected in message(tmp_path, task, **options)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    good(tmp_path)
    for i in range(8):
        (tmp_path / f"text{i}.png").write_text("no")
    cut(tmp_path / "cut.png")
    png(tmp_path / "wide.png", 33, 32)
    text = message(tmp_path)
    assert "10 of 13 images" in text
    assert "(text0.png, text1.png, text2.png, text3.png, text4.png and 3 more)" in text
    assert "cut.png" in text
    assert "wide.png 33×32" in text


@pytest.mark.parametrize("task", ["images", "pairs"])
def test_training_and_validation_are_checked_together(tmp_path: Path, task: str) -> None:
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.png").write_text("no")
    text = message(tmp_path / "train", task, valid_path=str(tmp_path / "valid"))
    assert "train.png" in text
    assert "; data.valid_path: 1 of 1 images" in text
    assert "valid.png" in text


@pytest.mark.parametrize(
    ("size", "options", "fix"),
    [
        ((64, 64), {}, "add -s data.fit=crop or -s data.image_size=64"),
        ((32, 32), {"image_size": 28}, "add -s data.fit=crop or -s data.image_size=32"),
        ((640, 480), {}, "add -s data.fit=crop"),
        ((20, 30), {}, "add -s data.fit=crop or -s data.fit=pad"),
        ((64, 64), {"fit": "pad"}, "add -s data.fit=crop or -s data.image_size=64"),
        ((40, 20), {"fit": "pad"}, "add -s data.fit=crop"),
    ],
)
def test_wrong_sizes_come_with_what_to_add(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], fix: str
) -> None:
    for i in range(2):
        png(tmp_path / f"{i}.png", *size)
    assert message(tmp_path, **options).endswith(fix)
    np.savez(tmp_path / "a.npz", np.zeros((2, size[1], size[0]), np.uint8))
    text = message(tmp_path / "a.npz", **options)
    assert text.endswith(fix)
    assert f"{size[0]}×{size[1]}" in text


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: None, "does not exist: give a folder or file of images"),
    "misspelt": (lambda p: p.with_name("thinks").mkdir(), "does not exist; did you mean 'thinks'?"),
    "empty folder": (lambda p: p.mkdir(), "holds no files: give a folder with .png, .jpg"),
    "other files": (
        lambda p: (p.mkdir(), (p / "a.txt").touch(), (p / "b.csv").touch()),
        "holds no images, only other files (a.txt, b.csv): give a folder with .png",
    ),
    "folder of arrays": (
        lambda p: (
            p.mkdir(),
            [(p / f"{n}-ubyte.gz").touch() for n in ("t10k-images-idx3", "train-images-idx3", "train-labels-idx1")],
        ),
        "holds no image files but 't10k-images-idx3-ubyte.gz': give that file",
    ),
    "one image": (lambda p: (p.mkdir(), good(p, 1)), "holds 1 image and at least 2 are needed: add more"),
    "zero bytes": (lambda p: p.touch(), "is of unknown type"),
    "unknown type": (lambda p: p.write_text("hello there"), "is of unknown type: give a folder of images"),
    "single image": (lambda p: Image.fromarray(GOOD).save(p, "PNG"), "is a single image: give its folder"),
    "idx cut short": (lambda p: p.write_bytes(idx(BYTES)[:-1]), "is cut short or damaged: copy it again"),
    "idx header cut": (lambda p: p.write_bytes(idx(BYTES)[:9]), "is cut short or damaged: copy it again"),
    "idx too long": (lambda p: p.write_bytes(idx(BYTES) + b"x"), "is cut short or damaged: copy it again"),
    "idx wrong magic": (lambda p: p.write_bytes(b"\0\0\x09\x07" + bytes(50)), "is no idx-ubyte file"),
    "idx of floats": (lambda p: p.write_bytes(idx(BYTES, 0x0D)), "or its numbers are not bytes: convert them"),
    "idx of labels": (lambda p: p.write_bytes(idx(BYTES[0, 0])), "holds labels: give the file of images"),
    "idx without images": (lambda p: p.write_bytes(idx(BYTES[:0])), "array of shape (0, 28, 28): images are"),
    "idx of one image": (lambda p: p.write_bytes(idx(BYTES[:1])), "holds 1 image and at least 2"),
    "gz cut short": (lambda p: p.write_bytes(gzip.compress(idx(BYTES))[:-9]), "is cut short or damaged"),
    "gz damaged": (lambda p: p.write_bytes(b"\x1f\x8b" + b"rubbish" * 9), "is cut short or damaged"),
    "gz of text": (lambda p: p.write_bytes(gzip.compress(b"hello")), "is no idx-ubyte file"),
    "npz cut short": (
        lambda p: (np.savez(f"{p}.npz", BYTES), p.write_bytes(Path(f"{p}.npz").read_bytes()[:-80])),
        "is cut short or damaged, or no .npz file",
    ),
    "npz of objects": (
        lambda p: npz(p, np.array([{}, []], dtype=object)),
        "holds Python objects, which are not loaded: save plain uint8 arrays",
    ),
    "npz of floats": (
        lambda p: npz(p, images=np.zeros((3, 28, 28))),
        "holds 'images' as float64: save it as uint8, 0 to 255",
    ),
    "npz of several": (
        lambda p: npz(p, a=BYTES, b=BYTES),
        "has arrays a, b: name the one with the images 'images'",
    ),
    "npz of a table": (
        lambda p: npz(p, BYTES[0]),
        "holds an array of shape (28, 28): images are (N, H, W), (N, H, W, C) or (N, C, H, W)",
    ),
    "npz with four channels": (
        lambda p: npz(p, np.zeros((2, 28, 28, 4), np.uint8)),
        "with 1 or 3 channels",
    ),
    "npz without any": (lambda p: npz(p), "has no arrays: name the one with the images 'images'"),
    "zip of images": (zip_of_images, "holds 'a.png' as no array: save it as uint8, 0 to 255"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_bad_place(tmp_path: Path, kind: str) -> None:
    make, expected = PLACES[kind]
    make(tmp_path / "thing")
    text = message(tmp_path / "thing")
    assert text.startswith(f"data.path: '{tmp_path / 'thing'}' ")
    assert expected in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "bundled:fashion-mnits",
            "is not among bundled:fashion-mnist, stacked-fashion-mnist; did you mean 'fashion-mnist'?",
        ),
        ("torchvision:CIFAR-10", "did you mean 'CIFAR10'?"),
        ("torchvision:", "is not among torchvision:MNIST, FashionMNIST"),
        ("torchvision:MNIST", "from torchvision.datasets import *; MNIST('{root}', download=True)\""),
        ("torchvision:CIFAR10", "from torchvision.datasets import *; CIFAR10('{root}', download=True)\""),
        ("torchvision:STL10", "STL10('{root}', download=True, split='unlabeled')\""),
        ("https://example.org/a.zip", "is an address: download the images and give their folder"),
        ("bad\0name", "cannot be read (embedded null byte)"),
        ("x" * 300, "cannot be read (File name too long)"),
    ],
)
def test_a_bad_name(tmp_path: Path, name: str, expected: str) -> None:
    assert expected.format(root=tmp_path) in message(name, root=str(tmp_path))


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system call: root, as whom tests may run, can read everything."""
    good(tmp_path)
    read = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "good1.png":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "not readable (good1.png), so restore them, give yourself permission (chmod u+r)" in message(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a folder nor a file" in message(tmp_path / "pipe")


@pytest.mark.parametrize(("task", "count"), [("images", 2), ("pairs", 1)])
def test_too_few_to_hold_any_out(tmp_path: Path, task: str, count: int) -> None:
    good(tmp_path, count)
    expected = f"of {count} image{'s' * (count > 1)} none can be held out: add images"
    assert expected in message(tmp_path, task, valid_fraction=0.5)


def test_nothing_is_printed_and_no_thread_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good(tmp_path, 100)
    cut(tmp_path / "cut.png")
    bomb(tmp_path / "bomb.png")
    before = threading.active_count()
    message(tmp_path)
    assert threading.active_count() == before
    assert capfd.readouterr() == ("", "")


def test_a_large_photo_warns_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from half of what it refuses on; a panorama is no attack."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    Image.new("1", (250, 250)).save(tmp_path / "a.png")
    Image.new("1", (64, 64)).save(tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, _ = open_images(DataConfig(path=str(tmp_path), fit="crop"), 0)
    assert len(images) == 2
