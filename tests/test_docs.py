"""The pages in docs/ say what runs."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_snippets_of_the_page_on_svf_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "svf.md").read_text(), re.DOTALL)
    for snippet in snippets:
        exec(snippet, names)

    assert len(snippets) == 6
    assert sum(p.numel() for p in names["trained"]) == 3456 + 512 * 1000 + 1000  # and the head
    for name, s in torch.load(tmp_path / "small.pt").items():
        assert torch.equal(s, names["other"].get_parameter(name))
    assert 16_000 < (tmp_path / "small.pt").stat().st_size < 18_500
    exported = names["program"].module()(torch.ones(3, 3, 64, 64))
    torch.testing.assert_close(exported, names["network"](torch.ones(3, 3, 64, 64)), atol=1e-5, rtol=1e-5)


def test_the_engine_needs_torch_and_nothing_heavy_beside_it():
    heavy = ("hydra", "omegaconf", "pytorch_lightning", "timm", "torchvision", "matplotlib", "peft")
    code = f"import sys, svf_lightning.svf; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_the_readmes_file_map_is_the_tree():
    text = (ROOT / "README.md").read_text()
    lines = re.search(r"## The files\n\n(.*?)\n\n", text, re.DOTALL)[1].splitlines()
    paths = [re.match(r"    ( *)(\S+)", line).groups() for line in lines]
    listed = {("svf_lightning/" if indent else "") + name.rstrip("/") for indent, name in paths}
    package = {
        f"svf_lightning/{path.name}"
        for path in (ROOT / "svf_lightning").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    folders -= {"runs", "datasets", "weights", "build", "dist"}  # git knows nothing of these
    folders -= {path.name for path in ROOT.glob("*.egg-info")}
    assert listed == package | folders | {"train.py", "evaluate.py"}


def test_no_file_but_a_published_method_is_longer_than_400_lines():
    package = ROOT / "svf_lightning"
    lengths = {
        path.relative_to(package).as_posix(): len(path.read_text().splitlines())
        for path in package.rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > 400 and not name.startswith("models/")} == {}
