"""Twelve small runs of both tasks, in float64, whose rows and pictures are kept in `tests/golden`.

`python tests/support/golden_runs.py` makes them with the version at hand and writes the records anew: only for a change that is
meant to change numbers, which the commit then says. `--check` demands equality to the bit, which holds on one kind of
machine; the test allows for the order of summation of another.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from support.commands import Background, free_port, good, noise_images, rows, saved, write_images

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 6

COMMON = ("--steps", str(STEPS), "--device", "cpu", "--batch-size", "8", "-s", "precision=fp64", "-s", "log.every=1")
COMMON += ("-s", "eval.every=3", "-s", "eval.num=8", "-s", "log.sample_count=4")


def _set(**fields: object) -> tuple[str, ...]:
    """`data__path="x"` sets `data.path`."""
    return tuple(part for key, value in fields.items() for part in ("-s", f"{key.replace('__', '.')}={_toml(value)}"))


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


GAN = _set(eval__kid_every=0, generator__width=4, generator__latent_dim=8, discriminator__width=4)
SR = (
    *("--preset", "munet-x2-cpu"),
    *_set(discriminator__width=4, generator__features=8, generator__blocks=2, data__patch_size=32, data__workers=1),
    *_set(train__batch_size=4, eval__perceptual="none", feature_matching__start_step=1, losses__gan__start_step=0),
)

RUNS: dict[str, tuple[str, ...]] = {
    "bundled-mean": ("--preset", "dcgan-fm", *GAN, *_set(data__hflip=True)),
    "folder-sample": (
        *("--preset", "dcgan-fm", *GAN),
        *_set(data__path="colour", data__fit="crop", data__valid_fraction=0.25, data__cache="none", data__workers=2),
        *_set(feature_matching__match="sample", feature_matching__criterion="l1", data__skip_unreadable=True),
    ),
    "idx-moments": (
        *("--preset", "dcgan-fm", *GAN),
        *_set(data__path="images.idx.gz", data__valid_path="folder", data__image_size=28, losses__gan__type="lsgan"),
        *_set(feature_matching__match="moments", feature_matching__criterion="charbonnier", train__g_updates=2),
    ),
    "npz-mmd": (
        *("--preset", "dcgan-fm-mmd", *GAN),
        *_set(data__path="small.npz", data__fit="pad", losses__gan__type="hinge", losses__gan__r1=1.0),
        *_set(losses__gan__penalty_every=2, train__augment=["color", "translation", "cutout"]),
    ),
    "torchvision-coral": (
        *("--preset", "dcgan-fm", *GAN),
        *_set(data__path="torchvision:MNIST", data__root="root", feature_matching__match="coral"),
        *_set(losses__gan__type="wgan", discriminator__norm="spectral", train__d_updates=2),
    ),
    "stacked-sliced": (
        *("--preset", "dcgan-stacked-fm", *GAN),
        *_set(feature_matching__match="sliced", feature_matching__directions=8, losses__gan__type="r3gan"),
        *_set(losses__gan__r1=0.5, losses__gan__r2=0.5, train__update="simultaneous"),
    ),
    "ranks-unbiased": (
        *("--preset", "dcgan-fm", *GAN),
        *_set(data__path="images.npz", feature_matching__estimator="unbiased", feature_matching__layers="all"),
    ),
    "accumulate-running": (
        *("--preset", "dcgan-fm", *GAN),
        *_set(data__path="images.npz", feature_matching__estimator="running", train__accumulate=2),
        *_set(discriminator__norm="group", generator__norm="none"),
    ),
    "paired-losses": (
        *SR,
        *_set(data__path="high", data__lr_path="low", data__valid_path="high", data__valid_lr_path="low"),
        *_set(data__rotate=True, data__hflip=True, losses__l1__weight=1.0),
        *_set(losses__l2__weight=0.5, losses__charbonnier__weight=0.5, losses__frequency__weight=0.1),
        *_set(losses__hfen__weight=0.1, losses__mobilenet__weight=0.1, feature_matching__match="mean"),
    ),
    "bicubic-streamed": (
        *SR,
        *_set(data__path="high", data__scale=4, data__cache="none", data__valid_fraction=0.25),
        *_set(losses__gan__type="lsgan", feature_matching__balance="gradient", feature_matching__weight=0.3),
    ),
    "chain-once": (
        *SR,
        *_set(data__path="high", data__degradation__kind="chain", data__degradation__passes=1, data__channels=1),
        *_set(data__cache="ram", losses__gan__start_step=2, losses__gan__ramp=2),
    ),
    "chain-bundled": (
        *SR,
        *_set(data__degradation__kind="chain", data__hflip=True, feature_matching__match="coral"),
        *_set(feature_matching__criterion="none"),
    ),
}


def smooth(count: int, height: int, width: int, channels: int, seed: int) -> list[Image.Image]:
    """Blurred noise, which degradations and crops tell apart as they do photographs."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    rng = np.random.default_rng(seed)
    noise = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]
    return [image.filter(ImageFilter.BoxBlur(1)) for image in noise]


