"""`data.degradation`: how low-resolution images are made from high-resolution ones."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .base import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Sigma = Annotated[float, Field(ge=0.05, le=20.0)]
Factor = Annotated[float, Field(ge=0.05, le=4.0)]
Level = Annotated[float, Field(ge=0.0, le=255.0)]
Strength = Annotated[float, Field(ge=0.0, le=100.0)]
Quality = Annotated[int, Field(ge=1, le=100)]
Kernel = Literal["area", "bilinear", "bicubic"]


class RangedSection(Section):
    @model_validator(mode="after")
    def _ascending(self) -> "RangedSection":
        for name, value in self:
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int | float):
                low, high = value
                if low > high:
                    raise ValueError(f"{name} is a range from its lower to its upper end, not {low:g} to {high:g}")
        return self


class BlurConfig(RangedSection):
    prob: Fraction = 1.0
    """Probability that an image is blurred by a Gaussian; 0 turns the step off."""

    sigma: tuple[Sigma, Sigma] = (0.2, 3.0)
    """Range of the Gaussian's standard deviation in pixels."""

    anisotropic: Fraction = 0.5
    """Fraction of Gaussians with two different standard deviations, at any angle."""


class SincConfig(RangedSection):
    prob: Fraction = 0.1
    """Probability of a sinc filter, which leaves ringing; 0 turns the step off. Within a pass it takes the blur's
    place."""

    cutoff: tuple[Fraction, Fraction] = (0.33, 1.0)
    """Range of the cutoff frequency, as a fraction of the highest an image can hold; lower rings more."""


class ResizeConfig(RangedSection):
    down: Fraction = 0.7
    """Probability that the image is made smaller; with `up` 0 as well the step is off."""

    up: Fraction = 0.2
    """Probability that the image is made larger."""

    factor: tuple[Factor, Factor] = (0.15, 1.5)
    """Smallest and largest factor, of the high-resolution size in the first pass and of the low-resolution size in the
    second."""

    kernels: Annotated[tuple[Kernel, ...], Field(min_length=1)] = ("area", "bilinear", "bicubic")
    """Kernels to choose from, none of them antialiased but `area`."""

    @model_validator(mode="after")
    def _shares(self) -> "ResizeConfig":
        if self.up + self.down > 1:
            raise ValueError(f"up and down are shares of all images: their sum is {self.up + self.down:g}, more than 1")
        if not self.factor[0] <= 1 <= self.factor[1]:
            raise ValueError(
                f"factor must reach from at most 1 to at least 1, not {self.factor[0]:g} to {self.factor[1]:g}"
            )
        return self


class NoiseConfig(RangedSection):
    gaussian: Fraction = 0.5
    """Probability of Gaussian noise; with `poisson` 0 as well the step is off."""

    poisson: Fraction = 0.5
    """Probability of Poisson (shot) noise; an image has one kind or none."""

    sigma: tuple[Level, Level] = (1.0, 30.0)
    """Range of the Gaussian noise's standard deviation, in levels of 255."""

    strength: tuple[Strength, Strength] = (0.05, 3.0)
    """Range of the factor on Poisson noise; at 1 a level of 255 has the noise of 255 photons."""

    grey: Fraction = 0.4
    """Fraction of noise that is the same in all channels."""

    @model_validator(mode="after")
    def _shares(self) -> "NoiseConfig":
        both = self.gaussian + self.poisson
        if both > 1:
            raise ValueError(f"gaussian and poisson are shares of all images: their sum is {both:g}, more than 1")
        return self


class JpegConfig(RangedSection):
    prob: Fraction = 1.0
    """Probability that the image goes through JPEG; 0 turns the step off."""

    quality: tuple[Quality, Quality] = (30, 95)
    """Range of JPEG's quality."""


class PassConfig(Section):
    blur: BlurConfig = BlurConfig()
    """Gaussian blur."""

    sinc: SincConfig = SincConfig()
    """Ringing."""

    resize: ResizeConfig = ResizeConfig()
    """Change of size."""

    noise: NoiseConfig = NoiseConfig()
    """Noise."""

    jpeg: JpegConfig = JpegConfig()
    """Compression."""


SECOND_PASS = PassConfig(
    blur=BlurConfig(prob=0.8, sigma=(0.2, 1.5)),
    resize=ResizeConfig(down=0.4, up=0.3, factor=(0.3, 1.2)),
    noise=NoiseConfig(sigma=(1.0, 25.0), strength=(0.05, 2.5)),
)


def _over(defaults: Any, values: Any) -> Any:
    """`values` with what it leaves out taken from `defaults`, section by section."""
    if not isinstance(values, dict) or not isinstance(defaults, Section):
        return values
    below = dict(defaults)
    return below | {name: _over(below.get(name), value) for name, value in values.items()}


class DegradationConfig(Section):
    kind: Literal["bicubic", "chain"] = "bicubic"
    """How a low-resolution image comes about where there is none: `bicubic` (antialiased, as in the usual benchmarks),
    or a random `chain` of blur, ringing, change of size, noise and JPEG (Wang et al. 2021, Real-ESRGAN)."""

    passes: Literal[1, 2] = 2
    """Passes of a `chain`: `first` alone, or `second` after it."""

    first: PassConfig = PassConfig()
    """First pass of a `chain`."""

    second: PassConfig = SECOND_PASS
    """Second pass."""

    sinc: SincConfig = SincConfig(prob=0.8)
    """Ringing at the end of a `chain`, at the low-resolution size."""

    kernels: Annotated[tuple[Kernel, ...], Field(min_length=1)] = ("area", "bilinear", "bicubic")
    """Kernels to choose from for the step to the low-resolution size. The last pass's JPEG comes before or after that
    step and the ringing, with equal chance."""

    @field_validator("second", "sinc", mode="before")
    @classmethod
    def _over_defaults(cls, values: Any, info: ValidationInfo) -> Any:
        """What is left out has the default that it has here, not that of the first pass."""
        assert info.field_name is not None
        return _over(cls.model_fields[info.field_name].default, values)

    def acting(self) -> dict[str, Any]:
        """The fields that have an effect, as JSON has them."""
        idle: set[str] = set(type(self).model_fields) - {"kind"} if self.kind == "bicubic" else set()
        return self.model_dump(mode="json", exclude=idle | ({"second"} if self.passes == 1 else set()))
