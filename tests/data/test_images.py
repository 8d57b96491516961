"""Every kind of source gives the images that were put into it."""

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import bundled_labels
from torchvision import datasets

from fmrun.config.data import DataConfig
from fmrun.data.files import AVIF, Square, converted, decode
from fmrun.data.sources import open_images
from fmrun.data.store import Images

BUNDLED = Path(__file__).parents[2] / "fmrun" / "data" / "bundled"
GREY = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)


def train(path: Path | str, **options: object) -> Images:
    return open_images(DataConfig(path=str(path), **options), 0)[0]  # type: ignore[arg-type]


def pixels(images: Images) -> np.ndarray:
    return images.read(range(len(images))).numpy()


def pad(images: np.ndarray, size: int) -> np.ndarray:
    gaps = [(size - side) // 2 for side in images.shape[-2:]]
    around = [(gap, size - side - gap) for gap, side in zip(gaps, images.shape[-2:], strict=True)]
    return np.pad(images, [(0, 0)] * (images.ndim - 2) + around)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    """`(H, W)` or `(C, H, W)` as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array if array.ndim == 2 else array.transpose(1, 2, 0)).save(path, **options)
    return path


# bundled


def test_bundled_images_are_what_they_say() -> None:
    images, valid = open_images(DataConfig(image_size=28), 0)
    assert valid is not None
    assert (len(images), len(valid)) == (10_000, 2_000)
    labels = [bundled_labels("train"), bundled_labels("valid")]
    assert np.bincount(labels[0]).tolist() == [1000] * 10
    assert np.bincount(labels[1]).tolist() == [200] * 10
    distinct = {image.tobytes() for image in [*pixels(images), *pixels(valid)]}
    assert len(distinct) == 12_000

    def digest(split: Images, labels: np.ndarray) -> str:
        return hashlib.sha256(pixels(split).tobytes() + labels.tobytes()).hexdigest()[:16]

    assert [digest(images, labels[0]), digest(valid, labels[1])] == ["f26e207323cb6564", "83d72c1b57218811"]


def test_bundled_files_are_small_and_have_their_licence() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 6e6
    assert "Zalando SE" in (BUNDLED / "LICENSE").read_text()
    assert "all 12,000 are from the original's training files" in (BUNDLED / "README.md").read_text()


def test_bundled_images_are_padded_with_black_by_default() -> None:
    images = train("bundled:fashion-mnist")
    inner = pixels(train("bundled:fashion-mnist", image_size=28))
    outer = pixels(images)
    assert outer.shape == (10_000, 1, 32, 32)
    np.testing.assert_array_equal(outer[..., 2:-2, 2:-2], inner)
    assert outer.sum(dtype=np.int64) == inner.sum(dtype=np.int64)


# arrays


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "odd").write_bytes(pack(idx(GREY)))
    np.testing.assert_array_equal(pixels(train(tmp_path / "odd", image_size=28)), GREY[:, None])


@pytest.mark.parametrize("key", ["images", "x_train", "arr_0", "sole"])
@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz(tmp_path: Path, key: str, layout: str) -> None:
    source, expected = {
        "NHW": (GREY, GREY[:, None]),
        "NHWC": (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        "NCHW": (COLOUR, COLOUR),
    }[layout]
    more = {} if key == "sole" else {"other": np.zeros(3), "labels": np.arange(4)}
    np.savez_compressed(tmp_path / "data.npz", **{key: source}, **more)
    images = train(tmp_path / "data.npz", image_size=expected.shape[-1])
    np.testing.assert_array_equal(pixels(images), expected)


def test_torchvision_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(GREY))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(5, dtype=np.uint8)))
    images = train("torchvision:MNIST", root=str(tmp_path))
    np.testing.assert_array_equal(pixels(images), pad(GREY[:, None], 32))


def test_torchvision_emnist_is_turned_upright(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in datasets.EMNIST.splits:
        for part in ("train", "test"):
            (raw / f"emnist-{split}-{part}-images-idx3-ubyte").write_bytes(idx(GREY.transpose(0, 2, 1).copy()))
            (raw / f"emnist-{split}-{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(5, dtype=np.uint8)))
    images = train("torchvision:EMNIST", root=str(tmp_path), image_size=28)
    np.testing.assert_array_equal(pixels(images), GREY[:, None])


def test_torchvision_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    batch = pickle.dumps({"data": COLOUR.reshape(5, -1), "labels": [4, 3, 2, 1, 0]})
    meta = pickle.dumps({"label_names": list("abcde")})
    (base / "one").write_bytes(batch)
    (base / "meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["one", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [])
    named = {"filename": "meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", named)
    images = train("torchvision:CIFAR10", root=str(tmp_path))
    np.testing.assert_array_equal(pixels(images), COLOUR)


# folders


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, image in zip(["b.PNG", "a/z.bmp", "a/b/c.tif", "c.Tiff", "a-.bmp"], GREY, strict=True):
        save(tmp_path / name, image)
    (tmp_path / ".hidden.png").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "a.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    images = train(tmp_path, image_size=28)
    # a-.bmp, a/b/c.tif, a/z.bmp, b.PNG, c.Tiff
    np.testing.assert_array_equal(pixels(images), GREY[[4, 2, 1, 0, 3]][:, None])
    assert images.name == str(tmp_path)


def test_what_is_no_image_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "album/b.png", "album/@eaDir/b.png", ".thumbnails/c.png", "._a.png"):
        save(tmp_path / name, COLOUR[0])
    for name in ("a.txt", "album/b.TXT", "readme", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    assert [entry.name for entry in train(tmp_path).files.entries] == ["a.png", "album/b.png"]  # type: ignore[union-attr]
    said = "2 .txt, 1 extensionless, 2 hidden files, 1 .thumbnails folder, 1 @eaDir folder left out"
    assert capsys.readouterr().err == f"'{tmp_path}': {said}\n"


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jpe", "jfif", "webp", "avif"])
def test_lossy_kinds_are_read(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not AVIF:
        pytest.skip("this Pillow does not read AVIF")
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8) * 7, (3, 32, 32))
    for i in range(2):
        save(tmp_path / f"{i}.{suffix}", smooth, quality=95)
    assert np.abs(pixels(train(tmp_path)).astype(int) - smooth).max() < 12


def test_colour_is_taken_only_if_an_image_has_it(tmp_path: Path) -> None:
    save(tmp_path / "a.png", GREY[0])
    save(tmp_path / "b.png", GREY[1])
    assert train(tmp_path, image_size=28).channels == 1
    save(tmp_path / "c.png", COLOUR[0, :, :28, :28])
    images = train(tmp_path, image_size=28)
    assert images.channels == 3
    np.testing.assert_array_equal(pixels(images)[0], np.repeat(GREY[:1], 3, axis=0))


@pytest.mark.parametrize("fit", ["exact", "crop", "pad"])
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("source", [GREY[:, None], COLOUR])
def test_an_array_and_a_folder_agree(tmp_path: Path, fit: str, channels: int | None, source: np.ndarray) -> None:
    """Padding, scaling, luma and repetition are the same whatever the images came in."""
    for i, image in enumerate(source):
        save(tmp_path / "folder" / f"{i}.png", image[0] if len(image) == 1 else image)
    np.savez(tmp_path / "a.npz", source)
    size = {"exact": source.shape[-1], "crop": 28, "pad": 64}[fit]
    options = {"fit": fit, "channels": channels, "image_size": size}
    array, folder = train(tmp_path / "a.npz", **options), train(tmp_path / "folder", **options)
    assert array.channels == (channels or source.shape[1])
    np.testing.assert_array_equal(pixels(array), pixels(folder))


def test_crop_takes_the_centre_of_the_shorter_side(tmp_path: Path) -> None:
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 32:96] = 200
    for name, image in (("a.png", wide), ("b.png", wide.T)):
        save(tmp_path / name, image)
    assert (pixels(train(tmp_path, fit="crop")) > 180).all()
    edge = np.zeros((32, 40), np.uint8)
    edge[:, 4:36] = GREY[0].repeat(2)[: 32 * 32].reshape(32, 32)
    save(tmp_path / "a.png", edge)
    np.testing.assert_array_equal(pixels(train(tmp_path, fit="crop"))[0, 0], edge[:, 4:36])


# modes of pixels


def test_orientation_is_honoured(tmp_path: Path) -> None:
    """The eight values of EXIF's tag, against its definition by the places of row 0 and column 0."""
    image = GREY[0, :12, :20]
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.T,
        6: image.T[:, ::-1],
        7: image.T[::-1, ::-1],
        8: image.T[::-1],
    }
    for tag, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        for kind in ("png", "tiff"):
            path = save(tmp_path / f"{tag}.{kind}", image, exif=exif)
            got = np.asarray(Square(32, "pad")(converted(decode(path), 1)))
            np.testing.assert_array_equal(got, pad(expected, 32), err_msg=f"{tag} {kind}")


