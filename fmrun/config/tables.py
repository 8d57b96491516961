"""What there is to choose from, with all that is known of it without torch: one row for each choice."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


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

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]
