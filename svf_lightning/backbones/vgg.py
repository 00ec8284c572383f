"""VGG-16 with and without BatchNorm, cut into stages after each pool.

Source: Simonyan and Zisserman, ICLR 2015, configuration D. As in PFENet, BAM and SVF the pools round
up (``ceil_mode``) and the last one is left out, so the output stride is 16; nothing is dilated. HSNet's
pools round down, as torchvision's.
"""

from pathlib import Path

from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone, kaiming_fan_out_
from svf_lightning.backbones.weights import download, load_exactly, read_state_dict

# Output channels of the 3x3 convolutions, stage by stage.
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(weights: str | Path | None = None, batch_norm: bool = True, ceil_mode: bool = True) -> Backbone:
    """Build a VGG-16 whose features have 64, 128, 256, 512 and 512 channels.

    Args:
        weights: A file with torchvision's names (``vgg16_bn.pth``; without BatchNorm
            ``vgg16-397923af.pth``), "torchvision" to download it, or None for random weights.
        batch_norm: Whether BatchNorm follows each convolution.
        ceil_mode: Whether pools round odd sizes up. False is torchvision's and HSNet's way.

    Raises:
        FileNotFoundError: If the file is missing or the download fails.
        ValueError: If the file does not fit the network exactly.
    """
    inputs, stages = 3, []
    for index, widths in enumerate(WIDTHS):
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            inputs = width
        if index < 4:
            layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=ceil_mode))
        stages.append(nn.Sequential(*layers))
    backbone = Backbone(stages, channels=(64, 128, 256, 512, 512), strides=(2, 4, 8, 16, 16))
    if weights is None:
        kaiming_fan_out_(backbone)
    else:
        state = _torchvision_weights(batch_norm) if weights == "torchvision" else _read(weights, batch_norm)
        load_exactly(backbone, in_stages(state), weights)
    return backbone


def _torchvision_weights(batch_norm: bool) -> dict[str, Tensor]:
    from torchvision import models

    entry = (models.VGG16_BN_Weights if batch_norm else models.VGG16_Weights).IMAGENET1K_V1
    return download(lambda: entry.get_state_dict(check_hash=True, weights_only=True), entry.url)


def _read(path: str | Path, batch_norm: bool) -> dict[str, Tensor]:
    file = "vgg16_bn-6c64b313.pth" if batch_norm else "vgg16-397923af.pth"
    state = read_state_dict(path, f"{file} (torchvision; download.pytorch.org/models)")
    found = "features.1.running_mean" in state
    if "features.0.weight" in state and found != batch_norm:
        raise ValueError(
            f"{path} holds a VGG-16 {'with' if found else 'without'} BatchNorm "
            f"but batch_norm is {batch_norm}; set batch_norm={found} or fetch {file}"
        )
    return state


def in_stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name torchvision's entries as in :class:`Backbone`; the ``classifier`` is dropped.

    ``features.17.weight`` becomes ``layer3.0.weight`` without BatchNorm, ``layer2.3.weight`` with it.
    """
    per_convolution = 3 if "features.1.running_mean" in state else 2  # BatchNorm, ReLU
    sizes = [per_convolution * len(widths) + 1 for widths in WIDTHS]  # and a pool
    places = [f"layer{i}.{j}" for i, size in enumerate(sizes) for j in range(size)]
    renamed = {}
    for key, tensor in state.items():
        module, _, rest = key.partition(".")
        position, _, entry = rest.partition(".")
        if module == "features" and position.isdecimal() and int(position) < len(places):
            renamed[f"{places[int(position)]}.{entry}"] = tensor
        elif module != "classifier":
            renamed[key] = tensor
    return renamed