def test_16_bits_are_rounded_to_8(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for name in ("a.png", "b.tif"):
        save(tmp_path / name, deep)
    images = train(tmp_path)
    assert images.channels == 1
    for image in pixels(images):
        np.testing.assert_array_equal(image[0], np.round(deep / 257).astype(np.uint8))


def test_black_and_white_is_grey(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(GREY[0]).convert("1").save(tmp_path / name)
    images = train(tmp_path, image_size=28)
    assert images.channels == 1
    assert set(np.unique(pixels(images))) == {0, 255}


def test_a_palette_is_colour(tmp_path: Path) -> None:
    for name in ("a.png", "b.gif"):
        image = Image.fromarray(np.arange(1024).reshape(32, 32).astype(np.uint8) % 4, "P")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 7, 8, 9])
        image.save(tmp_path / name)
    images = train(tmp_path)
    assert images.channels == 3
    for image in pixels(images):
        assert image[:, 0, :4].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 8, 9]]


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    """The colour under full transparency is rubbish that no viewer shows."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., :3] = (10, 20, 30)
    rgba[:, 16:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba).save(tmp_path / "b.webp", lossless=True)
    for image in pixels(train(tmp_path)):
        assert (image[:, :, :16] == 255).all()
        assert image[:, 0, 20].tolist() == [10, 20, 30]


def test_grey_with_transparency_stays_grey(tmp_path: Path) -> None:
    la = np.zeros((32, 32, 2), np.uint8)
    la[..., 0] = 50
    la[:, 16:, 1] = 255
    Image.fromarray(la, "LA").save(tmp_path / "a.png")
    Image.fromarray(np.full((32, 32), 50, np.uint8)).save(tmp_path / "b.png", transparency=50)
    images = train(tmp_path)
    assert images.channels == 1
    first, second = pixels(images)[:, 0]
    assert (first[:, :16] == 255).all()
    assert (first[:, 16:] == 50).all()
    assert (second == 255).all()


def test_cmyk_is_colour(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.tif"):
        Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / name)
    for image in pixels(train(tmp_path)):
        assert image[0].min() > 240
        assert image[1:].max() < 15


# validation, fingerprints, progress


def test_valid_path_has_the_channels_of_the_training_images(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "train" / f"{i}.png", COLOUR[i])
        save(tmp_path / "valid" / f"{i}.png", GREY[i])
    config = DataConfig(path=str(tmp_path / "train"), valid_path=str(tmp_path / "valid"))
    _, valid = open_images(config, 0)
    assert valid is not None
    assert (len(valid), valid.channels) == (3, 3)


@pytest.mark.parametrize("kind", ["folder", "stream", "array"])
def test_a_held_out_share_is_disjoint_and_seeded(tmp_path: Path, kind: str) -> None:
    source = np.arange(20, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    np.savez(tmp_path / "a.npz", images=source)
    for i, image in enumerate(source):
        save(tmp_path / "folder" / f"{i:02}.png", image)
    path = tmp_path / ("a.npz" if kind == "array" else "folder")
    cache = "none" if kind == "stream" else "auto"
    config = DataConfig(path=str(path), cache=cache, valid_fraction=0.25, image_size=28)  # type: ignore[arg-type]

    def halves(seed: int) -> tuple[list[int], list[int]]:
        images, valid = open_images(config, seed)
        assert valid is not None
        return pixels(images)[:, 0, 0, 0].tolist(), pixels(valid)[:, 0, 0, 0].tolist()

    images, valid = halves(0)
    assert len(valid) == 5
    assert sorted(images + valid) == list(range(20))
    assert (images, valid) == halves(0)
    assert valid != halves(1)[1]
    assert valid not in ([0, 1, 2, 3, 4], [15, 16, 17, 18, 19])


def test_without_a_share_there_is_no_validation(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GREY)
    assert open_images(DataConfig(path=str(tmp_path / "a.npz")), 0)[1] is None


def test_fingerprints_change_with_the_data_only(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "folder" / f"{i}.png", GREY[i])
    first = train(tmp_path / "folder").fingerprint
    assert train(tmp_path / "folder", cache="none").fingerprint == first
    save(tmp_path / "folder" / "2.png", GREY[3])
    second = train(tmp_path / "folder").fingerprint
    assert second != first
    (tmp_path / "folder" / "2.png").rename(tmp_path / "folder" / "3.png")
    assert train(tmp_path / "folder").fingerprint not in (first, second)

    np.savez(tmp_path / "a.npz", images=GREY)
    np.savez_compressed(tmp_path / "b.npz", other=GREY)
    a, b = (train(tmp_path / name).fingerprint for name in ("a.npz", "b.npz"))
    assert a == b
    np.savez(tmp_path / "b.npz", images=GREY ^ 1)
    assert train(tmp_path / "b.npz").fingerprint != a


def test_progress_counts_up_to_all(tmp_path: Path) -> None:
    for i in range(200):
        save(tmp_path / f"{i:03}.png", GREY[i % 5])
    seen: list[tuple[int, int]] = []
    open_images(DataConfig(path=str(tmp_path)), 0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (200, 200)
    assert len(seen) > 1
    assert seen == sorted(seen)


def test_reading_takes_any_indices() -> None:
    images = train("bundled:fashion-mnist")
    whole = pixels(images)
    for indices in ([3, 1, 3], np.array([3, 1, 3]), torch.tensor([3, 1, 3])):
        np.testing.assert_array_equal(images.read(indices).numpy(), whole[[3, 1, 3]])
    assert images.read([]).shape == (0, 1, 32, 32)
