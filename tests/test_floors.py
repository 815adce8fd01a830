"""Imports go down: the floors of docs/architecture.md, and no circle between any two modules."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_moe

SOURCE = Path(lightning_moe.__file__).parent
#: from the top to the ground; what stands on one floor does not import its neighbours
FLOORS = (
    "__main__",
    "cli",
    "study",
    "sweep",
    "analysis compare dial evaluation training",
    "tracking",
    "audit calibrate callbacks export plan replay runs",
    "module",
    "checkpoints hf metrics",
    "model",
    "config data optim routing",
    "internals trust user_paths file_schema",
    "bounds devices",
    "atomic checksums errors file_locks filenames processes ranks report waits",
    "redaction",
)
FLOOR = {room: height for height, rooms in enumerate(reversed(FLOORS)) for room in rooms.split()}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the package that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Each module → the modules of the package that it imports."""
    paths = {path for path in SOURCE.rglob("*.py") if "remote" not in path.parts}
    names = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in paths}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    return {name: {_module(found, modules) for found in imports(path)} - {"", name} for name, path in modules.items()}


def _module(name: str, modules: dict[str, Path]) -> str:
    """The module that an imported name is, or lies in; empty for other packages."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in graph()} - {""} == set(FLOOR)


def test_imports_go_down() -> None:
    upwards = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if room(module) != room(target) and "" not in (room(module), room(target))
        if FLOOR[room(module)] <= FLOOR[room(target)]
    ]
    assert upwards == []


def test_there_is_no_circle() -> None:
    """A package's own ``__init__`` gathers what is inside, so imports of it are not followed from there."""
    of_files = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph().items()}
    TopologicalSorter(of_files).prepare()  # raises CycleError with the circle
