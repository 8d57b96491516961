"""Code of the user's own that a config names: what would run, whether this user has allowed it, and its import.

A config, a run or a checkpoint can name any code (`generator.target = "os:system"`). It is imported only if its digest
stands in the user's own list; typing a target on the command line adds it. Until then nothing of it runs: the source is
found without importing the packages on the way. What is imported in the end is compiled from the bytes that were hashed,
whatever lies in `__pycache__` or has been written since.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.abc
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SaveError, UserError
from .report import warn_once
from .runs import Run, exclusive, saving, to_json, write_atomic

if TYPE_CHECKING:
    from .config import Config

SECTIONS = ("generator", "discriminator")
"""Sections of the config in which a target can stand."""

MOST_SOURCE = 10_000_000
"""Bytes of a source file."""

KINDS = ((ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES))
"""What a module may be, in Python's order. Byte code without its source is not imported."""


class Untrusted(UserError):
    """Code that this user has not allowed."""


@dataclass(frozen=True)
class Target:
    """Code that is named somewhere: `name` is `package.module:Class`, `field` where it stands (`generator`), `params` the
    arguments it is called with."""

    field: str
    name: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def module(self) -> str:
        return self.name.partition(":")[0]

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.params], sort_keys=True)


@dataclass(frozen=True)
class File:
    """A module's file: its source in `data`, None where it is compiled code. A folder without `__init__.py` is a module
    without a file, and has no hash."""

    path: Path
    sha256: str | None
    data: bytes | None
    is_package: bool

    def spec(self, name: str) -> ModuleSpec:
        if self.sha256 is None:
            return ModuleSpec(name, None, is_package=True)
        loader = ExtensionFileLoader(name, str(self.path)) if self.data is None else _Loader(self.path, self.data)
        # no search locations: of a package, too, only what was hashed can be imported
        locations: list[str] | None = [] if self.is_package else None
        spec = importlib.util.spec_from_file_location(
            name, self.path, loader=loader, submodule_search_locations=locations
        )
        assert spec is not None
        return spec

    def imports(self, name: str) -> Iterator[str]:
        """Modules that the source may import: all that its import statements name, wherever they stand."""
        package = name if self.is_package else name.rpartition(".")[0]
        try:
            tree = ast.parse(self.data or b"")
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # its import will say so
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    try:
                        base = importlib.util.resolve_name("." * node.level + base, package)
                    except ImportError:
                        continue
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


class _Loader(importlib.abc.SourceLoader):
    """Compiles bytes that have been read before. (torch and inspect read the file itself, to show its lines.)"""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = str(path), data

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:  # type: ignore[override]
        return self.data if path == self.path else Path(path).read_bytes()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds these modules and no others."""

    def __init__(self, files: Mapping[str, File]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        file = self.files.get(fullname)
        return None if file is None else file.spec(fullname)


@dataclass(frozen=True)
class Code:
    """What a target would run: files under `folder` by the names of their modules, or what is `installed`."""

    target: Target
    folder: Path | None = None
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)
    installed: str | None = None
    """`torch 2.15.0`: a distribution, or Python itself."""

    @property
    def digest(self) -> str:
        """SHA-256 of target, params and the bytes of the files, or name and version of what is installed."""
        code = self.installed or {name: file.sha256 for name, file in sorted(self.files.items())}
        content = [self.target.name, self.target.params, code]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def said(self) -> str:
        if self.installed is not None:
            return f"code of {self.installed}"
        others = sum(file.sha256 is not None for file in self.files.values()) - 1
        more = f" and {others} file{'s' * (others > 1)} that it imports" if others > 0 else ""
        return f"{self.files[self.target.module].path}{more}"

    @property
    def sources(self) -> dict[str, bytes]:
        """Text of the files, by their paths in the folder."""
        assert self.folder is not None or not self.files
        return {
            str(f.path.relative_to(self.folder)): f.data
            for f in self.files.values()
            if f.data is not None and self.folder is not None
        }

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Inside, the files can be imported, and come before installed packages of the same names; afterwards behind
        them, for what functions import when they are called."""
        if not self.files:
            yield
            return
        own = {name: loader for name in self.files if isinstance(loader := _loader_of(name), _Loader)}
        if any(loader.data != self.files[name].data for name, loader in own.items()):
            for name in own:  # another run's files of the same names, or an older state of these
                del sys.modules[name]
        for old in [f for f in sys.meta_path if isinstance(f, _Finder) and f.files.keys() & self.files.keys()]:
            sys.meta_path.remove(old)
        finder = _Finder(self.files)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            sys.meta_path.append(finder)


