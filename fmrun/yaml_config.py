"""A `losses:` list in the traiNNer-redux style, translated to fmrun's sections.

    losses:
      - type: featurematchingloss
        loss_weight: 0.2
        criterion: l1
      - type: ganloss
        gan_type: vanilla

Each entry goes to the section `TYPES` names. An entry describes its loss completely: what it leaves out has
the schema's default, never the preset's value, except that

- a feature-matching entry without `loss_weight` has weight 1, and without `criterion` is `l1` (as everywhere
  in that style), and `balance` is `none`: the raw sum, which is what its weight was chosen for;
- without `match` it follows the task. That style's equation is `sample`, the distance between the features of
  an upscaled picture and of its own original, and holds wherever such pairs exist. In `generate` there are
  none, and `sample` between unrelated pictures pulls every image to the mean of the data, so `mean` is taken
  there, with the same criterion. `match: sample` in the entry insists.

Without a feature-matching entry the preset's feature matching stands. What remains of the list, if anything
does, replaces the preset's losses: what it does not name is gone, the adversarial term too.
"""

from dataclasses import dataclass, field
from typing import Any

from fmrun.config.fields import FIELDS, members, show
from fmrun.errors import UserError, nearest

CRITERION = ("sample", "mean", "moments")
"""The statistics that take a criterion."""

UNPAIRED = {"generate": "mean"}
"""The statistic of each task in which real and generated images do not correspond."""


@dataclass(frozen=True)
class Target:
    """Where an entry's settings go: the section, and the keys that differ from fmrun's."""

    section: str
    rename: dict[str, str]
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    """Keys of that style that say what fmrun does anyway: accepted with this value only."""
    paired: bool = True
    """Whether it compares each image with its original."""


WEIGHT = {"loss_weight": "weight", "start_iter": "start_step"}

TYPES: dict[str, Target] = {
    "featurematchingloss": Target("feature_matching", WEIGHT, {"weight": 1.0, "balance": "none"}, paired=False),
    "ganloss": Target("losses.gan", {"gan_type": "type", **WEIGHT}, paired=False),
    "l1loss": Target("losses.l1", WEIGHT),
    "mseloss": Target("losses.l2", WEIGHT),
    "charbonnierloss": Target("losses.charbonnier", WEIGHT),
    "perceptualloss": Target(
        "losses.perceptual",
        WEIGHT,
        fixed={
            "w_lambda": 0.01,
            "alpha": None,
            "num_proj_fd": 256,
            "phase_weight_fd": 1.0,
            "stride_fd": 1,
            "clip_min": 0,
            "antialiased": False,
        },
    ),
    "convnextperceptualloss": Target("losses.convnext", WEIGHT),
    "mobilenetperceptualloss": Target("losses.mobilenet", WEIGHT),
    "ffloss": Target(
        "losses.frequency",
        {
            **WEIGHT,
            "ave_spectrum": "average_spectrum",
            "log_matrix": "log_weights",
            "batch_matrix": "batch_weights",
        },
    ),
    "hfenloss": Target("losses.hfen", WEIGHT),
    "distsloss": Target(
        "losses.dists", WEIGHT, fixed={"as_loss": True, "load_weights": True, "use_input_norm": True, "clip_min": 0}
    ),
    "lpipsloss": Target("losses.lpips", WEIGHT),
    "ldlloss": Target("losses.ldl", WEIGHT),
}


@dataclass(frozen=True)
class LossSetting:
    """One value out of an entry: fmrun's key, the value, and the entry and key the user wrote."""

    key: str
    value: Any
    entry: str
    name: str
    implied: bool = False
    """Not written in the entry."""


@dataclass(frozen=True)
class LossList:
    settings: tuple[LossSetting, ...]
    replaces: tuple[str, ...]
    """Sections in which nothing of the preset is left."""


def read_losses(entries: list[Any], task: str) -> LossList:
    """Translates the list; `UserError` names the entry (by its place, from 1) and what is wrong with it."""
    settings: list[LossSetting] = []
    first: dict[str, int] = {}
    targets: list[Target] = []
    paired: list[str] = []
    for number, entry in enumerate(entries, start=1):
        where = f"losses entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {show(entry)}; it must be a table with a type, like {{type: ganloss}}")
        if not isinstance(entry.get("type"), str):
            raise UserError(f"{where} has no type; known: {', '.join(TYPES)}")
        type_ = entry["type"].replace("_", "").replace("-", "").lower()
        if type_ not in TYPES:
            hint = nearest(type_, list(TYPES)) or f"; known: {', '.join(TYPES)}"
            raise UserError(f"{where}: there is no loss type {show(entry['type'])}{hint}")
        if type_ in first:
            raise UserError(f"{where}: {type_} is already entry {first[type_]}; each type is given once")
        first[type_] = number
        target = TYPES[type_]
        if target.paired and task in UNPAIRED:
            paired.append(entry["type"])
            continue
        targets.append(target)
        settings += _entry(entry, target, f"{where} ({entry['type']})", task)
    if paired:
        verb = "belongs" if len(paired) == 1 else "belong"
        raise UserError(
            f"{', '.join(paired)} {verb} to super-resolution, where every image has its original; "
            f"task '{task}' takes featurematchingloss and ganloss only"
        )
    replaces = [t.section for t in targets if t.section == "feature_matching"]
    if any(t.section != "feature_matching" for t in targets):
        replaces.append("losses")
        if "ganloss" not in first:
            settings.append(LossSetting("losses.gan.weight", 0.0, "losses without a ganloss", "weight", implied=True))
    return LossList(tuple(settings), tuple(replaces))


def _entry(entry: dict[Any, Any], target: Target, where: str, task: str) -> list[LossSetting]:
    known = [m for m in members(target.section) if not (m == "type" and "type" in target.rename.values())]
    given: dict[str, LossSetting] = {}
    for name, value in entry.items():
        if name == "type":
            continue
        if name in target.fixed:
            if value != target.fixed[name]:
                offered = show(target.fixed[name])
                raise UserError(f"{where}: {name} is {show(value)}; fmrun offers {offered} only")
            continue
        if name == "layer_weights" and isinstance(value, dict) and "layers" in known:
            if "layers" in entry:
                raise UserError(f"{where}: layers and the names in layer_weights are the same setting; give one")
            given["layers"] = LossSetting(f"{target.section}.layers", list(value), where, str(name))
            value = list(value.values())
        own = target.rename.get(str(name), str(name))
        if own not in known and own not in target.rename.values():
            options = [*target.rename, *known]
            hint = nearest(str(name), options) or f"; known: {', '.join(options)}"
            raise UserError(f"{where}: there is no key {show(str(name))}{hint}")
        if own in given:
            raise UserError(f"{where}: {given[own].name} and {name} are the same setting; give one")
        given[own] = LossSetting(f"{target.section}.{own}", value, where, str(name))
    implied = {"weight": 1.0, **target.defaults} if target.paired else dict(target.defaults)
    if target.section == "feature_matching":
        match = given["match"].value if "match" in given else UNPAIRED.get(task, "sample")
        implied["match"] = match
        if match in CRITERION:
            unbiased = "estimator" in given and given["estimator"].value == "unbiased"
            implied["criterion"] = "l2" if unbiased else "l1"
    extra = [
        LossSetting(f"{target.section}.{own}", value, where, own, implied=True)
        for own, value in implied.items()
        if own not in given
    ]
    result = [*given.values(), *extra]
    assert all(s.key in FIELDS for s in result)
    return result
