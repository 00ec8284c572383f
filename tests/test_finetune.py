"""The strategies on the real backbones: which parameters train, and how many."""

import pytest
import torch
from torch import nn

from svf_lightning.backbones.resnet import resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.finetune import frozen, full, svf


def trained(backbone):
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


@pytest.fixture
def factors_of_zeros(monkeypatch):
    """Factors of the right shape at no cost: decomposing a ResNet-101 takes a minute, counting does not."""

    def decompose(weight, groups=1):
        matrix = weight.to("meta").reshape(groups, weight.shape[0] // groups, -1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return tuple(torch.zeros(t.flatten(0, 1).shape) for t in (u, s, vh))

    monkeypatch.setattr(svf, "decompose", decompose)


@pytest.mark.parametrize(
    ("build", "stages", "count"),
    [
        (resnet50, ["layer2", "layer3", "layer4"], 12_544),
        (resnet50, ["layer3", "layer4"], 10_752),
        (resnet50, ["layer1", "layer2", "layer3", "layer4"], 13_248),
        (resnet50, ["layer0", "layer1", "layer2", "layer3", "layer4"], 13_467),
        (resnet101, ["layer2", "layer3", "layer4"], 25_600),
        (vgg16, ["layer2", "layer3", "layer4"], 3_840),
    ],
)
def test_svf_trains_as_many_values_as_the_paper_counts(factors_of_zeros, build, stages, count):
    backbone = build(weights=None, **({"stem": "deep"} if build is not vgg16 else {}))
    svf.prepare(backbone, stages)
    assert trained(backbone) == count
    svf.prepare(backbone, stages)
    assert trained(backbone) == count


@pytest.mark.slow
def test_a_factored_resnet50_computes_what_it_did_before():
    torch.manual_seed(0)
    backbone, images = resnet50(weights=None).eval(), torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        expected = backbone(images)
    svf.prepare(backbone)
    for got, want in zip(backbone(images), expected, strict=True):
        assert float(((got - want).norm() / want.norm()).detach()) < 1e-5


@pytest.mark.parametrize(
    ("stages", "batch_norm", "count"),
    [
        (["layer2", "layer3", "layer4"], False, 23_232_512),
        (["layer2", "layer3", "layer4"], True, 23_232_512 + 50_176),
    ],
)
def test_full_fine_tuning_trains_the_convolutions_and_batch_norm_on_request(stages, batch_norm, count):
    backbone = resnet50(weights=None)
    full.prepare(backbone, stages, batch_norm=batch_norm)
    assert trained(backbone) == count


def test_full_fine_tuning_starts_at_layer1_as_in_the_paper():
    backbone = resnet50(weights=None)
    full.prepare(backbone)
    parameters = list(backbone.layer0.parameters()), list(backbone.layer1.parameters())
    assert [any(p.requires_grad for p in stage) for stage in parameters] == [False, True]


def test_full_fine_tuning_refuses_a_stage_that_is_not_there_or_has_nothing_to_train():
    backbone = nn.ModuleDict({"layer4": nn.Conv2d(3, 4, 1), "relu": nn.ReLU()})
    with pytest.raises(ValueError, match="no 'layer5'; it has layer4, relu"):
        full.prepare(backbone, ["layer5"])
    with pytest.raises(ValueError, match="'relu' holds no convolution"):
        full.prepare(backbone, ["relu"])


def test_a_frozen_backbone_trains_nothing_whatever_came_before():
    backbone = nn.ModuleDict({"layer4": nn.Conv2d(3, 4, 1)})
    full.prepare(backbone, ["layer4"])
    frozen.prepare(backbone)
    assert trained(backbone) == 0
