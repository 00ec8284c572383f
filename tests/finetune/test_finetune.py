"""The strategies on the real backbones: which parameters train, and how many."""

from functools import partial

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

    monkeypatch.setattr("svf_lightning.svf.layer.decompose", decompose)


PLAIN50, PLAIN101 = partial(resnet50, stem="plain"), partial(resnet101, stem="plain")


@pytest.mark.parametrize(
    ("build", "values"),  # in layer0 to layer4
    [
        (resnet50, (219, 704, 1792, 5120, 5632)),
        (resnet101, (219, 704, 1792, 18_176, 5632)),
        (vgg16, (91, 256, 768, 1536, 1536)),
        (PLAIN50, (64, 640, 1792, 5120, 5632)),
        (PLAIN101, (64, 640, 1792, 18_176, 5632)),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_svf_trains_as_many_values_as_the_paper_counts(factors_of_zeros, build, values, first):
    with torch.device("meta"):
        backbone = build(weights=None)
    stages = [f"layer{number}" for number in range(first, 5)]
    for _ in range(2):
        svf.prepare(backbone, stages)
        assert trained(backbone) == sum(values[first:])


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
