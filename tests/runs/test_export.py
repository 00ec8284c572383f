"""What leaves a run predicts what the run predicts: merged weights, kilobyte files, ONNX models."""

import json
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from svf_lightning.cli import app
from svf_lightning.episode import Episode
from svf_lightning.finetune import channel_scale, lora, rotation, svf
from svf_lightning.runs import export
from svf_lightning.runs.evaluation import evaluate
from svf_lightning.runs.run import load_run
from svf_lightning.svf.layer import SVFLayer


@pytest.fixture(scope="module")
def run(tmp_path_factory, emoji_folder):
    """A finished tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.conftest import TINY
        from train import main

        folder = tmp_path_factory.mktemp("runs") / "svf"
        patch.setattr("sys.argv", ["train.py", *TINY, f"data_dir={emoji_folder}", f"hydra.run.dir={folder}"])
        main()
    return folder


def episodes(count=2, size=65):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 2, 3, size, size, generator=generator)
    masks = torch.zeros(count, 2, size, size, dtype=torch.long)
    masks[:, :, 10:40, 20:50] = 1
    masks[:, :, 10, 20:50] = 255
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], torch.ones(count).long())


def logits(folder):
    with torch.no_grad():
        return load_run(folder)[1].model(episodes()).logits


def command(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_merged_run_has_plain_layers_and_predicts_the_same(run, tmp_path):
    said = command("merge", run, tmp_path / "merged")

    model = load_run(tmp_path / "merged")[1].model
    assert not any(isinstance(module, SVFLayer) for module in model.modules())
    factored = sum(isinstance(m, SVFLayer) for m in load_run(run)[1].model.modules())
    assert f"folded {factored} layers" in said
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(run), atol=1e-5, rtol=1e-5)


def test_a_kilobyte_file_with_the_head_restores_the_score_to_the_digit(run, tmp_path):
    file, restored = tmp_path / "run.safetensors", tmp_path / "restored"
    command("export", run, "--singular-values", file, "--with-head")
    command("restore", file, restored)

    scores = json.loads((run / "metrics.json").read_text())
    assert evaluate(restored) == scores["miou"]


@pytest.mark.slow  # half a minute, nearly all of it torch's export
def test_an_onnx_model_computes_the_logits_for_any_number_of_episodes(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said = command("export", run, "--onnx", tmp_path / "run.onnx")

    assert "agrees with PyTorch within" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "run.onnx"), providers=["CPUExecutionProvider"])
    expected, given = logits(run), episodes()
    for count in (1, 2):
        inputs = {
            "support_images": given.support_images[:count].numpy(),
            "support_masks": given.support_masks[:count].numpy(),
            "query": given.query_image[:count].numpy(),
        }
        got = torch.from_numpy(session.run(["logits"], inputs)[0])
        gap = (got - expected[:count]).abs().max() / expected.abs().max().clamp_min(1)
        assert gap <= 1e-4


def test_onnx_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'svf-lightning\[export\]'"):
        export.export_onnx(run, tmp_path / "run.onnx")


def test_a_folder_that_holds_a_run_is_not_written_over(run, tmp_path):
    before = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match="holds a run already; name another folder"):
        export.merge_run(run, run)
    assert (run / "config.yaml").read_text() == before


def test_a_kilobyte_file_without_the_head_makes_no_run(run, tmp_path):
    export.export_singular_values(run, tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"holds a backbone alone; export with --with-head"):
        export.restore_run(tmp_path / "run.safetensors", tmp_path / "restored")


def test_every_strategy_folds_into_plain_layers():
    pytest.importorskip("peft")
    for prepare in (svf.prepare, channel_scale.prepare, rotation.prepare, lora.prepare):
        torch.manual_seed(0)
        backbone = nn.ModuleDict(
            {"layer4": nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))}
        )
        prepare(backbone, ["layer4"])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in backbone.parameters():
                if value.requires_grad:
                    value.add_(0.3 * torch.randn(value.shape, generator=generator))
            x = torch.randn(2, 8, 7, 7)
            expected = backbone["layer4"](x)
            assert export.merge(backbone) == 2
            assert [type(m) for m in backbone["layer4"]] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
            torch.testing.assert_close(backbone["layer4"](x), expected, atol=1e-5, rtol=1e-5)
