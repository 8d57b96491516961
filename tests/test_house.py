"""The house: a room imports only rooms on floors below its own, and no two files or rooms import each other."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fmrun

PACKAGE = Path(fmrun.__file__).parent
DRAWING = PACKAGE.parent / "docs" / "CONTRIBUTING.md"

FLOORS = {
    "street": ("cli",),
    "work": ("train", "probe", "sample", "evaluate", "compare", "sweep", "bench"),
    "tasks": ("tasks",),
    "library": ("feature_matching", "losses", "models", "metrics", "data"),
    "ground": ("config", "runs", "runtime"),
}
LEVEL = {room: level for level, rooms in enumerate(FLOORS.values()) for room in rooms}


def modules() -> dict[str, Path]:
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): path for name, path in files.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports, inside functions too; not what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                inner = ".".join(filter(None, [*base, alias.name]))
                found.add(inner if inner in known else ".".join(filter(None, base)))
        else:
            assert not re.match(r"(import|from) fmrun\b", ast.unparse(node)), f"{name}: imports of fmrun are relative"
    return found - {name}


KNOWN = modules()
IMPORTS = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_is_on_a_floor() -> None:
    assert {room(name) for name in KNOWN if name not in ("", "__main__")} == LEVEL.keys()


def test_no_room_imports_one_above_it() -> None:
    up = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(name) in LEVEL and room(other) in LEVEL and LEVEL[room(other)] < LEVEL[room(name)]
    ]
    assert not up, up


def test_no_two_rooms_and_no_two_files_import_each_other() -> None:
    rooms: dict[str, set[str]] = {one: set() for one in LEVEL}
    for name, others in IMPORTS.items():
        if room(name) in LEVEL:
            rooms[room(name)] |= {room(other) for other in others if room(other) in LEVEL} - {room(name)}
    files = {name: others - {""} for name, others in IMPORTS.items()}
    for graph in (rooms, files):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            raise AssertionError(f"these import each other: {' -> '.join(error.args[1])}") from None


def test_feature_matching_imports_torch_alone() -> None:
    for name in KNOWN:
        if room(name) == "feature_matching":
            assert {room(other) for other in IMPORTS[name]} <= {"feature_matching"}, name


def test_the_drawing_shows_these_floors() -> None:
    block = re.search(r"```text\n(street.*?)```", DRAWING.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    drawn = {}
    for line in block[1].splitlines():
        floor, *rooms = line.split()
        drawn[floor] = tuple(rooms)
    assert drawn == FLOORS


def test_no_private_name_is_imported_from_another_file() -> None:
    private = [
        f"{name}: {alias.name}"
        for name, path in KNOWN.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not private, private
