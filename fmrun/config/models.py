"""`generator` and `discriminator`: the two nets."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from .base import Section
from .tables import DISCRIMINATORS, GENERATORS, DiscriminatorName, GeneratorName, listed


class _Net(Section):
    @model_validator(mode="after")
    def _params_have_a_target(self) -> "_Net":
        if getattr(self, "params", None) and getattr(self, "target", None) is None:
            raise ValueError("params are the arguments of a target, and there is none; set target too")
        return self


class GeneratorConfig(_Net):
    type: GeneratorName = Field("dcgan", description=listed("Architecture", GENERATORS))

    target: str | None = None
    """A net of your own instead, as `path/to/file.py:Class`, or `package.module:Class` from the current folder or an installed
    package: for images from noise any `nn.Module` from latents (B, latent_dim), or (B, latent_dim, 1, 1), to images (B, C, size, size) in [-1, 1]; for super-resolution
    from images (B, C, H, W) in [0, 1], of any height and width, to (B, C, scale H, scale W). From a file it runs only with
    `--trust-code`, or if you have allowed it before."""

    params: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments that `target` is made with, by name."""

    width: int = Field(default=32, ge=1, le=1024)
    """`dcgan`: channels of the last hidden layer; each layer before it has twice as many."""

    features: int | None = Field(default=None, ge=1, le=1024)
    """Super-resolution: channels of the hidden layers. `none` is the file's of `init`, else the architecture's own."""

    blocks: int | None = Field(default=None, ge=1, le=256)
    """`compact`, `realplksr`, `esrgan`: convolutions or blocks. `none` is the file's of `init`, else the
    architecture's own."""

    kernel: int | None = Field(default=None, ge=1, le=63)
    """`realplksr`: side of its large kernels. `none` is the file's of `init`, else 17."""

    norm: bool | None = None
    """`span`: normalise images by its training data. `none` is the file's of `init`, else false."""

    layer_norm: bool | None = None
    """`realplksr`: layer norm in place of group norm. `none` is the file's of `init`, else false."""

    dysample: bool | None = None
    """`realplksr`: upsample by DySample. `none` is the file's of `init`, else false."""

    unshuffle: bool | None = None
    """`esrgan`, up to x2: compute at a quarter of the high resolution. `none` is the file's of `init`, else false."""

    latent_dim: int = Field(default=100, ge=1, le=4096)
    """`dcgan`: length of the standard normal latent vector."""

    init: str | None = None
    """Start from these weights: a `.safetensors` file or an fmrun checkpoint (its EMA weights); for super-resolution also
    a community model as `.safetensors` or `.pth`, of which nothing is executed."""


class DiscriminatorConfig(_Net):
    type: DiscriminatorName = Field("dcgan", description=listed("Architecture", DISCRIMINATORS))

    target: str | None = None
    """A net of your own instead, as `path/to/file.py:Class`, or `package.module:Class` from the current folder or an installed
    package: any `nn.Module` from images (B, C, H, W) in [-1, 1] to logits, which may come with features or at several
    scales. Its layers are found by walking it. From a file it runs only
    with `--trust-code`, or if you have allowed it before."""

    params: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments that `target` is made with, by name."""

    width: int = Field(default=32, ge=1, le=1024)
    """Channels of the first layer."""

    norm: Literal["batch", "spectral", "group", "instance", "none"] = "batch"
    """`dcgan` and `patchgan`: batch norm, spectral norm of the weights, group norm, instance norm (`patchgan`), or none.
    `munet` and `unet` have spectral norm."""

    ch_mult: tuple[Annotated[int, Field(ge=1, le=64)], ...] = (1, 2, 4, 8)
    """`munet`: one encoder stage for each entry, with this multiple of `width` channels."""

    window: int = Field(default=8, ge=1, le=64)
    """`munet`: side of its attention's windows, in positions of the bottleneck."""

    blocks: int = Field(default=4, ge=2, le=8)
    """`patchgan`: convolutions before the head, all but the last with stride 2. With 4 a logit sees 70 x 70 px."""

    gradient_branch: bool = False
    """`munet`: add the branch on the image's gradient, feature `gradient`."""

    init: str | None = None
    """Start from these weights: a `.safetensors` file or an fmrun checkpoint."""

    train: bool = True
    """`false` never updates the discriminator: features are matched in it as it is."""
