"""Presets, config files and flags, merged into one validated `Config`.

A preset, the file of `--config`, and `-s` and its shorthands lie on top of each other in this order; a later
one wins field by field. At the bottom is the default preset, or what the file's own `extends` names
(`--preset`, being typed, comes before `extends`).
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrun.errors import UserError, nearest
from fmrun.overlay import Layers, Override, one_line

if TYPE_CHECKING:
    from fmrun.config import Config
    from fmrun.overlay import Given

DEFAULT = "dcgan-fm"

FREE_ON_RESUME = (
    *("log.", "eval.", "checkpoint.", "train.steps", "data.workers", "data.cache", "device", "threads"),
    *("deterministic", "cuda_graphs", "discriminator.recompute"),
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
    packaged = Path(__file__).parent / "presets_data"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "presets"


def names() -> list[str]:
    """All presets, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def describe(name: str) -> str:
    """The preset's own sentence about itself."""
    return str(_read(name).get("description", ""))


def load(name: str) -> dict[str, Any]:
    """The preset with its bases applied, unvalidated; without `description` and `extends`."""
    chain = [name]
    data = _read(name)
    while (base := data.get("extends")) is not None:
        if base in chain:
            raise UserError(f"preset '{chain[-1]}' extends itself: {' -> '.join([*chain, base])}")
        chain.append(base)
        data = _merge(_read(base), {k: v for k, v in data.items() if k not in META})
    return {k: v for k, v in data.items() if k not in META}


def _read(name: Any) -> dict[str, Any]:
    known = names()
    if name not in known:
        if str(name).endswith((".toml", ".yaml", ".yml", ".json")):
            raise UserError(f"there is no preset '{name}'; a file goes with --config")
        raise UserError(f"there is no preset '{name}'{nearest(str(name), known)} (fmrun presets lists them)")
    path = _folder() / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"preset '{name}' cannot be read: {error}") from None


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# ---- flags


def parse_set(text: str) -> Override:
    """`KEY=VALUE` of `-s`; whether the field exists is seen when all is resolved."""
    key, equals, value = text.partition("=")
    key, flag = key.strip(), f"-s {one_line(text)}"
    if not equals:
        raise UserError(f"{flag}: there is no '='; write it as -s KEY=VALUE, like -s train.steps=100")
    if not key:
        raise UserError(f"{flag}: there is no field before '='; write it as -s KEY=VALUE, like -s train.steps=100")
    return Override(flag, key, value.strip())


def render(key: str, value: Any) -> str:
    """The `KEY=VALUE` that sets `key` to `value` when given to `-s` (unquoted for the shell)."""
    from fmrun.config.fields import FIELDS

    if value is None:
        return f"{key}=none"
    kind = FIELDS[key].kind
    if isinstance(value, str) and value and value.isprintable() and value == value.strip():
        try:
            if kind.parse(value) == value:
                return f"{key}={value}"
        except ValueError:
            pass
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    """A value of JSON's types as TOML writes it inline. (TOML has no null: keys without a value are left out.)"""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


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
    from pydantic import ValidationError

    from fmrun import trust
    from fmrun.config import Config

    file = _file(config_file)
    extends, label = (preset, "--preset") if preset is not None else (file.get("extends"), f"{config_file}: extends")
    base = DEFAULT if extends is None else extends
    try:
        raw = load(base)
    except UserError as error:
        raise UserError(f"{label}: {error}" if extends is not None else str(error)) from None

    layers = Layers()
    layers.table(raw, f"preset {base}")
    if config_file is not None:
        layers.file({k: v for k, v in file.items() if k not in META}, str(config_file))
    read = dict(layers.given)
    for override in overrides:
        layers.override(override)
    nested = layers.nested()
    layers.stop_if_wrong()
    try:
        config = Config.model_validate(nested)
    except ValidationError as error:
        layers.explain(error)
        raise AssertionError("explain raises") from error
    named = []
    for target in trust.targets(config):
        name, params = f"{target.field}.target", f"{target.field}.params"
        whole = params not in read or any(override.key == params for override in overrides)
        typed = layers.given[name] is not read.get(name) and whole  # the target, and all that it is called with
        named.append(trust.Named(target, "" if typed else str(config_file or layers.given[name].label), typed))
        _refuse_unused(target.field, layers, read)
    trust.admit(named, trust_code)
    if need_data:
        _check_bundled(config, layers)
    return config


