"""Presets, config files and flags, merged into one validated `Config`.

A preset, the file of `--config`, and `-s` and its shorthands lie on top of each other in this order; a later
one wins field by field. At the bottom is the default preset, or what the file's own `extends` names
(`--preset`, being typed, comes before `extends`).
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UserError, nearest
from .overrides import BENEATH, FILE, TYPED, Layers, Override, one_line

if TYPE_CHECKING:
    from .schema import Config

DEFAULT = "dcgan-fm"

FREE_ON_RESUME = (
    *("log.", "eval.", "checkpoint.", "train.steps", "data.workers", "data.cache", "device", "threads"),
    *("deterministic", "cuda_graphs"),
)
"""What a resumed run may change: nothing here changes the experiment."""

HORIZONS = ("optim.schedule.", "*.start_step", "*.ramp")
"""Absolute steps at which something begins or ends. A resumed run may change them where nothing before it changes."""

PLACES = ("data.path", "data.valid_path", "data.lr_path", "data.valid_lr_path", "data.root")
"""Where the images of a run lie. They may be moved; others of another number, other names or sizes are refused there."""

META = ("description", "extends")
"""Top-level keys of a preset or config file that are no settings."""

# ---- presets; nothing here imports pydantic, so that completion is quick


def _folder() -> Path:
    packaged = Path(__file__).parents[1] / "presets_data"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "presets"


def names() -> list[str]:
    """All presets, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def describe(name: str) -> str:
    """The preset's own sentence about itself."""
    return str(_read(name).get("description", ""))


def load(name: str) -> dict[str, Any]:
    """The preset with its bases applied, unvalidated; without `description` and `extends`."""
    data = _read(name)
    settings = {k: v for k, v in data.items() if k not in META}
    return _merge(load(data["extends"]), settings) if "extends" in data else settings


def _read(name: Any) -> dict[str, Any]:
    known = names()
    if name not in known:
        if str(name).endswith((".toml", ".yaml", ".yml", ".json")):
            raise UserError(f"there is no preset '{name}'; a file goes with --config")
        raise UserError(f"there is no preset '{name}'{nearest(str(name), known)} (fmrun presets lists them)")
    return tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


# ---- flags


def parse_set(text: str) -> Override:
    """`KEY=VALUE` of `-s`; whether the field exists is seen when all is resolved."""
    key, equals, value = text.partition("=")
    key, flag = key.strip(), f"-s {one_line(text)}"
    if not equals or not key:
        what = "field before '='" if equals else "'='"
        raise UserError(f"{flag}: there is no {what}; write it as -s KEY=VALUE, like -s train.steps=100")
    return Override(flag, key, value.strip())


def render(key: str, value: Any) -> str:
    """The `KEY=VALUE` that sets `key` to `value` when given to `-s` (unquoted for the shell)."""
    if value is None:
        return f"{key}=none"
    plain = (
        isinstance(value, str) and value.isprintable() and value == value.strip() and value[:1] not in [*"'\"[{", ""]
    )
    return f"{key}={value}" if plain else f"{key}={json.dumps(value)}"


# ---- the whole


def resolve(
    preset: str | None,
    config_file: Path | None,
    overrides: Sequence[Override],
    *,
    need_data: bool = True,
    trust_code: bool = False,
) -> "Config":
    """The config that the command line asks for; `UserError` names every mistake in one line, and code that a file names
    and this user has not allowed (`trust_code` allows it).

    `need_data=False` skips the check that the bundled images are as large as the config wants them.
    """
    from . import trust

    file = _file(config_file)
    extends, label = (preset, "--preset") if preset is not None else (file.get("extends"), f"{config_file}: extends")
    base = DEFAULT if extends is None else extends
    try:
        raw = load(base)
    except UserError as error:
        raise UserError(f"{label}: {error}" if extends is not None else str(error)) from None

    layers = Layers()
    layers.table(raw, f"preset {base}")
    beside = {k: v for k, v in file.items() if k not in META and not (k == "losses" and isinstance(v, list))}
    if isinstance(losses := file.get("losses"), list):
        from .yaml import lay_losses

        lay_losses(layers, losses, beside, str(config_file))
    else:
        layers.table(beside, str(config_file), FILE)
    read = dict(layers.given)
    for override in overrides:
        layers.override(override)
    config = layers.config()
    named = []
    for target in trust.targets(config):
        name, params = f"{target.field}.target", f"{target.field}.params"
        whole = params not in read or any(override.key == params for override in overrides)
        typed = layers.given[name].source == TYPED and whole  # the target, and all that it is called with
        where = "" if typed else str(config_file or layers.given[name].label)
        named.append(replace(target, where=where, typed=typed))
    trust.admit(named, trust_code)
    config = _without_idle(config, layers)
    size = config.data.image_size
    if need_data and config.data.path.startswith("bundled:") and size > 32 and config.data.fit != "pad":
        label = layers.given["data.image_size"].label
        raise UserError(
            f"{label}: data.image_size is {size}, but the bundled images are 28 px; give larger ones with --data FOLDER"
        )
    return config


