"""Pairs of images: what is found, what is refused, and that where they are kept changes no number."""

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmrun.config.degradation import DegradationConfig
from fmrun.data.degrade import MARGIN
from fmrun.data.filters import bicubic_down
from fmrun.data.pair_feed import Patches, _Store
from fmrun.data.pair_set import Pairs
from fmrun.data.pairs import BUNDLED, PairFeed, open_pairs
from fmrun.data.preview import write_preview
from fmrun.data.shelf import Packed
from fmrun.errors import UserError

CHAIN = DegradationConfig(kind="chain")
SIZES = [(40, 52), (64, 48), (57, 61), (48, 48), (90, 44)]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path, **options)


def opened(path: Path | str, lr_path: Path | None = None, **options: Any) -> Pairs:
    low = None if lr_path is None else str(lr_path)
    return open_pairs(str(path), low, **{"scale": 2, "patch_size": 32, **options})[0]


def feed(pairs: Pairs, part: slice = slice(None), global_batch: int = 6, **options: Any) -> PairFeed:
    defaults = {
        "seed": 3,
        "device": "cpu",
        "cache": "auto",
        "workers": 0,
        "patch_size": 32,
        "hflip": True,
        "rotate": True,
        "start": 0,
    }
    return PairFeed(pairs, global_batch=global_batch, rank_slice=part, **{**defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hr` and `lr`, whose pixels tell where they come from."""
    root = tmp_path_factory.mktemp("pairs")
    for i, size in enumerate(SIZES):
        low = picture(*size, seed=i)
        save(root / "lr" / "part" / f"{i}.png", low)
        save(root / "hr" / "part" / f"{i}.bmp", low.repeat(2, 0).repeat(2, 1))
    return root


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# what is found


def test_bundled_photographs_are_what_they_say() -> None:
    train, valid = open_pairs("bundled:photographs", scale=4, patch_size=128)
    assert valid is not None
    assert train.names == ["astronaut", "brick", "grass", "gravel", "hubble_deep_field", "rocket"]
    assert valid.names == ["chelsea", "coffee"]
    assert (train.name, train.channels, train.in_memory) == ("bundled:photographs", 3, True)
    assert train.info.smallest == (512, 512)
    assert train.info.largest == (872, 1000)
    assert train.info.low == "bicubic"
    digest = hashlib.sha256()
    for split in (train, valid):
        for i in range(len(split)):
            digest.update(split.high.whole(i).tobytes())
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
    assert pairs.info.low == "files"
    for i, size in enumerate(SIZES):
        low, high = pairs.whole(i)
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
    pairs = opened(tmp_path, scale=scale, patch_size=4 * scale, cache=cache)
    assert pairs.in_memory == (cache == "ram")
    height, width = 67 // scale * scale, 50 // scale * scale
    top, left = (67 - height) // 2, (50 - width) // 2
    middle = image[top : top + height, left : left + width]
    low, high = pairs.whole(0)
    np.testing.assert_array_equal(high.permute(1, 2, 0), middle)
    np.testing.assert_array_equal(low.permute(1, 2, 0), bicubic_down(middle, scale))


def test_channels_follow_the_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(48, 48, 1))
    assert opened(tmp_path).channels == 1
    assert opened(tmp_path, channels=3).whole(0)[1].shape == (3, 48, 48)
    save(tmp_path / "b.png", picture(48, 48, 3))
    assert opened(tmp_path).channels == 3
    save(tmp_path / "c.png", picture(48, 48, 4))
    assert opened(tmp_path).channels == 3
    clear = opened(tmp_path, channels=4)
    np.testing.assert_array_equal(clear.whole(2)[1].permute(1, 2, 0), picture(48, 48, 4))
    assert (clear.whole(0)[1][3] == 255).all()


def test_odd_files_come_out_upright_and_in_8_bits(tmp_path: Path) -> None:
    wide = picture(40, 60, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(wide[..., 0].astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.fromarray(wide).quantize(8).save(tmp_path / "c.png")
    for cache in ("ram", "none"):
        pairs = opened(tmp_path, cache=cache)
        np.testing.assert_array_equal(pairs.whole(0)[1].permute(1, 2, 0), np.rot90(wide, -1))
        np.testing.assert_array_equal(pairs.whole(1)[1][2], wide[..., 0])
        assert pairs.whole(2)[1].shape == (3, 40, 60)


@pytest.mark.parametrize("degradation", [DegradationConfig(), CHAIN])
def test_validation_is_the_same_for_every_seed(folder: Path, degradation: DegradationConfig) -> None:
    runs = [
        open_pairs(str(folder / "hr"), scale=4, patch_size=32, valid_fraction=0.4, seed=seed, degradation=degradation)
        for seed in (0, 0, 1)
    ]
    for train, valid in runs:
        assert valid is not None
        assert sorted(train.names + valid.names) == [f"part/{i}" for i in range(5)]
        assert len(valid) == 2
    assert runs[0][1].names == runs[1][1].names  # type: ignore[union-attr]
    assert runs[0][1].names != runs[2][1].names  # type: ignore[union-attr]
    wholes = [
        open_pairs(
            str(folder / "hr"),
            valid_path=str(folder / "hr"),
            scale=4,
            patch_size=32,
            seed=seed,
            degradation=degradation,
        )[1]
        for seed in (0, 1)
    ]
    for i in range(5):
        assert equal(*(valid.whole(i) for valid in wholes))  # type: ignore[union-attr]


def test_fingerprints_change_with_the_data_only(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "hr" / f"{i}.png", picture(64, 64, seed=i))
        save(tmp_path / "lr" / f"{i}.png", picture(32, 32, seed=i))
    high, low = tmp_path / "hr", tmp_path / "lr"
    first = opened(high, low).fingerprint
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


# patches


def patch_of(high: np.ndarray, spot: Any, side: int, scale: int) -> np.ndarray:
    top, left = scale * spot.top, scale * spot.left
    cut = np.rot90(high[top : top + scale * side, left : left + scale * side], spot.turns)
    return cut[:, ::-1] if spot.mirror else cut


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_both_sides_are_cut_and_turned_alike(folder: Path, cache: str) -> None:
    pairs = opened(folder / "hr", folder / "lr", cache=cache)
    source = feed(pairs)
    seen = set()
    patches = Patches(pairs, seed=3, global_batch=6, patch_size=32, hflip=True, rotate=True)
    for draw in range(12):
        low, high = source.batch(draw)
        assert (low.shape, high.shape) == ((6, 3, 16, 16), (6, 3, 32, 32))
        assert torch.equal(high, low.repeat_interleave(2, 2).repeat_interleave(2, 3))
        for k in range(6):
            image = patches.image(draw * 6 + k)
            spot = patches.spot(draw * 6 + k, image)
            seen.add((spot.turns, spot.mirror))
            expected = patch_of(pairs.high.whole(image), spot, 16, 2)
            np.testing.assert_array_equal(high[k].permute(1, 2, 0), expected)
    assert len(seen) == 8


def test_turning_and_mirroring_are_switches(folder: Path) -> None:
    pairs = opened(folder / "hr", folder / "lr")
    for hflip, rotate, expected in ((False, False, 1), (True, False, 2), (False, True, 4)):
        patches = Patches(pairs, seed=0, global_batch=50, patch_size=32, hflip=hflip, rotate=rotate)
        spots = [patches.spot(p, patches.image(p)) for p in range(50)]
        assert len({(spot.turns, spot.mirror) for spot in spots}) == expected


def test_every_place_of_an_image_is_reached(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(36, 38))
    patches = Patches(opened(tmp_path), seed=0, global_batch=300, patch_size=32, hflip=True, rotate=True)
    spots = [patches.spot(p, 0) for p in range(300)]
    assert {(spot.top, spot.left) for spot in spots} == {(y, x) for y in range(3) for x in range(4)}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_streamed_patch_is_part_of_the_downsampled_whole(tmp_path: Path, scale: int) -> None:
    with Image.open(BUNDLED["photographs"] / "valid" / "coffee.png") as image:
        image.crop((100, 90, 100 + 16 * 12, 90 + 120)).save(tmp_path / "a.png")
    held, streamed = (
        feed(opened(tmp_path, scale=scale, cache=c, patch_size=48), patch_size=48) for c in ("ram", "none")
    )
    assert (held.placement, streamed.placement) == ("ram", "none")
    for draw in range(10):
        assert equal(held.batch(draw), streamed.batch(draw)), draw


CONFIGS = {"files": None, "bicubic": DegradationConfig(), "chain": CHAIN}


def made(folder: Path, kind: str, cache: str) -> Pairs:
    low = folder / "lr" if kind == "files" else None
    return opened(folder / "hr", low, cache=cache, degradation=CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_equals_ram(folder: Path, kind: str, workers: int) -> None:
    held = feed(made(folder, kind, "ram"), slice(2, 6))
    streamed = feed(made(folder, kind, "none"), slice(2, 6), workers=workers, start=4)
    for draw in [4, 5, 6, 7, 1, 2, 2]:  # the last three are out of sequence
        assert equal(held.batch(draw), streamed.batch(draw)), draw
    streamed.close()
    held.close()


def test_degrading_by_workers_equals_degrading_here(folder: Path) -> None:
    pairs = made(folder, "chain", "ram")
    here, there = feed(pairs, workers=0), feed(pairs, workers=2)
    assert here.placement == there.placement == "ram"
    for draw in range(4):
        assert equal(here.batch(draw), there.batch(draw))
    there.close()


@given(
    kind=st.sampled_from(list(CONFIGS)),
    ranks=st.sampled_from([2, 3, 6]),
    draw=st.integers(0, 1000),
    crops=st.integers(1, 4),
)
@settings(max_examples=20, deadline=None)
def test_ranks_share_out_the_global_batch(folder: Path, kind: str, ranks: int, draw: int, crops: int) -> None:
    pairs = made(folder, kind, "ram")
    whole = feed(pairs, crops_per_image=crops).batch(draw)
    size = 6 // ranks
    parts = [feed(pairs, slice(r * size, (r + 1) * size), crops_per_image=crops).batch(draw) for r in range(ranks)]
    for side in (0, 1):
        assert torch.equal(whole[side], torch.cat([part[side] for part in parts]))


def test_numbers_do_not_depend_on_threads(folder: Path) -> None:
    source = feed(made(folder, "chain", "ram"))
    threads = torch.get_num_threads()
    try:
        batches = []
        for count in (1, 3):
            torch.set_num_threads(count)
            batches.append([source.batch(draw) for draw in range(3)])
    finally:
        torch.set_num_threads(threads)
    assert all(equal(a, b) for a, b in zip(*batches, strict=True))


def test_draws_and_seeds_differ_and_repeat(folder: Path) -> None:
    pairs = made(folder, "chain", "ram")
    batches = [feed(pairs, seed=seed).batch(draw) for seed in (0, 1) for draw in (0, 1)]
    assert len({batch.low.numpy().tobytes() for batch in batches}) == 4
    assert equal(feed(pairs, seed=1).batch(1), batches[3])


def test_no_two_patches_share_their_random_numbers(folder: Path) -> None:
    pairs = made(folder, "chain", "ram")
    patches = Patches(pairs, seed=0, global_batch=8, patch_size=32, hflip=True, rotate=True)
    spots = [patches.spot(p, 4) for p in range(40)]
    assert len({spot.steps for spot in spots}) == 40
    assert len({spot[:4] for spot in spots}) > 35


def test_every_image_is_seen_once_an_epoch(folder: Path) -> None:
    pairs = opened(folder / "hr", folder / "lr")
    for crops in (1, 3):
        patches = Patches(pairs, seed=0, global_batch=5, patch_size=32, hflip=True, rotate=True, crops_per_image=crops)
        images = [patches.image(p) for p in range(10 * crops)]
        for epoch in (images[: 5 * crops], images[5 * crops :]):
            assert sorted(epoch) == sorted(list(range(5)) * crops)
        assert all(len(set(images[k : k + crops])) == 1 for k in range(0, len(images), crops))


def test_an_image_is_decoded_once_for_its_neighbouring_crops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = feed(made(folder, "bicubic", "none"), crops_per_image=3)
    decoded = []
    from fmrun.data import shelf

    original = shelf.decode_upright
    monkeypatch.setattr(shelf, "decode_upright", lambda path: (decoded.append(path), original(path))[1])
    source.batch(0)
    assert len(decoded) == 2


def test_a_stream_leaves_the_global_generators_alone(folder: Path) -> None:
    source = feed(made(folder, "chain", "none"))
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    source.batch(0)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(legacy, np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_turns_bad_is_named(tmp_path: Path, workers: int) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", picture(48, 48, seed=i))
    pairs = opened(tmp_path, cache="none")
    (tmp_path / "1.png").write_text("gone")
    source = feed(pairs, workers=workers)
    with pytest.raises(UserError, match=r"1\.png' was fine before the first step") as caught:
        source.batch(0)
    assert "\n" not in str(caught.value)
    save(tmp_path / "1.png", picture(20, 48))
    with pytest.raises(UserError, match=r"unusable \(48×20 px\)"):
        source.batch(0)


def test_a_batch_is_a_copy_in_channels_last_memory(folder: Path) -> None:
    source = feed(opened(folder / "hr", folder / "lr"))
    low, high = source.batch(0)
    assert low.is_contiguous(memory_format=torch.channels_last)
    high.zero_()
    assert source.batch(0).high.any()


@pytest.mark.parametrize("cache", ["auto", "ram"])
def test_what_does_not_fit_is_streamed_or_refused(folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * sum(h * w for h, w in SIZES) * 5
    for free, fits in ((2 * needed, True), (needed - 1, False)):
        monkeypatch.setattr("fmrun.data.folder.available_ram", lambda free=free: free)
        if cache == "ram" and not fits:
            with pytest.raises(UserError, match=r"of RAM is free: stream them with -s data\.cache=none"):
                opened(folder / "hr", folder / "lr", cache=cache)
        else:
            assert opened(folder / "hr", folder / "lr", cache=cache).in_memory == fits


def test_gathering_on_a_device_equals_cutting(folder: Path) -> None:
    pairs = opened(folder / "hr", folder / "lr")
    patches = Patches(pairs, seed=3, global_batch=24, patch_size=32, hflip=True, rotate=True)
    rows = []
    for position in range(24):
        spot = patches.spot(position, image := patches.image(position))
        rows.append((image, spot.top, spot.left, spot.turns + 4 * spot.mirror))
    expected = patches.split(patches.read(np.arange(24)), 24)
    for side, packed, scale in ((0, pairs.low, 1), (1, pairs.high, 2)):
        assert isinstance(packed, Packed)
        store = _Store(packed, 16, scale, torch.device("cpu"))
        assert torch.equal(store.gather(torch.tensor(rows)), expected[side])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("kind", "cache"), [("files", "device"), ("bicubic", "device"), ("chain", "ram"), ("files", "none")]
)
def test_a_gpu_gets_the_same_patches(folder: Path, kind: str, cache: str) -> None:
    expected = feed(made(folder, kind, "ram"))
    got = feed(made(folder, kind, cache), cache=cache, workers=2, device="cuda")
    assert got.placement == cache
    for draw in range(5):
        batch = got.batch(draw)
        assert batch.low.is_cuda
        assert equal(tuple(side.cpu() for side in batch), expected.batch(draw))
    got.close()


def test_a_patch_within_an_image_is_degraded_with_its_surroundings(tmp_path: Path) -> None:
    """Where the chain is blur alone, a patch equals its part of the degraded whole."""
    off = {
        "sinc": {"prob": 0},
        "resize": {"up": 0, "down": 0},
        "noise": {"gaussian": 0, "poisson": 0},
        "jpeg": {"prob": 0},
    }
    blur = {**off, "blur": {"prob": 1, "sigma": (1, 1), "anisotropic": 0}}
    config = DegradationConfig.model_validate(
        {"kind": "chain", "passes": 1, "first": blur, "sinc": {"prob": 0}, "kernels": ["area"]}
    )
    save(tmp_path / "a.png", picture(120, 120))
    pairs = opened(tmp_path, degradation=config)
    assert MARGIN * 2 >= 3
    whole = pairs.whole(0)[0].permute(1, 2, 0).numpy()
    patches = Patches(pairs, seed=0, global_batch=10, patch_size=32, hflip=False, rotate=False)
    low = patches.split(patches.read(np.arange(10)), 10).low
    for position in range(10):
        spot = patches.spot(position, 0)
        expected = whole[spot.top : spot.top + 16, spot.left : spot.left + 16]
        assert np.abs(low[position].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


# what is refused


def message(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_pairs(*map(str, args), **{"scale": 2, "patch_size": 32, **options})
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("data.")
    return text


def bomb(path: Path) -> None:
    save(path, picture(48, 48))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def cut(path: Path) -> None:
    save(path, picture(48, 48))
    path.write_bytes(path.read_bytes()[:-900])


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda p: p.write_text("<html>"), "not PNG, JPEG, WEBP, BMP, TIFF or GIF inside (bad.png)"),
    "empty": (lambda p: p.touch(), "empty files (bad.png), so copy them again"),
    "truncated": (cut, "cut short or damaged (bad.png), so copy them again"),
    "bomb": (bomb, "larger than 178 million pixels (bad.png), so make them smaller"),
    "tiny": (lambda p: save(p, picture(48, 6)), "smaller than 8 px (bad.png), so remove them"),
    "deep": (
        lambda p: Image.fromarray(np.full((48, 48), 70_000, np.int32)).save(p, format="TIFF"),
        "of more than 16 bits a pixel and channel (bad.png)",
    ),
}


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file(tmp_path: Path, kind: str, cache: str) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", picture(48, 48))
    make, expected = BAD_FILES[kind]
    make(tmp_path / "bad.png")
    text = message(tmp_path, cache=cache)
    assert text.startswith(f"data.path: 1 of 4 images in '{tmp_path}' cannot be used: ")
    assert expected in text


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


def test_training_and_validation_are_checked_together(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.png").write_text("no")
    text = message(tmp_path / "train", valid_path=str(tmp_path / "valid"))
    assert "(train.png)" in text
    assert "; data.valid_path: 1 of 1 images" in text


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
        ("{root}/things", {"valid_fraction": 0.5}, "data.valid_fraction: of 1 image none can be held out"),
    ],
)
def test_a_bad_place(tmp_path: Path, path: str, options: dict[str, Any], expected: str) -> None:
    save(tmp_path / "things" / "a.png", picture(64, 64))
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    filled = {k: v.format(root=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    assert expected.format(root=tmp_path) in message(path.format(root=tmp_path), **filled)


# the preview


@pytest.mark.parametrize(("kind", "columns"), [("files", 4), ("bicubic", 4), ("chain", 4)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_preview_shows_what_is_trained_on(
    tmp_path: Path, folder: Path, kind: str, columns: int, channels: int
) -> None:
    low = folder / "lr" if kind == "files" else None
    pairs = opened(folder / "hr", low, degradation=CONFIGS[kind], channels=channels)
    write_preview(pairs, tmp_path / "a" / "preview.png", seed=0, patch_size=32, rows=2)
    with Image.open(tmp_path / "a" / "preview.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[2] == 3
    assert 256 * columns < sheet.shape[1] < 300 * columns
    across = 1 if kind == "chain" else 2
    patches = Patches(pairs, seed=0, global_batch=2 * across, patch_size=32, hflip=False, rotate=False)
    batch = patches.split(patches.read(np.arange(2 * across)), 2 * across)
    if channels == 3:
        np.testing.assert_array_equal(sheet[44:300:16, 12:268:16], batch.low[0].permute(1, 2, 0))
        right = 12 + (3 if kind == "chain" else 1) * 268
        np.testing.assert_array_equal(sheet[44:300:8, right : right + 256 : 8], batch.high[0].permute(1, 2, 0))
    before = (tmp_path / "a" / "preview.png").read_bytes()
    write_preview(pairs, tmp_path / "a" / "preview.png", seed=0, patch_size=32, rows=2)
    assert (tmp_path / "a" / "preview.png").read_bytes() == before
