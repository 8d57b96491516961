"""`data`: where the images come from and how they are held."""

from typing import Literal

from pydantic import Field

from .base import Section
from .degradation import DegradationConfig


class DataConfig(Section):
    path: str = Field(default="bundled:fashion-mnist", min_length=1)
    """Images to learn from. For images from noise: a folder (any nesting), an `idx-ubyte` or `idx-ubyte.gz` file, an
    `.npz` file, `torchvision:NAME` (already downloaded under `data.root`), `bundled:fashion-mnist`, or
    `bundled:stacked-fashion-mnist`, whose colour images are three independent grey ones, one per channel: 1,000 modes to
    be covered. For super-resolution: a folder of high-resolution images, or `bundled:photographs`."""

    root: str = "data"
    """Folder in which `torchvision:NAME` looks for its files."""

    image_size: Literal[28, 32, 64, 128] = 32
    """Height and width of the images in pixels."""

    channels: Literal[1, 3, 4] | None = None
    """Channels of the images: 1 (grey), 3 (colour) or, for super-resolution, 4 (with alpha). `none` takes what the data
    has."""

    fit: Literal["exact", "crop", "pad"] = "exact"
    """Images of another size than `image_size`: `exact` refuses them (28 px data at size 32 is zero-padded),
    `crop` resizes the shorter side and crops the centre, `pad` zero-pads smaller images evenly."""

    skip_unreadable: bool = False
    """Leave out files of a folder that cannot be read, as damaged or empty ones; in super-resolution with their partners.
    Which ones is said, and has to be the same when a run is resumed."""

    hflip: bool = False
    """Mirror each image left to right with probability one half."""

    cache: Literal["auto", "device", "ram", "none"] = "auto"
    """Where decoded images are kept as uint8: on the training device, in RAM, or nowhere (`none` streams them
    from disk through workers). `auto` takes the fastest that fits."""

    workers: int = Field(default=2, ge=0, le=64)
    """Processes that decode images when they are streamed."""

    valid_path: str | None = None
    """Images held out of training, as `path`. `none` takes the bundled ones, else a `valid_fraction` of the data."""

    valid_fraction: float = Field(default=0.0, ge=0.0, le=0.5)
    """Fraction of the data held out where `valid_path` is `none` and the data is not bundled, chosen by the seed."""

    scale: Literal[1, 2, 3, 4] = 2
    """Super-resolution: factor from the low to the high resolution."""

    patch_size: int = Field(default=128, ge=32, le=2048)
    """Super-resolution: side of the high-resolution patches trained on, in pixels, a multiple of `scale`."""

    rotate: bool = False
    """Super-resolution: turn each patch by 0, 90, 180 or 270 degrees."""

    lr_path: str | None = None
    """Super-resolution: folder of low-resolution images named as those of `path`; `none` makes them by `degradation`."""

    valid_lr_path: str | None = None
    """Super-resolution: folder of the low-resolution images of `valid_path`."""

    degradation: DegradationConfig = DegradationConfig()
    """Super-resolution: how low-resolution images are made where there are none."""


ONLY_GENERATE = ("root", "image_size", "fit")
ONLY_UPSCALE = ("scale", "patch_size", "rotate", "lr_path", "valid_lr_path", "degradation")
