"""Pairs of images: what is found, and what is refused."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pair_images import CHAIN, SIZES, both, equal, made, opened, picture, save, write_pairs

from fmrun.config.degradation import DegradationConfig
from fmrun.data import store as module
from fmrun.data.filters import bicubic_down
from fmrun.data.pairs import BUNDLED
from fmrun.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


# what is found


def test_bundled_photographs_are_what_they_say() -> None:
    train, valid = both("bundled:photographs", scale=4, patch_size=128)
    assert valid is not None
    assert train.names == ["astronaut", "brick", "grass", "gravel", "hubble_deep_field", "rocket"]
    assert valid.names == ["chelsea", "coffee"]
    assert (train.name, train.channels, train.in_memory) == ("bundled:photographs", 3, True)
    assert train.made_by == "bicubic"
    digest = hashlib.sha256()
    for split in (train, valid):
        for i in range(len(split)):
            digest.update(split.whole(i).tobytes())
    assert digest.hexdigest()[:16] == "c79b7f15dbc30477"


def test_bundled_photographs_have_their_licence() -> None:
    root = BUNDLED["photographs"]
    files = sorted(file.relative_to(root).as_posix() for file in root.glob("*/*.png"))
    licence = (root / "LICENSE").read_text()
    assert len(files) == 8
    assert all(file in licence for file in files)
    assert sum(file.stat().st_size for file in root.rglob("*.png")) < 4e6


def test_pairs_are_matched_by_name(folder: Path) -> None:
    pairs = opened(folder / "hr", folder / "lr")
    assert pairs.names == [f"part/{i}" for i in range(5)]
    assert pairs.made_by == "files"
    for i, size in enumerate(SIZES):
        low, high = pairs.pair(i)
        assert low.shape == (3, *size)
        assert torch.equal(high, low.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_names_that_say_the_scale_are_matched(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "0001.png", picture(64, 64))
    save(tmp_path / "lr" / "0001x2.png", picture(32, 32))
    assert opened(tmp_path / "hr", tmp_path / "lr").names == ["0001"]


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_without_partners_the_middle_is_downsampled(tmp_path: Path, scale: int, cache: str) -> None:
    image = picture(67, 50)
    save(tmp_path / "a.png", image)
    pairs = opened(tmp_path, scale=scale, trained=False, cache=cache)
    assert pairs.in_memory == (cache == "ram")
    height, width = 67 // scale * scale, 50 // scale * scale
    top, left = (67 - height) // 2, (50 - width) // 2
    middle = image[top : top + height, left : left + width]
    low, high = pairs.pair(0)
    np.testing.assert_array_equal(high.permute(1, 2, 0), middle)
    np.testing.assert_array_equal(low.permute(1, 2, 0), bicubic_down(middle, scale))


def test_channels_follow_the_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(48, 48, 1))
    assert opened(tmp_path).channels == 1
    assert opened(tmp_path, channels=3).pair(0)[1].shape == (3, 48, 48)
    save(tmp_path / "b.png", picture(48, 48, 3))
    assert opened(tmp_path).channels == 3
    save(tmp_path / "c.png", picture(48, 48, 4))
    assert opened(tmp_path).channels == 3
    clear = opened(tmp_path, channels=4)
    np.testing.assert_array_equal(clear.pair(2)[1].permute(1, 2, 0), picture(48, 48, 4))
    assert (clear.pair(0)[1][3] == 255).all()


def test_odd_files_come_out_upright_and_in_8_bits(tmp_path: Path) -> None:
    wide = picture(40, 60, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(wide[..., 0].astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.fromarray(wide).quantize(8).save(tmp_path / "c.png")
    for cache in ("ram", "none"):
        pairs = opened(tmp_path, cache=cache)
        np.testing.assert_array_equal(pairs.pair(0)[1].permute(1, 2, 0), np.rot90(wide, -1))
        np.testing.assert_array_equal(pairs.pair(1)[1][2], wide[..., 0])
        assert pairs.pair(2)[1].shape == (3, 40, 60)


@pytest.mark.parametrize("degradation", [DegradationConfig(), CHAIN])
def test_validation_is_the_same_for_every_seed(folder: Path, degradation: DegradationConfig) -> None:
    runs = [both(folder / "hr", scale=4, valid_fraction=0.4, seed=seed, degradation=degradation) for seed in (0, 0, 1)]
    for train, valid in runs:
        assert valid is not None
        assert sorted(train.names + valid.names) == [f"part/{i}" for i in range(5)]
        assert len(valid) == 2
    assert runs[0][1].names == runs[1][1].names  # type: ignore[union-attr]
    assert runs[0][1].names != runs[2][1].names  # type: ignore[union-attr]
    wholes = [
        both(folder / "hr", valid_path=str(folder / "hr"), scale=4, seed=seed, degradation=degradation)[1]
        for seed in (0, 1)
    ]
    for i in range(5):
        assert equal(*(valid.pair(i) for valid in wholes))  # type: ignore[union-attr]


def test_validation_degrades_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(folder, "chain", "none")
    low, high = first.pair(1)
    again = made(folder, "chain", "none")
    calls = []
    original = module.degrade
    monkeypatch.setattr(module, "degrade", lambda *args: (calls.append(1), original(*args))[1])
    for _ in range(2):
        assert equal(again.pair(1), (low, high))
    assert len(calls) == 1
    monkeypatch.setattr(module, "available_ram", lambda: 100)
    for _ in range(2):
        again.pair(0)
    assert len(calls) == 3


def test_fingerprints_change_with_the_data_only(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "hr" / f"{i}.png", picture(64, 64, seed=i))
        save(tmp_path / "lr" / f"{i}.png", picture(32, 32, seed=i))
    high, low = tmp_path / "hr", tmp_path / "lr"
    first = opened(high, low).fingerprint
    for path in high.glob("*.png"):
        os.utime(path, (0, 0))
    assert opened(high, low).fingerprint == first
    assert opened(high, low, cache="none").fingerprint == first
    assert opened(high).fingerprint != first
    save(low / "2.png", picture(32, 32, seed=9))
    assert opened(high, low).fingerprint != first
    assert opened("bundled:photographs").fingerprint == opened("bundled:photographs", scale=4).fingerprint


def test_progress_counts_up_to_all(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    opened(folder / "hr", folder / "lr", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)


# what is refused


def message(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        both(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("data.")
    return text


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    high, low = tmp_path / "hr", tmp_path / "lr"
    for i in range(4):
        save(high / f"good{i}.png", picture(64, 64))
        save(low / f"good{i}.png", picture(32, 32))
    save(high / "alone.png", picture(64, 64))
    save(low / "single.png", picture(32, 32))
    for name in ("text", "broken"):
        save(high / f"{name}.png", picture(64, 64))
        save(low / f"{name}.png", picture(32, 32))
    (high / "text.png").write_text("no")
    (low / "broken.png").write_text("no")
    save(high / "odd.png", picture(65, 64))
    save(low / "odd.png", picture(32, 32))
    save(high / "grey.png", picture(64, 64, 1))
    save(low / "grey.png", picture(32, 32))
    save(high / "small.png", picture(32, 24))
    save(low / "small.png", picture(16, 12))
    text = message(high, low)
    for expected in (
        f"data.lr_path: 1 of 10 images in '{high}' have no partner of the same name in '{low}' (alone.png), so add",
        f"data.path: 1 of 10 images in '{low}' have no partner of the same name in '{high}' (single.png), so add",
        f"data.path: 1 of 10 images in '{high}' cannot be used: not PNG",
        "(text.png)",
        f"data.lr_path: 1 of 10 images in '{low}' cannot be used: not PNG",
        "(broken.png)",
        "data.scale: 1 of 7 pairs are not ×2 (odd 64×65 from 32×32), so make each HR side 2 times its LR side",
        "data.lr_path: 1 of 7 pairs are grey on one side and in colour on the other (grey.png), so convert",
        "data.path: 1 of 8 images are smaller than data.patch_size 32 (small.png 24×32), so remove them",
    ):
        assert expected in text, expected
    assert "good" not in text
    assert "grey on one side" not in message(high, low, channels=3)


def test_another_scale_is_recognised(tmp_path: Path) -> None:
    for i in range(7):
        save(tmp_path / "hr" / f"{i}.png", picture(64, 64))
        save(tmp_path / "lr" / f"{i}.png", picture(16, 16))
    text = message(tmp_path / "hr", tmp_path / "lr")
    assert "7 of 7 pairs are not ×2 (0 64×64 from 16×16" in text
    assert text.endswith("and 2 more), so set -s data.scale=4")


def test_a_smaller_patch_is_proposed(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(100, 90))
    assert message(tmp_path, patch_size=128).endswith("(a.png 90×100), so set -s data.patch_size=80 or remove them")


def test_two_endings_of_one_name_are_ambiguous(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "a.png", picture(64, 64))
    save(tmp_path / "hr" / "a.bmp", picture(64, 64))
    save(tmp_path / "lr" / "a.png", picture(32, 32))
    assert "differ in nothing but their ending (a.bmp, a.png)" in message(tmp_path / "hr", tmp_path / "lr")


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("bundled:photograhps", {}, "is not among bundled:photographs; did you mean 'photographs'?"),
        ("bundled:fashion-mnist", {}, "is not among bundled:photographs"),
        ("https://example.org/a.zip", {}, "is an address: download the images"),
        ("{root}/thinks", {}, "does not exist; did you mean 'things'?"),
        ("{root}/file", {}, "is a file: give a folder of images"),
        ("{root}/empty", {}, "holds no files: give a folder with .png"),
        ("bad\0name", {}, "data.path: 'bad"),
        ("{root}/things", {"patch_size": 33}, "data.patch_size: 33 is no multiple of data.scale 2"),
        ("{root}/things", {"lr_path": "{root}/nowhere"}, "data.lr_path: '{root}/nowhere' does not exist"),
        ("{root}/things", {"valid_lr_path": "x"}, "data.valid_path: the HR images of data.valid_lr_path are missing"),
        (
            "{root}/things",
            {"lr_path": "{root}/things", "valid_path": "x"},
            "data.valid_lr_path: the LR images of data.valid_path are missing",
        ),
    ],
)
def test_a_bad_place(tmp_path: Path, path: str, options: dict[str, Any], expected: str) -> None:
    save(tmp_path / "things" / "a.png", picture(64, 64))
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    filled = {k: v.format(root=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    assert expected.format(root=tmp_path) in message(path.format(root=tmp_path), **filled)
