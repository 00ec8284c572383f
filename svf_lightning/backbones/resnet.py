"""ResNet-50 and ResNet-101 with the deep stem of PSPNet or the plain stem of torchvision.

The two stems are two networks with two sets of weights. The numbers of PFENet, BAM and SVF come
from the deep stem (``resnet50_v2.pth``); HSNet's from torchvision's.

Source: He et al., CVPR 2016, in the variant that strides on the 3x3 convolution. The trunk is
torchvision's (BSD-3-Clause); the deep stem follows hszhao/semseg (MIT), as used by PFENet.
"""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone, kaiming_fan_out_
from svf_lightning.backbones.weights import download, load_exactly, read_state_dict

Stem = Literal["deep", "plain"]
Dilation = Literal["torchvision", "uniform", "none"]

STRIDES = {"torchvision": (4, 4, 8, 8, 8), "uniform": (4, 4, 8, 8, 8), "none": (4, 4, 8, 16, 32)}

# Where the items of a source network's stem stand in layer0.
STEM_POSITIONS = {
    "deep": {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7},
    "plain": {"conv1": 0, "bn1": 1},
}


def resnet50(
    weights: str | Path | None = None, stem: Stem = "deep", dilation: Dilation = "torchvision"
) -> Backbone:
    """Build a ResNet-50 whose features have 128 (plain stem: 64), 256, 512, 1024 and 2048 channels.

    Loading weights under the wrong ``dilation`` gives no error but other features: the parameters
    are the same in all three schemes. PFENet and BAM need "uniform", also in the SVF authors' BAM;
    the SVF authors' baseline and PFENet need "torchvision"; HSNet needs "none".

    Args:
        weights: A file (deep stem: ``resnet50_v2.pth``; plain stem: torchvision's), "torchvision"
            for a download of IMAGENET1K_V1 (plain stem only), or None for random weights.
        stem: "deep" is three 3x3 convolutions, "plain" one 7x7.
        dilation: Of the 3x3 convolutions. "torchvision": 1 then 2 in ``layer3``, 2 then 4 in
            ``layer4``, a stage's first block keeping the dilation of the stage before. "uniform":
            2 in all of ``layer3``, 4 in all of ``layer4``. Both have output stride 8. "none":
            output stride 32.

    Raises:
        FileNotFoundError: If the file is missing or the download fails.
        ValueError: If an option is unknown or the file does not fit the network exactly.
    """
    return _resnet(50, weights, stem, dilation)


def resnet101(
    weights: str | Path | None = None, stem: Stem = "deep", dilation: Dilation = "torchvision"
) -> Backbone:
    """Build a ResNet-101: :func:`resnet50` with 23 instead of 6 blocks in ``layer3``."""
    return _resnet(101, weights, stem, dilation)


def _resnet(depth: int, weights: str | Path | None, stem: Stem, dilation: Dilation) -> Backbone:
    from torchvision import models

    if stem not in STEM_POSITIONS:
        raise ValueError(f"stem is {stem!r}; choose one of {', '.join(STEM_POSITIONS)}")
    if dilation not in STRIDES:
        raise ValueError(f"dilation is {dilation!r}; choose one of {', '.join(STRIDES)}")
    build = {50: models.resnet50, 101: models.resnet101}[depth]
    dilate = dilation != "none"
    trunk = build(replace_stride_with_dilation=[False, dilate, dilate])
    if dilation == "uniform":
        for stage, step in ((trunk.layer3, 2), (trunk.layer4, 4)):
            for block in stage:
                block.conv2.dilation = block.conv2.padding = (step, step)
    layer0 = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
    if stem == "deep":
        layer0 = _deep_stem()
        first = trunk.layer1[0]  # it takes 128 channels now
        first.conv1 = nn.Conv2d(128, 64, 1, bias=False)
        first.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
        for replaced in (first.conv1, first.downsample):
            kaiming_fan_out_(replaced)
    backbone = Backbone(
        stages=(layer0, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4),
        channels=(128 if stem == "deep" else 64, 256, 512, 1024, 2048),
        strides=STRIDES[dilation],
    )
    if weights is not None:
        state = _torchvision_weights(depth, stem) if weights == "torchvision" else _read(weights, depth, stem)
        load_exactly(backbone, in_stages(state, stem), weights)
    return backbone


def _deep_stem() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 64, 2), (64, 64, 1), (64, 128, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    stem = nn.Sequential(*layers, nn.MaxPool2d(3, stride=2, padding=1))
    kaiming_fan_out_(stem)
    return stem


def _torchvision_weights(depth: int, stem: Stem) -> dict[str, Tensor]:
    from torchvision import models

    if stem == "deep":
        raise ValueError(
            "weights='torchvision' have a plain stem but stem is 'deep'; "
            f"set stem='plain' or give the path of resnet{depth}_v2.pth"
        )
    entry = {50: models.ResNet50_Weights, 101: models.ResNet101_Weights}[depth].IMAGENET1K_V1
    return download(lambda: entry.get_state_dict(check_hash=True, weights_only=True), entry.url)


def _read(path: str | Path, depth: int, stem: Stem) -> dict[str, Tensor]:
    fetch = {
        "deep": f"resnet{depth}_v2.pth (ImageNet, deep stem; published by github.com/hszhao/semseg)",
        "plain": f"torchvision's resnet{depth} IMAGENET1K_V1 (download.pytorch.org/models)",
    }
    state = read_state_dict(path, fetch[stem])
    found = "deep" if "conv3.weight" in state else "plain"
    if "conv1.weight" in state and found != stem:
        raise ValueError(
            f"{path} has a {found} stem but stem is {stem!r}; set stem={found!r} or fetch {fetch[stem]}"
        )
    return state


def in_stages(state: dict[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """Name a source network's entries as in :class:`Backbone`; the classifier ``fc`` is dropped.

    Args:
        state: In the names of the source network, torchvision's for the plain stem.
        stem: Its stem; says where the stem's entries stand in ``layer0``.
    """
    renamed = {}
    for key, tensor in state.items():
        module, _, rest = key.partition(".")
        if module in STEM_POSITIONS[stem]:
            renamed[f"layer0.{STEM_POSITIONS[stem][module]}.{rest}"] = tensor
        elif module != "fc":
            renamed[key] = tensor
    return renamed
