"""The pages in docs/ say what runs."""

import re
import subprocess
import sys
from pathlib import Path

import torch

DOCS = Path(__file__).parent.parent / "docs"


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
