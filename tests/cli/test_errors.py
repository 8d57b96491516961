"""Every mistake is one line on stderr that names what was typed and says what to do; nothing is left behind."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.commands import TINY, fmrun, good, noise_images, refused, write_folder, write_images

from fmrun.runs.folder import Run

pytestmark = pytest.mark.usefixtures("workplace")

Make = Callable[[], object]


# ---- flags, keys and values: without any data


def t(*flags: str) -> tuple[str, ...]:
    return ("train", *TINY, "--steps", "2", "--name", "new", *flags)


def s(*settings: str) -> tuple[str, ...]:
    return t(*(part for setting in settings for part in ("-s", setting)))


TYPED = {
    "unknown command": (("trian",), ("No such command 'trian'. Did you mean 'train'?; fmrun --help",)),
    "folder for runs of too long a name": (t("--runs-dir", 300 * "x"), ("--runs-dir xxx", "give another --runs-dir")),
    "unknown flag": (
        ("train", "--lamda-feature", "0.1"),
        ("No such option: --lamda-feature (Possible options: --lambda-feature); fmrun train --help",),
    ),
    "flag unlike any": (("runs", "--foo"), ("No such option: --foo; fmrun runs --help",)),
    "flag without value": (("train", "--steps"), ("Option '--steps' requires an argument",)),
    "extra argument": (("train", "dcgan"), ("unexpected extra argument", "dcgan", "fmrun train --help")),
    "unknown preset": (("train", "--preset", "dcgan-fn"), ("--preset", "'dcgan-fn'", "did you mean 'dcgan-fm'?")),
    "misspelt key": (s("train.stpes=3"), ("-s train.stpes=3", "did you mean 'train.steps'?")),
    "steps of words": (t("--steps", "many"), ("--steps: train.steps is 'many'", "a whole number")),
    "device cuda without a GPU": (t("--device", "cuda"), ("--device: 'cuda' needs an NVIDIA GPU", "--device cpu")),
    "fp16 on the CPU": (s("precision=fp16"), ("precision 'fp16' needs an NVIDIA GPU", "precision=bf16")),
    "accumulate to single images": (s("train.accumulate=8"), ("one image per micro-batch", "at least 2")),
    "unknown layer": (t("--layers", "blokc1"), ("'blokc1'", "did you mean 'block1'?", "groups: early")),
    "index beyond": (t("--layers", "9"), ("there is no layer 9", "5 block3")),
    "too few layer weights": (
        s("feature_matching.layer_weights=1,2"),
        ("feature_matching.layer_weights has 2 weights for 3 layers", "block1, block2, block3", "one for each"),
    ),
    "layer weights all zero": (s("feature_matching.layer_weights=0,0,0"), ("all zero", "weight to 0")),
    "unbiased with l1": (
        s("feature_matching.estimator=unbiased", "feature_matching.criterion=l1"),
        ("estimator 'unbiased'", "criterion 'l2' only"),
    ),
    "unknown metric": (s("checkpoint.best=loss/q"), ("checkpoint.best: there is no metric 'loss/q'", "loss/d")),
    "metric without its data": (s("checkpoint.best=eval/overfit"), ("there is no metric 'eval/overfit'", "loss/g")),
    "64 px of bundled data": (("train", "--preset", "dcgan-64"), ("bundled images are 28 px", "--data FOLDER")),
    "name with a slash": (t("--name", "../new"), ("--name '../new'", "letters, digits")),
    "name of nothing": (t("--name", ""), ("--name ''", "letters, digits")),
    "name like a flag": (t("--name=-new"), ("--name '-new'", "letter or digit")),
    "resume without runs": (("resume",), ("no runs in runs", "fmrun train")),
    "sample without runs": (("sample",), ("no runs in runs", "fmrun train")),
    "resume of nothing": (("resume", "lost"), ("'lost'", "fmrun train")),
    "sample of no file": (("sample", "lost.safetensors"), ("no checkpoint file 'lost.safetensors'",)),
    "no images": (
        ("sample", "--num", "0"),
        ("'--num': Input should be greater than or equal to 1; fmrun sample --help",),
    ),
    "unknown pair": (
        ("bench", "--pair", "dcgn"),
        ("'--pair': 'dcgn' is not one of 'dcgan', 'munet', 'all'; fmrun bench --help",),
    ),
    "unknown field to measure with": (("bench", "-s", "foo=1"), ("-s foo=1: there is no field 'foo'",)),
    "one picture to walk": (("sample", "--interpolate", "1"), ("--interpolate", "2")),
    "unknown preset shown": (("presets", "dcgna"), ("error: there is no preset 'dcgna'; did you mean 'dcgan'?",)),
    "unknown run shown": (("runs", "lost"), ("'lost'", "fmrun train")),
    "probe of a run and a preset": (("probe-layers", "a", "--preset", "dcgan"), ("not both",)),
    "probe of an unknown layer": (("probe-layers", "--no-data", "--layers", "x"), ("'x'", "groups")),
}


@pytest.mark.parametrize("name", TYPED)
def test_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, phrases = TYPED[name]
    refused(fmrun(*arguments), phrases)
    assert not Path("runs").exists()


# ---- data


def empty_folder() -> None:
    Path("d").mkdir()


def only_text() -> None:
    empty_folder()
    Path("d/notes.txt").write_text("hello")


def one_bad(content: bytes, name: str = "bad.png") -> Make:
    def make() -> None:
        write_folder(Path("d"), count=4)
        Path("d", name).write_bytes(content)

    return make


def truncated() -> None:
    write_folder(Path("d"), count=4)
    data = Path("d/002.png").read_bytes()
    Path("d/002.png").write_bytes(data[: len(data) // 2])


def one_odd(size: tuple[int, int]) -> Make:
    def make() -> None:
        write_folder(Path("d"), count=4)
        Image.new("L", size).save("d/odd.png")

    return make


def many_bad() -> None:
    write_folder(Path("d"), count=4)
    Path("d/a.png").write_bytes(b"")
    Path("d/b.png").write_text("text")
    Image.new("L", (40, 40)).save("d/c.png")


def idx(magic: bytes, rest: bytes = b"") -> Make:
    return lambda: Path("d-ubyte").write_bytes(magic + rest)


def cut_idx() -> None:
    header = struct.pack(">4B3I", 0, 0, 8, 3, 4, 28, 28)
    Path("d-ubyte.gz").write_bytes(gzip.compress(header + bytes(100)))


def npz(**arrays: np.ndarray) -> Make:
    return lambda: np.savez("d.npz", **arrays)


DATA: dict[str, tuple[Make | None, str, tuple[str, ...]]] = {
    "missing": (None, "imagse.npz", ("data.path: 'imagse.npz' does not exist", "did you mean 'images.npz'?")),
    "missing far away": (None, "no/such/place", ("'no/such/place' does not exist", "give a folder or file")),
    "address": (None, "https://example.org/x.zip", ("is an address", "download")),
    "empty folder": (empty_folder, "d", ("'d' holds no files", "give a folder with .png")),
    "text only": (only_text, "d", ("no images, only other files (notes.txt)", ".png")),
    "text called png": (one_bad(b"hello"), "d", ("1 of 5 images in 'd'", "bad.png", "convert or remove")),
    "empty file": (one_bad(b""), "d", ("empty files (bad.png)", "remove them")),
    "cut short": (truncated, "d", ("cut short or damaged (002.png)", "copy them again")),
    "mixed sizes": (one_odd((30, 20)), "d", ("1 of 5", "odd.png 30×20", "data.fit=crop")),
    "one pixel": (one_odd((1, 1)), "d", ("odd.png 1×1", "data.fit=")),
    "all of another size": (
        lambda: write_folder(Path("d"), count=4, size=32),
        "d",
        ("4 of 4", "not 28×28", "-s data.image_size=32"),
    ),
    "everything at once": (many_bad, "d", ("3 of 7", "a.png", "b.png", "c.png 40×40")),
    "wrong magic": (idx(b"\1\2\3\4"), "d-ubyte", ("is no idx-ubyte file", "give other images")),
    "idx of floats": (idx(b"\0\0\x0d\3"), "d-ubyte", ("not bytes", "convert")),
    "idx of labels": (idx(b"\0\0\x08\1" + struct.pack(">I", 3), b"abc"), "d-ubyte", ("holds labels", "give the file")),
    "idx cut short": (cut_idx, "d-ubyte.gz", ("is cut short", "copy it again")),
    "npz of floats": (npz(images=np.zeros((4, 28, 28))), "d.npz", ("'images' as float64", "save it as uint8")),
    "npz of unknown names": (
        npz(a=noise_images(4), b=noise_images(4)),
        "d.npz",
        ("arrays a, b", "name the one with the images 'images'"),
    ),
    "npz of one row": (npz(images=np.zeros((4, 28), np.uint8)), "d.npz", ("shape (4, 28)", "(N, H, W)")),
    "npz damaged": (lambda: Path("d.npz").write_bytes(b"PK\3\4junk"), "d.npz", ("damaged", "copy it again")),
    "npz of another size": (npz(images=noise_images(4, 20)), "d.npz", ("20×20", "not 28×28", "data.fit=")),
    "a single image": (one_odd((28, 28)), "d/odd.png", ("is a single image", "give its folder, d")),
    "too few": (lambda: write_folder(Path("d"), count=1), "d", ("1 image", "at least 2", "add more")),
    "unknown file": (lambda: Path("d.bin").write_text("x"), "d.bin", ("unknown type", "a folder of images")),
    "unknown torchvision": (None, "torchvision:MNIT", ("torchvision:MNIT", "did you mean 'MNIST'?")),
    "torchvision not there": (None, "torchvision:MNIST", ("data.root 'data'", "download=True")),
    "unknown bundled": (None, "bundled:mnist", ("'bundled:mnist'", "bundled:fashion-mnist")),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    make, path, phrases = DATA[name]
    if make is not None:
        make()
    refused(fmrun(*t("--data", path)), phrases)
    assert not Path("runs").exists()


def test_validation_data_is_checked_as_well() -> None:
    refused(fmrun(*s("data.valid_path=lost")), ("data.valid_path: 'lost' does not exist",))


def test_data_with_another_number_of_channels_is_converted() -> None:
    write_images(Path("colour.npz"), channels=3)
    good(*t("--data", "colour.npz", "-s", "data.channels=1"))


# ---- config files


def test_config_files_that_are_none() -> None:
    Path("folder").mkdir()
    Path("base.toml").write_text("seed = = 1")
    refused(fmrun(*t("--config", "base.toml")), ("--config: base.toml: it is not valid TOML", "line 1"))
    refused(fmrun(*t("--config", "folder")), ("--config: folder is a folder, not a config file",))
    refused(fmrun(*t("--config", "bsae.toml")), ("--config: there is no file 'bsae.toml'", "did you mean 'base.toml'?"))


# ---- weights


WEIGHTS: dict[str, tuple[Make | None, str, tuple[str, ...]]] = {
    "missing": (None, "w.safetensors", ("generator.init: there is no file 'w.safetensors'",)),
    "not safetensors": (
        lambda: Path("w.safetensors").write_text("no"),
        "w.safetensors",
        ("'w.safetensors' is not a readable .safetensors file",),
    ),
    "empty": (
        lambda: Path("w.safetensors").write_bytes(b""),
        "w.safetensors",
        ("generator.init: 'w.safetensors' is empty; copy",),
    ),
    "another net": (
        lambda: save_file({"x": torch.zeros(2)}, "w.safetensors"),
        "w.safetensors",
        (
            "generator.init: 'w.safetensors' holds another net",
            "Missing key(s)",
            "Unexpected key(s)",
            "check type, width",
        ),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_initial_weights(name: str) -> None:
    make, path, phrases = WEIGHTS[name]
    if make is not None:
        make()
    refused(fmrun(*s(f"generator.init={path}")), phrases)
    assert not Path("runs").exists()


def test_initial_weights_of_another_width() -> None:
    good("train", *TINY, "--steps", "1", "--name", "other")
    path = "runs/other/checkpoints/step-00000001.safetensors"
    flags = s(f"discriminator.init={path}", "discriminator.width=5")
    fix = ": add -s discriminator.width=4 -s discriminator.norm=batch"
    refused(fmrun(*flags, "-s", "discriminator.norm=spectral"), ("discriminator.init", "Missing", "Unexpected", fix))
    mismatch = "size mismatch for blocks.0.conv.weight"
    refused(fmrun(*flags), ("discriminator.init", mismatch, ": add -s discriminator.width=4"))
    assert [p.name for p in Path("runs").iterdir()] == ["other"]
    good(*s(f"discriminator.init={path}", f"generator.init={path}"))


# ---- runs and folders


def test_runs_and_folders() -> None:
    good("train", *TINY, "--steps", "1", "--name", "old")
    file = Path("runs/old/checkpoints/step-00000001.safetensors")
    before = sorted(Path("runs").rglob("*"))
    refused(fmrun("train", *TINY, "--name", "old"), ("run old already exists in runs", "--name", "fmrun resume old"))
    refused(fmrun("resume", "odl"), ("no run 'odl' in runs", "did you mean 'old'?"))
    refused(fmrun("sample", "odl"), ("no run 'odl' in runs", "did you mean 'old'?"))
    refused(fmrun("runs", "odl"), ("no run 'odl' in runs", "did you mean 'old'?"))
    refused(fmrun("resume", "old", "--steps", "x"), ("--steps: train.steps is 'x'", "a whole number"))
    refused(fmrun("resume", "old", "--steps", "2", "-s", "log.evry=1"), ("'log.evry'", "did you mean 'log.every'?"))
    refused(fmrun("sample", "old", "--device", "gpu"), ("--device: device is 'gpu'",))
    refused(fmrun("sample", "old", "--out", "grid.jpg"), ("--out grid.jpg", ".png"))
    refused(fmrun("sample", "old", "--individual", "--out", "x.png"), ("--out x.png", "needs a folder"))
    refused(fmrun("sample", "images.safetensors"), ("'images.safetensors'",))
    Path("broken.safetensors").write_bytes(file.read_bytes()[:-1])
    refused(fmrun("sample", "broken.safetensors"), ("broken.safetensors is damaged",))
    Path("empty.safetensors").write_bytes(b"")
    refused(fmrun("sample", "empty.safetensors"), ("empty.safetensors is not a checkpoint of fmrun",))
    refused(fmrun("probe-layers", "odl"), ("no run 'odl'", "did you mean 'old'?"))
    Path("occupied").write_text("")
    refused(fmrun("train", *TINY, "--runs-dir", "occupied"), ("--runs-dir occupied is not a folder", "another"))
    refused(fmrun("sample", "old", "--out", "occupied"), ("--out occupied", ".png"))
    assert sorted(Path("runs").rglob("*")) == before

    file.unlink()
    for command in ("resume", "sample", "eval", "probe-layers"):
        gone = ("the checkpoints of run old are gone from runs/old/checkpoints", "put them back", "`fmrun train`")
        refused(fmrun(command, "old"), gone)
    Run(Path("runs/old")).write_status(state="failed", saved=None)
    for command in ("sample", "eval", "probe-layers"):
        refused(fmrun(command, "old"), ("run old has no checkpoint yet", "`fmrun resume old`"))
    Path("runs/old/config.json").write_text("{")
    refused(fmrun("resume", "old"), ("runs/old/config.json: it is not valid JSON", "line 1"))


def test_tensorboard_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmrun.runtime import report

    monkeypatch.setattr(report, "find_spec", lambda name: None)
    refused(fmrun(*s("log.tensorboard=true")), ("log.tensorboard", 'pip install "fmrun[tensorboard]"'))
    assert not Path("runs").exists()
