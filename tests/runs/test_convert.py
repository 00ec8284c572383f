"""An official checkpoint becomes a run folder that predicts what the checkpoint predicts."""

import re
import shutil

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from svf_lightning.backbones.resnet import resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.cli import app
from svf_lightning.episode import Episode
from svf_lightning.models.bam import BAM
from svf_lightning.models.baseline import Baseline
from svf_lightning.models.cyctr import CyCTR
from svf_lightning.models.hsnet import HSNet
from svf_lightning.models.pfenet import PFENet
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.runs.evaluation import evaluate
from svf_lightning.runs.official import from_official
from svf_lightning.runs.run import load_run
from tests.made_voc import make_voc


def episode(shot=1):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, shot + 1, 3, 33, 33, generator=generator)
    mask = torch.randint(0, 2, (1, shot + 1, 33, 33), generator=generator)
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


@pytest.mark.parametrize(
    ("method", "state"),
    [("baseline", baseline_state), pytest.param("svf_bam", bam_state, marks=pytest.mark.slow)],
)
def test_a_converted_run_predicts_what_the_checkpoint_predicts_and_can_be_evaluated(method, state, tmp_path):
    make_voc(tmp_path / "VOC2012", images=20)
    file, out = tmp_path / "official.pth", tmp_path / "run"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state().items()}}, file)
    small = [f"data_dir={tmp_path}", "++data.source.min_pixels=10", "data.image_size=33", "trainer=cpu"]
    done = svf(method, file, out, *small, "--backbone", "vgg16", "--fold", 1)
    assert done.exit_code == 0, done.output

    config, segmenter = load_run(out)
    assert (config["fold"], config["shot"], config["names"]["model"]) == (1, 1, method.removeprefix("svf_"))
    official = from_official(method, state(), backbone="vgg16")
    with torch.no_grad():
        ours, theirs = segmenter(episode()).logits, official(episode()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    assert 0 <= evaluate(out, episodes=2) <= 1
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


def inside_out(state):
    """A state dict of ours with the backbone's stages beside the head, as official ones have them."""
    return {key.removeprefix("backbone."): value for key, value in state.items()}


def original_bam(backbone, shot):
    pspnet = PSPNet(backbone, 15, train_batch_norm=False)
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    return BAM(pspnet.backbone, shot, base_learner=learner, base_classes=range(1, 16))


def torchvision_names(key):
    """``layer0.3.weight`` of a stage as torchvision or CyCTR name it."""
    for place, layer in (
        ("0", "conv1"),
        ("1", "bn1"),
        ("3", "conv2"),
        ("4", "bn2"),
        ("6", "conv3"),
        ("7", "bn3"),
    ):
        key = key.replace(f"layer0.{place}.", f"{layer}.")
    return key


def official_state(method, backbone, shot=1):
    """What the official code of a method saves, with random weights."""
    torch.manual_seed(0)
    if method == "hsnet":
        networks = {
            "resnet50": lambda: resnet50(stem="plain", dilation="none"),
            "resnet101": lambda: resnet101(stem="plain", dilation="none"),
            "vgg16": lambda: vgg16(batch_norm=False, ceil_mode=False),
        }
        model = HSNet(networks[backbone]())
        starts = (0, 5, 10, 17, 24)  # of VGG's stages in torchvision's one sequence
        renamed = {}
        for key, value in model.state_dict().items():
            if backbone == "vgg16" and key.startswith("backbone."):
                _, stage, place, entry = key.split(".")
                key = f"backbone.features.{starts[int(stage[-1])] + int(place)}.{entry}"
            renamed[torchvision_names(key)] = value
        classifier = {"backbone.classifier.6.bias": torch.zeros(1000), "backbone.fc.bias": torch.zeros(1000)}
        unused = ("classifier" if backbone == "vgg16" else "fc",)
        return renamed | {key: value for key, value in classifier.items() if unused[0] in key}
    network = {"resnet50": resnet50, "resnet101": resnet101, "vgg16": vgg16}[backbone](weights=None)
    if method == "cyctr":
        state = CyCTR(network).state_dict()
        return {
            torchvision_names(key).replace("backbone.", "backbone.body."): value
            for key, value in state.items()
            if not key.endswith("num_batches_tracked")
        } | {"addtional_proj.0.weight": torch.zeros(256, 256, 1, 1)}
    if method in ("bam", "svf_bam"):
        state = inside_out(original_bam(network, shot).state_dict())
        stages = {key: value for key, value in state.items() if re.match(r"layer\d\.", key)}
        if method == "svf_bam":  # without SVF it saves its one backbone twice
            state |= {f"{key[:6]}p{key[6:]}": value for key, value in stages.items()}
        return state
    if method == "baseline":
        state = inside_out(Baseline(network, shot).state_dict())
        unused = nn.Sequential(nn.Conv2d(shot, 2, 1), nn.ReLU(), nn.Conv2d(2, shot, 1)).state_dict()
        return state | ({f"kshot_rw.{key}": value for key, value in unused.items()} if shot > 1 else {})
    return inside_out(PFENet(network).state_dict())


OFFICIAL = ("baseline", "pfenet", "svf_pfenet", "bam", "svf_bam", "cyctr", "hsnet")


def round_trip(method, backbone, folder, shot=1):
    """Convert, rebuild, compare with the import, and take a training step."""
    state = official_state(method, backbone, shot)
    file, out = folder / "official.pth", folder / "run"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    done = svf(method, file, out, "--backbone", backbone, "--shot", shot)
    assert done.exit_code == 0, done.output
    file.unlink()
    _, segmenter = load_run(out)
    official = from_official(method, state, backbone=backbone, shot=shot)
    task = episode(shot)
    with torch.no_grad():
        torch.testing.assert_close(segmenter(task).logits, official(task).logits, atol=1e-5, rtol=1e-5)
    trained = {n: p.clone() for n, p in segmenter.model.named_parameters() if p.requires_grad}
    assert trained
    segmenter.train()
    loss = segmenter.loss(segmenter.model(task), task)
    loss.backward()
    torch.optim.SGD(segmenter.parameters(), lr=0.1).step()
    assert loss.isfinite()
    moved = [
        n for n, p in segmenter.model.named_parameters() if n in trained and not torch.equal(p, trained[n])
    ]
    assert len(moved) > len(trained) / 2
    shutil.rmtree(out)


@pytest.mark.parametrize(("method", "shot"), [("baseline", 5), ("bam", 5), ("pfenet", 1), ("hsnet", 1)])
def test_vgg_checkpoints_make_the_round_trip_and_train_on(method, shot, tmp_path):
    round_trip(method, "vgg16", tmp_path, shot)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
@pytest.mark.parametrize("method", OFFICIAL)
def test_resnet_checkpoints_make_the_round_trip_and_train_on(method, backbone, tmp_path):
    round_trip(method, backbone, tmp_path)


@pytest.mark.parametrize("wrong", [("baseline", "pfenet"), ("pfenet", "baseline"), ("bam", "baseline"),
                                   ("baseline", "svf_bam"), ("hsnet", "pfenet")])  # fmt: skip
def test_a_checkpoint_of_another_method_is_refused_and_the_right_one_named(wrong):
    what, taken_for = wrong
    with pytest.raises(ValueError, match=rf"import it as method '{what}'"):
        from_official(taken_for, official_state(what, "vgg16"), backbone="vgg16")


@pytest.mark.parametrize(("trained", "used"), [(5, 1), (1, 5)])
def test_a_baseline_of_another_number_of_shots_is_refused(trained, used):
    state = official_state("baseline", "vgg16", trained)
    message = rf"trained for {trained} shot\(s\).*but shot={used}; import it with shot={trained}"
    with pytest.raises(ValueError, match=message):
        from_official("baseline", state, backbone="vgg16", shot=used)


def test_the_one_layer_that_weighs_shots_cannot_be_imported_and_says_so():
    state = official_state("bam", "vgg16") | {"kshot_rw.weight": torch.zeros(5, 5, 1, 1)}
    with pytest.raises(ValueError, match="kshot_trans_dim=0"):
        from_official("bam", state, backbone="vgg16", shot=5)


@pytest.mark.parametrize("method", ["baseline", "hsnet"])
def test_a_checkpoint_of_another_backbone_is_refused_and_the_right_one_named(method):
    with pytest.raises(ValueError, match="import it with backbone='vgg16'"):
        from_official(method, official_state(method, "vgg16"), backbone="resnet50")
    small = {key: value for key, value in official_state(method, "resnet50").items() if "layer4" not in key}
    with pytest.raises(ValueError, match="import it with backbone='resnet50'"):
        from_official(method, small, backbone="vgg16")
