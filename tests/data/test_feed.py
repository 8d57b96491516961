"""The order of the data, and that where images are kept or decoded, and who shares a draw, changes no number."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.pair_images import CONFIGS, SIZES, equal, feed, made, opened, picture, save, windows, write_pairs

from fmrun.config.data import DataConfig
from fmrun.config.degradation import DegradationConfig
from fmrun.data.degrade import MARGIN
from fmrun.data.feed import order, placement
from fmrun.data.pairs import BUNDLED
from fmrun.data.sources import open_images
from fmrun.data.store import Images, to_float, to_uint8
from fmrun.runtime.errors import UserError

COUNTS = st.integers(1, 40)
KINDS = ["images", *CONFIGS]


def numbered(count: int) -> Images:
    """Images that know their index: it is in every pixel, beside a column that shows mirroring."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    pixels[:, :, 0] = 255
    return Images.of_array("numbered", pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and 11 images."""
    root = write_pairs(tmp_path_factory.mktemp("pairs"))
    for i in range(11):
        save(root / "images" / f"{i:02}.png", picture(32, 32, seed=i))
    return root


def data(folder: Path, kind: str, cache: str) -> Images:
    if kind != "images":
        return made(folder, kind, cache)
    return open_images(DataConfig(path=str(folder / "images"), cache=cache), 0)[0]  # type: ignore[arg-type]


# ---- order


@given(seed=st.integers(0, 2**63 - 1), count=COUNTS, epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(seed: int, count: int, epoch: int) -> None:
    assert sorted(order(seed, count, epoch * count, count)) == list(range(count))


@given(count=COUNTS, position=st.integers(0, 200), n=st.integers(0, 130), cut=st.integers(0, 130))
def test_order_does_not_depend_on_how_it_is_asked_for(count: int, position: int, n: int, cut: int) -> None:
    whole = order(7, count, position, n)
    cut = min(cut, n)
    parts = [order(7, count, position, cut), order(7, count, position + cut, n - cut)]
    assert len(whole) == n
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(whole, [order(7, count, position + i, 1)[0] for i in range(n)])


def test_order_stays_what_it_was_and_differs_between_epochs_and_seeds() -> None:
    """A change here changes every run ever resumed."""
    assert order(0, 10, 8, 6).tolist() == [7, 4, 4, 6, 2, 7]
    assert len({tuple(order(seed, 50, epoch * 50, 50)) for seed in range(3) for epoch in range(3)}) == 9


def test_every_image_is_seen_once_an_epoch(folder: Path) -> None:
    patches = windows(opened(folder / "hr", folder / "lr"), global_batch=5)
    for draw in range(2):
        assert sorted(patches.rows(draw)[:, 0]) == list(range(5))


# ---- where windows lie


def test_flips_mirror_about_half_and_differ_between_draws() -> None:
    source = feed(numbered(100), global_batch=100)
    mirrored = torch.stack([source.batch(draw)[:, 0, 0, -1] == 255 for draw in range(20)])  # type: ignore[call-overload]
    assert 0.45 < mirrored.float().mean() < 0.55
    assert len({tuple(row.tolist()) for row in mirrored}) == 20
    plain = feed(numbered(100), global_batch=100, hflip=False).batch(0)
    assert (plain[:, 0, 0, 0] == 255).all()  # type: ignore[call-overload]
    assert plain[:, 0, 0, 4].tolist() == order(3, 100, 0, 100).tolist()  # type: ignore[call-overload]


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_both_sides_are_cut_and_turned_alike(folder: Path, cache: str) -> None:
    pairs = opened(folder / "hr", folder / "lr", cache=cache)
    source, patches = feed(pairs), windows(pairs)
    seen = set()
    for draw in range(12):
        low, high = source.batch(draw)
        assert (low.shape, high.shape) == ((6, 3, 16, 16), (6, 3, 32, 32))
        assert torch.equal(high, low.repeat_interleave(2, 2).repeat_interleave(2, 3))
        for k, (image, top, left, turning) in enumerate(patches.rows(draw).tolist()):
            seen.add(turning)
            cut = pairs.whole(image)[2 * top : 2 * top + 32, 2 * left : 2 * left + 32]
            cut = np.rot90(cut, turning % 4)
            np.testing.assert_array_equal(high[k].permute(1, 2, 0), cut[:, ::-1] if turning >= 4 else cut)
    assert seen == set(range(8))


def test_turning_and_mirroring_are_switches_and_every_place_is_reached(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(36, 38))
    for hflip, rotate, expected in ((0, 0, {0}), (1, 0, {0, 4}), (0, 1, {0, 1, 2, 3}), (1, 1, set(range(8)))):
        rows = windows(opened(tmp_path), global_batch=300, hflip=bool(hflip), rotate=bool(rotate)).rows(0).tolist()
        assert {turning for *_, turning in rows} == expected
        assert {(top, left) for _, top, left, _ in rows} == {(y, x) for y in range(3) for x in range(4)}


def test_no_two_patches_share_their_random_numbers(folder: Path) -> None:
    patches = windows(made(folder, "chain", "ram"), global_batch=8)
    assert len({steps for draw in range(5) for steps in patches.recipes(draw)}) == 40
    assert len({tuple(row[1:3]) for draw in range(5) for row in patches.rows(draw).tolist()}) > 30


# ---- the same numbers everywhere


@given(
    kind=st.sampled_from(KINDS),
    ranks=st.sampled_from([2, 3, 6]),
    draw=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None)
def test_ranks_share_out_the_global_batch(folder: Path, kind: str, ranks: int, draw: int) -> None:
    images = data(folder, kind, "ram")
    size = 6 // ranks
    parts = [slice(None), *(slice(r * size, (r + 1) * size) for r in range(ranks))]
    whole, *shares = (feed(images, part).batch(draw) for part in parts)
    if isinstance(whole, torch.Tensor):
        whole, shares = (whole,), [(share,) for share in shares]  # type: ignore[assignment, misc]
    assert equal(whole, tuple(map(torch.cat, zip(*shares, strict=True))))


@pytest.mark.parametrize(("workers", "kind"), [*((0, kind) for kind in KINDS), (2, "images"), (2, "chain")])
def test_streaming_equals_ram(folder: Path, kind: str, workers: int) -> None:
    """11 or 5 images in draws of 6 cross epochs; draw 4 starts amid one; the last two are out of sequence."""
    held = feed(data(folder, kind, "ram"), slice(2, 6), workers=workers)  # which degrade at random, if anything does
    streamed = feed(data(folder, kind, "none"), slice(2, 6), cache="none", workers=workers, start=4)
    assert (held.placement, streamed.placement) == ("ram", "none")
    for draw in [4, 5, 1, 1]:
        assert equal(held.batch(draw), streamed.batch(draw)), draw
    streamed.close()
    held.close()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_streamed_patch_is_part_of_the_downsampled_whole(tmp_path: Path, scale: int) -> None:
    with Image.open(BUNDLED["photographs"] / "valid" / "coffee.png") as image:
        image.crop((100, 90, 100 + 16 * 12, 90 + 120)).save(tmp_path / "a.png")
    held, streamed = (
        feed(opened(tmp_path, scale=scale, cache=c, patch_size=48), patch_size=48) for c in ("ram", "none")
    )
    assert (held.placement, streamed.placement) == ("ram", "none")
    for draw in range(3):
        assert equal(held.batch(draw), streamed.batch(draw)), draw


def test_a_patch_within_an_image_is_degraded_with_its_surroundings(tmp_path: Path) -> None:
    """Where the chain is blur alone, a patch equals its part of the degraded whole."""
    off: dict[str, Any] = {name: {"prob": 0} for name in ("sinc", "jpeg")}
    off |= {"resize": {"up": 0, "down": 0}, "noise": {"gaussian": 0, "poisson": 0}}
    blur = {**off, "blur": {"prob": 1, "sigma": (1, 1), "anisotropic": 0}}
    chain = {"kind": "chain", "passes": 1, "first": blur, "sinc": {"prob": 0}, "kernels": ["area"]}
    save(tmp_path / "a.png", picture(120, 120))
    pairs = opened(tmp_path, degradation=DegradationConfig.model_validate(chain))
    assert MARGIN * 2 >= 3
    whole = pairs.pair(0)[0].permute(1, 2, 0).numpy()
    plain = {"global_batch": 10, "hflip": False, "rotate": False}
    low = feed(pairs, **plain).batch(0)[0]
    for made_low, (_, top, left, _) in zip(low, windows(pairs, **plain).rows(0).tolist(), strict=True):
        expected = whole[top : top + 16, left : left + 16]
        assert np.abs(made_low.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_draws_and_seeds_differ_and_repeat_whatever_the_threads(folder: Path) -> None:
    pairs = made(folder, "chain", "ram")
    batches = [feed(pairs, seed=seed).batch(draw) for seed in (0, 1) for draw in (0, 1)]
    assert len({batch[0].numpy().tobytes() for batch in batches}) == 4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert equal(feed(pairs, seed=1).batch(1), batches[3])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "workers"), [("images", 1), ("chain", 0)])
def test_a_stream_leaves_the_global_generators_alone(folder: Path, kind: str, workers: int) -> None:
    source = feed(data(folder, kind, "none"), cache="none", workers=workers)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    source.batch(0)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(legacy, np.random.get_state()[1])  # type: ignore[index]
    source.close()


@pytest.mark.parametrize("kind", ["images", "files", "bicubic"])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_batch_is_a_copy(folder: Path, kind: str, cache: str) -> None:
    source = feed(data(folder, kind, cache))
    first = source.batch(0)
    for part in [first] if isinstance(first, torch.Tensor) else first:
        assert part.is_contiguous(memory_format=torch.channels_last)
        part.zero_()
    second = source.batch(0)
    assert all(part.any() for part in ([second] if isinstance(second, torch.Tensor) else second))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", ["device", "ram", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gets_the_same_windows(folder: Path, kind: str, cache: str) -> None:
    expected = feed(data(folder, kind, "ram"))
    got = feed(data(folder, kind, cache), cache=cache, workers=2, device="cuda")
    assert got.placement == ("ram" if (kind, cache) == ("chain", "device") else cache)
    for draw in range(5):
        batch, there = got.batch(draw), expected.batch(draw)
        for one, other in [(batch, there)] if isinstance(batch, torch.Tensor) else zip(batch, there, strict=True):
            assert one.is_cuda
            assert torch.equal(one.cpu(), other)
    got.close()


# ---- what goes wrong


@pytest.mark.parametrize(("kind", "workers"), [("images", 1), ("bicubic", 0)])
def test_a_file_that_turns_bad_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", picture(32, 32, seed=i))
        save(tmp_path / "hr" / f"{i}.png", picture(48, 48, seed=i))
    images = data(tmp_path, kind, "none")
    bad = tmp_path / ("images" if kind == "images" else "hr") / "1.png"
    for spoil, said in ((lambda: bad.write_text("gone"), "not PNG"), (lambda: save(bad, picture(20, 48)), "48×20 px")):
        spoil()
        with pytest.raises(UserError, match=r"1\.png' was fine before the first step and is now unusable") as caught:
            feed(images, cache="none", workers=workers).batch(0)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_dead_worker_is_one_sentence(folder: Path) -> None:
    streamed = feed(data(folder, "images", "none"), cache="none", workers=1)
    streamed.batch(0)
    assert streamed._stream is not None
    for worker in streamed._stream._batches._workers:  # type: ignore[union-attr]
        worker.kill()
        worker.join()
    with pytest.raises(UserError, match=r"data\.workers=0"):
        [streamed.batch(draw) for draw in range(1, 50)]


SCRIPT = """
import os, signal, sys
from fmrun.config.data import DataConfig
from fmrun.data.feed import Feed, Windows
from fmrun.data.sources import open_images
images, _ = open_images(DataConfig(path=sys.argv[1], cache="none"), 0)
feed = Feed(Windows(images, seed=0, global_batch=4), device="cpu", cache="none", workers=2, start=0)
signal.signal(signal.SIGTERM, lambda *_: None)
feed.batch(0)
workers = [worker.pid for worker in feed._stream._batches._workers]
os.killpg(0, signal.SIGTERM)
for draw in range(1, 12):
    feed.batch(draw)
print(*workers, flush=True)
raise SystemExit(5)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_workers_outlast_a_signal_to_the_group_but_not_their_parent(folder: Path) -> None:
    """A batch system signals every process; the parent then still reads batches until it has saved."""
    command = [sys.executable, "-c", SCRIPT, str(folder / "images")]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert (done.returncode, done.stderr) == (5, "")
    for worker in done.stdout.split():
        assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize(("kind", "needed"), [("images", 11 * 3 * 32**2), ("files", 15 * sum(h * w for h, w in SIZES))])
def test_what_does_not_fit_is_streamed_or_refused(
    folder: Path, kind: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, expected in ((2 * needed, "ram"), (2 * needed - 2, "none")):
        monkeypatch.setattr("fmrun.data.check.available_ram", lambda free=free: free)
        images = data(folder, kind, "auto")
        assert placement(images, "auto", torch.device("cpu")) == expected
        assert images.in_memory == (expected == "ram")
    monkeypatch.setattr("fmrun.data.check.available_ram", lambda: needed - 1)
    with pytest.raises(UserError, match=r"of RAM is free: stream them with -s data\.cache=none"):
        data(folder, kind, "ram")


def test_device_takes_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    images = numbered(10)
    for free, expected in ((4 * images.nbytes, "device"), (4 * images.nbytes - 4, "ram")):
        monkeypatch.setattr("fmrun.data.feed.available_on", lambda _, free=free: free)
        assert placement(images, "auto", torch.device("cuda")) == expected
    monkeypatch.setattr("fmrun.data.feed.available_on", lambda _: 10)
    with pytest.raises(UserError, match=r"data\.cache=auto"):
        placement(images, "device", torch.device("cuda"))


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_and_bytes_are_inverse(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values, dtype)
    assert floats.dtype == dtype
    assert (floats[0], floats[-1]) == (-1, 1)
    assert torch.equal(to_uint8(floats), values)
    assert to_float(values, torch.bfloat16).dtype == torch.bfloat16


@settings(max_examples=50)
@given(st.floats(-10, 10))
def test_bytes_are_rounded_and_clamped(value: float) -> None:
    expected = min(255, max(0, (value + 1) * 127.5))
    assert abs(int(to_uint8(torch.tensor([value], dtype=torch.float64))) - expected) <= 0.5 + 1e-9
