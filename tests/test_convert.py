"""An official checkpoint becomes a run folder that predicts what the checkpoint predicts."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from svf_lightning import runs
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.checkpoints import from_official
from svf_lightning.cli import app
from svf_lightning.episode import Episode
from svf_lightning.models.bam import BAM
from svf_lightning.models.baseline import Baseline
from svf_lightning.models.pspnet import PSPNet
from tests.made_voc import make_voc


def episode():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 2, 3, 33, 33, generator=generator)
    mask = torch.randint(0, 2, (1, 2, 33, 33), generator=generator)
    return Episode(image[:, 0], mask[:, 0], image[:, 1:], mask[:, 1:], torch.ones(1, dtype=torch.long))


def baseline_state():
    torch.manual_seed(0)
    state = Baseline(vgg16(weights=None)).state_dict()
    return {key.removeprefix("backbone."): value for key, value in state.items()}


def bam_state():
    """Of the SVF authors with SVF: layer0 to layer4 factored, and as they were in layer0p to layer4p."""
    torch.manual_seed(0)
    pspnet = PSPNet(vgg16(weights=None), 15, train_batch_norm=False)
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    state = BAM(pspnet.backbone, base_learner=learner, base_classes=range(1, 16)).state_dict()
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    for key, weight in list(state.items()):
        stage, _, rest = key.partition(".")
        if not stage.startswith("layer") or stage.endswith("base"):
            continue
        state[f"{stage}p.{rest}"] = weight
        if weight.ndim == 4:
            name = key.removesuffix(".weight")
            del state[key]
            u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            rank = len(s) // 4 * 4  # the stem's 27 becomes 24, as officially
            state[f"{name}.conv_U.weight"] = u[:, :rank, None, None]
            state[f"{name}.vector_S"] = s[:rank].view(1, -1, 1, 1)
            state[f"{name}.conv_V.weight"] = vh[:rank].unflatten(1, weight.shape[1:])
            state[f"{name}.conv_U.bias"] = state.pop(f"{name}.bias")
    return state


def svf(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize(("method", "state"), [("baseline", baseline_state), ("svf_bam", bam_state)])
def test_a_converted_run_predicts_what_the_checkpoint_predicts_and_can_be_evaluated(method, state, tmp_path):
    make_voc(tmp_path / "VOC2012", images=20)
    file, out = tmp_path / "official.pth", tmp_path / "run"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state().items()}}, file)
    small = [f"data_dir={tmp_path}", "++data.source.min_pixels=10", "data.image_size=33", "trainer=cpu"]
    done = svf(method, file, out, *small, "--backbone", "vgg16", "--fold", 1)
    assert done.exit_code == 0, done.output

    config, segmenter = runs.load_run(out)
    assert (config["fold"], config["shot"], config["names"]["model"]) == (1, 1, method.removeprefix("svf_"))
    official = from_official(method, state(), backbone="vgg16")
    with torch.no_grad():
        ours, theirs = segmenter(episode()).logits, official(episode()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    assert 0 <= runs.evaluate(out, episodes=2) <= 1
    assert (out / "evaluation.json").is_file()

    assert svf(method, file, out, *small, "--backbone", "vgg16").exit_code == 1  # the folder is taken


def test_what_cannot_be_converted_is_named(tmp_path):
    for arguments, message in [
        (("unet", "x.pth"), "method must be one of baseline"),
        (("baseline", tmp_path / "x.pth"), "x.pth"),
    ]:
        done = svf(*arguments, tmp_path / "run")
        assert done.exit_code == 1
        assert message in done.output