def _loader_of(module: str) -> Any:
    return getattr(getattr(sys.modules.get(module), "__spec__", None), "loader", None)


# ---- what is allowed


def list_file() -> Path | None:
    """The user's list; None where there is no place for one."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    except RuntimeError:  # neither HOME nor an entry in the password file
        return None
    return folder / "fmrun" / "trusted.json"


def _listed() -> dict[str, Any]:
    """Entries by digest; none where the list is missing or damaged."""
    file = list_file()
    if file is None:
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.get("trusted") if isinstance(content, dict) else None
    return {k: v for k, v in entries.items() if isinstance(v, dict)} if isinstance(entries, dict) else {}


def _remember(code: Code) -> None:
    """Put code into the list; where that cannot be written, it is allowed in this command alone, which is said."""
    if code.digest in _listed():
        return
    entry = {"target": code.target.name, "params": dict(code.target.params), "code": code.said}
    file = list_file()
    try:
        if file is None:
            raise SaveError("there is no home folder, and XDG_CONFIG_HOME is not set")
        with saving(file):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(file.with_suffix(".lock"), f"process {{}} holds {file}", patience=5):
            content = {"format": 1, "trusted": {**_listed(), code.digest: entry}}
            with saving(file):
                write_atomic(file, to_json(content), mode=0o600)
    except (SaveError, UserError) as error:
        warn_once(f"{code.target.name} is allowed in this command alone, not remembered: {error}")


_ADMITTED: dict[str, Code] = {}
"""What this process may import, by `Target.key`."""


def targets(config: Config) -> list[Target]:
    """All code that a config names."""
    named = ((section, getattr(config, section)) for section in SECTIONS)
    return [Target(section, net.target, net.params) for section, net in named if net.target is not None]


def admit(config: Config, source: Run | Path, trust_code: bool = False) -> None:
    """Let the code that the config of a run, or of a file, names be imported, if this user has allowed it (`trust_code`
    allows it); else raise Untrusted. A run's code is looked for first where it was when the run was started."""
    where = source.config_file if isinstance(source, Run) else source
    for target in targets(config):
        lay = source.code().get(target.field, {}).get("folder") if isinstance(source, Run) else None
        admit_target(target, str(where), typed=trust_code, folder=Path(lay) if lay else None)


def admit_target(target: Target, where: str = "", *, typed: bool = False, folder: Path | None = None) -> Code:
    """Let one target be imported if this user has allowed it, or typed it; what it runs. `where` it was read, for the
    message; it is looked for in `folder` first."""
    _ADMITTED.pop(target.key, None)
    code = locate(target, folder)
    if typed:
        _remember(code)
    elif code.digest not in (listed := _listed()):
        known = any([e.get("target"), e.get("params")] == [target.name, target.params] for e in listed.values())
        params = f" with {json.dumps(target.params)[:500]}" if target.params else ""
        raise Untrusted(
            f"{f'{where}: ' * bool(where)}{target.field}.target '{target.name}'{params} runs {code.said}, which "
            f"{'has changed since you allowed it' if known else 'you have not allowed'}; if you trust it, add --trust-code"
        )
    _ADMITTED[target.key] = code
    return code


def admitted(target: Target) -> Code:
    """What a target may import in this process; Untrusted where nobody has allowed it."""
    code = _ADMITTED.get(target.key)
    return code if code is not None else admit_target(target)


# ---- where it lies