def _without_idle(config: "Config", layers: Layers, keep: bool = False) -> "Config":
    """UserError for a setting that does not act in this config. One that lies beneath the choice from which that follows, as a
    preset's generator.blocks beneath a typed generator.type, goes with that choice, or stays (`keep`) as in a run's config."""
    from .acting import idle

    gone = False
    for key, given in list(layers.given.items()):
        if (refusal := idle(config, key)) is not None:
            selector, sentence = refusal
            chosen = layers.given[selector].source if selector in layers.given else BENEATH
            if given.source >= max(chosen, FILE):
                layers.problems.append((given.label, sentence))
            elif not keep:
                gone = True
                del layers.given[key]
    layers.stop_if_wrong()
    return layers.config() if gone else config


def _file(config_file: Path | None) -> dict[str, Any]:
    """What `--config` holds; empty without one."""
    from . import files as config_files

    if config_file is None:
        return {}
    try:
        return config_files.read_settings(config_file)
    except UserError as error:
        raise UserError(f"--config: {error}") from None


def changes(config: "Config", preset: str | None, config_file: Path | None) -> tuple[str, list[str]]:
    """The preset that `config`, resolved from these, lies on, and the `KEY=VALUE`s in which it differs."""
    base = preset or _file(config_file).get("extends") or DEFAULT
    then, now = flatten(resolve(base, None, [], need_data=False)), flatten(config)
    return base, [render(key, value) for key, value in now.items() if key not in then or then[key] != value]


def from_json(data: "dict[str, Any] | Path") -> "Config":
    """The resolved config of a run, from its `config.json`: what was written, with no preset beneath."""
    from . import files as config_files

    label = "the run's config"
    if isinstance(data, Path):
        label, data = str(data), config_files.read_settings(data)
    return _of_run(data, label).config()


def _of_run(data: dict[str, Any], label: str) -> Layers:
    """A run's config; what an older version wrote of options that this one has not, and the run did not use, is left out."""
    from . import files as config_files
    from .fields import FIELDS, SECTIONS

    config_files.check_size(data, label)
    layers, strange = Layers(), []
    for key, value in _leaves(data).items():
        if key in FIELDS or key in SECTIONS:
            layers.put(key, value, label, BENEATH)
        elif value not in (None, []):
            strange.append(repr(key))
    if strange:
        raise UserError(
            f"{label}: this version of fmrun has no field {', '.join(strange)}; "
            "the run was made by another version, or its config was edited"
        )
    return layers


def revise(data: dict[str, Any], overrides: Sequence[Override], free: Sequence[str]) -> "Config":
    """A run's config with `overrides`, which may touch only the settings that `free` covers."""
    layers = _of_run(data, "the run's config")
    layers.config()
    before = dict(layers.given)
    for override in overrides:
        layers.override(override)
    changeable = ", ".join(f"{f}*" if f.endswith(".") else f for f in free)
    for key, given in layers.given.items():
        if given is not before.get(key) and not covers(free, key):
            sentence = f"{key} would make it another experiment; only {changeable} may be changed here; for another experiment: fmrun train"
            layers.problems.append((given.label, sentence))
    return _without_idle(layers.config(), layers, keep=True)


def covers(patterns: Sequence[str], key: str) -> bool:
    """Whether a field is among `patterns`: fields, sections (`log.`), or ends of fields (`*.ramp`)."""
    return any(
        key.endswith(p[1:]) if p.startswith("*") else key == p or (p.endswith(".") and key.startswith(p))
        for p in patterns
    )


def flatten(config: "Config") -> dict[str, Any]:
    """`{"train.steps": 2500, …}`, values as in JSON, in the order of the schema; a section that is absent is None."""
    return _leaves(config.model_dump(mode="json"))


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    from .fields import FIELDS

    leaves: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        leaves |= _leaves(value, f"{key}.") if isinstance(value, dict) and key not in FIELDS else {key: value}
    return leaves
