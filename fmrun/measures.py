"""What the keys of metrics.jsonl and of evaluations mean to a reader: name, unit, and which way is better."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .report import format_number

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Measure:
    label: str
    better: Better | None = None
    """None: neither way says that a run is better."""
    unit: str = ""
    about: str = ""
    """One sentence for someone who meets it for the first time."""


_D = "of the discriminator"

MEASURES = {
    "kid": Measure(
        "KID", "lower", about="Distance between the distributions of generated and real images; 0 is equal."
    ),
    "fid": Measure(
        "FID", "lower", about="Distance between Gaussians fitted to generated and real images; biased by N."
    ),
    "precision": Measure("precision", "higher", about="Share of generated images that lie among real ones."),
    "recall": Measure("recall", "higher", about="Share of real images that lie among generated ones."),
    "density": Measure("density", "higher", about="How densely real images surround the generated ones; 1 is real."),
    "coverage": Measure("coverage", "higher", about="Share of real images with a generated one near."),
    "modes": Measure("kinds covered", "higher", about="Kinds of image that the generator makes at all."),
    "modes_kl": Measure(
        "KL of kinds", "lower", "nats", "How far the kinds of image are from their real shares; 0 is equal."
    ),
    "psnr_y": Measure("PSNR-Y", "higher", "dB", "Pixel error of luma on held-out photographs, as a ratio."),
    "ssim_y": Measure("SSIM-Y", "higher", about="Structural similarity of luma on held-out photographs; 1 is equal."),
    "lpips": Measure("LPIPS", "lower", about="Perceptual distance to the original; 0 is equal."),
    "dists": Measure("DISTS", "lower", about="Perceptual distance to the original; 0 is equal."),
    "mobilenet": Measure("MobileNetV2 distance", "lower", about="Perceptual distance to the original; 0 is equal."),
    "overfit": Measure("overfitting", "lower", about=f"How far held-out images look generated to the eye {_D}."),
    "d_train": Measure("D on training images", about=f"Output {_D}."),
    "d_valid": Measure("D on held-out images", about=f"Output {_D}."),
    "d_fake": Measure("D on generated images", about=f"Output {_D}."),
    "health/diversity": Measure(
        "diversity", "higher", about="How much generated images vary, relative to real ones; 1 is as much."
    ),
    "fm/share": Measure(
        "gradient share", about="Gradient of feature matching at the generated images, relative to the adversarial one."
    ),
    "fm/distance": Measure(
        "feature distance",
        about="Between features of real and generated images, as each run's own discriminator sees them.",
    ),
    "loss/d": Measure("loss of D", about="Of the discriminator; near 0 it tells every image, and teaches little."),
    "loss/g_adv": Measure("adversarial loss of G", about="Of the generator, without feature matching."),
    "loss/g": Measure("loss of G", about="Of the generator, all terms."),
    "time/images_per_second": Measure("speed", "higher", "images/s", "Of training, on the machine of each run."),
    "health/d_real": Measure("D on real images", about="Output of the discriminator, before any squashing."),
    "health/d_fake": Measure("D on generated images", about="Output of the discriminator, before any squashing."),
    "health/d_grad_norm": Measure("gradient norm of D"),
    "health/g_grad_norm": Measure("gradient norm of G"),
    "fm/loss": Measure("feature-matching loss", about="Distance times its weight, as it is added to the loss of G."),
    "fm/weight": Measure("weight of the distance", about="Lambda times the balance."),
    "fm/balance": Measure("balance", about="What lambda is multiplied by to give the share that was asked for."),
    "fm/lambda": Measure("lambda"),
    "optim/lr_generator": Measure("learning rate of G"),
}
"""By key of metrics.jsonl; names under `eval/` and of evaluations stand without what follows them (extractors)."""

FIRST = ("kid", "psnr_y", "fid", "lpips", "dists", "mobilenet", "ssim_y", "coverage", "recall", "density", "precision")
"""Which measure decides where several could."""

TELLING = ("fm/share", "fm/distance", "loss/d", "loss/g_adv", "health/diversity", "time/images_per_second")
"""Curves of training that are shown first, after those of evaluations."""

EXTRACTORS = {"mobilenet_v2": "MobileNetV2", "inception": "Inception"}

BY_EXTRACTOR = ("kid", "fid", "precision", "recall", "density", "coverage")
"""Measures whose plain name means Inception's features."""