def locate(target: Target, folder: Path | None = None) -> Code:
    """What a target would run, from `folder`, the current folder, or what is installed; nothing is imported.

    Raises UserError if there is no such module.
    """
    module, _, name = target.name.partition(":")
    if not (module and name):
        raise UserError(f"{target.field}.target: '{target.name}' is not of the form 'package.module:Class'")
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return Code(target, installed=f"Python {platform.python_version()}")
    here = Path(os.getcwd())
    place: Path | None
    for place in dict.fromkeys((folder or here, here)):
        if files := _collect(module, place):
            break
    else:
        place, installed = _installed(top)
        if installed is not None:
            return Code(target, installed=installed)
        files = _collect(module, place) if place is not None else {}
    if module not in files or files[module].sha256 is None:
        missing = next((level for level in _levels(module) if level not in files), module)
        raise UserError(
            f"{target.field}.target: there is no module '{missing}' in {here} or among the installed packages"
        )
    return Code(target, place, files)


def _levels(module: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`."""
    return accumulate(module.split("."), "{}.{}".format)


def _collect(module: str, root: Path) -> dict[str, File]:
    """A module's file under `root`, those of the packages it lies in, and those that they import from there; Python's own
    modules go by the names they have."""
    found: dict[str, File] = {}
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] in sys.stdlib_module_names:
            continue
        seen.add(name)
        folder = root
        for level in _levels(name):
            if level not in found:
                spec = FileFinder(str(folder), *KINDS).find_spec(level) if folder.is_dir() else None
                if spec is None:
                    break
                found[level] = _read(spec)
                waiting += found[level].imports(level)
            file = found[level]
            folder = file.path if file.sha256 is None else file.path.parent
            if not file.is_package:
                break
    real = [name for name, file in found.items() if file.sha256 is not None]
    # a folder that only bears the name of an installed package is none
    return {n: f for n, f in found.items() if n in real or any(name.startswith(f"{n}.") for name in real)}


def _read(spec: ModuleSpec) -> File:
    if spec.loader is None:  # a folder without __init__.py
        assert spec.submodule_search_locations is not None
        return File(Path(next(iter(spec.submodule_search_locations))), None, None, True)
    assert spec.origin is not None
    path, is_package = Path(spec.origin), spec.submodule_search_locations is not None
    try:
        if isinstance(spec.loader, ExtensionFileLoader):
            with path.open("rb") as stream:
                return File(path, hashlib.file_digest(stream, "sha256").hexdigest(), None, is_package)
        if path.stat().st_size > MOST_SOURCE:
            raise UserError(f"{path} is larger than {MOST_SOURCE // 1_000_000} MB, too large for a source file")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return File(path, hashlib.sha256(data).hexdigest(), data, is_package)


def _installed(top: str) -> tuple[Path | None, str | None]:
    """The folder in which a top-level module lies outside the current one, and name and version of its distribution; an
    editable one, and what PYTHONPATH names, goes by its files."""
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    spec = next((s for finder in finders if (s := finder.find_spec(top, None)) is not None), None)
    if spec is None:
        return None, None
    locations = list(spec.submodule_search_locations or ())
    place = Path(locations[0] if locations else spec.origin or "").parent
    found = []
    for name in dict.fromkeys(importlib.metadata.packages_distributions().get(top, ())):
        distribution = importlib.metadata.distribution(name)
        if Path(str(distribution.locate_file(""))).resolve() == place.resolve():
            found.append(f"{name} {distribution.version}")
    return place, " and ".join(sorted(found)) or None


# ---- what a run keeps


def record(config: Config) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a run notes of the code it runs, by section, and its text by where it goes in the run's folder."""
    facts: dict[str, Any] = {}
    texts: dict[str, bytes] = {}
    for target in targets(config):
        code = admitted(target)
        folder = None if code.folder is None else str(code.folder)
        facts[target.field] = {
            "target": target.name,
            "sha256": code.digest,
            "folder": folder,
            "installed": code.installed,
        }
        texts |= {f"code/{target.field}/{path}": text for path, text in code.sources.items()}
    return facts, texts


def changed(config: Config, run: Run) -> list[str]:
    """The targets whose code is not what the run was started with."""
    return [
        t.name for t in targets(config) if (noted := run.code().get(t.field)) and noted["sha256"] != admitted(t).digest
    ]
