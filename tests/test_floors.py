"""The rooms of design.md: a file imports from lower floors only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "svf_lightning"

# The first entry that a file's path starts with says its floor. Rooms of one floor may know each other
# only where one of them is named in a file's own `siblings`.
FLOORS = {
    "__init__": 0,
    "episode": 0,
    "errors": 0,
    "progress": 0,
    "data/datamodule": 3,
    "data/base_images": 3,
    "data": 1,
    "backbones": 1,
    "finetune": 1,
    "models/blocks": 1,
    "losses": 1,
    "metrics": 1,
    "models": 2,
    "singular_files": 2,
    "checkpoints": 2.5,  # puts weights into methods
    "segmenter": 3,
    "base_learner": 3.5,
    "callbacks": 3.5,  # holds on to what the segmenter hands out
    "analysis": 3.5,
    "runs": 4,
    "evaluation": 4.5,
    "check": 4,
    "benchmarks": 4.5,
    "base_stage": 4.5,
    "convert": 4.5,
    "export": 4.5,
    "predict": 4.5,
    "cli": 5,
}
# What may be imported on one's own floor.
SIBLINGS = {
    "data": ("data",),
    "backbones": ("backbones",),
    "finetune": ("finetune",),
    "analysis": ("analysis",),
}


def floor(module: str) -> float:
    path = module.replace(".", "/")
    return next(
        height for prefix, height in FLOORS.items() if path == prefix or path.startswith(prefix + "/")
    )


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("svf_lightning"):
            base = node.module.removeprefix("svf_lightning").lstrip(".")
            for name in node.names:
                full = f"{base}.{name.name}".lstrip(".")
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                yield full if is_module else base or "__init__"


FILES = sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_no_import_points_to_a_higher_floor(name):
    room = name.split("/")[0]
    for target in imports(ROOT / f"{name}.py"):
        target = target.replace(".", "/").removesuffix("/__init__")
        same_room = target.split("/")[0] == room and room in SIBLINGS
        assert floor(target) < floor(name) or (same_room and floor(target) <= floor(name)), (
            f"{name} imports {target}"
        )


@pytest.mark.parametrize("name", FILES)
def test_the_package_never_imports_its_entry_points_or_the_other_lightning(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] not in ("train", "evaluate", "lightning"), f"{name} imports {module}"
            if module.split(".")[0] in ("hydra", "omegaconf"):
                assert name == "runs", f"{name} knows Hydra; only runs.py builds objects from a configuration"
