"""The rooms of the package: a file imports from lower floors only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "svf_lightning"

# Every room and every file beside them, from the bottom up. Rooms of one floor do not import each other,
# except where the table below says so.
FLOORS = (
    ("files", "errors", "progress", "episode", "objects", "schema", "backbones"),
    ("data", "models", "svf"),
    ("training", "finetune"),
    ("analysis",),
    ("runs",),
    ("own_images", "benchmarks"),
    ("cli", "__init__"),  # the package itself only hands on what others import
)
SAME_FLOOR = {("backbones", "files"), ("backbones", "episode")}
FILES = sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py"))


def room_of(path: str) -> str:
    return path.split("/")[0]


def floor(room: str) -> int:
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


def imported_rooms(name: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for full in names:
            first, _, rest = full.partition(".")
            if first == "svf_lightning":
                inner = rest.split(".")[0]
                rooms.add(
                    inner if (ROOT / inner).is_dir() or (ROOT / f"{inner}.py").is_file() else "__init__"
                )
    return rooms


@pytest.mark.parametrize("name", FILES)
def test_no_import_points_to_a_higher_floor_or_a_neighbour(name):
    room = room_of(name)
    for target in imported_rooms(name) - {room}:
        assert floor(target) < floor(room) or (room, target) in SAME_FLOOR, f"{name} imports {target}"


@pytest.mark.parametrize("name", FILES)
def test_the_package_never_imports_its_entry_points_or_the_other_lightning(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            first = module.split(".")[0]
            assert first not in ("train", "evaluate", "lightning"), f"{name} imports {module}"
            if first in ("hydra", "omegaconf"):
                assert name in ("objects", "runs/configuration", "runs/sweeps"), f"{name} imports {module}"
