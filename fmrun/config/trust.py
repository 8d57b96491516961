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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..runtime.errors import SaveError, UserError, reading
from ..runtime.files import exclusive, saving, to_json, write_atomic
from ..runtime.report import warn_once

if TYPE_CHECKING:
    from .schema import Config

SECTIONS = ("generator", "discriminator")
"""Sections of the config in which a target can stand."""

MOST_SOURCE = 10_000_000
"""Bytes of a source file."""

MOST_FILES = 2000
"""Source files that one target may bring."""

OURS = ("fmrun", "torch", "torchvision", "numpy")
"""What is imported already, or must not be another than fmrun's."""


class Untrusted(UserError):
    """Code that this user has not allowed."""


@dataclass(frozen=True)
class Target:
    """Code that is named somewhere: `name` is `package.module:Class` or `path/to/file.py:Class`, `field` the section of the
    config (`generator`), `params` the arguments it is called with."""

    field: str
    name: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""
    """The file that names it."""
    typed: bool = False
    """By this user, who thereby allows it."""
    folder: Path | None = None
    """Where it is looked for first."""

    @property
    def file(self) -> Path | None:
        """Where a file is named rather than a module."""
        where = self.name.rpartition(":")[0]
        return Path(where) if where.endswith(".py") else None

    @property
    def module(self) -> str:
        return self.file.stem if self.file is not None else self.name.rpartition(":")[0]

    @property
    def attribute(self) -> str:
        return self.name.rpartition(":")[2]

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.params], sort_keys=True)


