"""Any timm network that can be cut into stages, as a five-stage backbone.

Source: huggingface/pytorch-image-models (Apache-2.0). What timm calls ``features_only`` is followed:
the features are the same tensors, but the network is held as five modules one after the other, which
is what a mask before ``layer4`` and a fine-tune strategy "layers 2 to 4" need.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.weights import load_exactly, read_state_dict


def timm_features(
    name: str,
    weights: str | Path | None = None,
    output_stride: int | None = None,
    scale: Sequence[float] = (1.0,) * 5,
    **options: Any,
) -> Backbone:
    """Build a five-stage backbone from a timm network.

    How the stages are cut depends on what timm returns as features:

    - five (ResNet, RegNet, DenseNet, EfficientNet, MobileNet, ...): one stage each;
    - four (ConvNeXt, Swin, PVT, ...): ``layer0`` is the stem before the first, usually of stride 4, or
      nothing (the image itself) where the stem's output is no ``(N, C, h, w)`` map, as in PVT;
    - six or more: the last five, ``layer0`` taking all that comes before;
    - a plain vision transformer (ViT, DeiT, DINO): ``layer0`` is the patch embedding, ``layer1`` to
      ``layer4`` a quarter of the blocks each, all maps have the stride of a patch, and the final
      norm is left out as timm does. Images of any size are padded to whole patches.

    Args:
        name: A name from ``timm.list_models()``, with or without the tag of its weights.
        weights: "timm" to download, a file in timm's names for the whole network, or None for
            random weights.
        output_stride: Largest stride of the features, for networks in which timm can dilate; None
            leaves the network as it is.
        scale: What the five returned features are divided by. Networks whose stages end without
            norm or activation (ConvNeXt, EfficientNet, ViT) have large features.
        options: Further keywords of ``timm.create_model``, for instance ``img_size=473`` for Swin. Those that
            name weights or where to fetch them are refused: timm may read such files as pickles.

    Raises:
        FileNotFoundError: If the file is missing or the download fails.
        ValueError: If timm has no such network, it takes no such option, it cannot be cut into
            stages, or the file does not fit it exactly.
    """
    import timm

    if taken := [key for key in options if key.startswith("pretrained") or key == "checkpoint_path"]:
        raise ValueError(
            f"timm_features takes weights from weights=, not from {taken[0]}=; set weights to the file"
        )
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no network {name!r}; timm.list_models() lists them")
    transformer = timm.models.is_model_in_modules(name, ("vision_transformer", "deit"))
    if transformer:
        options = {"dynamic_img_size": True, "dynamic_img_pad": True, "num_classes": 0} | options
    else:
        options = {"features_only": True} | options
    if output_stride is not None:
        options["output_stride"] = output_stride
    net = _create(name, weights, options)
    mean, std = net.default_cfg["mean"], net.default_cfg["std"]
    if transformer:
        patch = net.patch_embed.patch_size[0]
        channels, strides = [net.embed_dim] * 5, [patch] * 5
        return Backbone(_transformer_stages(net), channels, strides, mean, std, scale)
    stages = _cut(name, net)
    channels, strides = net.feature_info.channels()[-5:], net.feature_info.reduction()[-5:]
    if len(channels) == 4:
        size = options.get("img_size", net.default_cfg["input_size"][1:])
        stem = _stem_output(stages[0], (size, size) if isinstance(size, int) else size)
        if stem is None:
            stages[:2] = nn.Identity(), nn.Sequential(*stages[:2])
            stem = (3, 1)
        channels, strides = [stem[0], *channels], [stem[1], *strides]
    return Backbone(stages, channels, strides, mean, std, scale)


def _create(name: str, weights: str | Path | None, options: dict[str, Any]) -> Any:
    import timm

    if weights is None or weights == "timm":
        source: dict[str, Any] = {"pretrained": weights == "timm"}
    else:
        state = read_state_dict(weights, f"the weights of {name} (huggingface.co/timm)")
        _try_whole_network(name, state, weights, options)
        source = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    try:
        return timm.create_model(name, **source, **options)
    except Exception as error:  # options fail in as many ways as there are networks, downloads likewise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if weights == "timm" and not isinstance(error, (TypeError, AssertionError, NotImplementedError)):
            raise FileNotFoundError(
                f"cannot download timm's weights of {name!r} ({reason}); "
                "fetch them from huggingface.co/timm and set weights to the file's path"
            ) from error
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"timm cannot build {name!r} with {given} ({reason}); change the options") from error


def _try_whole_network(
    name: str, state: dict[str, Tensor], source: str | Path, options: dict[str, Any]
) -> None:
    """Refuse a file that does not fit the network, of which timm would load what it can in silence."""
    whole = _create(name, None, {**options, "features_only": False, "num_classes": 0})
    classifier = whole.default_cfg["classifier"] or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    load_exactly(whole, {k: v for k, v in state.items() if not k.startswith(heads)}, source)


def _cut(name: str, net: nn.Module) -> list[nn.Module]:
    """Cut a features_only network after each of its last five returned modules."""
    from timm.models import FeatureListNet
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    if isinstance(net, FeatureListNet):
        modules = list(net.values())
        ends = [i + 1 for i, item in enumerate(net.keys()) if item in net.return_layers]
    elif isinstance(net, EfficientNetFeatures | MobileNetV3Features):
        stem = [module for item, module in net.named_children() if item != "blocks"]
        modules = [*stem, *net.blocks]
        # timm counts the stem as stage 0 and the blocks from 1
        ends = [len(stem) + stage for stage in net.feature_info.get("stage")]
    else:
        raise ValueError(
            f"timm's {name!r} cannot be cut into five stages (it gives features as {type(net).__name__}); "
            "choose a plain convolutional network (ResNet, ConvNeXt, EfficientNet, ...), Swin or ViT"
        )
    if len(ends) < 4:
        raise ValueError(f"timm's {name!r} gives {len(ends)} features; choose a network with four or more")
    if len(ends) == 4:
        ends = [ends[0] - 1, *ends]  # all before the module that makes the first feature is stem
    ends = ends[-5:]
    stages: list[nn.Module] = [nn.Sequential(*modules[a:b]) for a, b in pairwise([0, *ends])]
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        stages = [_ChannelsFirst(stage, first=i == 0) for i, stage in enumerate(stages)]
    return stages


def _stem_output(stem: nn.Module, size: Sequence[int]) -> tuple[int, int] | None:
    """Channels and stride of what a stem makes of a blank image; None if that is not a map."""
    with torch.no_grad():
        feature = stem.eval()(torch.zeros(1, 3, *size))  # eval: BatchNorm must not learn from a blank image
    if feature.ndim != 4 or size[0] * feature.shape[3] != size[1] * feature.shape[2]:
        return None
    return feature.shape[1], round(size[0] / feature.shape[2])


class _ChannelsFirst(nn.Module):
    """A stage that computes on ``(N, h, w, C)``, as in Swin, seen from outside as ``(N, C, h, w)``."""

    def __init__(self, stage: nn.Module, first: bool) -> None:
        super().__init__()
        self.stage = stage
        self.first = first  # the first stage gets the image, which has channels first anyway

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(x if self.first else x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


def _transformer_stages(net: Any) -> list[nn.Module]:
    blocks, net.blocks = list(net.blocks), nn.Identity()
    for unused in ("norm", "fc_norm", "head", "head_dist", "attn_pool"):
        setattr(net, unused, None)
    ends = [round(len(blocks) * quarter / 4) for quarter in range(5)]
    return [_PatchEmbedding(net), *(_Blocks(blocks[a:b]) for a, b in pairwise(ends))]


class _PatchEmbedding(nn.Module):
    """All that a vision transformer does before its blocks.

    Returns the map ``(N, C, h, w)`` and the prefix tokens (class, distillation, registers)
    ``(N, T, C)``, which belong to no position and travel beside it.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net.patch_embed(images)  # (N, h, w, C)
        height, width = x.shape[1:3]
        tokens = self.net.norm_pre(self.net.patch_drop(self.net._pos_embed(x)))  # (N, T + h * w, C)
        return _as_map(tokens, height, width)


class _Blocks(nn.Sequential):
    """Some transformer blocks in a row, on a map and its prefix tokens."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__(*blocks)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, prefix = state
        tokens = torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1)  # (N, T + h * w, C)
        return _as_map(super().forward(tokens), *x.shape[2:])


def _as_map(tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Split ``(N, T + h * w, C)`` into the map ``(N, C, h, w)`` and the prefix ``(N, T, C)``."""
    prefix, patches = tokens.tensor_split([tokens.shape[1] - height * width], dim=1)
    return patches.transpose(1, 2).unflatten(2, (height, width)), prefix