USED_BESIDE_TARGET = ("target", "params", "init", "latent_dim")
"""Settings of a net that one of the user's own has too."""


def _refuse_unused(section: str, layers: "Layers", read: "dict[str, Given]") -> None:
    """UserError for a setting that was typed beside a target, which does not read it; what was `read` of presets and files,
    which may be whole configs, stays unused."""
    for key, given in layers.given.items():
        name = key.removeprefix(f"{section}.")
        if name != key and name not in USED_BESIDE_TARGET and given is not read.get(key):
            raise UserError(
                f"{given.label}: {key} is for fmrun's own nets, and {section}.target has none of it; leave it out, or give the "
                f"target what it takes with -s '{section}.params={{…}}'"
            )


def _file(config_file: Path | None) -> dict[str, Any]:
    """What `--config` holds; empty without one."""
    from fmrun import config_files

    if config_file is None:
        return {}
    try:
        return config_files.read(config_file)
    except UserError as error:
        raise UserError(f"--config: {error}") from None


def changes(config: "Config", preset: str | None, config_file: Path | None) -> tuple[str, list[str]]:
    """The preset that `config`, resolved from these, lies on, and the `KEY=VALUE`s in which it differs."""
    base = preset or _file(config_file).get("extends") or DEFAULT
    then, now = flatten(resolve(base, None, [], need_data=False)), flatten(config)
    return base, [render(key, value) for key, value in now.items() if key not in then or then[key] != value]


def from_json(data: "dict[str, Any] | Path") -> "Config":
    """The resolved config of a run, from its `config.json`: what was written, with no preset beneath."""
    from pydantic import ValidationError

    from fmrun import config_files
    from fmrun.config import Config

    label = "the run's config"
    if isinstance(data, Path):
        label, data = str(data), config_files.read(data)
    config_files.check_size(data, label)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        unknown = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "extra_forbidden"]
        if unknown:
            raise UserError(
                f"{label}: this version of fmrun has no field {', '.join(repr(k) for k in unknown)}; "
                "the run was made by a newer one, or its config was edited"
            ) from None
        layers = Layers()
        layers.table(data, label)
        layers.explain(error)
        raise AssertionError("explain raises") from error


def revise(data: dict[str, Any], overrides: Sequence[Override], free: Sequence[str]) -> "Config":
    """A run's config with `overrides`, which may touch only the settings that `free` covers."""
    from pydantic import ValidationError

    from fmrun.config import Config

    from_json(data)
    layers = Layers()
    layers.table(data, "the run's config")
    before = dict(layers.given)
    for override in overrides:
        layers.override(override)
    changed = [key for key, given in layers.given.items() if given is not before.get(key)]
    for key in changed:
        if not covers(free, key):
            shown = ", ".join(f"{f}*" if f.endswith(".") else f for f in free)
            layers.problems.append(
                (
                    layers.given[key].label,
                    f"{key} would make it another experiment; only {shown} may be changed here; for another experiment: fmrun train",
                )
            )
    layers.stop_if_wrong()
    nested = layers.nested()
    layers.stop_if_wrong()
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        layers.explain(error)
        raise AssertionError("explain raises") from error


def covers(patterns: Sequence[str], key: str) -> bool:
    """Whether a field is among `patterns`: fields, sections (`log.`), or ends of fields (`*.ramp`)."""
    return any(
        key.endswith(p[1:]) if p.startswith("*") else key == p or (p.endswith(".") and key.startswith(p))
        for p in patterns
    )


def flatten(config: "Config") -> dict[str, Any]:
    """`{"train.steps": 2500, …}`, values as in JSON, in the order of the schema; a section that is absent is None."""
    return dict(_leaves(config.model_dump(mode="json")))


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    from fmrun.config.fields import FIELDS

    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in FIELDS:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_bundled(config: "Config", layers: Layers) -> None:
    size = config.data.image_size
    if config.data.path.startswith("bundled:") and size > 32 and config.data.fit != "pad":
        given = layers.given.get("data.image_size")
        raise UserError(
            f"{given.label if given else 'data'}: data.image_size is {size}, but the bundled images are "
            "28 px; give larger ones with --data FOLDER"
        )
