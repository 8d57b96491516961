"""Which settings act only where another has a certain value. Elsewhere they would be accepted and ignored."""

from collections.abc import Mapping
from typing import Any

from .data import ONLY_GENERATE, ONLY_UPSCALE
from .schema import Config, LossesConfig
from .tables import DISCRIMINATORS, FROM_CONDITIONS, FROM_LATENTS, GENERATORS, STATISTICS, Row


def _options(selector: str, table: Mapping[str, Row]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The settings that not every choice has, each with those that have it."""
    section = selector.rpartition(".")[0]
    names = dict.fromkeys(option for row in table.values() for option in row.options)
    return {
        f"{section}.{name}": (selector, tuple(choice for choice, row in table.items() if name in row.options))
        for name in names
    }


CHAIN, DECAYS = ("chain",), ("linear", "cosine")

ACTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"data.{name}": ("task", FROM_LATENTS) for name in ONLY_GENERATE},
    **{f"data.{name}": ("task", FROM_CONDITIONS) for name in ONLY_UPSCALE},
    **{f"data.degradation.{n}": ("data.degradation.kind", CHAIN) for n in ("passes", "first", "sinc", "kernels")},
    "data.degradation.second": ("data.degradation.passes", (2,)),
    **_options("generator.type", GENERATORS),
    "generator.latent_dim": ("task", FROM_LATENTS),  # also of a net of the user's own
    **_options("discriminator.type", DISCRIMINATORS),
    **_options("feature_matching.match", STATISTICS),
    "feature_matching.running_decay": ("feature_matching.estimator", ("running",)),
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
    if (stopped := _stopped(config, key)) is None or _value(config, key) == _value(Config(), key):
        return None
    selector, values, now = stopped
    (section, _, _), name = key.rpartition("."), selector.rpartition(".")[2].replace("target", "type")
    beside = [k for k, (by, having) in ACTS.items() if by == selector and now in having and k.startswith(f"{section}.")]
    has = f", which has {', '.join(k.removeprefix(f'{section}.') for k in beside)}" if beside else ""
    *first_values, last = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    allowed = f"{', '.join(first_values)} or {last}" if first_values else last
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
        if (stopped := _stopped(config, selector)) is not None:
            return stopped
    return None


def _value(config: Config, key: str) -> Any:
    """None in a section that is absent."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