REALS = "reals_sha256"
"""The setting of an evaluation that says which real images it was against; with `data.valid_fraction` each seed holds
out its own, so that it tells seeds apart, and not ways of measuring."""

REFERENCE = "_bicubic"
"""Ending of the measures of what super-resolution has to beat."""


def base(name: str) -> tuple[str, str]:
    """The measure and what it was taken with: `("kid", "mobilenet_v2")` of `eval/kid_mobilenet_v2`."""
    if name in MEASURES:
        return name, ""
    short = name.removeprefix("eval/")
    if short in MEASURES:
        return short, ""
    stem = next((k for k in MEASURES if "/" not in k and short.startswith(f"{k}_")), None)
    return (name, "") if stem is None else (stem, short[len(stem) + 1 :])


def measure(name: str) -> Measure:
    """What is known of a key of metrics.jsonl or a name of an evaluation; the key itself where nothing is."""
    stem, extra = base(name)
    known = MEASURES.get(stem)
    if known is None:
        return Measure(name)
    extractor = _extractor(extra) or ("Inception" if stem in BY_EXTRACTOR else "")
    label = f"{known.label} ({extractor})" if extractor else known.label
    return Measure(label, known.better, known.unit, known.about)


def _extractor(extra: str) -> str:
    """The extractor of a name's ending, for a reader. Only a plain name is of Inception as published."""
    known, _, weights = extra.rpartition("_")
    if known in EXTRACTORS and re.fullmatch("[0-9a-f]{8}", weights):
        return f"{EXTRACTORS[known]} with weights {weights}"
    return "MobileNetV2" if extra == "mobilenet_v2" else extra


def rank(name: str) -> tuple[int, int]:
    """The place of a measure among those that could decide, the first the lowest; Inception before other extractors."""
    stem, extra = base(name)
    return (FIRST.index(stem) if stem in FIRST else len(FIRST)), int(bool(extra))


def poolable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation that must be equal for a mean over seeds."""
    return {key: value for key, value in settings.items() if key != REALS}


COLLAPSED = 0.05
"""Recall or coverage below which a high precision or density says nothing."""


def lone_precision(who: str, values: Mapping[str, float | None]) -> Iterator[str]:
    """What has to be said of scores, by name, that praise a generator which makes next to nothing of what there is: `who`
    is called so in the sentence."""
    for name, precision in values.items():
        stem, extra = base(name)
        if stem != "precision" or precision is None or precision < 0.5:
            continue
        others = {other: values.get(f"{other}_{extra}" if extra else other) for other in ("recall", "coverage")}
        low = [
            f"{other} is {show(other, value)}"
            for other, value in others.items()
            if value is not None and value < COLLAPSED
        ]
        if low:
            yield (
                f"{who}: a precision of {show(name, precision)} says nothing by itself where {' and '.join(low)}: one good "
                "image, made over and over, has it too"
            )


SHOWN: dict[str, Callable[[float], str]] = {
    "psnr_y": lambda v: f"{v:.2f}",
    "ssim_y": lambda v: f"{v:.4f}",
    "fm/share": lambda v: f"{100 * v:.3g} %",
    "health/diversity": lambda v: f"{100 * v:.0f} %",
    "time/images_per_second": lambda v: f"{v:.0f}",
}


def show(name: str, value: float) -> str:
    """A value as a reader wants it, without its unit."""
    stem = base(name)[0]
    return SHOWN[stem](value) if stem in SHOWN else format_number(float(f"{value:.3g}") if abs(value) < 100 else value)


def show_interval(name: str, mean: float, low: float | None, high: float | None) -> tuple[str, str]:
    """The mean and half of its interval, to two digits of the latter: `("0.0361", "0.0016")`; no half where no interval."""
    if low is None or high is None or high <= low:
        return show(name, mean), ""
    half = (high - low) / 2
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f}", f"{half:.{digits}f}"
