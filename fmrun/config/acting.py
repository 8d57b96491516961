"""Which settings act only where another has a certain value. Elsewhere they would be accepted and ignored."""

from typing import Any

from . import Config, LossesConfig
from .data import ONLY_GENERATE, ONLY_UPSCALE
from .tables import FROM_CONDITIONS, FROM_LATENTS

CHAIN, DECAYS = ("chain",), ("linear", "cosine")

ACTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"data.{name}": ("task", FROM_LATENTS) for name in ONLY_GENERATE},
    **{f"data.{name}": ("task", FROM_CONDITIONS) for name in ONLY_UPSCALE},
    **{f"data.degradation.{n}": ("data.degradation.kind", CHAIN) for n in ("passes", "first", "sinc", "kernels")},
    "data.degradation.second": ("data.degradation.passes", (2,)),
    "generator.latent_dim": ("task", FROM_LATENTS),
    "generator.width": ("generator.type", ("dcgan",)),
    "generator.features": ("generator.type", ("compact", "span", "realplksr", "esrgan")),
    "generator.blocks": ("generator.type", ("compact", "realplksr", "esrgan")),
    "generator.kernel": ("generator.type", ("realplksr",)),
    "generator.norm": ("generator.type", ("span",)),
    "generator.layer_norm": ("generator.type", ("realplksr",)),
    "generator.dysample": ("generator.type", ("realplksr",)),
    "generator.unshuffle": ("generator.type", ("esrgan",)),
    "discriminator.width": ("discriminator.type", ("dcgan", "munet", "patchgan", "unet")),
    "discriminator.norm": ("discriminator.type", ("dcgan", "munet", "patchgan", "unet")),
    "discriminator.ch_mult": ("discriminator.type", ("munet",)),
    "discriminator.window": ("discriminator.type", ("munet",)),
    "discriminator.gradient_branch": ("discriminator.type", ("munet",)),
    "discriminator.blocks": ("discriminator.type", ("patchgan",)),
    "feature_matching.criterion": ("feature_matching.match", ("sample", "mean", "moments")),
    "feature_matching.estimator": ("feature_matching.match", ("mean",)),
    "feature_matching.running_decay": ("feature_matching.estimator", ("running",)),
    "feature_matching.kernel": ("feature_matching.match", ("mmd",)),
    "feature_matching.directions": ("feature_matching.match", ("sliced",)),
    "feature_matching.balance_decay": ("feature_matching.balance", ("gradient",)),
    **{f"optim.schedule.{n}": ("optim.schedule.decay", DECAYS) for n in ("decay_start", "decay_end", "final_factor")},
    **{f"eval.{name}": ("task", FROM_LATENTS) for name in ("kid_every", "kid_num", "kid_extractor")},
    "eval.perceptual": ("task", FROM_CONDITIONS),
    **{f"losses.{name}": ("task", FROM_CONDITIONS) for name in LossesConfig.model_fields if name != "gan"},
    "compile_mode": ("compile", (True,)),
}
"""A setting or section, the setting that it depends on, and the values of that with which it acts. A net of the user's
own has no type."""


def idle(config: Config, key: str) -> tuple[str, str] | None:
    """Where a setting is not its default and does not act: the setting that decides (a type, or the target in its place), and
    what is to be said."""
    if (found := _stopped(config, key)) is None or _value(config, key) == _value(Config(), key):
        return None
    selector, values, now = found
    (section, _, _), name = key.rpartition("."), selector.rpartition(".")[2].replace("target", "type")
    beside = [k for k, (by, having) in ACTS.items() if by == selector and now in having and k.startswith(f"{section}.")]
    has = f", which has {', '.join(k.removeprefix(f'{section}.') for k in beside)}" if beside else ""
    *others, last = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    allowed = f"{', '.join(others)} or {last}" if others else last
    now = str(now).lower() if isinstance(now, bool) else now
    return selector, f"{key} is for {name} {allowed}, not {now}{has}; leave it out"


def _stopped(config: Config, key: str) -> tuple[str, tuple[Any, ...], Any] | None:
    """Why a setting does not act: the setting that decides, the values with which it would act, and the value there."""
    for start, (selector, values) in ACTS.items():
        if not f"{key}.".startswith(f"{start}."):
            continue
        now = _value(config, selector)
        if selector.endswith(".type") and (target := _value(config, selector.replace(".type", ".target"))) is not None:
            return selector.replace(".type", ".target"), values, target
        if now not in values:
            return selector, values, now
        if (found := _stopped(config, selector)) is not None:
            return found
    return None


def _value(config: Config, key: str) -> Any:
    """None in a section that is absent."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
