"""Patches: where they are cut, and that where images are kept and who shares a draw changes no number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_images import CONFIGS, SIZES, equal, feed, made, opened, picture, save, write_pairs
from PIL import Image

from fmrun.config.degradation import DegradationConfig
from fmrun.data import shelf
from fmrun.data.degrade import MARGIN
from fmrun.data.pair_feed import Patches, _Store
from fmrun.data.pairs import BUNDLED
from fmrun.data.shelf import Packed
from fmrun.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


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
