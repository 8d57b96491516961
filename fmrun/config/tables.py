"""What there is to choose from, with all that is known of it without torch: one row for each choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple


@dataclass(frozen=True)
class Row:
    """A choice, as the reference page has it."""

    about: str

    options: tuple[str, ...] = ()
    """The settings of its section that not every choice has."""


@dataclass(frozen=True)
class TaskRow:
    """A task. Its code is the module of the same name in `fmrun/tasks`."""

    has_targets: bool
    """Whether every generated image has an original: it is made from a condition, otherwise from a latent vector."""

    samples_of: str
    """What pictures by several generators are made of, so that they can be compared."""

    data: str
    """What `data.path` may be."""

    sizes: str
    """The settings beside the batch size and the discriminator's width that decide how much memory a step takes."""

    sample_options: str = ""
    """What `fmrun sample` needs."""


TASKS = {
    "generate": TaskRow(
        has_targets=False,
        samples_of="latents",
        data="a folder or file of images",
        sizes="generator.width",
    ),
    "upscale": TaskRow(
        has_targets=True,
        samples_of="photographs",
        data="a folder of images",
        sizes="data.patch_size, generator.features",
        sample_options=" --input PHOTO",
    ),
}

FROM_LATENTS = tuple(name for name, row in TASKS.items() if not row.has_targets)
FROM_CONDITIONS = tuple(name for name, row in TASKS.items() if row.has_targets)


@dataclass(frozen=True)
class NetRow(Row):
    """A network. Its code is the module of the same name in `fmrun/models`, or a row there in `upscalers.ARCHITECTURES`."""

    tasks: tuple[str, ...] = tuple(TASKS)
    norms: tuple[str, ...] = ()
    """What `norm` may be; the schema's default, `batch`, is left alone where there is but one."""


GENERATORS = {
    "dcgan": NetRow("Radford et al. 2016, for images from noise", ("width", "latent_dim"), FROM_LATENTS),
    "compact": NetRow("for super-resolution", ("features", "blocks"), FROM_CONDITIONS),
    "span": NetRow("for super-resolution", ("features", "norm"), FROM_CONDITIONS),
    "realplksr": NetRow(
        "for super-resolution", ("features", "blocks", "kernel", "layer_norm", "dysample"), FROM_CONDITIONS
    ),
    "esrgan": NetRow("for super-resolution", ("features", "blocks", "unshuffle"), FROM_CONDITIONS),
}

DISCRIMINATORS = {
    "dcgan": NetRow("Radford et al. 2016", ("width", "norm"), norms=("batch", "spectral", "group", "none")),
    "munet": NetRow(
        "multi-branch U-Net with spatial, frequency and patch branches, with spectral norm",
        ("width", "norm", "ch_mult", "window", "gradient_branch"),
        FROM_CONDITIONS,
        norms=("spectral",),
    ),
    "patchgan": NetRow(
        "Isola et al. 2017",
        ("width", "norm", "blocks"),
        FROM_CONDITIONS,
        norms=("batch", "spectral", "group", "instance", "none"),
    ),
    "unet": NetRow(
        "U-Net with spectral norm, Wang et al. 2021", ("width", "norm"), FROM_CONDITIONS, norms=("spectral",)
    ),
}

STATISTICS = {
    "sample": Row("image by image", ("criterion",)),
    "mean": Row("batch mean at each position", ("criterion", "estimator")),
    "moments": Row("mean and standard deviation", ("criterion",)),
    "coral": Row("channel covariance"),
    "mmd": Row("unbiased kernel MMD^2", ("kernel",)),
    "sliced": Row("sliced Wasserstein-2", ("directions",)),
}


@dataclass(frozen=True)
class AdversarialRow(Row):
    """An adversarial loss. Its code: `d_NAME` and `g_NAME` in `fmrun/losses/adversarial.py`."""

    relativistic: bool = False
    """Whether the generator's loss reads the logits of real images."""

    aliases: tuple[str, ...] = ()


ADVERSARIAL_LOSSES = {
    "vanilla": AdversarialRow("binary cross-entropy on logits, also `bce`", aliases=("bce",)),
    "lsgan": AdversarialRow("least squares"),
    "hinge": AdversarialRow("hinge"),
    "wgan": AdversarialRow("Wasserstein, also `wasserstein`", aliases=("wasserstein",)),
    "r3gan": AdversarialRow(
        "relativistic, pairs real and generated images; the generator's update reads the real images of the "
        "discriminator's last one, where the authors' own trainer draws new ones",
        relativistic=True,
    ),
}


@dataclass(frozen=True)
class SourceRow(Row):
    """Images that `data.path` names as `SOURCE:NAME`. Its code is a reader in `fmrun/data/sources.py`."""

    tasks: tuple[str, ...] = FROM_LATENTS


SOURCES = {
    "bundled": SourceRow("what comes with fmrun", tasks=tuple(TASKS)),
    "torchvision": SourceRow("torchvision's small data sets, downloaded into `data.root` before"),
}


Better = Literal["lower", "higher"]


