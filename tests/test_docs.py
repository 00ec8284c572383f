"""README and docs/ describe the code as it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svf_lightning"
DOCS = ROOT / "docs"


def test_the_snippets_of_the_page_on_svf_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    page = (DOCS / "svf.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for snippet in snippets:
        exec(snippet, names)

    assert len(snippets) == 6
    assert sum(p.numel() for p in names["trained"]) == 1728 + 512 * 1000 + 1000  # and the head
    assert "1,728 numbers" in page
    for name, s in torch.load(tmp_path / "small.pt").items():
        assert torch.equal(s, names["other"].get_parameter(name))
    assert f"{(tmp_path / 'small.pt').stat().st_size / 1000:.0f} KB" in page
    exported = names["program"].module()(torch.ones(3, 3, 64, 64))
    torch.testing.assert_close(exported, names["network"](torch.ones(3, 3, 64, 64)), atol=1e-5, rtol=1e-5)


def test_the_engine_needs_torch_and_nothing_heavy_beside_it():
    heavy = ("hydra", "omegaconf", "pytorch_lightning", "timm", "torchvision", "matplotlib", "peft")
    code = f"import sys, svf_lightning.svf; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_the_file_map_of_the_readme_is_the_tree():
    section = (ROOT / "README.md").read_text().split("## The files\n")[1].split("\n## ")[0]
    entries = re.findall(r"^ {4}( *)(\S+)", section, re.MULTILINE)
    listed = [f"svf_lightning/{name}" if indent else name for indent, name in entries]

    rooms = {f"svf_lightning/{path.parent.name}/" for path in PACKAGE.glob("*/*.py")}
    files = {f"svf_lightning/{path.name}" for path in PACKAGE.glob("*.py")}
    others = {"conf/", "tests/", "docs/", "svf_lightning/", "train.py", "evaluate.py"}
    assert sorted(listed) == sorted(rooms | files | others)
    for name in listed:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_a_published_method_has_more_than_400_lines(path):
    if path.parent != PACKAGE / "models":
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; cut it into files of one purpose"
