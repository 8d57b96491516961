"""A `losses:` list in the traiNNer-redux style, translated to fmrun's sections (see docs/config.md).

An entry describes its loss completely: what it leaves out has the schema's default, never the preset's value, except that
a feature-matching entry without `loss_weight` has weight 1, without `criterion` is `l1`, and has `balance` `none`: the raw
sum, which is what its weight was chosen for. That style's statistic is `sample`, the distance to an image's own original;
in `generate` there is none, and `sample` would pull every image to the mean of the data, so `mean` is taken there unless
the entry says `match: sample`. Without a feature-matching entry the preset's stands; what remains of the list, if anything
does, replaces the preset's losses, the adversarial one too.
"""

from dataclasses import dataclass, field
from typing import Any

from ..runtime.errors import UserError, nearest
from .acting import ACTS
from .fields import members, show
from .overrides import FILE, Given, Layers
from .tables import FROM_LATENTS


@dataclass(frozen=True)
class LossTarget:
    """Where an entry's settings go: the section, and the keys that differ from fmrun's."""

    section: str
    rename: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    """Keys of that style that say what fmrun does anyway: accepted with this value only."""

    @property
    def has_targets(self) -> bool:
        """Whether it compares each image with its original."""
        return self.section not in ("feature_matching", "losses.gan")


WEIGHT = {"loss_weight": "weight", "start_iter": "start_step"}

SPECTRUM = {"ave_spectrum": "average_spectrum", "log_matrix": "log_weights", "batch_matrix": "batch_weights"}

DISTRIBUTIONS = {"num_proj_fd": 256, "phase_weight_fd": 1.0, "stride_fd": 1}
"""Of a variant of the perceptual loss that fmrun has not."""

TYPES: dict[str, LossTarget] = {
    "featurematchingloss": LossTarget("feature_matching"),
    "ganloss": LossTarget("losses.gan", {"gan_type": "type"}),
    "l1loss": LossTarget("losses.l1"),
    "mseloss": LossTarget("losses.l2"),
    "charbonnierloss": LossTarget("losses.charbonnier"),
    "perceptualloss": LossTarget(
        "losses.perceptual",
        fixed={"w_lambda": 0.01, "alpha": None, **DISTRIBUTIONS, "clip_min": 0, "antialiased": False},
    ),
    "convnextperceptualloss": LossTarget("losses.convnext"),
    "mobilenetperceptualloss": LossTarget("losses.mobilenet"),
    "ffloss": LossTarget("losses.frequency", SPECTRUM),
    "hfenloss": LossTarget("losses.hfen"),
    "distsloss": LossTarget(
        "losses.dists", fixed={"as_loss": True, "load_weights": True, "use_input_norm": True, "clip_min": 0}
    ),
    "lpipsloss": LossTarget("losses.lpips"),
}


def lay_losses(layers: Layers, entries: list[Any], beside: dict[str, Any], label: str) -> None:
    """Lays the list, and `beside` it the other settings of its file; what is wrong becomes a problem that names the entry."""
    task = str(beside.get("task") or (layers.given["task"].value if "task" in layers.given else "generate"))
    try:
        settings, implied, replaces = read_losses(entries, task)
    except UserError as error:
        layers.problems.append((label, str(error)))
        settings, implied, replaces = {}, {}, []
    for section in replaces:
        layers.drop(f"{section}.")
    below = dict(layers.given)
    layers.table(beside, label, FILE)
    for key, (value, entry, name) in {**implied, **settings}.items():
        if layers.given.get(key) is below.get(key):
            layers.lay(key, Given(value, f"{label}: {entry}", name, FILE))
        elif key in settings:
            layers.problems.append((label, f"{key} and {name} of {entry} are the same setting; give one"))


Settings = dict[str, tuple[Any, str, str]]
"""By fmrun's key: the value, and the entry and key that the user wrote."""


def read_losses(entries: list[Any], task: str) -> tuple[Settings, Settings, list[str]]:
    """What the list says, what it implies, and the sections in which nothing of the preset is left. UserError names the entry
    (by its place, from 1) and what is wrong with it."""
    settings: Settings = {}
    implied: Settings = {}
    first: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"losses entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {show(entry)}; it must be a table with a type, like {{type: ganloss}}")
        if not isinstance(entry.get("type"), str):
            raise UserError(f"{where} has no type; known: {', '.join(TYPES)}")
        type_ = entry["type"].replace("_", "").replace("-", "").lower()
        if type_ == "ldlloss":
            raise UserError(f"{where}: fmrun has no {entry['type']}; leave it out")
        if type_ not in TYPES:
            hint = nearest(type_, list(TYPES)) or f"; known: {', '.join(TYPES)}"
            raise UserError(f"{where}: there is no loss type {show(entry['type'])}{hint}")
        if type_ in first:
            raise UserError(f"{where}: {type_} is already entry {first[type_]}; each type is given once")
        first[type_] = number
        where = f"{where} ({entry['type']})"
        if TYPES[type_].has_targets and task in FROM_LATENTS:
            raise UserError(
                f"{where} belongs to super-resolution, where every image has its original; "
                f"task '{task}' takes featurematchingloss and ganloss only"
            )
        entry_settings = _entry(entry, TYPES[type_], where)
        settings |= entry_settings
        if TYPES[type_].has_targets:
            implied[f"{TYPES[type_].section}.weight"] = (1.0, where, "weight")
        elif type_ == "featurematchingloss":
            match = entry_settings.get("feature_matching.match", ("mean" if task in FROM_LATENTS else "sample",))[0]
            defaults = {"weight": 1.0, "balance": "none", "match": match}
            if match in ACTS["feature_matching.criterion"][1]:
                unbiased = entry_settings.get("feature_matching.estimator", ("",))[0] == "unbiased"
                defaults["criterion"] = "l2" if unbiased else "l1"
            implied |= {f"feature_matching.{name}": (value, where, name) for name, value in defaults.items()}
    replaces = ["feature_matching"] if "featurematchingloss" in first else []
    if first.keys() - {"featurematchingloss"}:
        replaces.append("losses")
        if "ganloss" not in first:
            implied["losses.gan.weight"] = (0.0, "losses without a ganloss", "weight")
    return settings, implied, replaces


def _entry(entry: dict[Any, Any], target: LossTarget, where: str) -> Settings:
    rename = {**WEIGHT, **target.rename}
    known = [m for m in members(target.section) if m != "type"]
    settings: Settings = {}
    for name, value in entry.items():
        if name == "type":
            continue
        if name in target.fixed:
            if value != target.fixed[name]:
                raise UserError(f"{where}: {name} is {show(value)}; fmrun offers {show(target.fixed[name])} only")
            continue
        if name == "layer_weights" and isinstance(value, dict) and "layers" in known:
            if "layers" in entry:
                raise UserError(f"{where}: layers and the names in layer_weights are the same setting; give one")
            settings[f"{target.section}.layers"] = (list(value), where, name)
            value = list(value.values())
        field_name = rename.get(str(name), str(name))
        if field_name not in known and field_name not in rename.values():
            options = [*rename, *known]
            hint = nearest(str(name), options) or f"; known: {', '.join(options)}"
            raise UserError(f"{where}: there is no key {show(str(name))}{hint}")
        key = f"{target.section}.{field_name}"
        if key in settings:
            raise UserError(f"{where}: {settings[key][2]} and {name} are the same setting; give one")
        settings[key] = (value, where, str(name))
    return settings
