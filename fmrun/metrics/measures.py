"""What the keys of metrics.jsonl and of evaluations mean to a reader: name, unit, which way is better, how it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

Better = Literal["lower", "higher"]


class Measure(NamedTuple):
    label: str
    better: Better | None = None
    """None: neither way says that a run is better."""
    unit: str = ""
    about: str = ""
    """One sentence for someone who meets it for the first time."""
    digits: int | None = None
    """Decimals; None: three significant digits, or two of the interval's."""


MEASURES = {
    "kid": Measure("KID", "lower", "", "Distance between the distributions of generated and real images; 0 is equal."),
    "fid": Measure("FID", "lower", "", "Distance between Gaussians fitted to generated and real images; biased by N."),
    "precision": Measure("precision", "higher", "", "Share of generated images that lie among real ones."),
    "recall": Measure("recall", "higher", "", "Share of real images that lie among generated ones."),
    "density": Measure("density", "higher", "", "How densely real images surround the generated ones; 1 is real."),
    "coverage": Measure("coverage", "higher", "", "Share of real images with a generated one near."),
    "modes": Measure("kinds covered", "higher", "", "Kinds of image that the generator makes at all."),
    "modes_kl": Measure("KL of kinds", "lower", "nats", "How far the kinds are from their real shares; 0 is equal."),
    "psnr_y": Measure("PSNR-Y", "higher", "dB", "Pixel error of luma on held-out photographs, as a ratio.", 2),
    "ssim_y": Measure("SSIM-Y", "higher", "", "Structural similarity of luma on held-out photographs; 1 is equal.", 4),
    "lpips": Measure("LPIPS", "lower", "", "Perceptual distance to the original; 0 is equal."),
    "dists": Measure("DISTS", "lower", "", "Perceptual distance to the original; 0 is equal."),
    "mobilenet": Measure("MobileNetV2 distance", "lower", "", "Perceptual distance to the original; 0 is equal."),
    "overfit": Measure("overfitting", "lower", "", "How far held-out images look generated to the discriminator."),
    "d_train": Measure("D on training images", None, "", "Output of the discriminator."),
    "d_valid": Measure("D on held-out images", None, "", "Output of the discriminator."),
    "d_fake": Measure("D on generated images", None, "", "Output of the discriminator."),
    "health/diversity": Measure(
        "diversity", "higher", "%", "How much generated images vary, relative to real ones.", 0
    ),
    "fm/share": Measure("gradient share", None, "%", "Gradient of feature matching, relative to the adversarial one."),
    "fm/distance": Measure("feature distance", None, "", "Between real and generated images, by each run's own D."),
    "loss/d": Measure("loss of D", None, "", "Of the discriminator; near 0 it tells every image, and teaches little."),
    "loss/g_adv": Measure("adversarial loss of G", None, "", "Of the generator, without feature matching."),
    "loss/g": Measure("loss of G", None, "", "Of the generator, all terms."),
    "time/images_per_second": Measure("speed", "higher", "images/s", "Of training, on the machine of each run.", 0),
    "health/d_real": Measure("D on real images", None, "", "Output of the discriminator, before any squashing."),
    "health/d_fake": Measure("D on generated images", None, "", "Output of the discriminator, before any squashing."),
    "health/d_grad_norm": Measure("gradient norm of D"),
    "health/g_grad_norm": Measure("gradient norm of G"),
    "fm/loss": Measure("feature-matching loss", None, "", "Distance times its weight, as added to the loss of G."),
    "fm/weight": Measure("weight of the distance", None, "", "Lambda times the balance."),
    "fm/balance": Measure("balance", None, "", "What lambda is multiplied by to give the share that was asked for."),
    "fm/lambda": Measure("lambda"),
    "optim/lr_generator": Measure("learning rate of G"),
}
"""By key of metrics.jsonl; names under `eval/` and of evaluations stand without what follows them (extractors)."""

FIRST = ("kid", "psnr_y", "fid", "lpips", "dists", "mobilenet", "ssim_y", "coverage", "recall", "density", "precision")
"""Which measure decides where several could."""

TELLING = ("fm/share", "fm/distance", "loss/d", "loss/g_adv", "health/diversity", "time/images_per_second")
"""Curves of training that are shown first, after those of evaluations."""

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
    known = MEASURES.get(stem, Measure(name))
    extractor = "MobileNetV2" if extra == "mobilenet_v2" else extra or ("Inception" if stem in BY_EXTRACTOR else "")
    return known._replace(label=f"{known.label} ({extractor})") if extractor else known


def rank(name: str) -> tuple[int, int]:
    """The place of a measure among those that could decide, the first the lowest; Inception before other extractors."""
    stem, extra = base(name)
    return (FIRST.index(stem) if stem in FIRST else len(FIRST)), int(bool(extra))


def decides(name: str) -> bool:
    """Whether it can say which run is better."""
    return base(name)[0] in FIRST


COLLAPSED = 0.05
"""Recall or coverage below which a high precision or density says nothing."""


def lone_precision(who: str, values: Mapping[str, float | None]) -> Iterator[str]:
    """What has to be said of scores, by name, that praise a generator which makes next to nothing of what there is: `who`
    is called so in the sentence."""
    for name, precision in values.items():
        stem, extra = base(name)
        if stem == "precision" and precision is not None and precision >= 0.5:
            others = {other: values.get(f"{other}_{extra}" if extra else other) for other in ("recall", "coverage")}
            low = [f"{o} is {v:.3g}" for o, v in others.items() if v is not None and v < COLLAPSED]
            if low:
                told = f"a precision of {precision:.3g} says nothing by itself where {' and '.join(low)}"
                yield f"{who}: {told}: one good image, made over and over, has it too"


def show_all(name: str, values: Sequence[float | None], halves: Sequence[float | None] = ()) -> list[str]:
    """Values of one measure, all with the same number of decimals; `-` for None. Where halves of intervals are given, that
    number shows two digits of a typical one."""
    known = measure(name)
    factor, unit = (100, " %") if known.unit == "%" else (1, "")
    sizes = [abs(v) * factor for v in halves if v] or [abs(v) * factor for v in values if v]
    digits = known.digits
    if digits is None:
        significant = 2 if any(halves) else 3
        digits = min(8, max(0, significant - 1 - math.floor(math.log10(median(sizes))))) if sizes else 0
    return ["-" if value is None else f"{factor * value:.{digits}f}{unit}" for value in values]