def data(folder: Path) -> None:
    """All images that the runs learn from."""
    write_images(folder / "images.npz")
    np.savez(folder / "small.npz", images=noise_images(24, 20, 3))
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (40, 28, 28))
    (folder / "images.idx.gz").write_bytes(gzip.compress(header + noise_images(40, seed=1).tobytes(), mtime=0))
    raw = folder / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, seed in (("train", 2), ("t10k", 3)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + noise_images(40, seed=seed).tobytes())
        labels = bytes((0, 0, 8, 1)) + (40).to_bytes(4, "big") + bytes(i % 10 for i in range(40))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    for place, images in {
        "folder": smooth(12, 28, 28, 1, 4),
        "colour": smooth(8, 40, 36, 3, 5) + smooth(8, 33, 50, 1, 6),
        "high": smooth(6, 72, 96, 3, 7) + smooth(6, 64, 80, 3, 8),
    }.items():
        (folder / place / "b").mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(folder / place / ("b" if i % 3 else ".") / f"{i:03d}.png")
    (folder / "colour" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for file in sorted((folder / "high").rglob("*.png")):
        small = folder / "low" / file.relative_to(folder / "high")
        small.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).reduce(2).save(small)


def run(name: str) -> None:
    """Train one of them in the current folder."""
    command = ("train", *RUNS[name][:2], *COMMON, *RUNS[name][2:], "--name", name)
    if not name.startswith("ranks"):
        good(*command)
        return
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [Background(*command, env={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for rank in ranks:
        assert (done := rank.end(120)).code == 0, done.err


def record(name: str) -> dict[str, Any]:
    """What is kept of a run, besides its pictures: its rows but for times, and which images it learnt from."""
    path = Path("runs") / name
    meta = saved(path, STEPS).meta
    table = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows(path)]
    return {"rows": table, "data": meta.data, "held_out": meta.held_out}


def pictures(name: str) -> dict[str, Path]:
    return {f"{name}-{file.name}": file for file in sorted((Path("runs") / name / "samples").glob("*.png"))}


def main() -> None:
    check = "--check" in sys.argv[1:]
    kept = json.loads((GOLDEN / "runs.json").read_text()) if check else {}
    version = subprocess.run(
        ("git", "rev-parse", "--short", "HEAD"), cwd=GOLDEN.parent, capture_output=True, text=True, check=True
    )
    made: dict[str, Any] = {"commit": version.stdout.strip(), "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_CACHE_HOME"] = folder
        data(Path(folder))
        for name in RUNS:
            run(name)
            made["runs"][name] = record(name)
            for picture, file in pictures(name).items():
                if not check:
                    (GOLDEN / picture).write_bytes(file.read_bytes())
                elif not np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(GOLDEN / picture))):
                    sys.exit(f"{name}: {picture} differs")
            if check and made["runs"][name] != kept["runs"][name]:
                sys.exit(f"{name}: rows or images differ from those of {kept['commit']}")
            print(name, "equal" if check else "made", flush=True)
        os.chdir(GOLDEN)
    if not check:
        (GOLDEN / "runs.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
