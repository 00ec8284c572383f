"""The base learner's stage: its images, its file, and BAM taking it over."""

import numpy as np
import pytest
import torch

from svf_lightning.backbones.backbone import dilations
from svf_lightning.backbones.resnet import resnet50
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.data.base_images import BaseImages
from svf_lightning.data.emoji import Emoji
from svf_lightning.data.pascal import Pascal
from svf_lightning.data.source import ImageIndex
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.runs.run import load_run
from svf_lightning.training.base_learner import bam, load_base, save_base
from svf_lightning.training.checkpoints import load_checkpoint

PASCAL = Pascal("nowhere")  # its classes need no files


def test_base_classes_are_numbered_in_order_and_novel_ones_are_background():
    label = torch.tensor([[0, 1, 2, 3, 4, 255]], dtype=torch.uint8)
    index = ImageIndex(
        "made", ("a", "b", "c", "d"), ("x",), np.zeros((1, 5)), lambda i: (torch.zeros(3, 1, 6), label)
    )
    images = BaseImages(index, (2, 4), lambda image, mask, generator: (image, mask), seed=0)
    assert images[0][1].tolist() == [[0, 0, 1, 0, 2, 255]]
    assert len(images) == 1  # however little it shows


def test_an_image_is_augmented_anew_in_every_epoch_and_alike_in_every_run():
    index = ImageIndex(
        "made",
        ("a",),
        ("x",),
        np.zeros((1, 2)),
        lambda i: (torch.zeros(3, 1, 1), torch.zeros(1, 1, dtype=torch.uint8)),
    )
    images = BaseImages(
        index, (1,), lambda i, mask, generator: (torch.tensor(generator.random()), mask), seed=0
    )
    assert images[0, 0][0] == images[0, 0][0] == images[0][0]
    assert images[0, 0][0] != images[1, 0][0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base learner of PASCAL-5i, fold 0, with a VGG-16, and its file."""
    torch.manual_seed(0)
    model = PSPNet(vgg16(weights=None), classes=15)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    classes = list(PASCAL.classes(0)[0])
    save_base(path, model, {"data": "pascal", "fold": 0, "classes": classes, "backbone": "vgg16"})
    return path, model


def build(path, *, source=PASCAL, fold=0, name="vgg16", backbone=None, **options):
    backbone = backbone or vgg16(weights=None)
    return bam(backbone, source=source, fold=fold, base=path, backbone_name=name, channels=4, **options)


def test_bam_takes_over_backbone_base_learner_and_classes(saved):
    path, trained = saved
    model = build(path)
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        ours = model.eval().learner_base(model.backbone(images)[4])
        theirs = trained.eval().cls(trained.ppm(trained.backbone(images)[4]))
    torch.testing.assert_close(ours, theirs)
    assert model.base_classes.tolist() == list(range(6, 21))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 1}, r"was trained on fold 0.*novel classes of fold 1.*task=base fold=1.*force=true"),
        ({"source": Emoji("nowhere")}, "trained with data=pascal, this run has data=emoji"),
        ({"name": "resnet50"}, "trained with backbone=vgg16, this run has backbone=resnet50"),
    ],
)
def test_a_base_learner_of_something_else_is_refused_by_what_differs(saved, options, message):
    with pytest.raises(ValueError, match=message):
        build(saved[0], **options)


def test_a_base_learner_of_another_fold_is_taken_when_forced_and_keeps_its_classes(saved):
    assert build(saved[0], fold=1, force=True).base_classes.tolist() == list(range(6, 21))


def test_another_number_of_classes_is_refused(saved, tmp_path):
    header = {"data": "pascal", "fold": 0, "classes": [6, 7], "backbone": "vgg16"}
    save_base(tmp_path / "base.pth", PSPNet(vgg16(weights=None), classes=2), header)
    with pytest.raises(ValueError, match="knows 2 base classes, pascal has 15 to learn a fold"):
        build(tmp_path / "base.pth")


def test_the_two_dilation_schemes_of_a_resnet_are_told_apart():
    assert dilations(resnet50(dilation="uniform")).endswith("layer3: 2; layer4: 4")
    assert dilations(resnet50(dilation="torchvision")).endswith("layer3: 1, 2; layer4: 2, 4")


def original_file(folder, model):
    """What chunbolang/BAM saves: the backbone under two names, behind DistributedDataParallel."""
    state = model.state_dict()
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    twice = {f"encoder.{k.removeprefix('layer')}": v for k, v in backbone.items()}
    rest = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    folder.mkdir(parents=True)
    content = {"epoch": 9, "state_dict": {f"module.{k}": v for k, v in {**backbone, **twice, **rest}.items()}}
    torch.save({**content, "optimizer": {}}, folder / "best.pth")
    return folder / "best.pth"


def test_the_original_file_is_read_and_its_folder_says_its_fold(saved, tmp_path):
    path = original_file(tmp_path / "pascal" / "split0" / "vgg", saved[1])
    model = PSPNet(vgg16(weights=None), classes=15)
    assert load_base(model, path, source=PASCAL, fold=0) == tuple(range(6, 21))
    for key, value in saved[1].state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(ValueError, match="was trained on fold 0"):
        load_base(model, path, source=PASCAL, fold=2)


def test_the_original_file_in_a_folder_that_says_nothing_must_be_forced(saved, tmp_path):
    path = original_file(tmp_path / "somewhere", saved[1])
    model = PSPNet(vgg16(weights=None), classes=15)
    with pytest.raises(ValueError, match="an unknown fold"):
        load_base(model, path, source=PASCAL, fold=0)
    assert load_base(model, path, source=PASCAL, fold=0, force=True) == tuple(range(6, 21))


def test_a_damaged_or_missing_file_is_named(saved, tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(saved[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read"):
        build(broken)
    with pytest.raises(FileNotFoundError, match=r"no base learner at .*gone\.pth.*task=base"):
        build(tmp_path / "gone.pth")


TINY = [
    *("++data.source.train_images=60", "++data.source.val_images=30", "++data.source.image_size=64"),
    *("data.image_size=65", "data.batch_size=4", "data.episodes_per_epoch=8", "data.val_episodes=4"),
    *("data.test_episodes=6", "model.network.channels=8", "epochs=1", "logger=none"),
    *("base.image_size=65", "base.batch_size=8", "base.epochs=1"),
]


@pytest.mark.slow
def test_one_command_trains_both_stages_and_the_next_one_finds_the_base_learner(tmp_path, monkeypatch):
    from train import main

    def train(name, *overrides):
        folder = tmp_path / "runs" / name
        command = ["train.py", *TINY, f"data_dir={tmp_path}", f"hydra.run.dir={folder}", *overrides]
        monkeypatch.setattr("sys.argv", command)
        main()
        return folder

    train("svf", "model=bam", "test=false")
    base = tmp_path / "runs" / "emoji-bam_base-efficientnet_lite0-fold0-seed0" / "base.pth"
    written = base.stat().st_mtime_ns
    frozen = train("frozen", "model=bam", "finetune=frozen", "test=false")
    assert base.stat().st_mtime_ns == written

    stage1 = load_checkpoint(base)["state_dict"]
    base.unlink()  # a finished run needs it no more
    for folder in (tmp_path / "runs" / "svf", frozen):
        _, segmenter = load_run(folder)
        kept = getattr(segmenter.model, "base_backbone", segmenter.model.backbone).state_dict()
        assert all(torch.equal(value, stage1[f"backbone.{key}"]) for key, value in kept.items())

    alone = train("base", "task=base")
    again = load_checkpoint(alone / "base.pth")["state_dict"]
    assert all(torch.equal(value, stage1[key]) for key, value in again.items())