@dataclass(frozen=True)
class File:
    """A module's source; None for a folder without `__init__.py`, which is a module without a file."""

    path: Path
    data: bytes | None
    is_package: bool

    @property
    def sha256(self) -> str | None:
        return None if self.data is None else hashlib.sha256(self.data).hexdigest()

    def spec(self, name: str) -> ModuleSpec:
        if self.data is None:  # without search locations: nothing in the folder but what was hashed is found
            return ModuleSpec(name, None, is_package=True)
        spec = importlib.util.spec_from_file_location(name, self.path, loader=_Loader(self.path, self.data))
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
    """Finds these modules; in their packages, nothing but them."""

    def __init__(self, files: Mapping[str, File]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname in self.files:
            return self.files[fullname].spec(fullname)
        package = fullname.rpartition(".")[0]
        if isinstance(_loader_of(package), _Loader) and package in self.files:
            raise ModuleNotFoundError(f"No module named '{fullname}' among the files that were allowed", name=fullname)
        return None


@dataclass(frozen=True)
class NamedCode:
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
        others = sum(file.data is not None for file in self.files.values()) - 1
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

    def make_importable(self) -> None:
        """Let the files be imported, now and by what functions import when they are called, before installed packages of the
        same names; what has been imported from older or other files of these names is forgotten."""
        hashed = {name: loader for name in self.files if isinstance(loader := _loader_of(name), _Loader)}
        if any(loader.data != self.files[name].data for name, loader in hashed.items()):
            for name in hashed:  # another run's files of the same names, or an older state of these
                del sys.modules[name]
        for old in [f for f in sys.meta_path if isinstance(f, _Finder) and f.files.keys() & self.files.keys()]:
            sys.meta_path.remove(old)
        if self.files:
            sys.meta_path.insert(0, _Finder(self.files))


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


def _remember(code: NamedCode) -> None:
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


_ADMITTED: dict[str, NamedCode] = {}
"""What this process may import, by `Target.key`."""


def targets(config: Config, where: str = "", noted: Mapping[str, Any] = MappingProxyType({})) -> list[Target]:
    """All code that a config names, which was read from the file `where`. A run's code, of which it has `noted` what `record`
    gave, is looked for first where it was when the run was started."""
    folders = {section: Path(code["folder"]) for section, code in noted.items() if code.get("folder")}
    return [
        Target(section, net.target, net.params, where, folder=folders.get(section))
        for section in SECTIONS
        if (net := getattr(config, section)).target is not None
    ]


def admit(named: Iterable[Target], trust_code: bool = False) -> None:
    """Let code be imported that this user has allowed, or typed, which allows it; `trust_code` allows all of it. Else raises
    Untrusted, which tells of all that is not allowed: who then adds --trust-code has seen what that allows."""
    refused: dict[str, str] = {}
    codes = []
    for target in named:
        _ADMITTED.pop(target.key, None)
        code = locate(target)
        codes.append(code)
        if not (target.typed or trust_code or code.digest in _listed()):
            refused.setdefault(target.key, _refusal(code))
    if refused:
        what = "trust it" if len(refused) == 1 else "trust all of it"
        raise Untrusted(f"{'; '.join(refused.values())}; if you {what}, add --trust-code")
    for code in codes:
        if code.target.typed or trust_code:
            _remember(code)
        _ADMITTED[code.target.key] = code


def _refusal(code: NamedCode) -> str:
    target = code.target
    known = any([e.get("target"), e.get("params")] == [target.name, target.params] for e in _listed().values())
    params = ", ".join(f"{json.dumps(k)}: {_shortened(json.dumps(v))}" for k, v in target.params.items())
    return (
        f"{f'{target.where}: ' * bool(target.where)}{target.field}.target {json.dumps(target.name)}"
        f"{f' with {{{params}}}' * bool(params)} runs {code.said}, which "
        f"{'has changed since you allowed it' if known else 'you have not allowed'}"
    )


def _shortened(text: str) -> str:
    """A value's beginning and end: no key, and no value's end, can be pushed out of sight."""
    return text if len(text) <= 200 else f"{text[:100]} … {text[-100:]}"


def admitted(target: Target) -> NamedCode:
    """What a target may import in this process; Untrusted where nobody has allowed it."""
    if target.key not in _ADMITTED:
        admit([target])
    return _ADMITTED[target.key]


# ---- where it lies


def locate(target: Target) -> NamedCode:
    """What a target would run, from its folder, the current folder, or what is installed; nothing is imported.

    Raises UserError if there is no such module.
    """
    module, folder, what = target.module, target.folder, f"{target.field}.target"
    if not (module and target.attribute):
        raise UserError(f"{what}: '{target.name}' is not of the form 'package.module:Class' or 'path/to/file.py:Class'")
    here = Path(os.getcwd())
    if target.file is not None:
        for place in dict.fromkeys((folder or here, here / target.file.parent)):
            if module in (files := _collect(module, place)):
                return NamedCode(target, place, files)
        if module in (*OURS, *sys.stdlib_module_names):
            raise UserError(f"{what}: rename '{target.file}': its name is that of a module of Python's or of fmrun's")
        before = f", nor in {folder}, where it was when the run was started" if folder is not None else ""
        raise UserError(f"{what}: there is no file '{target.file}' in {here}{before}")
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return NamedCode(target, installed=f"Python {platform.python_version()}")
    for place in dict.fromkeys((folder or here, here)):
        if files := _collect(module, place):
            break
    else:
        places, installed = _installed(top)
        if installed is not None:
            return NamedCode(target, installed=installed)
        place = next((p for p in places if module in _collect(module, p)), here)
        files = _collect(module, place)
    if module not in files or files[module].data is None:
        missing = next((level for level in _levels(module) if level not in files), module)
        before = f", in {folder}, where it was when the run was started," if folder is not None else ""
        raise UserError(f"{what}: there is no module '{missing}' in {here}{before} or among the installed packages")
    return NamedCode(target, place, files)


def _levels(module: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`."""
    return accumulate(module.split("."), "{}.{}".format)


def _collect(module: str, root: Path) -> dict[str, File]:
    """A module's file under `root`, all of the packages it lies in, and what these import from there; modules of Python and
    of OURS go by the names they have."""
    files: dict[str, File] = {}
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] in (*OURS, *sys.stdlib_module_names):
            continue
        seen.add(name)
        folder = root
        for level in _levels(name):
            if level not in files:
                spec = (
                    FileFinder(str(folder), (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(level)
                    if folder.is_dir()
                    else None
                )
                if spec is None:
                    break
                files[level] = file = _read(spec)
                waiting += file.imports(level)
                if file.data is not None and file.is_package:  # any of its modules may be imported, by whatever name
                    inner = sorted(p.name.partition(".")[0] for p in file.path.parent.iterdir())
                    waiting += [f"{level}.{one}" for one in inner if one.isidentifier() and not one.startswith("__")]
                if len(files) > MOST_FILES:
                    raise UserError(
                        f"{module} in {root} brings more than {MOST_FILES} source files; install it as a package"
                    )
            file = files[level]
            folder = file.path if file.data is None else file.path.parent
            if not file.is_package:
                break
    real = [name for name, file in files.items() if file.data is not None]
    # a folder that only bears the name of an installed package is none
    return {n: f for n, f in files.items() if n in real or any(name.startswith(f"{n}.") for name in real)}


def _read(spec: ModuleSpec) -> File:
    if spec.loader is None:  # a folder without __init__.py
        assert spec.submodule_search_locations is not None
        return File(Path(next(iter(spec.submodule_search_locations))), None, True)
    assert spec.origin is not None
    path = Path(spec.origin)
    with reading(path):
        if path.stat().st_size > MOST_SOURCE:
            raise UserError(f"{path} is larger than {MOST_SOURCE // 1_000_000} MB, too large for a source file")
        return File(path, path.read_bytes(), spec.submodule_search_locations is not None)


def _installed(top: str) -> tuple[list[Path], str | None]:
    """The folders in which a top-level module lies outside the current one, and name and version of its distribution; an
    editable one, and what PYTHONPATH names, goes by its files."""
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    spec = next((s for finder in finders if (s := finder.find_spec(top, None)) is not None), None)
    if spec is None:
        return [], None
    places = [Path(place).parent for place in spec.submodule_search_locations or [spec.origin or ""]]
    distributions = []
    for name in dict.fromkeys(importlib.metadata.packages_distributions().get(top, ())):
        distribution = importlib.metadata.distribution(name)
        if Path(str(distribution.locate_file(""))).resolve() in [place.resolve() for place in places]:
            distributions.append(f"{name} {distribution.version}")
    return places, " and ".join(sorted(distributions)) or None


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


def changed(config: Config, noted: Mapping[str, Any]) -> list[str]:
    """The targets whose code is not what a run was started with, which has `noted` what `record` gave."""
    return [t.name for t in targets(config) if t.field in noted and noted[t.field]["sha256"] != admitted(t).digest]
