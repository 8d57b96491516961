"""The order of the data, and that where images are kept or decoded changes no number."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmrun.config.data import DataConfig
from fmrun.data.images import ArrayImages, Feed, Images, open_data, order, placement, to_float, to_uint8
from fmrun.errors import UserError

COUNTS = st.integers(1, 40)


def numbered(count: int) -> ArrayImages:
    """Images that know their index: it is in every pixel, beside a column that shows mirroring."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    pixels[..., 0] = 255
    return ArrayImages("numbered", pixels)


def feed(images: Images, part: slice = slice(None), global_batch: int = 6, **options: object) -> Feed:
    defaults = {"seed": 3, "device": "cpu", "cache": "ram", "workers": 0, "hflip": True, "start": 0}
    return Feed(images, global_batch=global_batch, rank_slice=part, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def opened(folder: Path, cache: str) -> Images:
    return open_data(DataConfig(path=str(folder), cache=cache), 0)[0]  # type: ignore[arg-type]


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


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(order(seed, 50, epoch * 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_order_stays_what_it_was() -> None:
    """A change here changes every run ever resumed."""
    assert order(0, 10, 8, 6).tolist() == [7, 4, 4, 6, 2, 7]


@given(count=COUNTS, draw=st.integers(0, 50), ranks=st.sampled_from([1, 2, 3, 6]), hflip=st.booleans())
def test_ranks_share_out_the_global_batch(count: int, draw: int, ranks: int, hflip: bool) -> None:
    images = numbered(count)
    whole = feed(images, hflip=hflip).batch(draw)
    size = 6 // ranks
    slices = [slice(r * size, (r + 1) * size) for r in range(ranks)]
    assert torch.equal(whole, torch.cat([feed(images, part, hflip=hflip).batch(draw) for part in slices]))
    assert whole[:, 0, 0, 4].tolist() == order(3, count, draw * 6, 6).tolist()


def test_flips_mirror_about_half_and_differ_between_draws() -> None:
    source = feed(numbered(100), global_batch=100)
    mirrored = torch.stack([source.batch(draw)[:, 0, 0, -1] == 255 for draw in range(20)])
    assert 0.45 < mirrored.float().mean() < 0.55
    assert len({tuple(row.tolist()) for row in mirrored}) == 20
    plain = feed(numbered(100), global_batch=100, hflip=False)
    assert (plain.batch(0)[:, 0, 0, 0] == 255).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_streaming_equals_ram(folder: Path, workers: int, start: int) -> None:
    """11 images in draws of 6: each second draw crosses an epoch; draw 5 starts amid one."""
    held = feed(opened(folder, "ram"), slice(2, 6))
    streamed = feed(opened(folder, "none"), slice(2, 6), cache="none", workers=workers, start=start)
    assert (held.placement, streamed.placement) == ("ram", "none")
    draws = [*range(start, start + 12), 1, 2, 2]  # the last three are out of sequence
    for draw in draws:
        assert torch.equal(held.batch(draw), streamed.batch(draw)), draw
    streamed.close()


def test_a_stream_leaves_the_global_generator_alone(folder: Path) -> None:
    streamed = feed(opened(folder, "none"), cache="none", workers=1)
    before = torch.get_rng_state()
    streamed.batch(0)
    assert torch.equal(before, torch.get_rng_state())
    streamed.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_turns_bad_is_named(folder: Path, workers: int) -> None:
    images = opened(folder, "none")
    (folder / "04.png").write_text("gone")
    streamed = feed(images, global_batch=11, cache="none", workers=workers)
    with pytest.raises(UserError, match=r"04\.png' was fine before the first step") as caught:
        streamed.batch(0)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dead_worker_is_one_sentence(folder: Path) -> None:
    streamed = feed(opened(folder, "none"), cache="none", workers=1)
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
from fmrun.data.images import Feed, open_data
images, _ = open_data(DataConfig(path=sys.argv[1], cache="none"), 0)
feed = Feed(images, seed=0, global_batch=4, rank_slice=slice(None), device="cpu", cache="none", workers=2,
            hflip=False, start=0)
signal.signal(signal.SIGTERM, lambda *_: None)
feed.batch(0)
workers = [worker.pid for worker in feed._stream._batches._workers]
os.killpg(0, signal.SIGTERM)
for draw in range(1, 30):
    feed.batch(draw)
print(*workers, flush=True)
raise SystemExit(5)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_workers_outlast_a_signal_to_the_group_but_not_their_parent(folder: Path) -> None:
    """A batch system signals every process; the parent then still reads batches until it has saved."""
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert (done.returncode, done.stderr) == (5, "")
    for worker in done.stdout.split():
        assert not Path(f"/proc/{worker}").exists()


def test_auto_keeps_in_ram_what_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 11 * 3 * 32 * 32
    cpu = torch.device("cpu")
    for free, expected in ((2 * needed, "ram"), (2 * needed - 2, "none")):
        for module in ("feed", "folder"):
            monkeypatch.setattr(f"fmrun.data.{module}.available_ram", lambda free=free: free)
        images = opened(folder, "auto")
        assert placement(images, "auto", cpu) == expected
        assert (images.pixels is not None) == (expected == "ram")
    monkeypatch.setattr("fmrun.data.folder.available_ram", lambda: needed - 1)
    with pytest.raises(UserError, match=r"of RAM is free: stream them with -s data\.cache=none"):
        opened(folder, "ram")


def test_device_takes_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    images = numbered(10)
    for free, expected in ((4 * images.nbytes, "device"), (4 * images.nbytes - 4, "ram")):
        monkeypatch.setattr("fmrun.data.feed.available_on", lambda _, free=free: free)
        assert placement(images, "auto", torch.device("cuda")) == expected
    monkeypatch.setattr("fmrun.data.feed.available_on", lambda _: 10)
    with pytest.raises(UserError, match=r"data\.cache=auto"):
        placement(images, "device", torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", ["device", "ram", "none"])
def test_a_gpu_gets_the_same_images(folder: Path, cache: str) -> None:
    expected = feed(opened(folder, "ram"))
    got = feed(opened(folder, cache), cache=cache, workers=2, device="cuda")
    assert got.placement == cache
    for draw in range(8):
        batch = got.batch(draw)
        assert batch.is_cuda
        assert torch.equal(batch.cpu(), expected.batch(draw))
    got.close()


def test_a_batch_is_a_copy() -> None:
    source = feed(numbered(6), hflip=False)
    first = source.batch(0)
    first.zero_()
    assert source.batch(0).any()


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