class MetricRow(NamedTuple):
    """What a key of metrics.jsonl or a name of an evaluation means to a reader."""

    label: str
    better: Better | None = None
    """None: neither way says that a run is better."""
    unit: str = ""
    about: str = ""
    """One sentence for someone who meets it for the first time."""
    digits: int | None = None
    """Decimals; None: three significant digits, or two of the interval's."""
    of_features: bool = False
    """Whether it is computed from an extractor's features; its plain name means Inception's."""


METRICS = {
    "kid": MetricRow(
        "KID",
        "lower",
        "",
        "Distance between the distributions of generated and real images; 0 is equal.",
        of_features=True,
    ),
    "fid": MetricRow(
        "FID",
        "lower",
        "",
        "Distance between Gaussians fitted to generated and real images; biased by N.",
        of_features=True,
    ),
    "precision": MetricRow(
        "precision", "higher", "", "Share of generated images that lie among real ones.", of_features=True
    ),
    "recall": MetricRow(
        "recall", "higher", "", "Share of real images that lie among generated ones.", of_features=True
    ),
    "density": MetricRow(
        "density", "higher", "", "How densely real images surround the generated ones; 1 is real.", of_features=True
    ),
    "coverage": MetricRow(
        "coverage", "higher", "", "Share of real images with a generated one near.", of_features=True
    ),
    "modes": MetricRow("modes covered", "higher", "", "Modes of the data that the generator makes at all."),
    "modes_kl": MetricRow("KL of modes", "lower", "nats", "How far the modes are from their real shares; 0 is equal."),
    "psnr_y": MetricRow("PSNR-Y", "higher", "dB", "Pixel error of luma on held-out photographs, as a ratio.", 2),
    "ssim_y": MetricRow(
        "SSIM-Y", "higher", "", "Structural similarity of luma on held-out photographs; 1 is equal.", 4
    ),
    "lpips": MetricRow("LPIPS", "lower", "", "Perceptual distance to the original; 0 is equal."),
    "dists": MetricRow("DISTS", "lower", "", "Perceptual distance to the original; 0 is equal."),
    "mobilenet": MetricRow("MobileNetV2 distance", "lower", "", "Perceptual distance to the original; 0 is equal."),
    "overfit": MetricRow("overfitting", "lower", "", "How far held-out images look generated to the discriminator."),
    "d_train": MetricRow("D on training images", None, "", "Output of the discriminator."),
    "d_valid": MetricRow("D on held-out images", None, "", "Output of the discriminator."),
    "d_fake": MetricRow("D on generated images", None, "", "Output of the discriminator."),
    "health/diversity": MetricRow(
        "diversity", "higher", "%", "How much generated images vary, relative to real ones.", 0
    ),
    "fm/share": MetricRow(
        "gradient share", None, "%", "Gradient of feature matching, relative to the adversarial one."
    ),
    "fm/distance": MetricRow("feature distance", None, "", "Between real and generated images, by each run's own D."),
    "loss/d": MetricRow(
        "loss of D", None, "", "Of the discriminator; near 0 it tells every image, and teaches little."
    ),
    "loss/g_adv": MetricRow("adversarial loss of G", None, "", "Of the generator, without feature matching."),
    "loss/g": MetricRow("loss of G", None, "", "Of the generator, all terms."),
    "time/images_per_second": MetricRow("speed", "higher", "images/s", "Of training, on the machine of each run.", 0),
    "health/d_real": MetricRow("D on real images", None, "", "Output of the discriminator, before any squashing."),
    "health/d_fake": MetricRow("D on generated images", None, "", "Output of the discriminator, before any squashing."),
    "health/d_grad_norm": MetricRow("gradient norm of D"),
    "health/g_grad_norm": MetricRow("gradient norm of G"),
    "fm/loss": MetricRow("feature-matching loss", None, "", "Distance times its weight, as added to the loss of G."),
    "fm/weight": MetricRow("weight of the distance", None, "", "Lambda times the balance."),
    "fm/balance": MetricRow("balance", None, "", "What lambda is multiplied by to give the share that was asked for."),
    "fm/lambda": MetricRow("lambda"),
    "optim/lr_generator": MetricRow("learning rate of G"),
}
"""By key of metrics.jsonl; names under `eval/` and of evaluations stand without what follows them (extractors)."""


def listed(what: str, table: Mapping[str, Row]) -> str:
    """A setting's description from the rows of what it may be."""
    return f"{what}: {', '.join(f'`{name}` ({row.about})' for name, row in table.items())}."


if TYPE_CHECKING:
    TaskName = str
    GeneratorName = str
    DiscriminatorName = str
    StatisticName = str
    AdversarialName = str
else:
    TaskName = Literal[tuple(TASKS)]
    GeneratorName = Literal[tuple(GENERATORS)]
    DiscriminatorName = Literal[tuple(DISCRIMINATORS)]
    StatisticName = Literal[tuple(STATISTICS)]
    AdversarialName = Literal[tuple(ADVERSARIAL_LOSSES)]
