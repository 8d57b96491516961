"""What there is to choose from, with all that is known of it without torch: one row for each choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


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

    schemes: tuple[str, ...]
    """What `data.path` begins with where it names a data set."""

    sizes: str
    """The settings beside the batch size and the discriminator's width that decide how much memory a step takes."""

    sample_options: str = ""
    """What `fmrun sample` needs."""


TASKS = {
    "generate": TaskRow(
        has_targets=False,
        samples_of="latents",
        data="a folder or file of images",
        schemes=("bundled:", "torchvision:"),
        sizes="generator.width",
    ),
    "upscale": TaskRow(
        has_targets=True,
        samples_of="photographs",
        data="a folder of images",
        schemes=("bundled:",),
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
    """An adversarial loss. Its code are `d_NAME` and `g_NAME` in `fmrun/losses/adversarial.py`."""

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
